"""The steps of TensorFlow 1.15.5, for speed.py: one for every line that it is sent."""
# ruff: noqa: B905 (zip has no strict= in Python 3.7)

import json
import sys
import time

import tensorflow as tf


def main():
    settings = json.loads(sys.argv[1])
    for i, shape in enumerate(settings["shapes"]):
        tf.compat.v1.get_variable("w" + str(i), initializer=tf.ones(shape))
    params = tf.compat.v1.trainable_variables()
    average = tf.train.ExponentialMovingAverage(settings["decay"])
    if settings["momentum"] is None:
        step = average.apply(params)
    else:
        grads = [tf.Variable(p.initial_value * 1e-3, trainable=False) for p in params]
        optimizer = tf.compat.v1.train.MomentumOptimizer(settings["rate"], settings["momentum"])
        with tf.control_dependencies([optimizer.apply_gradients(zip(grads, params))]):
            step = average.apply(params)
    threads = settings["threads"]
    config = tf.compat.v1.ConfigProto(
        intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads
    )
    with tf.compat.v1.Session(config=config) as session:
        session.run(tf.compat.v1.global_variables_initializer())
        run = session.make_callable(step)
        print(json.dumps({"tensorflow": tf.__version__}), flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            run()
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
