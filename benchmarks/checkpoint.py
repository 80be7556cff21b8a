"""What swapping, digests and finding the averages cost, beside plain Orbax on the same tree.

    python benchmarks/checkpoint.py            # about 1 GB, 4 GB of disk, under 3 minutes
    python benchmarks/checkpoint.py --mb 100
    python benchmarks/checkpoint.py --tmp /dev/shm --rounds 13    # what is published

A disk that others use too makes the same round twice as slow as another. A file system in memory
does not, and makes the ratios larger, not smaller: plain Orbax is fastest there.

Parameters, their average and Adam's two slots, ViT-B shaped (152 arrays per copy), float32. Every
round runs each variant once, in one process with a warm page cache, and each is the first in turn;
one round before them is not counted. A row of the table is one round: the one whose ratio is the
median. So its seconds and its ratio belong together. Writes `results/checkpoint.md`.
"""

import argparse
import os
import shutil
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
    parser.add_argument("--rounds", type=int, default=7, help="odd, for there to be a median")
    parser.add_argument("--tmp", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()

    width = 64 * max(1, round((args.mb * 1e6 / 4 / 4 / (12 * 12)) ** 0.5 / 64))
    params = vit(width)
    params, opt_state = jax.jit(lambda p: emaopt.apply_gradients(TX, p, p, TX.init(p)))(params)
    jax.block_until_ready(params)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    total, copy = size((params, opt_state)), size(params)
    leaves = jax.tree.leaves((params, opt_state))
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

    def in_turn(variants, i):
        """The variants, another one first in each round."""
        start = i % len(variants)
        return (list(variants.items()) * 2)[start : start + len(variants)]

    try:
        for i in range(args.rounds + 1):
            for name, f in in_turn(saves, i):
                shutil.rmtree(root / name, ignore_errors=True)
                with ocp.training.Checkpointer(root / name) as checkpointer:
                    timed(("save", name), f, checkpointer, 0, params, opt_state)
            for name, (run, f) in in_turn(loads, i):
                with ocp.training.Checkpointer(root / run) as checkpointer:
                    timed(("resume", name), f, checkpointer, 0, params, opt_state)
            for name, f in in_turn(averages, i):
                timed(("averages", name), f, root / "emaopt")
    finally:
        shutil.rmtree(root)

    what = f"`--tmp {args.tmp}`: {total / 1e9:.2f} GB in {len(leaves)} arrays"
    text = table(seconds, moved, what, copy)
    print(text)
    (RESULTS / "checkpoint.md").write_text(f"# What a checkpoint costs\n\n{text}")


def table(seconds, moved, what, copy):
    """The table: of each variant the round whose ratio to plain Orbax's seconds is the median."""
    rounds = len(next(iter(seconds.values()))) - 1
    lines = [
        f"{what}, of which the averages are {copy / 1e9:.3f} GB. Of {rounds} interleaved rounds, "
        "each row is the one whose ratio is the median.",
        "",
        "| | | seconds | plain Orbax, seconds | ratio | least and most | GB read | GB written |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = {what: times[1:] for (what, name), times in seconds.items() if "plain" in name}
    for (action, name), times in seconds.items():
        if "plain" in name:
            continue
        ratios = sorted((a / b, a, b) for a, b in zip(times[1:], plain[action], strict=True))
        ratio, own, other = ratios[len(ratios) // 2]
        read, written = moved[action, name] / 1e9
        lines.append(
            f"| {action} | {name} | {own:.2f} | {other:.2f} | {ratio:.2f} | {ratios[0][0]:.2f} to "
            f"{ratios[-1][0]:.2f} | {read:.3f} | {written:.3f} |"
        )
    read = moved["averages", "emaopt"][0] / copy
    lines += ["", f"`restore_averages` reads {read:.3f} times the bytes of the averages."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
