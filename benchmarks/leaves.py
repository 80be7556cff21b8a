"""What a training step costs where there are many small leaves, as a tree and packed.

    python benchmarks/leaves.py            # 100 and 1,000 leaves of 200 numbers
    python benchmarks/leaves.py --leaves 5000

The step: momentum and an average, with and without clipping by the global norm. *Optimizer*: that
alone. *Whole step*: with the gradient, of a loss that does next to nothing with each leaf, opened
by `emaopt.unpack` where it is packed. *Network*: the same for a chain of as many small matrices,
whose own time, for three products a leaf, is the same on both sides.

Tree and packed take turns in one process, each between two steps that only hand on as many arrays;
a row has the median times, and the median of the ratios. Compile: seconds of processor time of all
threads, tracing included. Writes results/leaves.json and leaves.md. What the optimizer alone takes
to compile, in memory, and beside Optax: dispatch.py.
"""

import argparse
import os
import time


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import Step, handing, publish, ratio, table, times
from tqdm import tqdm

import emaopt


CHAIN = (emaopt.momentum(0.1, 0.9), emaopt.ema(0.999))
CHAINS = {
    "momentum + ema": optax.chain(*CHAIN),
    "clip + momentum + ema": optax.chain(emaopt.clip_by_global_norm(1.0), *CHAIN),
}


def parameters(number: int) -> dict:
    """So many leaves of 200 numbers."""
    rng = np.random.default_rng(0)
    return {
        f"layer{i:04}": jnp.asarray(rng.normal(size=(10, 20)), jnp.float32) for i in range(number)
    }


def loss(tree):
    """Every leaf on its own, so that next to nothing is computed."""
    return sum(jnp.sum(jnp.square(x - 1.0)) for x in jax.tree.leaves(tree))


def network(tree):
    """A chain of small matrices, 8 rows."""
    x = jnp.ones((8, 10))
    for w in jax.tree.leaves(tree):
        x = jnp.tanh(x @ w.reshape(x.shape[1], -1))
    return jnp.mean(x)


def whole_step(tx, loss=loss):
    def step(params, opt_state):
        grads = jax.grad(lambda p: loss(emaopt.unpack(p)))(params)
        return emaopt.apply_gradients(tx, grads, params, opt_state)

    return step


def network_step(tx):
    return whole_step(tx, network)


def optimizer(tx):
    def step(params, opt_state):
        return emaopt.apply_gradients(tx, params, params, opt_state)

    return step


STEPS = {"optimizer": optimizer, "whole step": whole_step, "network": network_step}


def measure(make, tx, params, rounds: int) -> dict[str, float]:
    calls, compiling = {}, {}
    for name, form, repeat in (("tree", params, 1), ("packed", emaopt.pack(params), 10)):
        start = time.process_time()
        calls[name] = Step(make(tx), form, tx.init(form), repeat=repeat)
        compiling[name] = time.process_time() - start
    found = times(calls, rounds, handing(params))
    each = {name: call.repeat for name, call in calls.items()}
    relative = {name: found[name].relative / each[name] for name in calls}
    return {
        **{f"{x} ms": float(np.median(found[x].seconds)) * 1e3 / each[x] for x in calls},
        "faster": ratio(relative["tree"], relative["packed"]),
        **{f"{x} compile s": compiling[x] for x in calls},
    }


def report(rows: list[dict]) -> list[str]:
    head = ["leaves", "step", "", "tree, ms", "packed, ms", "faster"]
    return [
        "`python benchmarks/leaves.py`: leaves of 200 numbers, float32, on a CPU.",
        "",
        *table(
            [*head, "compile, CPU s: tree", "packed"],
            (
                [
                    f"{row['leaves']:,}",
                    row["step"],
                    row["of"],
                    f"{row['tree ms']:.2f}",
                    f"{row['packed ms']:.3f}",
                    f"{row['faster']:.1f}",
                    f"{row['tree compile s']:.1f}",
                    f"{row['packed compile s']:.1f}",
                ]
                for row in rows
            ),
        ),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--leaves", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    cells = [(n, c, what) for n in args.leaves for c in CHAINS for what in STEPS]
    rows = []
    for number, chain, what in tqdm(cells, leave=False, disable=None):
        found = measure(STEPS[what], CHAINS[chain], parameters(number), args.rounds)
        rows.append({"leaves": number, "step": chain, "of": what} | found)
    publish("leaves", "Many small leaves", report(rows), rows)


if __name__ == "__main__":
    main()
