"""What several averages cost in one training step, against so many times one.

    python benchmarks/several.py               # 8 million parameters
    python benchmarks/several.py --millions 32

One jitted step of Adam and k averages, each with its own decay, parameters and state donated.
Every round takes a step of each variant, in turn, in one process; the table has the least time of
each beside that of Adam alone, and the bytes that the compiled step accesses by XLA's count. "k
times one" is what the first average adds, k times. "Fed back" overwrites the parameters by the
average every ten updates. The second table is an evaluation of all averages at once, `jax.vmap`
over `emaopt.stacked`, against one after the other. Writes `benchmarks/several.md`.
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import emaopt


HERE = Path(__file__).parent
DECAYS = [0.999, emaopt.half_life(500), emaopt.warmup(0.9999), emaopt.power(6.94)]
LAYERS = 8


def parameters(millions: float):
    """Eight square layers."""
    width = round((millions * 1e6 / LAYERS) ** 0.5)
    keys = jax.random.split(jax.random.key(0), LAYERS)
    return {f"layer{i}": jax.random.normal(k, (width, width)) for i, k in enumerate(keys)}


def transformation(k: int, fed_back: bool = False) -> optax.GradientTransformation:
    averages = [(f"average{i}", emaopt.ema(decay)) for i, decay in enumerate(DECAYS[:k])]
    if fed_back:
        averages = [(name, emaopt.overwrite(10, average)) for name, average in averages]
    return optax.named_chain(("adam", emaopt.adam()), *averages)


class Training:
    """A donated step, compiled ahead, and what it carries."""

    def __init__(self, tx: optax.GradientTransformation, millions: float):

        def step(params, opt_state):
            grads = params
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        params = parameters(millions)
        self.carry = params, tx.init(params)
        self.step = jax.jit(step, donate_argnums=(0, 1)).lower(*self.carry).compile()
        self.bytes = self.step.cost_analysis()["bytes accessed"]

    def __call__(self):
        """One step."""
        self.carry = self.step(*self.carry)
        return self.carry


def least_seconds(calls: dict, rounds: int) -> dict:
    """The least time of each call, in turn, after one to warm up."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: min(times[1:]) for name, times in seconds.items()}


def training_rows(millions: float, rounds: int):
    variants = {
        "Adam": (0, transformation(0)),
        "Adam, 1 average": (1, transformation(1)),
        "Adam, 2 averages": (2, transformation(2)),
        "Adam, 4 averages": (4, transformation(4)),
        "Adam, 1 average, fed back": (1, transformation(1, fed_back=True)),
    }
    trainings = {name: Training(tx, millions) for name, (_, tx) in variants.items()}
    seconds = least_seconds(trainings, rounds)
    volumes = {name: training.bytes for name, training in trainings.items()}
    adam, one = list(variants)[:2]

    def ratios(found, name):
        k = variants[name][0]
        added = (found[name] - found[adam]) / (k * (found[one] - found[adam])) if k else 0
        return f"{found[name] / found[adam]:.2f}", f"{added:.2f}" if k else ""

    for name in variants:
        gigabytes = f"{volumes[name] / 1e9:.3f}"
        yield name, *ratios(seconds, name), gigabytes, *ratios(volumes, name)


def evaluation(width: int) -> dict:
    """Two ways to evaluate four averages of a network."""
    params = {f"layer{i}": jnp.eye(width) for i in range(LAYERS)}
    opt_state = transformation(4).init(params)
    images = jnp.ones((64, width))

    def evaluate(params):
        return jnp.mean(functools.reduce(lambda x, w: jnp.tanh(x @ w), params.values(), images))

    each = [
        jax.jit(lambda p, s, name=name: evaluate(emaopt.average(p, s, name)))
        for name in emaopt.averages(opt_state)
    ]
    together = jax.jit(lambda p, s: jax.vmap(evaluate)(emaopt.stacked(p, s)))
    return {
        "each": lambda: [one(params, opt_state) for one in each],
        "together": lambda: together(params, opt_state),
    }


def evaluation_rows(rounds: int):
    for width in (64, 512):
        seconds = least_seconds(evaluation(width), 10 * rounds)
        yield f"{LAYERS} layers of width {width}", f"{seconds['together'] / seconds['each']:.2f}"


def table(head, rows):
    lines = [head, "|---" * len(head) + "|", *rows]
    return [x if isinstance(x, str) else "| " + " | ".join(x) + " |" for x in lines]


def main():
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--millions", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    head = [
        "",
        "time / Adam's",
        "added / k times one",
        "GB accessed",
        "/ Adam's",
        "added / k times one",
    ]
    title = (
        f"Several averages in one step, {options.millions:g} million float32 parameters, jax "
        f"{jax.__version__}, {jax.default_backend()}; the least of {options.rounds} interleaved "
        "rounds; made by `python benchmarks/several.py`."
    )
    lines = [
        title,
        "",
        *table(head, training_rows(options.millions, options.rounds)),
        "",
        "Evaluating four averages:",
        "",
        *table(["", "all at once / one after the other"], evaluation_rows(options.rounds)),
    ]
    text = "\n".join([*lines, ""])
    print(text, end="")
    (HERE / "several.md").write_text(text)


if __name__ == "__main__":
    main()
