"""What an average that takes a value every ten steps costs, beside no average.

    python benchmarks/interval.py

Momentum and `ema(every(10, 0.99))`, one jitted step that donates what it carries, and other ways to
the same numbers: a conditional around the whole shadow, given the new parameters or, as
`optax.conditionally_transform` does, making them inside; one around every leaf; a loop of no or one
turns; and `moving_average` with the decay of ten steps, called by the training loop after every
tenth step. The table has the time of a step that takes no value, of one that does, and the mean of
ten, each divided by that of momentum alone next to it, and the arrays that the compiled step
copies. Writes results/interval.json and interval.md.
"""

import argparse
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import trees
from jax import lax
from timing import Step, handing, publish, relative_times, scaling, table
from tqdm import tqdm

import emaopt


N, DECAY = 10, 0.99
MEAN = emaopt.moving_average(emaopt.every(N, DECAY))
MEAN_OF_TEN = emaopt.moving_average(DECAY**N)
OPTIMIZER = emaopt.momentum(1e-3, 0.9)
TREES = {
    "8 x 4.2 million": {f"w{i}": (2**22,) for i in range(8)},
    "ResNet-50": trees.RESNET50,
    "1,000 x 200": {f"w{i:03}": (200,) for i in range(1000)},
}


def takes(step):
    return (step + 1) % N == 0


def idle(state):
    return state._replace(step=state.step + 1)


def around_all(values, state):
    return lax.cond(takes(state.step), MEAN.update, lambda _, state: idle(state), values, state)


def around_each(values, state):
    def leaf(old, new):
        return lax.cond(
            takes(state.step),
            lambda old, new: old - (old - new) * rate,
            lambda old, _: old,
            old,
            new,
        )

    rate = np.float32(1 - DECAY**N)
    return idle(state)._replace(shadow=jax.tree.map(leaf, state.shadow, values))


def loop(values, state):
    turn = lambda _, state: MEAN_OF_TEN.update(values, state)._replace(step=state.step)
    return idle(lax.fori_loop(0, takes(state.step).astype(jnp.int32), turn, state))


class FromTheLoop:
    """A step without average, and one of the average after every tenth."""

    def __init__(self, params, grads):
        self.step = Step(by_hand(None), params, OPTIMIZER.init(params), (), inputs=(grads,))
        update = lambda state, params: (MEAN_OF_TEN.update(params, state),)
        self.average = Step(update, MEAN_OF_TEN.init(params), inputs=(params,))
        self.calls = 0

    def __call__(self):
        """One step."""
        self.calls += 1
        params, *_ = self.step()
        if self.calls % N == 0:
            self.average.inputs = (params,)
            return self.average()
        return params


def by_hand(average: Callable | None):
    """Momentum, then the average of the new parameters."""

    def step(params, slots, state, grads):
        updates, slots = OPTIMIZER.update(grads, slots, params)
        params = optax.apply_updates(params, updates)
        return params, slots, average(params, state) if average else state

    return step


def chained(tx):
    """The average as the last link of a chain."""

    def step(params, opt_state, _, grads):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, ()

    return step


def copies(call) -> int:
    """The arrays of numbers that the compiled step copies."""
    if isinstance(call, FromTheLoop):
        return copies(call.step) + copies(call.average)
    return len(re.findall(r"f32\[\d[^=]* copy\(", call.compiled.as_text()))


def variants(params) -> dict[str, Callable]:
    grads = jax.tree.map(lambda p: p * 1e-3, params)
    optional = optax.conditionally_transform(emaopt.ema(DECAY**N), takes)
    chains = {
        "`ema(0.99)`, every step": emaopt.ema(DECAY),
        "`ema(every(10, 0.99))`": emaopt.ema(emaopt.every(N, DECAY)),
        "`optax.conditionally_transform`": optional,
    }
    found = {"none": Step(by_hand(None), params, OPTIMIZER.init(params), (), inputs=(grads,))}
    for name, average in chains.items():
        tx = optax.chain(OPTIMIZER, average)
        found[name] = Step(chained(tx), params, tx.init(params), (), inputs=(grads,))
    for name, average in {
        "`lax.cond` around the shadow": around_all,
        "`lax.cond` around every leaf": around_each,
        "`lax.fori_loop`, no or one turn": loop,
    }.items():
        carry = params, OPTIMIZER.init(params), MEAN.init(params)
        found[name] = Step(by_hand(average), *carry, inputs=(grads,))
    return found | {"`moving_average`, called every tenth step": FromTheLoop(params, grads)}


def measure(shapes: dict, rounds: int) -> dict[str, dict[str, float]]:
    params = trees.full(shapes)
    calls = variants(params)
    small = sum(x.size for x in params.values()) < 2**20
    times = relative_times(calls, N * rounds, handing(params) if small else scaling(128))
    taking = takes(1 + np.arange(N * rounds))  # after one call to warm up
    found = {}
    for name, each in times.items():
        ratios = each / times["none"]
        between, at = float(np.median(ratios[~taking])), float(np.median(ratios[taking]))
        mean = (at + (N - 1) * between) / N
        found[name] = {"idle": between, "taking": at, "mean": mean, "copies": copies(calls[name])}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="of ten steps")
    rounds = parser.parse_args().rounds
    found = {
        name: measure(shapes, rounds)
        for name, shapes in tqdm(TREES.items(), leave=False, disable=None)
    }
    lines = [
        f"`python benchmarks/interval.py`: time of a step / of momentum alone; jax "
        f"{jax.__version__}, {jax.default_backend()}, {rounds} rounds of ten steps.",
    ]
    for name, rows in found.items():
        head = [name, "takes nothing", "takes a value", "mean of ten", "arrays copied"]
        cells = (
            [form, *(f"{row[x]:.2f}" for x in ("idle", "taking", "mean")), row["copies"]]
            for form, row in rows.items()
            if form != "none"
        )
        lines += ["", *table(head, cells)]
    publish("interval", "An average every ten steps", lines, {"rounds": rounds, "steps": found})


if __name__ == "__main__":
    main()
