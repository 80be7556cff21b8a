"""Write what TensorFlow 1.15.5 makes of sparse gradients, into sparse.npz.

    tf1/bin/python tests/golden/make_sparse.py      # `make.py` says how to make this environment

`sparse.json` says what was run: 14 cases of 30 steps on a table [11, 4] and a bias [5], then an
average with the global step as `num_updates`. The gradient of the table is an `IndexedSlices` with
the `indices` and `values` of each step: ids that repeat within a batch, rows that no batch touches,
a row touched with a gradient of zero. These inputs stand in sparse.npz and are read from there; all
that TensorFlow computes is written anew. Row i of an array is read after step i + 1.
"""
# ruff: noqa: B905 (zip has no strict= in Python 3.7)

import json
import pathlib

import numpy as np
import tensorflow as tf


FOLDER = pathlib.Path(__file__).parent
INPUTS = ("init/table", "init/bias", "indices", "values", "grad/bias")
VARIABLES = ("table", "bias")


def optimizer_of(case):
    if case["class"] == "LazyAdamOptimizer":
        return tf.contrib.opt.LazyAdamOptimizer(**case["hyper"])
    return getattr(tf.compat.v1.train, case["class"])(**case["hyper"])


def clipped(case, sparse, bias):
    """Clipped by the global norm; of the sparse gradient before or after its rows are added up."""
    if case["clip_norm"] is None:
        return [sparse, bias], None
    if case["name"].endswith("_unique"):
        ids, positions = tf.unique(sparse.indices)
        summed = tf.math.unsorted_segment_sum(sparse.values, positions, tf.shape(ids)[0])
        sparse = tf.IndexedSlices(summed, ids, sparse.dense_shape)
    return tf.clip_by_global_norm([sparse, bias], case["clip_norm"])


def run(case, inputs):
    """All variables after every step."""
    tf.compat.v1.reset_default_graph()
    variables = [
        tf.compat.v1.get_variable(name, initializer=tf.constant(inputs["init/" + name]))
        for name in VARIABLES
    ]
    ids = tf.compat.v1.placeholder(tf.int32, [None])
    values = tf.compat.v1.placeholder(tf.float32, [None, 4])
    bias = tf.compat.v1.placeholder(tf.float32, [5])
    sparse = tf.IndexedSlices(values, ids, tf.constant([11, 4]))
    step = tf.compat.v1.train.get_or_create_global_step()
    optimizer = optimizer_of(case)
    grads, norm = clipped(case, sparse, bias)
    train = optimizer.apply_gradients(zip(grads, variables), global_step=step)
    average = tf.train.ExponentialMovingAverage(case["ema_decay"], num_updates=step)
    with tf.control_dependencies([train]):
        update = average.apply(variables)
    read = {} if norm is None else {"norm": norm}
    for name, variable in zip(VARIABLES, variables):
        read[name] = variable
        read["shadow/" + name] = average.average(variable)
        for slot in case["slots"]:
            read[f"slot/{slot}/{name}"] = optimizer.get_slot(variable, slot)
    rows = []
    config = tf.compat.v1.ConfigProto(inter_op_parallelism_threads=1)
    config.intra_op_parallelism_threads = 1
    with tf.compat.v1.Session(config=config) as session:
        session.run(tf.compat.v1.global_variables_initializer())
        for t in range(case["steps"]):
            fed = {ids: inputs["indices"][t], values: inputs["values"][t]}
            fed[bias] = inputs["grad/bias"][t]
            session.run(update, fed)
            rows.append(session.run(read, fed))
    return {name: np.stack([row[name] for row in rows]) for name in read}


def main():
    cases = json.loads((FOLDER / "sparse.json").read_text())
    with np.load(FOLDER / "sparse.npz") as stored:
        old = dict(stored)
    arrays = {}
    for case in cases:
        inputs = {name: old[case["name"] + "/" + name] for name in INPUTS}
        made = dict(run(case, inputs), **inputs)
        arrays.update({case["name"] + "/" + name: array for name, array in made.items()})
    changed = [name for name in old if not np.array_equal(old[name], arrays.get(name))]
    changed += [name for name in arrays if name not in old]
    print(f"{len(arrays)} arrays, {len(changed)} of them changed: {changed}")
    np.savez_compressed(FOLDER / "sparse.npz", **arrays)


if __name__ == "__main__":
    main()
