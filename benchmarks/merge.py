"""Measure what merging costs: memory, time and digits, beside the same work in other ways.

    nice python benchmarks/merge.py            # some minutes, and 1.2 GB of disk for a while
    nice python benchmarks/merge.py --mb 40
    nice python benchmarks/merge.py --only errors    # printed alone; seconds

The peak of the memory, above that of a tiny run: for many arrays, for one array in chunks, and for
one large array. The time as a ratio of reading the checkpoints and writing the result by plain
Orbax. The error of the sum, beside float32 as Megatron-LM's `weighted_merge.py` adds up (its rule,
our code). And what a predicted error means for the loss, in a quadratic model whose expected losses
are exact. Writes `results/merge.md`.
"""

import argparse
import itertools
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
from emaopt.posthoc._fit import fit, profile_of


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
        "600 arrays": ([(side, side // 600)] * 600, None),
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
        "",
        "Some 50 MB are fixed: one sum of 16 MB in float64, what is read, read ahead, rounded and "
        "written, and the threads of TensorStore. Without `mallopt(M_MMAP_THRESHOLD, 2**20)`, "
        "which the command calls, it is 80 to 100 MB more: freed memory that glibc keeps for each "
        "thread. In Python, `MALLOC_MMAP_THRESHOLD_=1048576` in the environment does the same.",
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


UPDATES, RATE = 1000, 0.1
CURVATURES = np.geomspace(5, 0.008, 24)
# of a direction with curvature h: where it starts, and its noise in a gradient
MODELS = {
    "noise alone": lambda h: (0.0, 1.0),
    "noise by curvature": lambda h: (30.0, h**0.5),
    "still on its way": lambda h: (43.0 if h < 0.2 else 3.0, 1.0),
}
SHAPES = {"linear": lambda x: 1 - x, "1-sqrt": lambda x: 1 - np.sqrt(x)}
WINDOWS = (50, 100, 200, 500)
RECORDED = ((0.05,), (0.1,), (0.2,), (0.05, 0.1))  # sigma_rel of power averages
SPACINGS = (25, 50, 100, 125, 250, 500)
BOUNDS = (0, 0.15, 0.35, 0.5, 0.7, 1, 3)


def loss_of_sums(model, weights):
    """The expected loss at sums of the iterates of SGD, whose weights are columns [T + 1, k]."""
    loss = 0
    past = np.subtract.outer(np.arange(UPDATES + 1), np.arange(UPDATES + 1))
    for h in CURVATURES:
        start, noise = model(h)
        kept = np.where(past >= 0, (1 - RATE * h) ** np.maximum(past, 0), 0)
        share = kept.T @ weights  # of the start, and of the noise of each update
        share *= np.array([start, *[RATE * noise] * UPDATES])[:, None]
        loss = loss + h / 2 * (share[0] ** 2 + np.square(share[1:]).sum(0))
    return loss


def loss_annealed(model, rates):
    """The expected loss at the end of SGD with these rates."""
    loss = 0
    for h in CURVATURES:
        start, noise = model(h)
        kept = np.cumprod((1 - rates * h)[::-1])[::-1]
        after = np.append(kept[1:], 1)
        loss += h / 2 * ((kept[0] * start) ** 2 + np.square(rates * noise * after).sum())
    return loss


def errors():
    """What predicted errors mean for the loss: of merges, of their targets, and of real decays."""
    cases, weights, real = [], [], {}
    for name, n in itertools.product(SHAPES, WINDOWS):
        rates = np.full(UPDATES, RATE)
        rates[-n:] *= SHAPES[name](np.arange(n) / n)
        real[name, n] = rates
    for (name, n), sigmas, every in itertools.product(real, RECORDED, SPACINGS):
        if n % every:
            continue
        steps = range(every, UPDATES + 1, every)
        sources = [posthoc.gamma(s) for s in sigmas]
        target = posthoc.anneal(SHAPES[name](np.arange(0, n, every) / n), UPDATES, every)
        pairs = [(step, source) for step in steps for source in sources]
        factors, error = fit(pairs, UPDATES, target)
        columns = [np.pad(profile_of(g, t), (0, UPDATES - t)) for t, g in pairs]
        inside = [step for step in steps if step > UPDATES - n]
        cases.append((name, n, error))
        weights += [np.transpose(columns) @ factors, target]
        weights.append(posthoc.anneal(SHAPES[name], UPDATES, on=inside))
    more = {(low, high): [] for low, high in itertools.pairwise(BOUNDS)}
    for model in MODELS.values():
        losses = loss_of_sums(model, np.stack(weights, axis=1)).reshape(-1, 3)
        decayed = {key: loss_annealed(model, rates) for key, rates in real.items()}
        for (name, n, error), (made, wanted, plain) in zip(cases, losses, strict=True):
            (bounds,) = [b for b in more if b[0] <= error < b[1]]
            truth = decayed[name, n]
            found = [made / wanted, made / truth, wanted / truth, plain / truth]
            more[bounds].append(np.array(found) - 1)
    rows = [
        [f"{low:g} to {high:g}", str(len(found))]
        + [f"{a:+.0%} to {b:+.0%}" for a, b in zip(np.min(found, 0), np.max(found, 0), strict=True)]
        for (low, high), found in more.items()
    ]
    head = ["predicted error", "cases", "merged, beside its target", "merged, beside a real decay"]
    return [
        "",
        "## What a predicted error means",
        "",
        f"Expected losses, exact, of SGD in {len(CURVATURES)} directions of a quadratic model: "
        f"{', '.join(MODELS)}. Averages of sigma_rel 0.05, 0.1, 0.2, or the first two are saved "
        "every 1/40 to 1/2 of the run, and merged to linear and 1-sqrt decays over its last 1/20, "
        "1/10, 1/5 and 1/2. The target is the sum with exactly the weights that were asked for. "
        "The last column merges the plain parameters of the same checkpoints.",
        "",
        *table([*head, "target, beside a real decay", "plain, beside a real decay"], rows),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--only", choices=["memory", "seconds", "digits", "errors"])
    parser.add_argument("--tmp", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=args.tmp))
    sections = {
        "memory": lambda: memory(args.mb, directory),
        "seconds": lambda: seconds(args.mb, directory),
        "digits": lambda: digits(directory),
        "errors": errors,
    }
    try:
        parts = {name: make() for name, make in sections.items() if args.only in (None, name)}
    finally:
        shutil.rmtree(directory)
    text = "\n".join(line for lines in parts.values() for line in lines) + "\n"
    print(text)
    if args.only is None:
        (RESULTS / "merge.md").write_text(text)


if __name__ == "__main__":
    main()
