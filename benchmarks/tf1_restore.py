"""TensorFlow 1.15.5 restores what `emaopt.tf1.save` wrote, and trains on from there.

    python benchmarks/tf1_restore.py TF1_PYTHON

TF1_PYTHON is a Python 3.7 with TensorFlow 1.15.5 (`tests/golden/make.py` says how to make one).
Each run of `tests/golden/checkpoints` is trained to step 20 by TensorFlow, from there to step 30 in
JAX, saved, restored by TensorFlow's own `Saver` or `swapping_saver`, and trained to step 40. The
table has the distance to TensorFlow's run without the detour: the largest of all variables, slots
and averages, as a fraction of the largest value of each.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np


GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
SAVED, HANDED_BACK, STEPS = 20, 30, 40


def in_jax(folder):
    """From step 20 to 30."""
    import jax
    import jax.numpy as jnp
    import optax

    import emaopt
    from emaopt import tf1

    spec = json.loads((GOLDEN / "checkpoints" / "runs.json").read_text())
    arrays = np.load(GOLDEN / "checkpoints" / "runs.npz")
    like = {"mlp": {"dense": {"bias": jnp.zeros(4), "kernel": jnp.zeros((3, 4))}}}
    for run, (kind, hyper) in spec["runs"].items():
        name = {"GradientDescent": "gradient_descent"}.get(kind, kind.lower())
        average = emaopt.ema(emaopt.warmup(spec["decay"]))
        tx = optax.chain(getattr(emaopt, name)(**hyper), average)
        for swapped in (False, True):
            case = run + "_swapped" * swapped
            source = GOLDEN / "checkpoints" / case
            carry = tf1.load(source, like, tx.init(like), swapped=swapped)
            step = jax.jit(lambda c, g, tx=tx: emaopt.apply_gradients(tx, g, *c))
            for t in range(SAVED, HANDED_BACK):
                grads = jax.tree.map(lambda n, t=t: arrays[f"grad/{n}"][t], emaopt.names(like))
                carry = step(carry, grads)
            tf1.save(folder / case / f"model.ckpt-{HANDED_BACK}", *carry, swapped=swapped)


def in_tf1(folder):
    """From step 30 to 40, and the table."""
    import tensorflow as tf
    from helpers import make_checkpoints as made

    arrays = dict(np.load(str(GOLDEN / "checkpoints" / "runs.npz")))
    grads = {n: arrays["grad/" + n] for n in made.SHAPES}
    initial = {n: np.full(shape, np.nan, np.float32) for n, shape in made.SHAPES.items()}
    print("TensorFlow " + tf.__version__)
    print("| optimizer | saver | variables | largest distance after step 40 |\n|---|---|---|---|")
    for run, (kind, hyper) in made.RUNS.items():
        for swapping in (False, True):
            case = run + "_swapped" * swapping
            with tf.Graph().as_default(), made.session() as sess:
                train, feeds, saver = made.graph(kind, hyper, swapping, initial)
                # no initializer is run: what is not restored fails
                saver.restore(sess, tf.train.latest_checkpoint(str(folder / case)))
                for t in range(HANDED_BACK, STEPS):
                    sess.run(train, {feeds[n]: grads[n][t] for n in feeds})
                end = made.values(sess)
            assert end["global_step"] == STEPS
            worst = 0.0
            for name, value in end.items():
                expected = arrays[case + "/" + name]
                np.testing.assert_allclose(
                    value, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=name
                )
                worst = max(worst, np.abs(value - expected).max() / np.abs(expected).max())
            saver_name = "swapping_saver" if swapping else "Saver"
            print(f"| {run} | {saver_name} | {len(end)} | {worst:.1e} |")


def main():
    if sys.argv[1] == "--restore":
        in_tf1(pathlib.Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        in_jax(pathlib.Path(folder))
        subprocess.run([sys.argv[1], "-W", "ignore", __file__, "--restore", folder], check=True)


if __name__ == "__main__":
    main()
