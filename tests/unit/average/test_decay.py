"""What a user's decay becomes, how it is shown, and which ones are refused by name."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import emaopt
from emaopt import after, debiased, every, half_life, inverse_gamma, moving_average, power, warmup
from emaopt._average.clock import rate_of_update
from emaopt._average.decay import as_decay


DECAYS = {
    "0.9": 0.9,
    "0.0": 0.0,
    "warmup(0.999)": warmup(0.999),
    "warmup(power(0))": warmup(power(0)),
    "debiased(0.9)": debiased(0.9),
    "debiased(0.0)": debiased(0.0),
    "power(6.94)": power(6.94),
    "inverse_gamma(1.0, 0.75, 0.0, 0.9999)": inverse_gamma(power=0.75),
    "half_life(1000)": half_life(1000),
    "every(10, half_life(1000))": every(10, half_life(1000)),
    "every(3, 0.0)": every(3, 0.0),
    "after(100, power(0))": after(100, power(0)),
    "after(2, debiased(every(2, 0.9)))": after(2, debiased(every(2, 0.9))),
}


@pytest.mark.parametrize("text", DECAYS)
def test_a_decay_is_shown_as_it_is_written(text):
    assert repr(as_decay(DECAYS[text])) == text


def test_a_decay_of_other_functions_is_shown_by_their_names():
    def slow(t):
        return 0.5

    assert repr(every(2, slow)) == "every(2, slow)"
    assert repr(as_decay(lambda t: 0.5)) == "<lambda>"
    assert repr(emaopt.Decay(slow, slow)) == "Decay(rate=slow)"
    assert repr(half_life(jnp.float32(8))) == "half_life(8.0)"
    shown = []
    jax.jit(lambda x: shown.append(repr(every(3, half_life(x)))))(8.0)
    assert shown == ["every(3, half_life(<traced>))"]


FAR = 2**31
REFUSED = {
    "one by rounding to float32": (
        lambda: emaopt.ema(1 - 1e-9),
        r"decay=0\.999999999 is 1 in float32: .* move\. Pass emaopt\.half_life\(6\.931e\+08\)",
    ),
    "a cap that is one by rounding": (
        lambda: warmup(1 - 1e-9),
        r"decay=0\.999999999 is 1 in float",
    ),
    "one by rounding to bfloat16": (
        lambda: emaopt.ema(jnp.bfloat16(0.9999)),
        "dtype bfloat16, in which 0.9999 is 1",
    ),
    "a function that is one by rounding": (
        lambda: emaopt.ema(lambda t: 1 - 1e-9),
        r"decay\(t\) has dtype float32 and is rounded to 1: the average would never move\. Return",
    ),
    "a function of bfloat16": (
        lambda: emaopt.ema(lambda t: jnp.bfloat16(0.9999)),
        r"decay\(t\) has dtype bfloat16 and is rounded to 1",
    ),
    "a function that returns nothing": (
        lambda: emaopt.ema(lambda t: None),
        r"decay\(t\) is None, not a scalar",
    ),
    "a rate that returns nothing": (
        lambda: emaopt.ema(emaopt.Decay(lambda t: None, lambda t, n: None)),
        r"the rate of decay\(t\) is None, not a scalar",
    ),
    "a rate above 1": (
        lambda: emaopt.ema(emaopt.Decay(lambda t: 1.5, lambda t, n: 1.5)),
        r"the rate of decay\(t\) is 1\.5 at t=1",
    ),
    "a function that is NaN": (lambda: emaopt.ema(lambda t: jnp.nan), r"decay\(t\) is nan at t=1"),
    "power(-1)": (lambda: power(-1), "gamma=-1 is out of range. Pass a number above -1"),
    "power(infinity)": (lambda: power(np.inf), "gamma=inf is out of range"),
    "power beyond float32": (lambda: power(1e39), "gamma=1e"),
    "a half-life without end": (lambda: half_life(np.inf), "updates=inf .* above 0, at most 5e"),
    "a half-life whose rate is 0": (lambda: debiased(half_life(1e38)), r"updates=1e\+38 is out"),
    "a half-life of nothing": (lambda: half_life(1e-46), "updates=1e-46 is out of range"),
    "several half-lives": (lambda: half_life(np.ones(2)), r"updates=array\(.* is out of range"),
    "inv_gamma beyond float32": (lambda: inverse_gamma(1e39), r"inv_gamma=1e\+39 is out of range"),
    "a power of 0 in float32": (lambda: inverse_gamma(power=1e-46), "power=1e-46 is out of range"),
    "every 2**31": (lambda: every(FAR, 0.9), r"n=2147483648 .* from 1 to 2\*\*31 - 1"),
    "every 0": (lambda: every(0, 0.9), "n=0 is out of range"),
    "every 1.5": (lambda: every(1.5, 0.9), r"n=1\.5 is out of range"),
    "every 2**70": (lambda: every(2**70, 0.9), "n=1180591620717411303424 is out of range"),
    "after 2.5": (lambda: after(2.5, 0.9), r"start=2\.5 .* whole number from 0 to"),
    "after 2**31": (lambda: after(FAR, 0.9), "start=2147483648 is out of range"),
    "after infinity": (lambda: after(np.inf, 0.9), "start=inf is out of range"),
    "a profile of 2**31": (lambda: emaopt.profile(0.9, FAR), "t=2147483648 is out of range"),
    "overwriting every 2**31": (lambda: emaopt.overwrite(FAR, emaopt.ema(0.9)), "n=2147483648"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_nan_or_nothing_or_stands_still_is_refused_by_name(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_half_life_that_is_suggested_is_the_decay_that_was_meant():
    with pytest.raises(ValueError, match="half_life") as error:
        emaopt.ema(1 - 1e-9)
    updates = float(re.findall(r"half_life\((.*?)\)", str(error.value))[0])
    np.testing.assert_allclose(half_life(updates).rate(1), 1e-9, rtol=1e-3)


@pytest.mark.parametrize("decay", [1.0, 1, np.float32(1), lambda t: 1.0])
def test_a_decay_of_exactly_one_is_meant(decay):
    mean = moving_average(decay)
    assert mean.update(jnp.ones(()), mean.init(jnp.zeros(()))).shadow == 0


def test_a_decay_that_is_one_in_float32_is_exact_where_it_is_composed():
    np.testing.assert_allclose(after(0, 1 - 1e-9).rate(1), 1e-9, rtol=1e-6)


@pytest.mark.many(2)
@pytest.mark.parametrize("gamma", [-1 + 1e-9, -1 + 1e-15, np.float64(-1 + 1e-9)])
def test_power_near_minus_1_is_computed_as_it_was_checked(gamma):
    t = np.array([1, 2, 1000])
    with np.errstate(divide="ignore"):
        expected = -np.expm1((float(gamma) + 1) * np.log1p(-1 / t))
    np.testing.assert_allclose(jax.vmap(power(gamma).rate)(t), expected, rtol=1e-5)
    np.testing.assert_allclose(emaopt.profile(power(gamma), 3).sum(), 1)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("text", DECAYS)
def test_no_decay_makes_nan_or_infinity_on_the_way(text, n):
    decay = as_decay(DECAYS[text])
    with jax.debug_nans(True), jax.debug_infs(True):
        for t in (1, 2, 9, 100, 2**31 - 1):
            rates = decay.rate(jnp.int32(t)), decay.over(jnp.int32(t), jnp.int32(n))
            assert all(0 <= rate <= 1 for rate in rates)


@pytest.mark.parametrize("text", DECAYS)
def test_the_rate_of_a_step_is_over_all_that_it_advances(text):
    decay = as_decay(DECAYS[text])
    assert rate_of_update(decay, jnp.int32(9), 1) == decay.rate(jnp.int32(9))
    assert rate_of_update(decay, jnp.int32(9), jnp.int32(4)) == decay.over(9, 4)
    assert rate_of_update(decay, jnp.int32(9), jnp.int32(0)) == 0
    assert rate_of_update(decay, jnp.int32(0), jnp.int32(0)) == 0
