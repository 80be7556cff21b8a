"""Decays, against their formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

import emaopt
from emaopt import (
    after,
    debiased,
    every,
    half_life,
    inverse_gamma,
    moving_average,
    power,
    warmup,
)


TIMES = np.unique(np.geomspace(1, 1e8, 100).astype(np.int32))


def effective(decay, times, jit=jax.jit):
    """What an average really takes from a new value at these times."""
    average = moving_average(decay)
    state = average.init(jnp.zeros(()))
    rate = lambda t: average.update(jnp.ones(()), state, t).shadow
    return np.asarray(jit(jax.vmap(rate))(times), np.float64)


# the decay, its rate as a formula of t (float64 is enough for 1e-5 at 1e8), and when it takes
RATES = {
    "power(0)": (power(0), lambda t: 1 / t),
    "power(-0.5)": (power(-0.5), lambda t: 1 - ((t - 1) / t) ** 0.5),
    "power(6.94)": (power(6.94), lambda t: 1 - ((t - 1) / t) ** 7.94),
    "power(16.97)": (power(16.97), lambda t: 1 - ((t - 1) / t) ** 17.97),
    "inverse_gamma()": (inverse_gamma(), lambda t: np.maximum((1 + t) ** (-2 / 3), 1e-4)),
    "inverse_gamma(50, 0.75, 0.2, 1)": (
        inverse_gamma(50, 0.75, 0.2, 1),
        lambda t: np.minimum((1 + t / 50) ** -0.75, 0.8),
    ),
    "debiased(0.9)": (debiased(0.9), lambda t: (1 - 0.9) / (1 - 0.9**t)),
    "debiased(0.99999)": (debiased(0.99999), lambda t: 1e-5 / (1 - 0.99999**t)),
    "debiased(half_life(1e6))": (
        debiased(half_life(1e6)),
        lambda t: (1 - 0.5**1e-6) / (1 - 0.5 ** (t * 1e-6)),
    ),
    "half_life(1)": (half_life(1), lambda t: 0.5 + 0 * t),
    "half_life(1e7)": (half_life(1e7), lambda t: 1 - 0.5**1e-7 + 0 * t),
}
PERIODIC = {
    f"every({n}, {name})": (every(n, decay), n, over)
    for n in (2, 1000)
    for name, decay, over in (
        ("0.9999", 0.9999, lambda t, n: 1 - 0.9999**n + 0 * t),
        ("half_life(1e6)", half_life(1e6), lambda t, n: 1 - 0.5 ** (n * 1e-6) + 0 * t),
        ("power(0)", power(0), lambda t, n: n / t),
        ("power(6.94)", power(6.94), lambda t, n: 1 - ((t - n) / t) ** 7.94),
        ("debiased(0.9999)", debiased(0.9999), lambda t, n: (1 - 0.9999**n) / (1 - 0.9999**t)),
    )
}


@pytest.mark.many(4)
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("name", RATES)
def test_the_effective_rate_is_right_at_any_t(name, jit):
    decay, rate = RATES[name]
    np.testing.assert_allclose(effective(decay, TIMES, jit), rate(TIMES * 1.0), rtol=1e-5)


@pytest.mark.many(2)
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("name", PERIODIC)
def test_the_effective_rate_over_n_updates_is_right_at_any_t(name, jit):
    decay, n, over = PERIODIC[name]
    times = np.unique(TIMES[n <= TIMES] // n * n)
    np.testing.assert_allclose(effective(decay, times, jit), over(times * 1.0, n), rtol=1e-5)
    assert not effective(decay, times - 1, jit).any()


@pytest.mark.many(2)
@pytest.mark.parametrize("start", [1, 5, 10**7])
@pytest.mark.parametrize("name", RATES)
def test_after_restarts_the_clock_and_copies_before(name, start):
    decay, rate = RATES[name]
    late = TIMES[10**8 - start >= TIMES]
    rates = effective(after(start, decay), late + start)
    np.testing.assert_allclose(rates, rate(late * 1.0), rtol=1e-5)
    assert (effective(after(start, decay), np.minimum(TIMES, start)) == 1).all()


@pytest.mark.many(5)
@pytest.mark.parametrize("name", RATES)
def test_rates_have_the_precision_of_float64_where_it_is_enabled(name, x64):
    decay, rate = RATES[name]
    # the formula itself loses eight digits at 1e8
    np.testing.assert_allclose(effective(decay, TIMES), rate(TIMES * 1.0), rtol=1e-7)


# the same decays by their definitions: functions of a Python t, slow and in float64
def slow_debiased(d):
    total = lambda t: 1 - np.prod([d(s) for s in range(1, t + 1)])
    return lambda t: 1 - (1 - d(t)) / total(t) if total(t) else 1.0


def slow_every(n, d):
    return lambda t: np.prod([d(s) for s in range(t - n + 1, t + 1)]) if t % n == 0 else 1.0


def slow_after(start, d):
    return lambda t: d(t - start) if t > start else 0.0


def slow_power(gamma):
    return lambda t: ((t - 1) / t) ** (gamma + 1)


def slow(d):
    return lambda t: d


COMPOSED = {
    "every(3, debiased(0.9))": (every(3, debiased(0.9)), slow_every(3, slow_debiased(slow(0.9)))),
    "every(2, every(3, 0.9))": (every(2, every(3, 0.9)), slow_every(2, slow_every(3, slow(0.9)))),
    "every(4, every(2, power(1)))": (
        every(4, every(2, power(1))),
        slow_every(4, slow_every(2, slow_power(1))),
    ),
    "every(3, after(4, power(2)))": (
        every(3, after(4, power(2))),
        slow_every(3, slow_after(4, slow_power(2))),
    ),
    "after(4, every(3, power(2)))": (
        after(4, every(3, power(2))),
        slow_after(4, slow_every(3, slow_power(2))),
    ),
    "after(2, after(3, 0.7))": (after(2, after(3, 0.7)), slow_after(2, slow_after(3, slow(0.7)))),
    "after(5, debiased(half_life(2)))": (
        after(5, debiased(half_life(2))),
        slow_after(5, slow_debiased(slow(0.5**0.5))),
    ),
    "debiased(every(2, 0.9))": (
        debiased(every(2, 0.9)),
        slow_debiased(slow_every(2, slow(0.9))),
    ),
    "debiased(power(1))": (debiased(power(1)), slow_power(1)),
    "debiased(after(3, 0.9))": (debiased(after(3, 0.9)), slow_after(3, slow(0.9))),
    "debiased(debiased(0.9))": (debiased(debiased(0.9)), slow_debiased(slow(0.9))),
    "every(2, debiased(every(3, 0.9)))": (
        every(2, debiased(every(3, 0.9))),
        slow_every(2, slow_debiased(slow_every(3, slow(0.9)))),
    ),
    "every(3, warmup(0.4))": (
        every(3, warmup(0.4)),
        lambda t: min(0.4, (1 + t) / (10 + t)) ** 3 if t % 3 == 0 else 1.0,
    ),
    "warmup(power(0))": (warmup(power(0)), lambda t: min((t - 1) / t, (1 + t) / (10 + t))),
    "after(0, 0.9)": (after(0, 0.9), slow(0.9)),
    "debiased(0)": (debiased(0.0), slow(0.0)),
    "every(2, 1)": (every(2, 1.0), slow(1.0)),
}


@pytest.mark.many(2)
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("name", COMPOSED)
def test_composed_decays_are_their_definition(name, jit):
    decay, definition = COMPOSED[name]
    times = np.arange(1, 31, dtype=np.int32)
    expected = [1 - definition(int(t)) for t in times]
    np.testing.assert_allclose(effective(decay, times, jit), expected, rtol=1e-5, atol=1e-7)


def test_a_debiased_every_keeps_its_beat_where_float32_has_no_odd_numbers():
    times = np.arange(10**8 - 4, 10**8, dtype=np.int32)
    rates = effective(debiased(every(3, 0.5)), times)
    np.testing.assert_allclose(rates, np.where(times % 3 == 0, 1 - 0.5**3, 0))


def test_a_float_n_or_t_is_the_whole_number():
    times = np.arange(1, 10, dtype=np.int32)
    expected = effective(every(3, power(1)), times)
    np.testing.assert_array_equal(effective(every(3.0, power(1)), times), expected)
    np.testing.assert_array_equal(effective(every(3, power(1)), times.astype(np.float32)), expected)


def test_every_1_of_a_decay_is_that_decay():
    decay = debiased(0.9)
    assert every(1, decay) is decay
    np.testing.assert_array_equal(effective(every(1, 0.9), TIMES), effective(0.9, TIMES))


@pytest.mark.parametrize("name", RATES)
def test_a_decay_is_called_for_what_it_keeps(name):
    decay, rate = RATES[name]
    np.testing.assert_allclose(decay(jnp.int32(3)), 1 - rate(3.0), rtol=1e-6, atol=1e-7)


def test_power_0_is_the_mean():
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    assert_average(power(0), values, np.cumsum(values, dtype=np.float64) / np.arange(1, 51))


@pytest.mark.parametrize("d", [0.5, 0.9, 0.999])
def test_debiased_is_the_average_from_zero_divided_by_1_minus_decay_to_the_t(d):
    values = np.random.default_rng(1).normal(size=50).astype(np.float32)
    from_zero, expected = 0.0, []
    for t, value in enumerate(values, start=1):
        from_zero = from_zero * d + value * (1 - d)
        expected.append(from_zero / (1 - d**t))
    assert_average(debiased(d), values, expected)


def assert_average(decay, values, expected):
    average = moving_average(decay)
    state, update = average.init(jnp.float32(np.nan)), jax.jit(average.update)
    for value, right in zip(values, expected, strict=True):
        state = update(value, state)
        np.testing.assert_allclose(state.shadow, right, rtol=2e-5, atol=1e-6)


@pytest.mark.many(3)
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("d", [0.3, 0.9, 0.999, 0.9999])
def test_warmup_is_bitwise_tf1(d, jit):
    times = np.unique(np.r_[0:1000, np.geomspace(1, 1e6, 500)]).astype(np.int32)
    n = times.astype(np.float32)
    decay = np.minimum(np.float32(d), (1 + n) / (10 + n))
    np.testing.assert_array_equal(effective(warmup(d), times, jit), np.float32(1) - decay)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.floats(0, 1).filter(lambda d: np.float32(d) < 1 or d == 1))
def test_a_constant_decay_is_bitwise_tf1(d):
    rate = np.float32(1) - np.float32(d)
    state = moving_average(d).init(jnp.zeros(()))
    assert moving_average(d).update(jnp.ones(()), state).shadow == rate
    function = moving_average(lambda t: jnp.float32(d))
    assert function.update(jnp.ones(()), state).shadow == rate


@pytest.mark.parametrize(
    "decay", [np.float32(0.9), np.float64(0.9), jnp.float32(0.9), np.array(0.9), lambda t: 0.9]
)
def test_a_constant_decay_may_come_as_any_kind_of_number(decay):
    np.testing.assert_array_equal(effective(decay, TIMES[:3]), effective(0.9, TIMES[:3]))


def test_a_schedule_of_optax_is_a_decay():
    rates = effective(optax.linear_schedule(0.0, 1.0, 4), np.arange(1, 6, dtype=np.int32))
    np.testing.assert_array_equal(rates, [0.75, 0.5, 0.25, 0, 0])


def test_a_decay_may_depend_on_a_traced_value():
    @jax.jit
    def rate(d, t):
        average = moving_average(after(1, lambda t: jnp.where(t > 0, d, 0)))
        return average.update(jnp.ones(()), average.init(jnp.zeros(())), t).shadow

    assert rate(0.75, 1) == 1
    assert rate(0.75, 2) == 0.25


@pytest.mark.many(1)
@pytest.mark.parametrize(
    "make",
    [
        half_life,
        power,
        lambda x: warmup(x / 10),
        lambda x: debiased(x / 10),
        lambda x: inverse_gamma(x, x, x / 10, x / 4),
        lambda x: every(2, x / 10),
        lambda x: every(x, power(1)),
        lambda x: every(x // 3, power(1)),
        lambda x: after(x, power(1)),
    ],
)
def test_the_arguments_of_a_decay_may_be_traced(make):
    times = np.arange(1, 8, dtype=np.int32)
    traced = jax.jit(lambda x: jax.vmap(make(x).rate)(times))
    np.testing.assert_allclose(traced(3), jax.vmap(make(3).rate)(times), rtol=1e-6)


LAWFUL = {
    "0.9": 0.9,
    "0.9999": 0.9999,
    "warmup": warmup(0.99),
    "debiased": debiased(0.9),
    "power": power(3.0),
    "inverse_gamma": inverse_gamma(),
    "half_life": half_life(3.0),
    "every": every(2, 0.9),
    "after": after(2, power(0)),
    "function": lambda t: jnp.where(t < 3, 0.5, 0.75),
}
STEPS = 6
FLOATS = arrays(np.float32, STEPS, elements=st.floats(-(2.0**60), 2.0**60, width=32))


@functools.cache
def trajectory(name):
    """The averages of values, the first of which is the start."""
    average = moving_average(LAWFUL[name])

    def step(state, value):
        state = average.update(value, state)
        return state, state.shadow

    return jax.jit(lambda values: jax.lax.scan(step, average.init(values[0]), values[1:])[1])


@pytest.mark.many(2)
@pytest.mark.parametrize("name", LAWFUL)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(values=FLOATS)
def test_an_average_lies_between_the_extremes(name, values):
    averages = np.asarray(trajectory(name)(values), np.float64)
    # s - (s - x) * rate rounds the difference and the product: at most 2 ulp of the largest
    slack = 4 * np.finfo(np.float32).eps * np.abs(values).max()
    assert (values.min() - slack <= averages).all()
    assert (averages <= values.max() + slack).all()


@pytest.mark.many(3)
@pytest.mark.parametrize("name", LAWFUL)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(value=st.floats(width=32, allow_infinity=False, allow_nan=False, allow_subnormal=False))
def test_a_constant_stays_bitwise_constant(name, value):
    averages = trajectory(name)(np.full(STEPS, value, np.float32))
    assert (np.asarray(averages).view(np.uint32) == np.float32(value).view(np.uint32)).all()


def test_decay_is_public():
    assert isinstance(power(0), emaopt.Decay)
