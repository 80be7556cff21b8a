"""Write `tf1_run/` and `tf1_run.npz`, with the real TensorFlow 1.15.5 on Python 3.7.

    tf1/bin/python notebooks/data/make_tf1_run.py

A network of one hidden layer learns 1000 digits for 200 steps. The checkpoint is that of step 100;
`tf1_run.npz` has the loss of every step, and the averages after the last. `digits.npz` has the
digits: the first 1500 of scikit-learn's, as bytes from 0 to 16.
"""

import pathlib
import shutil

import numpy as np
import tensorflow as tf


FOLDER = pathlib.Path(__file__).parent
BATCH, TRAINED, SAVED, STEPS = 50, 1000, 100, 200


def main():
    digits = np.load(str(FOLDER / "digits.npz"))
    images, labels = digits["images"].astype(np.float32) / 16, digits["labels"].astype(np.int32)

    tf.set_random_seed(1)
    x, y = tf.placeholder(tf.float32, [None, 64]), tf.placeholder(tf.int32, [None])
    hidden = tf.layers.dense(x, 32, tf.nn.relu, name="hidden")
    logits = tf.layers.dense(hidden, 10, name="output")
    loss = tf.losses.sparse_softmax_cross_entropy(y, logits)

    step = tf.train.get_or_create_global_step()
    rate = tf.train.exponential_decay(0.002, step, 50, 0.8, staircase=True)
    opt = tf.train.RMSPropOptimizer(rate, decay=0.9, momentum=0.9, epsilon=0.01)
    ema = tf.train.ExponentialMovingAverage(0.95, num_updates=step)
    with tf.control_dependencies([opt.minimize(loss, step)]):
        train = ema.apply(tf.trainable_variables())

    shutil.rmtree(str(FOLDER / "tf1_run"), ignore_errors=True)
    losses = []
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        for t in range(STEPS):
            rows = np.arange(t * BATCH, (t + 1) * BATCH) % TRAINED
            feed = {x: images[rows], y: labels[rows]}
            losses.append(sess.run([loss, train], feed)[0])
            if t + 1 == SAVED:
                saver = tf.train.Saver(save_relative_paths=True)
                path = str(FOLDER / "tf1_run" / "model.ckpt")
                saver.save(sess, path, SAVED, write_meta_graph=False)
        averages = {v.op.name: sess.run(ema.average(v)) for v in tf.trainable_variables()}
    np.savez_compressed(str(FOLDER / "tf1_run.npz"), loss=np.float32(losses), **averages)


if __name__ == "__main__":
    main()
