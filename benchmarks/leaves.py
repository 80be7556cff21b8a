"""What a training step costs where there are many small leaves, as a tree and packed.

    python benchmarks/leaves.py            # 100, 1,000 and 5,000 leaves of 200 numbers
    python benchmarks/leaves.py --leaves 100

The step: momentum and an average, with and without clipping by the global norm. *Optimizer*: that
alone. *Whole step*: with the gradient, of a loss that does next to nothing with each leaf, opened
by `emaopt.unpack` where it is packed. *Network*: the same for a chain of as many small matrices,
whose own time, for three products a leaf, is the same on both sides.

Tree and packed take turns in one process; a row has the median times, and the median of the ratios
of neighbouring runs. Compile: seconds of processor time of all threads, tracing included. Writes
`benchmarks/leaves.json` and `benchmarks/leaves.md`.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import emaopt


HERE = Path(__file__).parent
CHAIN = (emaopt.momentum(0.1, 0.9), emaopt.ema(0.999))
CHAINS = {
    "momentum + ema": optax.chain(*CHAIN),
    "clip + momentum + ema": optax.chain(emaopt.clip_by_global_norm(1.0), *CHAIN),
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


class Run:
    """A step that is compiled, and a state that it goes on from."""

    def __init__(self, step, tx, params):
        self.carry = jax.tree.map(jnp.copy, (params, tx.init(params)))
        self.step = jax.jit(step, donate_argnums=(0, 1))
        start = time.process_time()
        self.step.lower(*self.carry).compile()
        self.compile = time.process_time() - start
        self(2)

    def __call__(self, steps):
        """Milliseconds per step."""
        start = time.perf_counter()
        for _ in range(steps):
            self.carry = self.step(*self.carry)
            jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) * 1e3 / steps


def measure(make, tx, params, rounds):
    tree = Run(make(tx), tx, params)
    packed = Run(make(tx), tx, emaopt.pack(params))
    times = [(tree(1), packed(10)) for _ in tqdm(range(rounds), leave=False, disable=None)]
    return {
        "tree ms": statistics.median(a for a, _ in times),
        "packed ms": statistics.median(b for _, b in times),
        "faster": statistics.median(a / b for a, b in times),
        "tree compile s": tree.compile,
        "packed compile s": packed.compile,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leaves", type=int, nargs="*", default=[100, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()

    rng, rows = np.random.default_rng(0), []
    for number in args.leaves:
        params = {
            f"layer{i:04}": jnp.asarray(rng.normal(size=(10, 20)), jnp.float32)
            for i in range(number)
        }
        for chain, tx in CHAINS.items():
            for what, make in STEPS.items():
                row = {"leaves": number, "step": chain, "of": what}
                rows.append(row | measure(make, tx, params, args.rounds))
                print(rows[-1], flush=True)
                write(rows)


def write(rows):
    (HERE / "leaves.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "# Many small leaves",
        "",
        "`python benchmarks/leaves.py`: leaves of 200 numbers, float32, on a CPU.",
        "",
        "| leaves | step | | tree, ms | packed, ms | faster | compile, CPU s: tree | packed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['leaves']:,} | {row['step']} | {row['of']} | {row['tree ms']:.2f} | "
        f"{row['packed ms']:.3f} | {row['faster']:.1f} | {row['tree compile s']:.1f} | "
        f"{row['packed compile s']:.1f} |"
        for row in rows
    ]
    (HERE / "leaves.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
