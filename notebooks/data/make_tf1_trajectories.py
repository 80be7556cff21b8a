"""Write `tf1_trajectories.npz`, with the real TensorFlow 1.15.5 on Python 3.7.

    tf1/bin/python notebooks/data/make_tf1_trajectories.py

Each optimizer descends a curved valley in two dimensions, and teaches a network of one hidden layer
1000 digits. `OPTIMIZER/valley` has the points, the first one the start; `OPTIMIZER/digits` the loss
of each batch; `OPTIMIZER/read` the share of the other digits that is read right at the end.
`adagrad/small` is the valley with all heights times 1e-4, from a small accumulator.
"""

import pathlib

import numpy as np
import tensorflow as tf


FOLDER = pathlib.Path(__file__).parent
BATCH, TRAINED, STEPS = 50, 1000, 150
OPTIMIZERS = {
    "gradient_descent": lambda: tf.train.GradientDescentOptimizer(0.3),
    "momentum": lambda: tf.train.MomentumOptimizer(0.03, 0.9),
    "nesterov": lambda: tf.train.MomentumOptimizer(0.03, 0.9, use_nesterov=True),
    "adagrad": lambda: tf.train.AdagradOptimizer(0.3),
    "adadelta": lambda: tf.train.AdadeltaOptimizer(0.5, 0.95, 1e-3),
    "adam": lambda: tf.train.AdamOptimizer(0.1, epsilon=0.1),
    "ftrl": lambda: tf.train.FtrlOptimizer(0.3, l1_regularization_strength=0.001),
    "rmsprop": lambda: tf.train.RMSPropOptimizer(0.02, 0.9, 0.9, epsilon=0.1),
}


def session():
    """One thread, so that every run gives the same bits."""
    tf.set_random_seed(0)
    config = tf.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
    sess = tf.Session(config=config)
    sess.run(tf.global_variables_initializer())
    return sess


def valley(optimizer, height=1.0):
    """The points of a descent."""
    tf.reset_default_graph()
    x, y = tf.Variable(-1.2), tf.Variable(2.2)
    descend = optimizer().minimize(height * (0.1 * (1 - x) ** 2 + 0.5 * (y - x * x) ** 2))
    with session() as sess:
        points = [sess.run([x, y])]
        for _ in range(STEPS):
            sess.run(descend)
            points.append(sess.run([x, y]))
    return points


def digits(optimizer, initial, images, labels):
    """The loss of each batch, and the share of the other digits that is read right."""
    tf.reset_default_graph()
    x, y = tf.placeholder(tf.float32, [None, 64]), tf.placeholder(tf.int32, [None])
    w = {name: tf.Variable(value) for name, value in initial.items()}
    hidden = tf.nn.relu(tf.matmul(x, w["hidden/kernel"]) + w["hidden/bias"])
    logits = tf.matmul(hidden, w["output/kernel"]) + w["output/bias"]
    loss = tf.losses.sparse_softmax_cross_entropy(y, logits)
    train = optimizer().minimize(loss)
    losses = []
    with session() as sess:
        for t in range(STEPS):
            rows = np.arange(t * BATCH, (t + 1) * BATCH) % TRAINED
            losses.append(sess.run([loss, train], {x: images[rows], y: labels[rows]})[0])
        guess = sess.run(logits, {x: images[TRAINED:]}).argmax(1)
    return losses, np.mean(guess == labels[TRAINED:])


def main():
    data = np.load(str(FOLDER / "digits.npz"))
    images, labels = data["images"].astype(np.float32) / 16, data["labels"].astype(np.int32)
    rng = np.random.default_rng(0)
    initial = {
        "hidden/kernel": rng.standard_normal((64, 32)) / 8,
        "hidden/bias": np.zeros(32),
        "output/kernel": rng.standard_normal((32, 10)) / 6,
        "output/bias": np.zeros(10),
    }
    initial = {name: value.astype(np.float32) for name, value in initial.items()}
    made = {"initial/" + name: value for name, value in initial.items()}
    for name, optimizer in OPTIMIZERS.items():
        made[name + "/valley"] = np.float32(valley(optimizer))
        losses, read = digits(optimizer, initial, images, labels)
        made[name + "/digits"], made[name + "/read"] = np.float32(losses), read
    small = lambda: tf.train.AdagradOptimizer(0.3, initial_accumulator_value=1e-9)
    made["adagrad/small"] = np.float32(valley(small, 1e-4))
    np.savez_compressed(str(FOLDER / "tf1_trajectories.npz"), **made)


if __name__ == "__main__":
    main()
