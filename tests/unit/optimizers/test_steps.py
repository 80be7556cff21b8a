"""compute_gradients, apply_gradients and minimize."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt import apply_gradients, compute_gradients, matching, minimize


PARAMS = {
    "conv": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])},
    "steps": jnp.array([3]),
    "on": jnp.array(True),
    "key": jax.random.key(0),
    "absent": None,
}
NOT_TRAINED = {"steps": None, "on": None, "key": None, "absent": None}


def loss(params, x=1.0):
    return x * (jnp.sum(params["conv"]["kernel"] ** 2) + params["conv"]["bias"][0] ** 2)


def assert_equal(got, expected):
    absent = lambda x: x is None
    assert jax.tree.structure(got, is_leaf=absent) == jax.tree.structure(expected, is_leaf=absent)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_gradients_are_those_of_jax_where_there_can_be_one():
    value, grads = compute_gradients(loss, PARAMS, 10.0)
    assert value == 52.5
    assert_equal(
        grads,
        {"conv": {"kernel": np.array([20.0, -40.0]), "bias": np.array([10.0])}, **NOT_TRAINED},
    )


@pytest.mark.parametrize(
    "var_list",
    [
        matching("kernel$"),
        matching("kernel$")(PARAMS),
        {
            "conv": {"kernel": np.True_, "bias": np.False_},
            "steps": True,
            "on": False,
            "key": True,
            "absent": None,
        },
        {
            "conv": {"kernel": True, "bias": None},
            "steps": None,
            "on": None,
            "key": None,
            "absent": None,
        },
    ],
    ids=["function", "tree", "numpy", "none"],
)
def test_leaves_outside_var_list_have_no_gradient(var_list):
    _, grads = compute_gradients(loss, PARAMS, var_list=var_list)
    assert_equal(grads, {"conv": {"kernel": np.array([2.0, -4.0]), "bias": None}, **NOT_TRAINED})


def test_a_loss_of_many_elements_counts_as_their_sum():
    value, grads = compute_gradients(lambda p: p**2, jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(value, [1.0, 4.0, 9.0])
    np.testing.assert_array_equal(grads, [2.0, 4.0, 6.0])


@pytest.mark.parametrize("grad_loss", [[1.0, 0.0, -2.0], np.array([1, 0, -2])])
def test_grad_loss_is_the_gradient_coming_in(grad_loss):
    _, grads = compute_gradients(lambda p: p**2, jnp.array([1.0, 2.0, 3.0]), grad_loss=grad_loss)
    np.testing.assert_array_equal(grads, [2.0, 0.0, -12.0])


@pytest.mark.parametrize("var_list", [None, matching("conv")])
def test_aux_comes_beside_the_value(var_list):
    with_aux = lambda params, x: (loss(params, x), {"seen": x, "steps": params["steps"]})
    (value, aux), grads = compute_gradients(with_aux, PARAMS, 10.0, var_list=var_list, has_aux=True)
    assert value == 52.5
    assert (aux["seen"], aux["steps"][0]) == (10.0, 3)
    assert_equal(grads, compute_gradients(loss, PARAMS, 10.0)[1])


def test_the_gradient_has_the_dtype_of_its_parameter():
    params = {"half": jnp.bfloat16(2), "float": jnp.float32(3)}
    product = lambda p: p["half"].astype(jnp.float32) * p["float"]
    _, grads = compute_gradients(product, params)
    assert_equal(grads, {"half": jnp.bfloat16(3), "float": jnp.float32(2)})
    assert grads["half"].dtype == jnp.bfloat16


def test_python_numbers_are_parameters_too():
    value, grads = compute_gradients(lambda p: p["a"] * p["b"], {"a": 2.0, "b": 3})
    assert (value, grads) == (6.0, {"a": 3.0, "b": None})


def test_gradients_under_jit_are_the_same():
    arrays = {"conv": PARAMS["conv"], "steps": PARAMS["steps"]}
    jitted = jax.jit(lambda p: compute_gradients(loss, p, var_list=matching("conv")))
    assert_equal(jitted(arrays), compute_gradients(loss, arrays))


def test_apply_gradients_is_one_step_of_the_transformation():
    tx = emaopt.momentum(0.5, 0.9)
    params = PARAMS["conv"]
    grads = {"kernel": jnp.array([2.0, 4.0]), "bias": jnp.array([1.0])}
    new, state = apply_gradients(tx, grads, params, tx.init(params))
    assert_equal(new, {"kernel": np.array([0.0, -4.0]), "bias": np.array([0.0])})
    assert_equal(state.slots["momentum"], grads)


@pytest.mark.parametrize(
    "tx",
    [emaopt.momentum(0.5, 0.9), emaopt.adam(0.5), optax.sgd(0.5), emaopt.clip_by_norm(1.0)],
    ids=["momentum", "adam", "sgd", "clip"],
)
def test_a_leaf_without_a_gradient_stays_bitwise(tx):
    params = {"a": jnp.array([-0.0, np.nan, 1e-45]), "b": jnp.array([1.0]), "n": jnp.array(7)}
    masked = optax.masked(tx, {"a": True, "b": True, "n": False})
    state = masked.init(params)
    grads = {"a": None, "b": jnp.array([1.0]), "n": None}
    new, new_state = apply_gradients(masked, grads, params, state)
    assert (np.asarray(new["a"]).view(np.int32) == np.asarray(params["a"]).view(np.int32)).all()
    assert new["n"] == 7
    assert new["b"] != params["b"]
    for slot in getattr(state.inner_state, "slots", {}).values():
        assert not slot["a"].any()
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_an_absent_gradient_and_one_that_jax_calls_float0_leave_integers_and_keys():
    params = {"w": jnp.float32(1), "n": jnp.array(7), "key": jax.random.key(1)}
    tx = optax.identity()
    float0 = np.zeros((), jax.dtypes.float0)
    grads = {"w": jnp.float32(2), "n": float0, "key": float0}
    new, _ = apply_gradients(tx, grads, params, tx.init(params))
    assert (new["w"], new["n"], new["key"]) == (3, 7, jax.random.key(1))


@pytest.fixture
def traces():
    """A loss that counts how often it is traced."""
    seen = []

    def counted(params, x):
        seen.append(x)
        return jnp.sum((params["w"] - x) ** 2) + params["b"] ** 2

    counted.seen = seen
    return counted


def fresh():
    return {"w": jnp.array([1.0, 2.0]), "b": jnp.array(3.0, jnp.float32)}


def recipe():
    rate = emaopt.exponential_decay(0.1, 2, 0.5, staircase=True)
    return optax.chain(
        emaopt.clip_by_global_norm(1.0),
        emaopt.momentum(rate, 0.9),
        emaopt.ema(emaopt.warmup(0.9)),
    )


def test_minimize_is_compute_and_apply_with_the_average_moved(traces):
    tx = recipe()
    step = minimize(traces, tx)
    params, state = fresh(), tx.init(fresh())
    expected_params, expected_state = fresh(), tx.init(fresh())
    for x in (1.0, -2.0, 3.0):
        params, state, value = step(params, state, x)
        expected, grads = compute_gradients(traces, expected_params, x)
        expected_params, expected_state = apply_gradients(
            tx, grads, expected_params, expected_state
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        (params, state),
        (expected_params, expected_state),
    )
    assert emaopt.global_step(state) == 3


def test_minimize_compiles_once(traces):
    tx = recipe()
    step = minimize(traces, tx)
    params, state = fresh(), tx.init(fresh())
    for x in (1.0, 2.0, 3.0):
        params, state, _ = step(params, state, x)
    assert len(traces.seen) == 1


def test_minimize_takes_over_the_buffers_that_it_is_given(traces):
    tx = recipe()
    params, state = fresh(), tx.init(fresh())
    kept = fresh()
    step = minimize(traces, tx)
    new_params, new_state, _ = step(params, state, 1.0)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((new_params, new_state, kept)))


def test_minimize_trains_var_list_only():
    tx = optax.chain(emaopt.adam(0.1), emaopt.ema(0.5))
    step = minimize(lambda p: p["w"][0] * p["b"], tx, var_list=matching("w"))
    params, state, _ = step(fresh(), tx.init(fresh()))
    np.testing.assert_array_equal(params["b"], fresh()["b"])
    assert params["w"][0] < fresh()["w"][0]
    assert emaopt.slot(state, "m")["b"] == 0
    np.testing.assert_array_equal(emaopt.average(params, state)["b"], params["b"])


def test_minimize_gives_aux_beside_the_value():
    tx = emaopt.gradient_descent(0.5)
    step = minimize(lambda p, x: (p["b"] * x, p["w"] + x), tx, has_aux=True)
    params, _, (value, aux) = step(fresh(), tx.init(fresh()), 2.0)
    assert (params["b"], value) == (2.0, 6.0)
    np.testing.assert_array_equal(aux, [3.0, 4.0])


def test_training_reaches_the_minimum():
    tx = optax.chain(emaopt.adam(0.1), emaopt.ema(emaopt.power(2.0)))
    step = minimize(lambda p, x: jnp.sum((p["w"] - x) ** 2) + p["b"] ** 2, tx)
    params, state = fresh(), tx.init(fresh())
    for _ in range(300):
        params, state, _ = step(params, state, 5.0)
    averaged = emaopt.average(params, state)
    np.testing.assert_allclose(averaged["w"], [5.0, 5.0], atol=0.02)
    np.testing.assert_allclose(averaged["b"], 0, atol=0.02)
