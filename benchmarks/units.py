"""The half-life of an average, in samples, for each way to batch them.

    python benchmarks/units.py

Asked for: a half-life of 64 samples. emaopt's is measured in training runs, through
`optax.MultiSteps`, as `emaopt.every(n, emaopt.half_life(64 / samples_per_update))`. Beside it is
what the rules of others make of settings that are right for batches of 4, each one averaged: a
decay for each call of the average, scaled with the interval or not; Keras has no interval, and
averages after each micro-batch. Writes `results/units.md`.
"""

import math
import os


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from helpers import RESULTS, batching


HALF_LIFE, BATCH = batching.HALF_LIFE, 4
HEAD = [
    "batch",
    "accumulated",
    "interval",
    "emaopt",
    "a decay per call (torch, timm, ema-pytorch)",
    "scaled with the interval (Composer)",
    "a decay per micro-batch (Keras)",
]


def measured(*way) -> float:
    """From what is left of the first value after four half-lives."""
    seen, average = batching.averages(*way)
    last = 4 * HALF_LIFE // way[0] - 1
    return float(seen[last] * math.log(0.5) / math.log(average["start"][last]))


def rows():
    for batch, accumulated, interval in batching.WAYS:
        calls = HALF_LIFE / BATCH
        per_call = calls * batch * accumulated * interval
        others = [per_call, per_call / interval] + [calls * batch] * (interval == 1)
        ours = measured(batch, accumulated, interval)
        numbers = [f"{ours:.4f}", *(f"{x:g}" for x in others)]
        yield batch, accumulated, interval, *numbers, *[""] * (4 - len(numbers))


def main():
    """Print the table and write it."""
    lines = [
        "# A half-life in samples",
        "",
        f"Half-life in samples, {HALF_LIFE} asked for; jax {jax.__version__}; made by "
        "`python benchmarks/units.py`.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows()),
    ]
    text = "\n".join([*lines, ""])
    print(text, end="")
    (RESULTS / "units.md").write_text(text)


if __name__ == "__main__":
    main()
