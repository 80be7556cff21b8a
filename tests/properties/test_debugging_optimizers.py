"""Every function of the optimizers' wing runs op by op under jax_debug_nans and jax_debug_infs.

There each operation is checked for NaN and infinity, also in branches that a `where` does not take.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt


SOME = {"w": jnp.array([[1.0, -2.0], [0.5, 0.0]]), "b": jnp.array([3.0, 4.0])}
ZERO = jax.tree.map(jnp.zeros_like, SOME)
TRANSFORMATIONS = {
    "gradient_descent": emaopt.gradient_descent(emaopt.exponential_decay(0.1, 2, 0.5)),
    "momentum": emaopt.momentum(emaopt.exponential_decay(0.1, 2, 0.5, staircase=True), 0.9),
    "nesterov": emaopt.momentum(0.1, 0.9, use_nesterov=True),
    "adagrad": emaopt.adagrad(0.1),
    "adadelta": emaopt.adadelta(),
    "adam": emaopt.adam(),
    "ftrl": emaopt.ftrl(0.1),
    "ftrl_from_zero": emaopt.ftrl(0.1, initial_accumulator_value=0.0),
    "ftrl_power": emaopt.ftrl(0.1, -0.7, 0.0, 0.1, 0.1, 0.1),
    "ftrl_injected": optax.inject_hyperparams(emaopt.ftrl)(0.1, initial_accumulator_value=0.0),
    "rmsprop": emaopt.rmsprop(0.1),
    "rmsprop_centered": emaopt.rmsprop(0.1, momentum=0.9, centered=True),
    "clip_by_value": emaopt.clip_by_value(-1.0, 1.0),
    "clip_by_norm": emaopt.clip_by_norm(1.0),
    "clip_by_norm_axes": emaopt.clip_by_norm(1.0, axes=-1),
    "clip_by_average_norm": emaopt.clip_by_average_norm(0.1),
    "clip_by_global_norm": emaopt.clip_by_global_norm(1.0),
    "no_clipping": emaopt.clip_by_global_norm(np.inf),
    "on_leaves": emaopt.on_leaves(emaopt.clip_by_norm(1.0)),
}


@pytest.fixture
def checked():
    """Raise at the first NaN or infinity."""
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


@pytest.mark.many(2)
@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("grads", [SOME, ZERO], ids=["some", "zero"])
@pytest.mark.parametrize("pack", [lambda tree: tree, emaopt.pack], ids=["leaves", "packed"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_updates_make_no_nan_and_no_infinity(name, grads, pack):
    if pack is emaopt.pack and "norm" in name and "global" not in name:
        pytest.skip("it treats every leaf by itself")
    tx = TRANSFORMATIONS[name]
    params, packed = pack(SOME), pack(grads)
    state = tx.init(params)
    for _ in range(3):
        params, state = emaopt.apply_gradients(tx, packed, params, state)
    assert jax.tree.structure(emaopt.unpack(params)) == jax.tree.structure(SOME)


@pytest.mark.many(1)
@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_derivatives_of_updates_make_no_nan_and_no_infinity(name):
    tx = TRANSFORMATIONS[name]

    def length(params, grads):
        state = tx.init(params)
        for _ in range(2):
            params, state = emaopt.apply_gradients(tx, grads, params, state)
        return emaopt.global_norm(params)

    for grads in (SOME, ZERO):
        jax.grad(length, (0, 1))(SOME, grads)


@pytest.mark.slow
@pytest.mark.usefixtures("checked")
def test_steps_make_no_nan_and_no_infinity():
    def loss(params, x):
        return jnp.sum((params["w"] @ params["b"] - x) ** 2)

    tx = optax.chain(emaopt.clip_by_global_norm(1.0), emaopt.adam())
    value, grads = emaopt.compute_gradients(loss, ZERO, 0.0)
    assert value == 0
    assert emaopt.global_norm(grads) == 0
    params, state, _ = emaopt.minimize(loss, tx)(jax.tree.map(jnp.copy, SOME), tx.init(SOME), 1.0)
    with jax.disable_jit():
        emaopt.minimize(loss, tx)(params, state, 1.0)
