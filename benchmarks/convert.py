"""What `emaopt convert` needs: time and memory, for a checkpoint of about 1 GB.

    python benchmarks/convert.py               # about 1 GB; 3 GB of disk for a minute
    python benchmarks/convert.py --blocks 2

A checkpoint of TF1 with a transformer's variables, Adam's slots and the averages, float32, goes to
Orbax and back. Every conversion is a process of its own; its peak of resident memory is what the
system counts at its end. What came back must be the same, bit for bit. Writes
`results/convert.md`.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from helpers import RESULTS


WIDTH, VOCABULARY = 576, 30522
PYTHON = [sys.executable, "-m", "emaopt"]


def transformer(blocks):
    """The shapes of a text encoder's variables, by name."""
    block = {
        "attention/query_key_value/kernel": (WIDTH, 3 * WIDTH),
        "attention/query_key_value/bias": (3 * WIDTH,),
        "attention/output/kernel": (WIDTH, WIDTH),
        "attention/output/bias": (WIDTH,),
        "attention/LayerNorm/gamma": (WIDTH,),
        "attention/LayerNorm/beta": (WIDTH,),
        "intermediate/kernel": (WIDTH, 4 * WIDTH),
        "intermediate/bias": (4 * WIDTH,),
        "output/kernel": (4 * WIDTH, WIDTH),
        "output/bias": (WIDTH,),
        "output/LayerNorm/gamma": (WIDTH,),
        "output/LayerNorm/beta": (WIDTH,),
    }
    layers = {f"layer_{i}/{name}": shape for i in range(blocks) for name, shape in block.items()}
    return {
        "embeddings/words": (VOCABULARY, WIDTH),
        "embeddings/positions": (512, WIDTH),
        **{f"encoder/{name}": shape for name, shape in layers.items()},
    }


def write(prefix, blocks):
    """A checkpoint as a run of TF1 leaves it; its size in bytes."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    values = {
        "beta1_power": np.float32(0.9),
        "beta2_power": np.float32(0.999),
        "global_step": np.int64(1000),
    }
    for name, shape in transformer(blocks).items():
        for ending in ("", "/Adam", "/Adam_1", "/ExponentialMovingAverage"):
            values[name + ending] = rng.standard_normal(shape, np.float32)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(values.values()),
    )
    return sum(value.nbytes for value in values.values())


def run(command):
    """Seconds, and the most memory that the process had, in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return time.perf_counter() - start, used.ru_maxrss * 1024


def same(a, b):
    """Whether two checkpoints hold the same variables, bit for bit."""
    import tensorflow as tf

    a, b = (tf.train.load_checkpoint(str(path)) for path in (a, b))
    shapes, dtypes = a.get_variable_to_shape_map(), a.get_variable_to_dtype_map()
    if (shapes, dtypes) != (b.get_variable_to_shape_map(), b.get_variable_to_dtype_map()):
        return False
    bits = lambda reader, name: np.asarray(reader.get_tensor(name)).tobytes()
    return all(bits(a, name) == bits(b, name) for name in shapes)


def main():
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--tmp", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    # Linux takes the memory of the process that starts another one for memory of that one
    elsewhere = multiprocessing.get_context("spawn").Pool(1)
    root = Path(tempfile.mkdtemp(dir=args.tmp))
    tf1, orbax, back = root / "tf1" / "model.ckpt-1000", root / "orbax", root / "back" / "model"
    try:
        tf1.parent.mkdir()
        total = elsewhere.apply(write, (tf1, args.blocks))
        rows = {
            "start: `import emaopt._commands.convert, tensorflow`": run(
                [sys.executable, "-c", "import emaopt._commands.convert, tensorflow"]
            ),
            "TF1 to Orbax": run([*PYTHON, "convert", tf1, orbax]),
            "Orbax to TF1": run([*PYTHON, "convert", orbax, back]),
        }
        if not elsewhere.apply(same, (tf1, back)):
            raise SystemExit("what came back is not what was converted")
    finally:
        elsewhere.terminate()
        shutil.rmtree(root)

    lines = [
        "# What `emaopt convert` needs",
        "",
        f"{total / 1e9:.2f} GB in {len(transformer(args.blocks)) * 4 + 3} variables; what came "
        "back is the same, bit for bit.",
        "",
        "| | seconds | peak memory, GB | / size |",
        "|---|---|---|---|",
    ]
    for what, (seconds, peak) in rows.items():
        lines.append(f"| {what} | {seconds:.1f} | {peak / 1e9:.2f} | {peak / total:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "convert.md").write_text(text)


if __name__ == "__main__":
    main()
