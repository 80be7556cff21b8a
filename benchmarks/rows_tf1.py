"""Steps on an embedding table in TensorFlow 1.15.5, for rows.py: some for every line."""

import json
import sys
import time

import numpy as np
import tensorflow as tf


def optimizer_of(name, rate):
    if name == "LazyAdam":
        return tf.contrib.opt.LazyAdamOptimizer(rate)
    if name == "Adagrad":
        return tf.compat.v1.train.AdagradOptimizer(rate)
    return tf.compat.v1.train.MomentumOptimizer(rate, 0.9)


def main():
    settings = json.loads(sys.argv[1])
    with np.load(settings["data"]) as data:
        batches, y = data["ids"], data["y"]
    shape = settings["shape"]
    table = tf.compat.v1.get_variable(
        "table", initializer=tf.random.normal(shape), use_resource=False
    )
    ids = tf.compat.v1.placeholder(tf.int32, [None])
    looked_up = tf.nn.embedding_lookup(table, ids)
    loss = tf.reduce_mean((tf.reduce_sum(looked_up, -1) - tf.constant(y)) ** 2)
    train = optimizer_of(settings["optimizer"], settings["rate"]).minimize(loss)
    if settings["average"]:
        average = tf.train.ExponentialMovingAverage(0.999)
        with tf.control_dependencies([train]):
            train = average.apply([table])
    threads = settings["threads"]
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads
    )
    with tf.compat.v1.Session(config=config) as session:
        session.run(tf.compat.v1.global_variables_initializer())
        run = session.make_callable(train, [ids])
        for batch in batches:
            run(batch)
        print(json.dumps({"tensorflow": tf.__version__}), flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            for i in range(settings["steps"]):
                run(batches[i % len(batches)])
            print((time.perf_counter() - start) / settings["steps"], flush=True)


if __name__ == "__main__":
    main()
