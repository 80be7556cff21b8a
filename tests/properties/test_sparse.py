"""TensorFlow 1.15.5 on sparse gradients (`golden/make_sparse.py`): tables, slots, averages.

Within 1e-5 of each value plus 1e-5 of the largest of its tensor. TF1's `AdamOptimizer` moves every
row of a table, so a dense gradient has its numbers, and `take` has those of `LazyAdamOptimizer`.
TF1's `clip_by_global_norm` takes the norm of a sparse gradient before it adds up the rows that
repeat; the norm of the gradient that is applied is another one.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt


GOLDEN = Path(__file__).parent.parent / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "sparse.json").read_text())}
OF_ITS_OWN = {"adam", "momentum_clipped"}
OPTIMIZERS = {
    "GradientDescentOptimizer": emaopt.gradient_descent,
    "MomentumOptimizer": emaopt.momentum,
    "AdagradOptimizer": emaopt.adagrad,
    "AdadeltaOptimizer": emaopt.adadelta,
    "AdamOptimizer": emaopt.adam,
    "LazyAdamOptimizer": emaopt.adam,
    "FtrlOptimizer": emaopt.ftrl,
    "RMSPropOptimizer": emaopt.rmsprop,
}


def arrays_of(name):
    with np.load(GOLDEN / "sparse.npz") as stored:
        return {
            key.removeprefix(f"{name}/"): stored[key]
            for key in stored
            if key.startswith(f"{name}/")
        }


def transformation(case, **options):
    links = [OPTIMIZERS[case["class"]](**case["hyper"])]
    if case["clip_norm"] is not None:
        links.insert(0, emaopt.clip_by_global_norm(case["clip_norm"]))
    return optax.chain(*links, emaopt.ema(emaopt.warmup(case["ema_decay"]), **options))


def summed(table, at, values):
    """A gradient with the rows that repeat added up."""
    return jnp.zeros_like(table).at[at].add(values)


def sparsely(tx):
    def step(params, opt_state, ids, values, bias, **extra):
        tables = {"table": emaopt.rows(ids)}
        small, small_state = emaopt.take((params, opt_state), tables)
        grads = {"table": summed(small["table"], tables["table"].positions, values), "bias": bias}
        updates, small_state = tx.update(grads, small_state, small, **extra)
        small = optax.apply_updates(small, updates)
        return emaopt.put((params, opt_state), (small, small_state), tables)

    return step


def densely(tx):
    def step(params, opt_state, ids, values, bias, **extra):
        grads = {"table": summed(params["table"], ids, values), "bias": bias}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    return step


def run(case, arrays, step, tx, extra=lambda t: {}):
    """All variables after every step, by the names of the arrays."""
    params = {name: jnp.asarray(arrays[f"init/{name}"]) for name in ("table", "bias")}
    opt_state = tx.init(params)
    step, read = jax.jit(step), jax.jit(emaopt.average)
    found = {}
    for t in range(case["steps"]):
        batch = arrays["indices"][t], arrays["values"][t], arrays["grad/bias"][t]
        params, opt_state = step(params, opt_state, *batch, **extra(t))
        trees = {"": params, "shadow/": read(params, opt_state)}
        trees |= {f"slot/{slot}/": emaopt.slot(opt_state, slot) for slot in case["slots"]}
        for prefix, tree in trees.items():
            for name, value in tree.items():
                found.setdefault(prefix + name, []).append(value)
    return {name: np.stack(values) for name, values in found.items()}


def off(got, arrays):
    """How far from TensorFlow's numbers, at the worst place, as a share of what is allowed."""
    worst = 0.0
    for name, values in got.items():
        for value, want in zip(values, arrays[name], strict=True):
            allowed = 1e-5 * (np.abs(want) + np.abs(want).max())
            worst = max(worst, float(np.max(np.abs(value - want) / np.maximum(allowed, 1e-30))))
    return worst


@pytest.mark.many(1)
@pytest.mark.parametrize("name", sorted(CASES.keys() - OF_ITS_OWN))
def test_rows_have_the_numbers_of_tf1s_sparse_kernels(name):
    case, arrays = CASES[name], arrays_of(name)
    tx = transformation(case, rows=emaopt.matching("table"))
    assert off(run(case, arrays, sparsely(tx), tx), arrays) < 0.1


@pytest.mark.slow
def test_tf1s_adam_moves_every_row_as_a_dense_gradient_does():
    case, arrays = CASES["adam"], arrays_of("adam")
    tx = transformation(case)
    assert off(run(case, arrays, densely(tx), tx), arrays) < 0.1
    lazy = transformation(case, rows=emaopt.matching("table"))
    assert off(run(case, arrays, sparsely(lazy), lazy), arrays) > 1000


@pytest.mark.slow
def test_tf1_clips_by_the_norm_of_the_rows_before_they_are_added_up():
    """With that norm given, the numbers are TF1's. `momentum_clipped_unique` has the other norm."""
    case, arrays = CASES["momentum_clipped"], arrays_of("momentum_clipped")
    tx = transformation(case, rows=emaopt.matching("table"))

    def norm(t):
        parts = {"values": arrays["values"][t], "bias": arrays["grad/bias"][t]}
        return {"use_norm": emaopt.global_norm(parts)}

    assert off(run(case, arrays, sparsely(tx), tx, norm), arrays) < 0.1
    assert off(run(case, arrays, sparsely(tx), tx), arrays) > 1000
