"""Measure what merging costs: memory, time and digits, beside the same work in other ways.

    nice python benchmarks/merge.py            # some minutes, and 1.2 GB of disk for a while
    nice python benchmarks/merge.py --mb 40

The peak of the memory, above that of a tiny run: for many arrays, for one array in chunks, and for
one large array. The time as a ratio of reading the checkpoints and writing the result by plain
Orbax. The error of the sum, beside float32 as Megatron-LM's `weighted_merge.py` adds up (its rule,
our code). Writes `results/merge.md`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from helpers import RESULTS
from orbax.checkpoint import v1 as ocp
from timing import table

from emaopt import posthoc
from emaopt.merge import Run


COUNT = 4  # checkpoints
ROUNDS = 5


def one_minus_sqrt(run):
    return posthoc.anneal(lambda x: 1 - np.sqrt(x), at=run.at, on=run.steps)


def save(directory, shapes, chunk=None):
    """Save checkpoints of random parameters, and return the bytes of one."""
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = chunk
    params = {}
    for step in range(1, COUNT + 1):
        noise = np.random.default_rng(step)
        params = {
            f"w{i:03}": noise.standard_normal(shape, np.float32) for i, shape in enumerate(shapes)
        }
        with context:
            ocp.save(directory / str(step), params, checkpointable_name="params")
    return sum(x.nbytes for x in params.values())


def peak(run, out):
    """The largest resident memory of a process that merges, in bytes."""
    code = (
        "import re, sys;"
        "from emaopt.__main__ import main; main(sys.argv[1:]);"
        "print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) * 1024)"
    )
    arguments = ["merge", str(run), "--one-minus-sqrt", str(out)]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def memory(megabytes, directory):
    side = int((megabytes * 250_000) ** 0.5)
    cases = {
        "a tiny run": ([(4, 4)], None),
        "24 arrays, each in one chunk": ([(side, side // 24)] * 24, None),
        "one array, in chunks of 8 MB": ([(side, side)], 2**23),
        "one array, in one chunk": ([(side, side)], None),
    }
    rows, base = [], 0
    for name, (shapes, chunk) in cases.items():
        run = directory / "run"
        size = save(run, shapes, chunk)
        used = peak(run, directory / "out")
        base = base or used
        largest = 4 * max(int(np.prod(shape)) for shape in shapes)
        above = used - base
        ratio = f"{above / largest:.2f}" if above else ""
        numbers = [f"{x / 1e6:.0f}" for x in (size, largest, above)]
        rows.append([name, *numbers, ratio])
        shutil.rmtree(run)
        shutil.rmtree(directory / "out")
    return [
        "# What merging costs",
        "",
        "## Memory",
        "",
        f"The peak of `emaopt merge RUN --one-minus-sqrt OUT` on {COUNT} checkpoints, above that "
        f"on a tiny run ({base / 1e6:.0f} MB: the interpreter, JAX, Orbax).",
        "",
        *table(["parameters", "MB", "largest array, MB", "above, MB", "in largest arrays"], rows),
    ]


def read_and_write(run, out):
    """Read all checkpoints one after the other and write the last, by plain Orbax."""
    start = time.perf_counter()
    params = None
    for step in range(1, COUNT + 1):
        params = None  # before the next is read
        params = ocp.load(run / str(step), checkpointable_name="params")
    ocp.save(out, params, checkpointable_name="params")
    return time.perf_counter() - start


def merge(run, out):
    start = time.perf_counter()
    opened = Run.open(run)
    opened.plan(one_minus_sqrt(opened)).write(out)
    return time.perf_counter() - start


def seconds(megabytes, directory):
    side = int((megabytes * 250_000) ** 0.5)
    rows = []
    for name, shapes, chunk in (
        ("24 arrays, each in one chunk", [(side, side // 24)] * 24, None),
        ("600 arrays", [(side, side // 600)] * 600, None),
        ("one array, in chunks of 8 MB", [(side, side)], 2**23),
    ):
        run = directory / "run"
        save(run, shapes, chunk)
        times = []
        for i in range(ROUNDS + 1):
            pair = [read_and_write(run, directory / f"out{i}")]
            shutil.rmtree(directory / f"out{i}")
            pair.append(merge(run, directory / f"out{i}"))
            shutil.rmtree(directory / f"out{i}")
            times += [pair] if i else []  # the first one compiles
        ratios = [ours / plain for plain, ours in times]
        plain, ours = np.median(times, axis=0)
        rows.append(
            [
                name,
                f"{plain:.2f}",
                f"{ours:.2f}",
                f"{np.median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
            ]
        )
        shutil.rmtree(run)
    head = ["parameters", "read and written by Orbax, s", "merged, s", "median of the ratios"]
    return [
        "",
        "## Time",
        "",
        f"Of {COUNT} checkpoints of {megabytes} MB: to read each and write one by plain Orbax, and "
        f"to merge them, with digests; {ROUNDS} interleaved rounds.",
        "",
        *table([*head, "ratios"], rows),
    ]


def digits(directory):
    """The error of the sum in units of the last place, beside a sum in float32."""
    run = directory / "run"
    save(run, [(1000, 1000)])
    opened = Run.open(run)
    target = one_minus_sqrt(opened)
    opened.plan(target).write(directory / "out")
    made = ocp.load(directory / "out", checkpointable_name="params")["w000"]
    loaded = [
        ocp.load(run / str(step), checkpointable_name="params")["w000"] for step in opened.steps
    ]
    factors = target[opened.steps]
    exact, narrow = np.zeros(loaded[0].shape, np.longdouble), np.zeros_like(loaded[0])
    for factor, x in zip(factors, loaded, strict=True):
        exact += np.longdouble(factor) * x.astype(np.longdouble)
        narrow += np.float32(factor) * x
    shutil.rmtree(run)
    place = np.spacing(np.abs(exact.astype(np.float32))).astype(np.longdouble)
    rows = []
    for name, x in (("emaopt, float64", made), ("float32, the rule of Megatron-LM", narrow)):
        off = np.abs(x.astype(np.longdouble) - exact) / place
        share = f"{(off > 1).mean():.2%}"
        rows.append([name, f"{off.max():.2f}", f"{np.quantile(off, 0.99):.2f}", share])
    return [
        "",
        "## Digits",
        "",
        f"10**6 normal numbers in each of {COUNT} checkpoints; the error in units of the last "
        "place of the exact sum.",
        "",
        *table(["sum", "largest", "99 % are below", "above 1"], rows),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--tmp", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=args.tmp))
    try:
        lines = [
            *memory(args.mb, directory),
            *seconds(args.mb, directory),
            *digits(directory),
        ]
    finally:
        shutil.rmtree(directory)
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "merge.md").write_text(text)


if __name__ == "__main__":
    main()
