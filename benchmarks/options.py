"""What each option of an average costs, in time and memory, beside the plain average.

    python benchmarks/options.py
    python benchmarks/options.py --trees large --rounds 31

One jitted update whose state is donated, on eight arrays of 2048 x 2048 and on a thousand leaves of
200 numbers, float32. The updates take turns, each between two passes of memory traffic. The table
has the median, round by round, of the time divided by that of the plain average, and what XLA says
of the compiled program: the bytes that it accesses, also as a multiple (a branch that is not taken
counts), and the memory that it needs beside its arguments, in MB. *fed back* and *at the gradient*
are steps of gradient descent; they are divided by such a step with the plain average.
`stacked` is an evaluation: two averages in one tree, beside `average` of one. *A view of rows* is a
step of gradient descent on 256 rows of each large array, with the average of all rows, beside such
a step on the whole arrays. XLA counts all bytes of an array for the few that `put` writes.

Most updates of `every(10, d)` take nothing, and such a one is the median: XLA on CPU skips a loop
whose rate is 0. Another option is one more row in `UPDATES` or `STEPS`. Writes
results/options.json and options.md.
"""

import argparse
import os

import jax
import jax.numpy as jnp
import optax
from timing import Step, bandwidth, publish, ratio, relative_times, table

import emaopt


DECAY = 0.999
ROWS = 256  # of each array, in a view
TREES = {
    "large": {f"w{i}": (2048, 2048) for i in range(8)},
    "small": {f"w{i:03}": (200,) for i in range(1000)},
}
TITLES = {"large": "8 x 2048 x 2048", "small": "1,000 x 200"}
PLAIN = "plain"
UPDATES = {
    PLAIN: emaopt.ema(DECAY),
    "`warmup(d)`": emaopt.ema(emaopt.warmup(DECAY)),
    "`every(10, d)`": emaopt.ema(emaopt.every(10, DECAY)),
    "`ledger=True`": emaopt.ema(DECAY, ledger=True),
    "`compensated()`": emaopt.ema(DECAY, accumulator_dtype=emaopt.compensated()),
    "`stochastic()`": emaopt.ema(DECAY, accumulator_dtype=emaopt.stochastic()),
    "`stochastic()`, `warmup(d)`": emaopt.ema(
        emaopt.warmup(DECAY), accumulator_dtype=emaopt.stochastic()
    ),
    "`heal`": emaopt.heal(emaopt.ema(DECAY)),
    "`masked`, half of the leaves": optax.masked(
        emaopt.ema(DECAY), lambda params: {name: i % 2 == 0 for i, name in enumerate(params)}
    ),
}
SGD = emaopt.gradient_descent(1e-3)
STEPS = {
    PLAIN: optax.chain(SGD, emaopt.ema(DECAY)),
    "fed back: `overwrite(10, ema)`": optax.chain(SGD, emaopt.overwrite(10, emaopt.ema(DECAY))),
    "at the gradient: `primal`": emaopt.primal(SGD, emaopt.ema(DECAY)),
}


def full(shapes: dict) -> dict:
    return {name: jnp.full(shape, 1.0 + i) for i, (name, shape) in enumerate(shapes.items())}


def update_of(tx: optax.GradientTransformation, params: dict) -> Step:
    """The update of an average alone: the parameters are what the average is of."""
    absent = dict.fromkeys(params)

    def step(state, params):
        return (tx.update(absent, state, params)[1],)

    return Step(step, tx.init(params), inputs=(params,))


def step_of(tx: optax.GradientTransformation, params: dict) -> Step:
    """A step that changes the parameters and averages them."""

    def step(params, state, grads):
        return emaopt.apply_gradients(tx, grads, params, state)

    grads = jax.tree.map(lambda p: p * 1e-6, params)
    return Step(step, params, tx.init(params), inputs=(grads,))


def step_on_rows(params: dict) -> Step:
    """A step on some rows of each array, each of which is a table of its own."""
    tx = optax.chain(SGD, emaopt.ema(DECAY, rows=dict.fromkeys(params, True)))

    def step(params, state, ids, grads):
        tables = dict.fromkeys(params, emaopt.rows(ids))
        small, small_state = emaopt.take((params, state), tables)
        small, small_state = emaopt.apply_gradients(tx, grads, small, small_state)
        return emaopt.put((params, state), (small, small_state), tables)

    ids = jnp.arange(ROWS) * (min(len(p) for p in params.values()) // ROWS)
    grads = jax.tree.map(lambda p: p[:ROWS] * 1e-6, params)
    return Step(step, params, tx.init(params), inputs=(ids, grads))


def evaluation_of(params: dict, names: list[str]) -> Step:
    """The averages of that name in one tree, from a state of two."""
    tx = optax.named_chain(("a", emaopt.ema(0.9)), ("b", emaopt.ema(DECAY)))

    def step(old, params, state):
        del old  # donated, so that the result has a place
        if len(names) == 1:
            return (emaopt.average(params, state, names[0]),)
        return (emaopt.stacked(params, state, names),)

    state = tx.init(params)
    (old,) = jax.eval_shape(step, None, params, state)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), old)
    return Step(step, zeros, inputs=(params, state))


def measure(shapes: dict, rounds: int) -> dict[str, dict[str, float]]:
    """Time, bytes and memory of each option, as the table has them."""
    params = full(shapes)
    groups = [
        {name: update_of(tx, params) for name, tx in UPDATES.items()},
        {name: step_of(tx, params) for name, tx in STEPS.items()},
        {PLAIN: evaluation_of(params, ["a"]), "`stacked`, two": evaluation_of(params, ["a", "b"])},
    ]
    if all(len(shape) > 1 for shape in shapes.values()):
        groups[1]["a view of 256 rows: `take`, `put`"] = step_on_rows(params)
    found = {}
    for calls in groups:
        times = relative_times(calls, rounds, bandwidth(2**24, os.cpu_count() or 1))
        for name, call in calls.items():
            if name == PLAIN:
                continue
            found[name] = {
                "time": ratio(times[name], times[PLAIN]),
                "bytes": accessed(call) / accessed(calls[PLAIN]),
                "temporary": call.compiled.memory_analysis().temp_size_in_bytes,
            }
    return found


def accessed(call: Step) -> float:
    return call.compiled.cost_analysis()["bytes accessed"]


def report(found: dict) -> list[str]:
    lines = [
        f"`python benchmarks/options.py`: time / the plain average's, on a CPU with "
        f"{os.cpu_count()} cores; jax {jax.__version__}.",
    ]
    for tree, rows in found.items():
        lines += [
            "",
            *table(
                [TITLES[tree], "time", "bytes", "temporary memory, MB"],
                (
                    [name, f"{x['time']:.2f}", f"{x['bytes']:.2f}", f"{x['temporary'] / 1e6:.1f}"]
                    for name, x in rows.items()
                ),
            ),
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trees", nargs="*", choices=TREES, default=list(TREES))
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    found = {tree: measure(TREES[tree], options.rounds) for tree in options.trees}
    publish("options", "What each option of an average costs", report(found), found)


if __name__ == "__main__":
    main()
