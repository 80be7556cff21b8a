"""Write the checkpoints in `checkpoints/`, with the real TensorFlow 1.15.5 (see `make.py`).

    tf1/bin/python tests/golden/make_checkpoints.py

Each of nine optimizers, with averages, trains 40 steps and is saved after 20, by `Saver` and by
`swapping_saver`: `runs.npz` has all gradients and where the variables are after 40 steps. The other
checkpoints have one thing each that a real one may have.
"""

import json
import pathlib
import shutil

import numpy as np
import tensorflow as tf


FOLDER = pathlib.Path(__file__).parent / "checkpoints"
DECAY = 0.95
SAVED, STEPS = 20, 40
SHAPES = {"mlp/dense/bias": (4,), "mlp/dense/kernel": (3, 4)}
RUNS = {
    "gradient_descent": ("GradientDescent", {"learning_rate": 0.05}),
    "momentum": ("Momentum", {"learning_rate": 0.02, "momentum": 0.8}),
    "nesterov": ("Momentum", {"learning_rate": 0.02, "momentum": 0.8, "use_nesterov": True}),
    "adagrad": ("Adagrad", {"learning_rate": 0.2}),
    "adadelta": ("Adadelta", {"learning_rate": 0.5, "rho": 0.9, "epsilon": 1e-5}),
    "adam": ("Adam", {"learning_rate": 0.02, "beta1": 0.8, "beta2": 0.99}),
    "ftrl": ("Ftrl", {"learning_rate": 0.3, "l1_regularization_strength": 0.02}),
    "rmsprop": ("RMSProp", {"learning_rate": 0.02, "momentum": 0.5, "epsilon": 0.1}),
    "rmsprop_centered": ("RMSProp", {"learning_rate": 0.005, "decay": 0.8, "centered": True}),
}
STREAM = np.random.RandomState(27182)


def optimizer(kind, hyper):
    return getattr(tf.train, kind + "Optimizer")(**hyper)


def session():
    return tf.Session(config=tf.ConfigProto(intra_op_parallelism_threads=1))


def save(saver, sess, name, step):
    folder = FOLDER / name
    folder.mkdir(parents=True)
    saver.save(sess, str(folder / "model.ckpt"), step, write_meta_graph=False)


def saver(**arguments):
    return tf.train.Saver(save_relative_paths=True, **arguments)


def graph(kind, hyper, swapping, initial):
    """The training step, what it is fed by variable, and the saver."""
    step = tf.train.get_or_create_global_step()
    variables = [tf.get_variable(n, initializer=initial[n]) for n in sorted(SHAPES)]
    feeds = {v.op.name: tf.placeholder(tf.float32, v.shape) for v in variables}
    opt, pairs = optimizer(kind, hyper), [(feeds[v.op.name], v) for v in variables]
    if swapping:
        opt = tf.contrib.opt.MovingAverageOptimizer(opt, DECAY, num_updates=step)
        train = opt.apply_gradients(pairs, global_step=step)
        return train, feeds, opt.swapping_saver(save_relative_paths=True)
    ema = tf.train.ExponentialMovingAverage(DECAY, num_updates=step)
    with tf.control_dependencies([opt.apply_gradients(pairs, global_step=step)]):
        train = ema.apply(variables)
    return train, feeds, saver()


def values(sess):
    """All variables by name."""
    return {v.op.name: sess.run(v) for v in tf.global_variables()}


def run(name, kind, hyper, swapping, initial, grads):
    """Train; returns all variables by name after the last step."""
    with tf.Graph().as_default(), session() as sess:
        train, feeds, writer = graph(kind, hyper, swapping, initial)
        sess.run(tf.global_variables_initializer())
        for t in range(STEPS):
            sess.run(train, {feeds[n]: grads[n][t] for n in feeds})
            if t + 1 == SAVED:
                save(writer, sess, name, SAVED)
        return values(sess)


def extra(name, build, steps=3, variables=tf.global_variables, **saving):
    """Save what `build` makes: it returns the tensors to run for a step, and those to record."""
    with tf.Graph().as_default(), session() as sess:
        tf.set_random_seed(5)
        train, recorded = build(tf.train.get_or_create_global_step())
        sess.run(tf.global_variables_initializer())
        for _ in range(steps):
            sess.run(train)
        save(saver(var_list=variables(), **saving), sess, name, steps)
        return {name + "/" + k: sess.run(x) for k, x in recorded.items()}


def averaged(opt, loss, step, **arguments):
    """A step of training, and the averages of all that is trained."""
    ema = tf.train.ExponentialMovingAverage(0.5, **arguments)
    with tf.control_dependencies([opt.minimize(loss, step)]):
        return ema.apply(tf.trainable_variables()), ema


def of_dtype(dtype):
    def build(step):
        w = tf.Variable(np.array([1.0, -0.3, 1e-3]), dtype=dtype, name="w")
        loss = tf.reduce_sum(tf.square(w)) / 7
        return averaged(optimizer(*RUNS["momentum"]), loss, step)[0], {}

    return build


def no_average(step):
    w = tf.get_variable("w", initializer=np.float32([1, 2, 3]))
    return optimizer(*RUNS["adam"]).minimize(tf.reduce_sum(w * w), step), {"w": w}


def other_name(step):
    w = tf.get_variable("w", initializer=np.float32([1, 2, 3]))
    train, ema = averaged(optimizer(*RUNS["adam"]), tf.reduce_sum(w * w), step, name="slow")
    return train, {"w": w, "average": ema.average(w)}


def partitioned(step):
    cut = tf.fixed_size_partitioner(2)
    w = tf.get_variable("w", (5, 3), initializer=tf.random_normal_initializer(), partitioner=cut)
    train, _ = averaged(optimizer(*RUNS["adam"]), tf.reduce_sum(tf.square(w)), step)
    return train, {"w": tf.convert_to_tensor(w)}


def parts_by_name():
    return {v.op.name: v for v in tf.global_variables() if "part" in v.op.name}


IMAGES = STREAM.normal(size=(2, 6, 6, 3)).astype(np.float32)


def trained(logits, step):
    updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
    loss = tf.losses.sparse_softmax_cross_entropy([0, 1], logits)
    with tf.control_dependencies(updates):
        return averaged(optimizer(*RUNS["momentum"]), loss, step)[0]


def layers(step):
    def net(x, training, reuse=None):
        with tf.variable_scope("net", reuse=reuse):
            return forward(x, training)

    def forward(x, training):
        x = tf.layers.conv2d(x, 4, 3, padding="same", name="conv2d")
        x = tf.layers.batch_normalization(x, training=training, name="batch_normalization")
        x = tf.nn.relu(x)
        kernel = tf.get_variable("depthwise/kernel", (3, 3, 4, 2))
        x = tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "SAME")
        x = tf.layers.flatten(tf.nn.relu(x))
        x = tf.nn.relu(tf.layers.dense(x, 5, name="dense"))
        return tf.layers.dense(x, 2, name="dense_1")

    return trained(net(IMAGES, True), step), {"logits": net(IMAGES, False, True)}


def slim(step):
    slim = tf.contrib.slim

    def net(x, training, reuse=None):
        norm = {"is_training": training, "scale": True, "decay": 0.9}
        with tf.variable_scope("Net", reuse=reuse):
            with slim.arg_scope(
                [slim.conv2d], normalizer_fn=slim.batch_norm, normalizer_params=norm
            ):
                x = slim.conv2d(x, 4, [3, 3], scope="Stem")
            x = slim.separable_conv2d(x, None, [3, 3], 2, scope="Separable")
            return slim.fully_connected(slim.flatten(x), 2, activation_fn=None)

    return trained(net(IMAGES, True), step), {"logits": net(IMAGES, False, True)}


def main():
    shutil.rmtree(str(FOLDER), ignore_errors=True)
    initial = {n: STREAM.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    scale = 10.0 ** STREAM.uniform(-2, 0.5, size=STEPS)
    grads = {
        n: np.stack([STREAM.normal(size=s) * x for x in scale]).astype(np.float32)
        for n, s in SHAPES.items()
    }
    arrays = {"grad/" + n: g for n, g in grads.items()}
    arrays.update({"init/" + n: x for n, x in initial.items()})
    for name, (kind, hyper) in RUNS.items():
        for suffix in ("", "_swapped"):
            end = run(name + suffix, kind, hyper, bool(suffix), initial, grads)
            arrays.update({name + suffix + "/" + n: x for n, x in end.items()})
    arrays["images"] = IMAGES
    for name, build in {
        "float16": of_dtype(tf.float16),
        "bfloat16": of_dtype(tf.bfloat16),
        "float64": of_dtype(tf.float64),
        "no_average": no_average,
        "version_1": no_average,
        "other_name": other_name,
        "partitioned": partitioned,
        "layers": layers,
        "slim": slim,
    }.items():
        version = tf.train.SaverDef.V1 if name == "version_1" else tf.train.SaverDef.V2
        arrays.update(extra(name, build, write_version=version))
    extra("parts_by_name", partitioned, variables=parts_by_name)
    np.savez_compressed(str(FOLDER / "runs.npz"), **arrays)
    runs = {"decay": DECAY, "runs": RUNS}
    (FOLDER / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
