"""What several averages cost in one training step, against so many times one.

    python benchmarks/several.py               # 8 million parameters
    python benchmarks/several.py --millions 32

One jitted step of Adam and k averages, each with its own decay, parameters and state donated.
Every round takes ten steps of each variant, in turn, in one process, between two passes of memory
traffic; the table has the median time of each beside that of Adam alone, and the bytes that the
compiled step accesses by XLA's count. "k times one" is what the first average adds, k times. "Fed
back" overwrites the parameters by the average every ten updates. The second table is an evaluation
of all averages at once, `jax.vmap` over `emaopt.stacked`, against one after the other. Writes
results/several.json and several.md.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax
from timing import Step, publish, ratio, relative_times, scaling, table

import emaopt


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


def training(tx: optax.GradientTransformation, millions: float) -> Step:

    def step(params, opt_state):
        grads = params
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = parameters(millions)
    return Step(step, params, tx.init(params), repeat=10)


def measure_training(millions: float, rounds: int) -> dict:
    variants = {
        "Adam": (0, transformation(0)),
        "Adam, 1 average": (1, transformation(1)),
        "Adam, 2 averages": (2, transformation(2)),
        "Adam, 4 averages": (4, transformation(4)),
        "Adam, 1 average, fed back": (1, transformation(1, fed_back=True)),
    }
    steps = {name: training(tx, millions) for name, (_, tx) in variants.items()}
    times = relative_times(steps, rounds, scaling(128))
    return {
        name: {
            "averages": k,
            "time": ratio(times[name], times["Adam"]),
            "bytes": steps[name].compiled.cost_analysis()["bytes accessed"],
        }
        for name, (k, _) in variants.items()
    }


def training_rows(found: dict):
    adam, one = found["Adam"], found["Adam, 1 average"]
    for name, row in found.items():
        cells = []
        for what in ("time", "bytes"):
            added, first = (x[what] - adam[what] for x in (row, one))
            share = f"{added / (row['averages'] * first):.2f}" if row["averages"] else ""
            cells.append((f"{row[what] / adam[what]:.2f}", share))
        yield name, *cells[0], f"{row['bytes'] / 1e9:.3f}", *cells[1]


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


def measure_evaluation(rounds: int) -> dict[str, float]:
    found = {}
    for width in (64, 512):
        times = relative_times(evaluation(width), 10 * rounds, scaling(1))
        found[f"{LAYERS} layers of width {width}"] = ratio(times["together"], times["each"])
    return found


def main():
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--millions", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    found = vars(options) | {
        "training": measure_training(options.millions, options.rounds),
        "evaluation": measure_evaluation(options.rounds),
    }
    added = "added / k times one"
    lines = [
        f"`python benchmarks/several.py`: {options.millions:g} million float32 parameters, jax "
        f"{jax.__version__}, {jax.default_backend()}, {options.rounds} rounds of ten steps.",
        "",
        *table(
            ["", "time / Adam's", added, "GB accessed", "/ Adam's", added],
            training_rows(found["training"]),
        ),
        "",
        "Evaluating four averages:",
        "",
        *table(
            ["", "all at once / one after the other"],
            ([name, f"{share:.2f}"] for name, share in found["evaluation"].items()),
        ),
    ]
    publish("several", "Several averages in one step", lines, found)


if __name__ == "__main__":
    main()
