"""The share of elements that rounding holds still."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt


def test_stalled_is_the_share_that_rounding_held():
    mean = emaopt.moving_average(0.9999)
    value = {"w": jnp.array([1 + 1e-4, 1.1, 1.0, 2.0]), "n": jnp.arange(7), "none": None}
    before = mean.init({"w": jnp.ones(4), "n": jnp.arange(7), "none": None})
    assert emaopt.stalled(value, before, mean.update(value, before)) == 0.25


def test_a_residue_that_moves_is_not_held():
    value, first = jnp.full(4, 1 + 1e-6), jnp.ones(4)
    for kind, expected in ((None, 1), (emaopt.compensated(), 0)):
        mean = emaopt.moving_average(0.9999, accumulator_dtype=kind)
        before = mean.init(first)
        after = mean.update(value, before)
        np.testing.assert_array_equal(before.shadow, after.shadow)
        assert emaopt.stalled(value, before, after) == expected


@pytest.mark.slow
def test_over_many_updates_chance_moves_what_rounding_to_nearest_holds():
    first = jnp.full(1000, 1.0, jnp.bfloat16)
    value = first.astype(jnp.float32) * 1.01
    for kind, low, high in ((jnp.bfloat16, 1, 1), (emaopt.stochastic(), 0, 0.1)):
        mean = emaopt.moving_average(0.999, accumulator_dtype=kind)
        update = jax.jit(lambda t, state, mean=mean: mean.update(value, state), static_argnums=0)
        after = before = mean.init(first)
        for _ in range(2000):
            after = update(0, after)
        assert low <= emaopt.stalled(value, before, after) <= high


def test_stalled_in_a_step_and_of_one_of_several_averages():
    tx = optax.named_chain(
        ("sgd", optax.sgd(0.0)), ("short", emaopt.ema(0.5)), ("long", emaopt.ema(1 - 2**-23))
    )
    params = {"w": jnp.full(4, 1.001)}
    before = tx.init({"w": jnp.ones(4)})

    @jax.jit
    def step(params, opt_state):
        _, after = tx.update(params, opt_state, params)
        return {name: emaopt.stalled(params, opt_state, after, name) for name in ("short", "long")}

    assert step(params, before) == {"short": 0, "long": 1}
    with pytest.raises(ValueError, match="name is missing"):
        emaopt.stalled(params, before, before)


def test_a_leaf_that_is_not_averaged_does_not_count():
    tx = optax.masked(emaopt.ema(0.9999), {"w": True, "b": False})
    before = tx.init({"w": jnp.ones(2), "b": jnp.ones(100)})
    params = {"w": jnp.full(2, 1 + 1e-6), "b": jnp.zeros(100)}
    _, after = tx.update(params, before, jax.tree.map(jnp.zeros_like, params))
    assert emaopt.stalled(params, before, after) == 1
    counts = emaopt.moving_average(0.9)
    state = counts.init({"n": jnp.arange(2)})
    assert emaopt.stalled({"n": jnp.arange(2)}, state, state) == 0
