"""What a step costs by the number of leaves: to compile, in memory, and to call.

    python benchmarks/dispatch.py                  # 100 to 2,000 leaves of 200 numbers
    python benchmarks/dispatch.py --leaves 5000

Three steps: of a chain of Optax with an average written by hand, of emaopt on the same tree, and of
emaopt on packed parameters. Each is a process of its own, whose peak of resident memory, imports
included, is taken when the step is compiled; the three then take five steps in turn, each between
two steps, here, that only hand on as many arrays. A step of so few numbers is bookkeeping per
array, so its time is that of dispatching it. Compile: seconds of processor time of all threads. The
last column is the median, round by round, of the time divided by that of the chain by hand. Writes
results/dispatch.json and dispatch.md; the rows of other numbers of leaves stay.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from helpers import RESULTS
from leaves import parameters
from steps import RATE, by_hand, ours
from timing import Worker, handing, publish, ratio, serve, table, times
from tqdm import tqdm

import emaopt


# clipped, optimizer of emaopt, of Optax, averaged
STEPS = {
    "momentum": (False, emaopt.momentum(RATE, 0.9), optax.sgd(RATE, 0.9), False),
    "clip, momentum": (True, emaopt.momentum(RATE, 0.9), optax.sgd(RATE, 0.9), False),
    "clip, adam, ema": (True, emaopt.adam(RATE), optax.adam(RATE), True),
}
STEPS_A_TURN = 5
FORMS = ("Optax, by hand", "emaopt", "emaopt, packed")


def work(leaves: int, of: str, form: str) -> None:
    """Compile a step, tell what it took, and step when told."""
    clip, mine, other, average = STEPS[of]
    params = parameters(leaves)
    if form == "emaopt, packed":
        params = emaopt.pack(params)
    by_optax = form == FORMS[0]
    init, step = by_hand(other, clip, average) if by_optax else ours(mine, clip, average)
    carry = jax.tree.map(lambda x: x.copy(), (params, init(params)))
    grads = jax.tree.map(lambda p: p * 1e-3, params)
    start = time.process_time()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, grads)
    middle = time.process_time()
    compiled = lowered.compile()
    report = {"trace and lower s": middle - start, "compile s": time.process_time() - middle}
    # not ru_maxrss, which begins with what the process that started this one uses
    peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    report["peak GB"] = int(peak[1]) * 1024 / 1e9

    def call():
        nonlocal carry
        for _ in range(STEPS_A_TURN):
            carry = jax.block_until_ready(compiled(*carry, grads))

    serve(call, report)


def measure(leaves: int, of: str, rounds: int) -> list[dict]:
    workers = {
        form: Worker(sys.executable, __file__, leaves=leaves, of=of, form=form) for form in FORMS
    }
    found = times(workers, rounds, handing(parameters(leaves)))
    for worker in workers.values():
        worker.close()
    return [
        {
            "leaves": leaves,
            "step": of,
            "form": form,
            **workers[form].report,
            "ms": float(np.median(own.seconds)) / STEPS_A_TURN * 1e3,
            "time / by hand": ratio(own.relative, found[FORMS[0]].relative),
        }
        for form, own in found.items()
    ]


def report(rows: list[dict]) -> list[str]:
    head = ["leaves", "step", "", "trace and lower, s", "compile, s", "peak, GB", "step, ms"]
    return [
        f"`python benchmarks/dispatch.py`: leaves of 200 numbers, float32, jax {jax.__version__}, "
        "on a CPU.",
        "",
        *table(
            [*head, "/ by hand"],
            (
                [
                    f"{row['leaves']:,}",
                    row["step"],
                    row["form"],
                    f"{row['trace and lower s']:.2f}",
                    f"{row['compile s']:.2f}",
                    f"{row['peak GB']:.2f}",
                    f"{row['ms']:.3f}",
                    f"{row['time / by hand']:.3f}",
                ]
                for row in rows
            ),
        ),
    ]


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        work(**json.loads(sys.argv[1]))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--leaves", type=int, nargs="*", default=[100, 200, 500, 1000, 2000])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    before = RESULTS / "dispatch.json"
    rows = json.loads(before.read_text()) if before.exists() else []
    rows = [row for row in rows if row["leaves"] not in args.leaves]
    cells = [(leaves, of) for leaves in args.leaves for of in STEPS]
    for leaves, of in tqdm(cells, leave=False, disable=None):
        rows += measure(leaves, of, args.rounds)
    rows.sort(key=lambda row: row["leaves"])
    publish("dispatch", "A step by the number of leaves", report(rows), rows)


if __name__ == "__main__":
    main()
