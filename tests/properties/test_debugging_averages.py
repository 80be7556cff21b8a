"""Averages under `jax_debug_nans` and `jax_debug_infs`, op by op, and their derivatives at zero.

These settings look at the result of each operation. So nothing may pass through NaN or infinity,
not even where a `where` takes another value in the end.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt


DECAYS = {
    "constant": 0.9,
    "zero": 0.0,
    "one": 1.0,
    "warmup": emaopt.warmup(0.999),
    "power": emaopt.power(6.94),
    "mean": emaopt.power(0),
    "inverse_gamma": emaopt.inverse_gamma(),
    "half_life": emaopt.half_life(10),
    "debiased": emaopt.debiased(0.99),
    "every": emaopt.every(3, 0.9),
    "after": emaopt.after(2, 0.9),
}
KINDS = {
    "nearest": None,
    "bfloat16": jnp.bfloat16,
    "compensated": emaopt.compensated(),
    "stochastic": emaopt.stochastic(),
}
PARAMS = {"w": jnp.array([0.0, -1.0, 1e-30, 1e19, 3e38])}
UPDATES = {"w": jnp.array([0.0, 1.0, 1e-38, 1e18, -1e30])}


@pytest.fixture(autouse=True)
def debug():
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


def run(tx, params=PARAMS, updates=UPDATES, number=3):
    state = tx.init(params)
    for _ in range(number):
        new, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, new)
    return params, state


@pytest.mark.many(2)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_every_decay_and_every_way_to_store(decay, kind):
    params, state = run(emaopt.ema(decay, accumulator_dtype=kind, ledger=True))
    assert np.isfinite(emaopt.average(params, state)["w"]).all()
    known = emaopt.ledgers(state)["ema"]
    assert all(np.isfinite(x) for x in known.values())


@pytest.mark.many(1)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_what_is_around_an_average(kind):
    average = emaopt.ema(0.5, accumulator_dtype=kind)
    for tx in (
        emaopt.heal(average),
        emaopt.overwrite(2, average),
        emaopt.overwrite(2, emaopt.heal(average)),
        optax.masked(average, {"w": True}),
        emaopt.overwrite(2, emaopt.ema(1.0, accumulator_dtype=kind), outer=optax.sgd(0.5)),
        emaopt.primal(optax.sgd(0.1), average),
        optax.chain(emaopt.gradient_descent(0.1), average),
    ):
        _, state = run(tx, {"w": PARAMS["w"][:4]}, {"w": UPDATES["w"][:4]})
        assert all(np.isfinite(s.shadow["w"]).all() for s in emaopt.averages(state).values())


def test_what_reads_an_average():
    tx = optax.named_chain(("a", emaopt.ema(0.5)), ("b", emaopt.ema(0.9)))
    params, state = run(tx)
    swapped = emaopt.swap(params, state, "a")
    jax.tree.map(np.testing.assert_array_equal, emaopt.swap(*swapped, "a")[0], params)
    assert np.isfinite(emaopt.stacked(params, state)["w"]).all()
    assert emaopt.stalled(params, state, state, "b") > 0
    assert emaopt.averages(emaopt.reset(params, state, "a"))["a"].step == 0
    assert np.isfinite(emaopt.profile(emaopt.power(3), 10)).all()


def test_recalibrated_statistics():
    forward = lambda old, x: {"mean": 0.5 * old["mean"] + 0.5 * jnp.mean(x)}
    batches = [jnp.array([0.0, 0.0]), jnp.array([4.0, 8.0])]
    found = emaopt.recalibrate(forward, {"mean": jnp.array(7.0)}, batches)
    np.testing.assert_allclose(found["mean"], 3)


@pytest.mark.many(4)
@pytest.mark.parametrize("wrap", [lambda tx: tx, emaopt.heal], ids=["ema", "heal"])
@pytest.mark.parametrize("kind", [None, emaopt.compensated()], ids=["nearest", "compensated"])
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_derivatives_of_an_average_at_zero(decay, kind, wrap):
    tx = wrap(emaopt.ema(decay, accumulator_dtype=kind))

    def total(first, update):
        params, state = run(tx, {"w": first}, {"w": update}, number=2)
        return jnp.sum(emaopt.average(params, state)["w"])

    zeros = jnp.zeros(2)
    of_first, of_update = jax.grad(total, (0, 1))(zeros, zeros)
    np.testing.assert_allclose(of_first, 1, rtol=1e-5)  # the weights sum to 1
    assert (of_update >= 0).all()
    assert (of_update <= 2).all()
