"""How many passes over memory a step of momentum with an average makes, and what that costs.

    NPROC=1 python benchmarks/passes.py

XLA on a CPU makes a loop for each result: new momenta, new parameters, new averages, 9 arrays read
or written. PyTorch's fused SGD makes the first two in one loop, its `AveragedModel` the third: 8
arrays. One loop for all would touch 7. Here are these loops in C, over leaves with the shapes of
ResNet-50, float32, one thread, each loop over all leaves before the next one; emaopt's step; and a
step that computes nothing, for what JAX takes to hand 161 leaves of four trees on.
Needs `cc`. Times are of the processor, so other processes disturb little; medians over rounds of
the time divided by that of emaopt's step. Writes results/passes.md.
"""

import argparse
import ctypes
import os
import subprocess
import tempfile
import time
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from helpers import trees
from timing import Step, publish, ratio, table

import emaopt


SOURCE = """
#define LOOP(name, body) void name(float *restrict p, const float *restrict g, float *restrict m, \\
    float *restrict e, long n) { for (long i = 0; i < n; i++) { body } }
#define MOMENTUM m[i] = m[i] * 0.9f + g[i];
#define PARAMETER p[i] -= 0.001f * m[i];
#define AVERAGE e[i] -= (e[i] - p[i]) * 0.001f;
LOOP(momentum, MOMENTUM)
LOOP(parameter, PARAMETER)
LOOP(average, AVERAGE)
LOOP(momentum_and_parameter, MOMENTUM PARAMETER)
LOOP(all_three, MOMENTUM PARAMETER AVERAGE)
"""
LOOPS = {
    "C, a loop for each result (XLA)": (["momentum", "parameter", "average"], 9),
    "C, two loops (PyTorch)": (["momentum_and_parameter", "average"], 8),
    "C, one loop": (["all_three"], 7),
}
OURS = "emaopt, momentum and average"
HANDED = "JAX, a step that hands the same arrays on"


def library(folder: Path) -> ctypes.CDLL:
    source, built = folder / "passes.c", folder / "passes.so"
    source.write_text(SOURCE)
    flags = "-O3", "-march=native", "-shared", "-fPIC"
    subprocess.run(["cc", *flags, str(source), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


def in_c(loops: list, leaves: list[list[np.ndarray]]):
    given = [
        ([ctypes.c_void_p(x.ctypes.data) for x in leaf], ctypes.c_long(leaf[0].size))
        for leaf in leaves
    ]

    def call():
        for loop in loops:
            for pointers, size in given:
                loop(*pointers, size)

    return call


def steps_of(params: dict) -> dict[str, Step]:
    tx = optax.chain(emaopt.momentum(1e-3, 0.9), emaopt.ema(0.999))
    step = lambda params, state, grads: emaopt.apply_gradients(tx, grads, params, state)
    hand_on = lambda params, state, grads: (params, state)
    carry, grads = (params, tx.init(params)), jax.tree.map(lambda p: p * 1e-3, params)
    steps = {OURS: step, HANDED: hand_on}
    return {name: Step(call, *carry, inputs=(grads,)) for name, call in steps.items()}


def processor_time(call) -> float:
    start = time.process_time()
    jax.block_until_ready(call())
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    params = trees.full(trees.RESNET50)
    # momenta and gradients of zero would be denormal numbers in the end
    leaves = [[np.array(p) for _ in range(4)] for p in params.values()]
    calls = steps_of(params)
    with tempfile.TemporaryDirectory() as folder:
        built = library(Path(folder))
        for name, (loops, _) in LOOPS.items():
            calls[name] = in_c([getattr(built, loop) for loop in loops], leaves)
    found = {name: np.empty(rounds) for name in calls}
    for call in calls.values():
        call()
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            found[name][i] = processor_time(calls[name])
    arrays = {OURS: 9, HANDED: 0} | {name: number for name, (_, number) in LOOPS.items()}
    rows = [
        (name, arrays[name], f"{arrays[name] / 9:.2f}", f"{ratio(times, found[OURS]):.2f}")
        for name, times in found.items()
    ]
    lines = [
        f"`NPROC=1 python benchmarks/passes.py`: ResNet-50's shapes, one thread, {rounds} rounds; "
        f"jax {jax.__version__}.",
        "",
        *table(("a step", "arrays touched", "/ the first", "processor time / the first"), rows),
    ]
    publish("passes", "Passes over memory", lines)


if __name__ == "__main__":
    main()
