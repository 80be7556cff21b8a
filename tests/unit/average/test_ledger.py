"""What is known of an average: the ledger against the weights themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


DECAYS = {
    "constant": 0.99,
    "warmup": emaopt.warmup(0.999),
    "power": emaopt.power(6.94),
    "every": emaopt.every(7, 0.99),
    "after": emaopt.after(100, 0.9),
    "never": 1.0,
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(mean, updates):
    update = lambda t, state: mean.update(jnp.float32(t), state)
    return jax.lax.fori_loop(1, updates + 1, update, mean.init(jnp.float32(0)))


@pytest.mark.many(2)
@pytest.mark.parametrize("updates", [1, 2, 500])
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_it_describes_the_weights_of_the_average(decay, updates):
    known = emaopt.ledgers(run(emaopt.moving_average(decay, ledger=True), updates))["ema"]
    weights = emaopt.profile(decay, updates)
    ages = updates - np.arange(updates + 1)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    close(known["initial_weight"], weights[0], atol=1e-35)
    close(known["mean_age"], weights @ ages, atol=1e-6)
    close(known["effective_window"], 1 / (weights @ weights))


def test_it_is_right_after_many_updates_of_a_long_average():
    known = emaopt.ledgers(run(emaopt.moving_average(0.99999, ledger=True), 10**6))["ema"]
    kept = 1 - float(1 - np.float32(0.99999))
    np.testing.assert_allclose(known["mean_age"], kept / (1 - kept) * (1 - kept**10**6), rtol=1e-6)
    square = (1 - kept) / (1 + kept) + kept ** (2 * 10**6) * 2 * kept / (1 + kept)
    np.testing.assert_allclose(known["effective_window"], 1 / square, rtol=1e-6)


@pytest.mark.many(1)
@pytest.mark.parametrize("kind", [None, emaopt.compensated(), emaopt.stochastic()])
def test_it_is_float32_in_double_precision_too(kind, x64):
    mean = emaopt.moving_average(emaopt.half_life(3), accumulator_dtype=kind, ledger=True)
    state = mean.init(jnp.ones(2))
    for ledger in (state.ledger, mean.update(jnp.ones(2), state).ledger):
        assert {x.dtype for x in ledger} == {jnp.dtype(jnp.float32)}


def test_it_has_room_for_more_parameters_than_32_bits_count():
    mean = emaopt.moving_average(0.9, ledger=True)
    values = jax.ShapeDtypeStruct((3, 2**30), jnp.float32)
    state = jax.eval_shape(mean.init, values)
    assert jax.eval_shape(mean.update, values, state) == state


def test_num_updates_counts():
    mean = emaopt.moving_average(emaopt.warmup(0.999), ledger=True)
    state = mean.update(1.0, mean.init(0.0), num_updates=40)
    known = emaopt.ledgers(state)["ema"]
    np.testing.assert_allclose(known["initial_weight"], 41 / 50, rtol=1e-6)


def test_every_average_with_a_ledger_is_described_by_its_name():
    tx = optax.named_chain(
        ("sgd", optax.sgd(0.1)),
        ("fast", emaopt.ema(0.9, ledger=True)),
        ("slow", optax.masked(emaopt.ema(0.99, ledger=True), {"w": True, "b": False})),
        ("plain", emaopt.ema(0.5)),
    )
    params = {"w": jnp.ones(2), "b": jnp.ones(3)}

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state, emaopt.ledgers(state)

    *_, known = step(params, tx.init(params))
    assert list(known) == ["fast", "slow"]
    np.testing.assert_allclose(known["fast"]["initial_weight"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(known["slow"]["initial_weight"], 0.99, rtol=1e-6)


@pytest.mark.slow
def test_it_counts_the_steps_that_were_made():
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), emaopt.ema(0.9, ledger=True)), 3)
    params = jnp.ones(2)
    state = tx.init(params)
    for _ in range(7):
        with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps mixes dtypes
            _, state = tx.update(params, state, params)
    (known,) = emaopt.ledgers(state).values()
    np.testing.assert_allclose(known["initial_weight"], 0.81, rtol=1e-6)


def test_without_a_ledger_the_error_says_how_to_have_one():
    with pytest.raises(ValueError, match=r"no ledger\. Make .*ema\(decay, ledger=True\)"):
        emaopt.ledgers(emaopt.ema(0.9).init({"w": jnp.ones(2)}))


@pytest.mark.parametrize("ledger", [True, False])
def test_the_state_of_an_average_without_or_with_one_is_refused(ledger):
    state = emaopt.moving_average(0.9, ledger=not ledger).init(1.0)
    with pytest.raises(ValueError, match=r"state has (no|a) ledger.*ledger=True"):
        emaopt.moving_average(0.9, ledger=ledger).update(1.0, state)


def test_a_checkpoint_of_the_first_version_is_resumed(tmp_path):
    tx = optax.chain(optax.sgd(0.1), emaopt.ema(0.9, ledger=True))
    params = {"w": jnp.ones(3)}
    _, opt_state = tx.update(params, tx.init(params), params)
    average = opt_state[1]
    fields = ("initial", "age", "square", "stalled", "lost_initial", "lost_age", "lost_square")
    old = average._replace(ledger={x: getattr(average.ledger, x) for x in fields})
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, params, (opt_state[0], old))
        found = checkpoint.resume(checkpointer, params, tx.init(params))[:2]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves((params, opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)
