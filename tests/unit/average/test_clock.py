"""A clock in samples or tokens: `update(..., advance=n)`."""

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt import after, debiased, every, half_life, moving_average, power, warmup


# a batch ramp from 64 to 512 tokens, and a batch that is not a full one
RAMP = [64] * 40 + [128] * 30 + [256] * 20 + [512] * 20 + [37]
TOKENS = sum(RAMP)
EXACT = {
    "power(0)": power(0),
    "power(6.94)": power(6.94),
    "half_life(3000)": half_life(3000),
    "debiased(half_life(3000))": debiased(half_life(3000)),
    "after(5000, power(0))": after(5000, power(0)),
    "every(1000, half_life(3000))": every(1000, half_life(3000)),
    "every(1000, power(6.94))": every(1000, power(6.94)),
    "debiased(every(1000, 0.9999))": debiased(every(1000, 0.9999)),
    "0.9999": 0.9999,
}


def weights(decay, advances, **arguments):
    """The weights that an average gives to the initial value and to each update."""
    mean = moving_average(decay, **arguments)
    values = jnp.eye(len(advances) + 1)

    def step(state, pair):
        value, advance = pair
        return mean.update(value, state, advance=advance), None

    pairs = values[1:], jnp.array(advances)
    return jax.jit(lambda: jax.lax.scan(step, mean.init(values[0]), pairs)[0])()


def ideal(decay, advances):
    """The same where each token is an update of its own, with the parameters of its batch."""
    of_tokens = emaopt.profile(decay, sum(advances))
    batch = np.repeat(np.arange(1, len(advances) + 1), advances)
    return np.bincount(np.append(0, batch), of_tokens)


@pytest.mark.many(1)
@pytest.mark.parametrize("decay", EXACT)
def test_a_batch_ramp_has_the_profile_of_single_tokens(decay):
    state = weights(EXACT[decay], RAMP)
    assert state.step == TOKENS
    assert np.abs(state.shadow - ideal(EXACT[decay], RAMP)).sum() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("decay", [warmup(0.999), lambda t: 1 - 8 / (t + 8)])
def test_a_ramp_or_a_function_is_taken_for_constant_over_a_batch(decay):
    found = weights(decay, RAMP).shadow
    assert np.abs(found - ideal(decay, RAMP)).sum() < 0.15
    assert np.abs(found - weights(decay, [1] * len(RAMP)).shadow).sum() > 0.5


def test_every_fires_when_t_passes_a_multiple():
    mean = moving_average(every(1000, half_life(1000)))
    state, fired = mean.init(jnp.zeros(())), []
    for _ in range(20):
        before = state
        state = mean.update(jnp.ones(()), state, advance=256)
        if state.shadow != before.shadow:
            fired.append(int(state.step))
    assert fired == [1024, 2048, 3072, 4096, 5120]


def test_a_half_life_in_tokens_holds_for_batches_of_any_length():
    mean = moving_average(half_life(1000.0))
    state = mean.init(jnp.zeros(()))
    for tokens in (500, 2000, 100):
        state = mean.update(jnp.ones(()), state, advance=tokens)
    np.testing.assert_allclose(state.shadow, 1 - 0.5**2.6, rtol=1e-6)


def test_an_advance_of_1_is_an_update_bit_for_bit():
    ones = [1] * 30
    for decay in (0.9, warmup(0.99), power(3)):
        mean = moving_average(decay, ledger=True)
        plain, counted = mean.init(jnp.float32(3)), mean.init(jnp.float32(3))
        for value in ones:
            plain = mean.update(jnp.float32(value), plain)
            counted = mean.update(jnp.float32(value), counted, advance=1)
        assert jax.tree.leaves(plain) == jax.tree.leaves(counted)


@pytest.mark.slow
def test_an_advance_of_nothing_leaves_the_average():
    for decay in (*EXACT.values(), warmup(0.9)):
        mean = moving_average(decay)
        start = mean.init(jnp.float32(3))
        state = jax.jit(mean.update)(jnp.float32(5), start, advance=jnp.int32(0))
        assert (state.step, state.shadow) == (0, 3)
        state = mean.update(jnp.float32(5), start, advance=0)
        assert (state.step, state.shadow) == (0, 3)


def test_another_advance_does_not_compile_again():
    mean = moving_average(power(7))
    update = compiling.jit(mean.update)
    state = mean.init(jnp.zeros(()))
    for tokens in (3, 5, 8):
        state = update(jnp.ones(()), state, advance=jnp.int32(tokens))
    assert compiling.compilations(update) == 1
    assert state.step == 16


def test_in_a_chain_and_inside_of_multisteps_the_sum_of_the_batches_is_passed():
    chain = optax.chain(optax.sgd(0.5), emaopt.ema(half_life(100)))
    params = {"w": jnp.float32(1)}
    _, plain = chain.update({"w": jnp.float32(2)}, chain.init(params), params, advance=48)
    tx = optax.MultiSteps(chain, every_k_schedule=3)
    opt_state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            _, opt_state = tx.update({"w": jnp.float32(2)}, opt_state, params, advance=48)
    inner = emaopt.averages(opt_state)
    (found,) = inner.values()
    assert found.step == 48
    np.testing.assert_allclose(found.shadow["w"], plain[-1].shadow["w"], rtol=1e-6)
    np.testing.assert_allclose(found.shadow["w"], 1 - (1 - 0.5**0.48), rtol=1e-5)


def test_the_ledger_counts_the_age_in_tokens():
    decay = half_life(3000)
    state = weights(decay, RAMP, ledger=True)
    found = ideal(decay, RAMP)
    age = (TOKENS - np.append(0, np.cumsum(RAMP))) @ found
    np.testing.assert_allclose(state.ledger.age, age, rtol=1e-4)
    np.testing.assert_allclose(state.ledger.square, (found**2).sum(), rtol=1e-4)
    np.testing.assert_allclose(state.ledger.initial, found[0], rtol=1e-4)


def test_overwriting_is_due_when_t_passes_a_multiple():
    tx = emaopt.overwrite(1000, emaopt.ema(1.0))  # an average that stays where it started
    params, due = jnp.float32(1), []
    state = tx.init(params)
    for i in range(1, 13):
        updates, state = tx.update(jnp.float32(1), state, params, advance=256)
        if updates == 0:
            due.append(i)
    assert due == [4, 8, 12]


def test_the_step_stops_at_the_last_one():
    last = 2**31 - 1
    mean = moving_average(half_life(1e9))
    state = mean.init(jnp.zeros(()))._replace(step=jnp.int32(last - 5))
    for advance in (10, jnp.int32(10**9), last):
        state = mean.update(jnp.zeros(()), state, advance=advance)
        assert state.step == last
    state = mean.update(jnp.ones(()), state, advance=10**9)
    assert state.shadow == 0.5  # a half-life does not ask for t


@pytest.mark.parametrize("decay", [power(7.0), half_life(1e11)])
def test_more_than_2_31_tokens_are_counted_by_the_user(decay):
    t, n = 10**12, 4 * 10**7
    mean = moving_average(decay)
    start = mean.init(jnp.zeros(()))
    state = jax.jit(mean.update)(jnp.ones(()), start, jnp.float32(t), advance=jnp.int32(n))
    wanted = 1 - (1 - n / t) ** 8 if decay.text == "power(7.0)" else 1 - 0.5 ** (n / 1e11)
    np.testing.assert_allclose(state.shadow, wanted, rtol=1e-2)


@pytest.mark.parametrize(
    ("advance", "message"),
    [
        (-1, r"advance=-1 is out of range\. Pass a whole number from 0 to 2\*\*31 - 1"),
        (1.5, r"advance=1\.5 is out of range"),
        (2**31, "advance=2147483648 is out of range"),
        (np.ones(2, int), "advance=array"),
    ],
)
def test_an_advance_that_is_no_count_is_refused(advance, message):
    mean = moving_average(0.9)
    with pytest.raises(ValueError, match=message):
        mean.update(jnp.ones(()), mean.init(jnp.ones(())), advance=advance)


@pytest.mark.parametrize("advance", [jnp.float32(3), jnp.ones(2, jnp.int32)])
def test_a_traced_advance_that_is_no_integer_is_refused(advance):
    mean = moving_average(0.9)
    with pytest.raises(ValueError, match=r"advance is .*32\[.*\], and t counts in whole numbers"):
        jax.jit(mean.update)(jnp.ones(()), mean.init(jnp.ones(())), advance=advance)


@pytest.mark.parametrize("advance", [8, jnp.int32(8)])
def test_the_parameters_from_before_have_no_advance(advance):
    tx = emaopt.ema(0.9, sequential_update=False)
    state = tx.init(jnp.ones(()))
    with pytest.raises(ValueError, match=r"sequential_update=False: these parameters are from"):
        jax.jit(lambda n: tx.update(jnp.ones(()), state, jnp.ones(()), advance=n))(advance)


def test_an_array_that_counts_is_not_looked_at():
    # to look at it, op by op, an update would wait for the device
    mean = moving_average(power(7))
    state = mean.update(jnp.ones(()), mean.init(jnp.zeros(())), advance=jnp.int32(5))
    assert state.step == 5
    state = mean.update(jnp.zeros(()), state, advance=jnp.int32(-5))
    assert (state.step, state.shadow) == (5, 1)


@pytest.mark.parametrize(
    "count",
    [
        -1,
        float("nan"),
        float("inf"),
        "3",
        1j,
        True,
        [1],
        np.ones(1),
        jnp.ones(1),
        jnp.complex64(1),
    ],
)
def test_num_updates_is_one_number(count):
    tx = emaopt.ema(warmup(0.9))
    with pytest.raises(ValueError, match=r"num_updates(=| is ).*Pass a"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2), num_updates=count)
