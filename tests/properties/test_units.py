"""A half-life in samples or tokens: one length for every way to batch them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from batching import HALF_LIFE, SAMPLES, WAYS, averages, decay_of

import emaopt


each_way = pytest.mark.parametrize(("batch", "accumulated", "interval"), WAYS)


@pytest.mark.many(3)
@each_way
def test_so_many_samples_later_a_value_counts_half(batch, accumulated, interval):
    seen, average = averages(batch, accumulated, interval)
    for halvings in (1, 2, 3):
        after = HALF_LIFE * halvings // batch - 1
        assert seen[after] == HALF_LIFE * halvings
        np.testing.assert_allclose(average["start"][after], 0.5**halvings, rtol=2e-6)


@each_way
def test_the_average_is_as_many_samples_behind(batch, accumulated, interval):
    seen, average = averages(batch, accumulated, interval)
    assert seen[-1] == SAMPLES
    stride = batch * accumulated * interval
    # a stride is one value, which stands for its samples: half of them are older. The rest is the
    # next term of Euler and Maclaurin
    rest = stride**2 * math.log(2) / (12 * HALF_LIFE)
    behind = SAMPLES - average["samples"][-1]
    assert abs(behind - (HALF_LIFE / math.log(2) - stride / 2)) < rest + 0.02


@pytest.mark.many(3)
@each_way
def test_the_weight_of_all_older_samples_is_the_same(batch, accumulated, interval):
    per_update = batch * accumulated
    weights = emaopt.profile(decay_of(batch, accumulated, interval), SAMPLES // per_update)
    older = np.cumsum(weights)[:: 16 // per_update]
    expected = 0.5 ** ((SAMPLES - np.arange(0, SAMPLES + 1, 16)) / HALF_LIFE)
    np.testing.assert_allclose(older, expected, rtol=2e-5)
    np.testing.assert_allclose(older, expected, atol=1e-6)


def test_a_fraction_of_an_update_is_a_half_life_too():
    decay = decay_of(batch=256, accumulated=1, interval=1)
    np.testing.assert_allclose(decay(1), 0.5**4, rtol=1e-6)


def test_a_batch_that_grows_is_a_function_of_t():
    sizes = np.array([1, 1, 2, 4, 8, 16, 32, 64])
    decay = lambda t: 0.5 ** (2.0 ** jnp.maximum(t - 2, 0).astype(jnp.float32) / HALF_LIFE)
    weights = emaopt.profile(decay, len(sizes))
    older = 0.5 ** ((sizes.sum() - np.cumsum([0, *sizes])) / HALF_LIFE)
    np.testing.assert_allclose(np.cumsum(weights), older, rtol=2e-6)
