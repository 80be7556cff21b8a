"""The weights of an average, and that they are what the average gives to each value."""

import jax
import numpy as np
import pytest

import emaopt


@pytest.mark.many(2)
@pytest.mark.parametrize("t", [0, 1, 2, 40])
@pytest.mark.parametrize(
    "decay",
    [
        0.9,
        0.0,
        1.0,
        emaopt.power(6.94),
        emaopt.warmup(0.999),
        emaopt.debiased(0.9),
        emaopt.every(3, emaopt.power(2)),
        emaopt.after(5, 0.9),
        lambda t: 1 - 1 / t,
    ],
)
def test_the_profile_is_what_the_average_gives_to_each_value(decay, t):
    mean = emaopt.moving_average(decay)
    one_hot = np.eye(t + 1, dtype=np.float32)
    state = mean.init(one_hot[0])
    for value in one_hot[1:]:
        state = mean.update(value, state)
    weights = emaopt.profile(decay, t)
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, state.shadow, rtol=1e-5, atol=1e-7)
    assert abs(weights.sum() - 1) < 1e-14


def test_profiles_of_two_lengths_share_what_was_compiled(caplog):
    emaopt.profile(emaopt.power(2), 35)
    with jax.log_compiles():
        assert emaopt.profile(emaopt.power(2), 61).shape == (62,)
    assert not caplog.records


def test_the_profile_of_a_million_updates_is_right_at_both_ends():
    weights = emaopt.profile(emaopt.power(7), 10**6)
    np.testing.assert_allclose(weights[-1], -np.expm1(8 * np.log1p(-1e-6)), rtol=1e-6)
    np.testing.assert_allclose(weights[:500_001].sum(), 0.5**8, rtol=1e-4)


@pytest.mark.parametrize("t", [-1, 1.5])
def test_the_profile_needs_a_number_of_updates(t):
    with pytest.raises(ValueError, match=r"t=.* is out of range\. Pass a whole number"):
        emaopt.profile(0.9, t)
