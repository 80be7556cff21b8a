"""What swapping, digests and finding the averages cost, beside plain Orbax on the same tree.

    python benchmarks/checkpoint.py            # about 1 GB, and 5 GB of disk for a few minutes
    python benchmarks/checkpoint.py --mb 100

Parameters, their average and Adam's two slots, ViT-B shaped (152 arrays per copy), float32. Every
round runs each variant once, in turn, in one process with a warm page cache; the table gives the
median time, its ratio to plain Orbax's, and the bytes that were read or written. Writes
`results/checkpoint.md`.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import RESULTS
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


TX = optax.chain(emaopt.adam(), emaopt.ema(emaopt.warmup(0.999)))


def vit(width: int):
    """The shapes of a ViT-B: 12 blocks, and a width that decides the size."""
    block = {
        "norm1": {"scale": (width,), "bias": (width,)},
        "qkv": {"kernel": (width, 3 * width), "bias": (3 * width,)},
        "out": {"kernel": (width, width), "bias": (width,)},
        "norm2": {"scale": (width,), "bias": (width,)},
        "mlp1": {"kernel": (width, 4 * width), "bias": (4 * width,)},
        "mlp2": {"kernel": (4 * width, width), "bias": (width,)},
    }
    ends = {
        "patches": {"kernel": (16, 16, 3, width), "bias": (width,)},
        "position": (197, width),
        "class": (width,),
        "norm": {"scale": (width,), "bias": (width,)},
        "head": {"kernel": (width, 1000), "bias": (1000,)},
    }
    shapes = {f"block{i}": block for i in range(12)} | ends
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s, np.float32)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def counters():
    """Bytes that this process has read and written, as the system counts them."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return np.array([int(fields["rchar"]), int(fields["wchar"])])


def plain_save(checkpointer, step, params, opt_state):
    checkpointer.save_checkpointables(step, {"params": params, "opt_state": opt_state})


def plain_resume(checkpointer, step, params, opt_state):
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        {"params": params, "opt_state": opt_state},
    )
    return checkpointer.load_checkpointables(step, like)


def unverified_save(*args):
    return checkpoint.save(*args, digest=False)


def resume(checkpointer, step, params, opt_state):
    return checkpoint.resume(checkpointer, params, opt_state, step=step)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tmp", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()

    width = 64 * max(1, round((args.mb * 1e6 / 4 / 4 / (12 * 12)) ** 0.5 / 64))
    params = vit(width)
    params, opt_state = jax.jit(lambda p: emaopt.apply_gradients(TX, p, p, TX.init(p)))(params)
    jax.block_until_ready(params)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    total, copy = size((params, opt_state)), size(params)
    root = Path(tempfile.mkdtemp(dir=args.tmp))

    saves = {
        "plain Orbax": plain_save,
        "emaopt, digest=False": unverified_save,
        "emaopt": checkpoint.save,
    }
    loads = {
        "plain Orbax": ("plain Orbax", plain_resume),
        "emaopt, digest=False": ("emaopt, digest=False", resume),
        "emaopt": ("emaopt", resume),
    }
    averages = {
        "plain Orbax, item params": lambda run: ocp.load(
            run / "0",
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
            ),
            checkpointable_name="params",
        ),
        "emaopt": lambda run: checkpoint.restore_averages(run, params),
    }
    seconds, moved = {}, {}

    def timed(key, f, *inputs):
        os.sync()  # what others wrote before is not what is timed
        before = counters()
        start = time.perf_counter()
        jax.block_until_ready(f(*inputs))
        seconds.setdefault(key, []).append(time.perf_counter() - start)
        moved[key] = counters() - before

    try:
        for i in range(args.rounds):
            for name, f in (list(saves.items()) * 2)[i % 3 : i % 3 + 3]:  # each first in turn
                shutil.rmtree(root / name, ignore_errors=True)
                with ocp.training.Checkpointer(root / name) as checkpointer:
                    timed(("save", name), f, checkpointer, 0, params, opt_state)
            for name, (run, f) in loads.items():
                with ocp.training.Checkpointer(root / run) as checkpointer:
                    timed(("resume", name), f, checkpointer, 0, params, opt_state)
            for name, f in averages.items():
                timed(("averages", name), f, root / "emaopt")
    finally:
        shutil.rmtree(root)

    lines = [
        "# What a checkpoint costs",
        "",
        f"{total / 1e9:.2f} GB in {len(jax.tree.leaves((params, opt_state)))} arrays, of which the "
        f"averages are {copy / 1e9:.3f} GB; medians of {args.rounds} interleaved rounds: of the "
        "seconds, and of the ratios within each round.",
        "",
        "| | | seconds | / plain Orbax | GB read | GB written |",
        "|---|---|---|---|---|---|",
    ]
    first = {"save": "plain Orbax", "resume": "plain Orbax", "averages": "plain Orbax, item params"}
    for (what, name), times in seconds.items():
        pairs = zip(times, seconds[what, first[what]], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        read, written = moved[what, name] / 1e9
        lines.append(
            f"| {what} | {name} | {statistics.median(times):.2f} | {ratio:.2f} | {read:.3f} | "
            f"{written:.3f} |"
        )
    pairs = zip(seconds["save", "emaopt"], seconds["save", "emaopt, digest=False"], strict=True)
    share = statistics.median(1 - b / a for a, b in pairs)
    read = moved["averages", "emaopt"][0] / copy
    lines += [
        "",
        f"The digests take {share:.0%} of the save, in the median round. `restore_averages` reads "
        f"{read:.3f} times the bytes of the averages.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "checkpoint.md").write_text(text)


if __name__ == "__main__":
    main()
