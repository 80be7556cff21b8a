"""A real TensorFlow 1 run, taken over in JAX, trained on, and handed back to its own graph.

    python benchmarks/tf1_real_run.py TF1_PYTHON

TF1_PYTHON is a Python 3.7 with TensorFlow 1.15.5 (`tests/golden/make.py` says how to make one). The
run is `DNA_default` of the package `chiron` 0.6.1.1, which pip downloads (53 MB). It is a network
of three residual blocks and three bidirectional LSTMs that reads DNA, trained with Adam to step
158,301, with its graph in a `.meta` file. Each step here is on 4 pieces of a real signal of that
package, with random labels.

1. TensorFlow restores the run and trains it for 10 steps: the reference.
2. `emaopt.tf1.load_partial` takes the run over, with an average beside it. Five times, the
   gradients are those of the run's own graph at the parameters of JAX, and the step is that of
   `emaopt.adam`.
3. `emaopt.tf1.save(like=...)` hands it back. The Saver in the `.meta` file restores it, in the
   graph as it was published, and TensorFlow trains it for five more steps.

The table has the distance to the reference: the largest of all variables, as a fraction of the
largest value of each. Its last row is the reference itself, run a second time.

The graph was built for batches of 300. For training, these sizes are replaced by 4.
"""

import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np


STEPS, BATCH, PUBLISHED, LENGTH, LABELS = 5, 4, 300, 400, 25
RUN = "chiron/model/DNA_default/final.ckpt-158301"
SIGNAL = "chiron/example_data/DNA/output/raw/read1.signal"


def fetch(folder):
    """Download the package, and unpack the run and a signal."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, "chiron==0.6.1.1"], check=True)
    (wheel,) = folder.glob("chiron-*.whl")
    with zipfile.ZipFile(wheel) as package:
        for name in package.namelist():
            if name.startswith(str(pathlib.Path(RUN).parent)) or name == SIGNAL:
                package.extract(name, folder)


# ---- in TensorFlow 1 ---------------------------------------------------------------------------


def with_batches_of_four(path):
    """Read the graph, with another batch size wherever the published one is a constant."""
    import tensorflow as tf
    from tensorflow.core.protobuf import meta_graph_pb2

    def resize(shape):
        sizes = [dim.size for dim in shape.dim]
        for dim in shape.dim:
            if dim.size == PUBLISHED and sizes != [300, 400]:  # a kernel has this shape
                dim.size = BATCH

    meta = meta_graph_pb2.MetaGraphDef()
    meta.ParseFromString(pathlib.Path(path).read_bytes())
    for node in meta.graph_def.node:
        if "_output_shapes" in node.attr:
            del node.attr["_output_shapes"]
        if node.op.startswith("Variable") or "/Initializer/" in node.name:
            continue
        if node.op == "Placeholder":
            for dim in node.attr["shape"].shape.dim:
                dim.size = BATCH if dim.size == PUBLISHED else dim.size
        for key in node.attr:
            resize(node.attr[key].shape)
            resize(node.attr[key].tensor.tensor_shape)
        if node.op == "Const" and node.attr["dtype"].type in (
            tf.int32.as_datatype_enum,
            tf.int64.as_datatype_enum,
        ):
            value = tf.make_ndarray(node.attr["value"].tensor)
            new = np.where(value == PUBLISHED, BATCH, value)
            new = np.where(value == PUBLISHED * LENGTH, BATCH * LENGTH, new).astype(value.dtype)
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(new, shape=value.shape))
    return meta


def opened(folder):
    """Build the graph for training; returns its Saver, the Adam of each variable, and a feeder."""
    import tensorflow as tf

    saver = tf.train.import_meta_graph(with_batches_of_four(folder / (RUN + ".meta")))
    operations = tf.get_default_graph().get_operations()
    adam = {o.inputs[0].op.name: o for o in operations if o.type == "ApplyAdam"}
    places = [o.outputs[0] for o in operations if o.type == "Placeholder"]
    signal = np.array((folder / SIGNAL).read_text().split(), np.float32)
    signal = (signal - signal.mean()) / signal.std()
    where = [(b, t) for b in range(BATCH) for t in range(LABELS)]

    def feed(step):
        start = 1000 + step * BATCH * LENGTH
        values = (
            True,
            signal[start : start + BATCH * LENGTH].reshape(BATCH, LENGTH),
            np.full(BATCH, LENGTH, np.int32),
            np.array(where, np.int64),
            np.random.RandomState(step).randint(0, 4, len(where)).astype(np.int32),
            np.array([BATCH, LABELS], np.int64),
        )
        return dict(zip(places, values))  # noqa: B905 (Python 3.7)

    return saver, adam, feed


def variables(sess):
    import tensorflow as tf

    return {v.op.name: value for v, value in ((v, sess.run(v)) for v in tf.global_variables())}


def in_tf1(what, folder):
    """Run one part in TensorFlow 1."""
    import tensorflow as tf

    if what == "restore":  # the graph as it was published, and its own Saver
        saver = tf.train.import_meta_graph(str(folder / (RUN + ".meta")))
        with tf.Session() as sess:
            try:
                saver.restore(sess, str(folder / "without_like"))
                print("refused without like: no")
            except tf.errors.OpError as error:
                print("refused without like: " + type(error).__name__)
            saver.restore(sess, str(folder / "handed_back"))
            np.savez(str(folder / "restored.npz"), **variables(sess))
        return
    saver, adam, feed = opened(folder)
    with tf.Session() as sess:
        saver.restore(sess, str(folder / ("handed_back" if what == "go_on" else RUN)))
        if what == "gradients":
            one = next(iter(adam.values()))
            print(
                *(repr(float(sess.run(one.inputs[i], feed(0)))) for i in (5, 6, 7, 8)), flush=True
            )
            by_name = {v.op.name: v for v in tf.global_variables()}
            for line in sys.stdin:
                for name, value in np.load(str(folder / "params.npz")).items():
                    by_name[name].load(value, sess)
                grads = {name: o.inputs[9] for name, o in adam.items()}
                np.savez(str(folder / "grads.npz"), **sess.run(grads, feed(int(line))))
                print("done", flush=True)
            return
        for step in range(STEPS, 2 * STEPS) if what == "go_on" else range(2 * STEPS):
            sess.run("Adam", feed(step))
            if step in (STEPS - 1, 2 * STEPS - 1):
                np.savez(str(folder / f"{what}_{step + 1}.npz"), **variables(sess))


# ---- in JAX ------------------------------------------------------------------------------------


def in_jax(folder, tf1_python):
    """Take the run over, train it on the gradients of its own graph, and hand it back."""
    import jax
    import jax.numpy as jnp
    import optax

    import emaopt
    from emaopt import tf1

    found = {v.name: v for v in tf1.inspect(folder / RUN)}
    trained = [name for name in found if f"{name}/Adam" in found]
    params = {name: jnp.zeros(found[name].shape) for name in trained}
    command = [*tf1_python, __file__, "--gradients", str(folder)]
    with subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as graph:
        assert graph.stdin is not None
        assert graph.stdout is not None
        tx = optax.chain(
            emaopt.adam(*map(float, graph.stdout.readline().split())), emaopt.ema(0.999)
        )
        params, opt_state, skipped = tf1.load_partial(folder / RUN, params, tx.init(params))
        print(f"taken over: {len(trained)} parameters at step {emaopt.global_step(opt_state)}")
        print(f"not held: {sum('is not used' in why for why in skipped.values())} variables")
        step = jax.jit(lambda p, s, g: emaopt.apply_gradients(tx, g, p, s))
        for i in range(STEPS):
            np.savez(folder / "params.npz", **{n: np.asarray(x) for n, x in params.items()})
            print(i, file=graph.stdin, flush=True)
            assert graph.stdout.readline() == "done\n"
            params, opt_state = step(params, opt_state, dict(np.load(folder / "grads.npz")))
        graph.stdin.close()
    tf1.save(folder / "handed_back", params, opt_state, like=folder / RUN)
    tf1.save(folder / "without_like", params, opt_state)
    return trained


def distance(folder, name, reference, wanted):
    """The largest distance of some variables to the reference, as a share of the largest value."""
    ours, theirs = (np.load(folder / f"{file}.npz") for file in (name, reference))
    return max(np.abs(ours[n] - theirs[n]).max() / np.abs(theirs[n]).max() for n in wanted)


def main():
    if sys.argv[1].startswith("--"):
        in_tf1(sys.argv[1][2:], pathlib.Path(sys.argv[2]))
        return
    # TensorFlow 1 finds neither these packages nor the switch to the behaviour of TensorFlow 2
    tf1_python = ["env", "-u", "PYTHONPATH", "-u", "TF2_BEHAVIOR", "TF_CPP_MIN_LOG_LEVEL=3"]
    tf1_python += [sys.argv[1], "-W", "ignore"]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        fetch(folder)
        run = lambda what: subprocess.run([*tf1_python, __file__, what, name], check=True)
        run("--reference")
        trained = in_jax(folder, tf1_python)
        run("--restore")
        run("--go_on")
        run("--again")
        slots = [f"{name}/{slot}" for name in trained for slot in ("Adam", "Adam_1")]
        print("\n| after | parameters | slots of Adam | global_step |\n|---|---|---|---|")
        for after, ours, theirs in (
            (f"{STEPS} steps in JAX", "restored", f"reference_{STEPS}"),
            (f"{STEPS} more in TensorFlow", f"go_on_{2 * STEPS}", f"reference_{2 * STEPS}"),
            (
                f"{2 * STEPS} in TensorFlow, once more",
                f"again_{2 * STEPS}",
                f"reference_{2 * STEPS}",
            ),
        ):
            row = [f"{distance(folder, ours, theirs, wanted):.1e}" for wanted in (trained, slots)]
            at = np.load(folder / f"{ours}.npz")["global_step"]
            print(f"| {after} | {' | '.join(row)} | {at} {at.dtype} |")


if __name__ == "__main__":
    main()
