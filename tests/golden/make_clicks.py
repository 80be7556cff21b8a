"""Write the TF1 run of a click model into clicks/, with the real TensorFlow 1.15.5.

    tf1/bin/python tests/golden/make_clicks.py      # `make.py` says how to make this environment

A logistic regression on two hashed fields with FtrlOptimizer and L1, whose gradients are sparse,
and an average with the global step as `num_updates`: 40 steps, with a checkpoint after step 20.
`clicks/run.npz` has the batches of all steps, and the variables after step 40.
"""

import pathlib

import numpy as np
import tensorflow as tf


FOLDER = pathlib.Path(__file__).parent / "clicks"
FIELDS = {"user": 500, "page": 200}
STEPS, SAVED, BATCH = 40, 20, 16


def batches():
    """Hashed ids of each field, and clicks that depend on the page."""
    draw = np.random.RandomState(7)
    ids = {
        name: np.minimum(draw.zipf(1.3, (STEPS, BATCH)) * 7 % size, size - 1).astype(np.int32)
        for name, size in FIELDS.items()
    }
    clicks = (draw.rand(STEPS, BATCH) < 0.2 + 0.5 * (ids["page"] % 2)).astype(np.float32)
    return ids, clicks


def main():
    ids, clicks = batches()
    tf.compat.v1.set_random_seed(1)
    logits = bias = tf.compat.v1.get_variable("bias", initializer=tf.zeros([1]))
    tables = {}
    fed = {name: tf.compat.v1.placeholder(tf.int32, [None]) for name in FIELDS}
    for name, size in FIELDS.items():
        start = tf.random.normal([size, 1], stddev=0.01)
        tables[name] = tf.compat.v1.get_variable(name + "/weights", initializer=start)
        logits += tf.nn.embedding_lookup(tables[name], fed[name])[:, 0]
    labels = tf.compat.v1.placeholder(tf.float32, [None])
    loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits))
    step = tf.compat.v1.train.get_or_create_global_step()
    optimizer = tf.compat.v1.train.FtrlOptimizer(0.5, l1_regularization_strength=0.02)
    train = optimizer.minimize(loss, global_step=step)
    average = tf.train.ExponentialMovingAverage(0.99, num_updates=step)
    with tf.control_dependencies([train]):
        update = average.apply([bias, *tables.values()])
    saver = tf.compat.v1.train.Saver()
    config = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=1)
    config.intra_op_parallelism_threads = 1
    FOLDER.mkdir(exist_ok=True)
    with tf.compat.v1.Session(config=config) as session:
        session.run(tf.compat.v1.global_variables_initializer())
        for t in range(STEPS):
            batch = {fed[name]: ids[name][t] for name in FIELDS}
            batch[labels] = clicks[t]
            session.run(update, batch)
            if t + 1 == SAVED:
                path = str(FOLDER / "model.ckpt")
                saver.save(session, path, global_step=step, write_meta_graph=False)
        values = {
            variable.op.name: session.run(variable) for variable in tf.compat.v1.global_variables()
        }
    arrays = {"ids/" + name: x for name, x in ids.items()}
    np.savez_compressed(FOLDER / "run.npz", clicks=clicks, **dict(arrays, **values))


if __name__ == "__main__":
    main()
