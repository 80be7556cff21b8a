"""The learning-rate schedule, against its formula in float64."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emaopt import exponential_decay


STAIR = 0.99
STEPS = np.unique(np.geomspace(1, 1000, 60).astype(np.int32))
EVERY_DECAY_STEPS = np.arange(1, 20001, dtype=np.int32)
# where n * float32(1 / n) falls below 1: the stairs that TF1 and a jitted float quotient have late
LATE = [int(n) for n in EVERY_DECAY_STEPS if np.float32(n) * (1 / np.float32(n)) < 1]


def stair(values):
    """On which stair a schedule that falls by `STAIR` is."""
    return np.round(np.log(np.asarray(values, np.float64)) / np.log(STAIR)).astype(int)


@pytest.mark.many(6)
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("k", [1, 2, 3, 41, 1000])
def test_step_k_decay_steps_is_on_stair_k_for_every_decay_steps(k, jit):
    schedule = lambda n, step: exponential_decay(1.0, n, STAIR, staircase=True)(step)
    values = jit(jax.vmap(schedule))
    assert set(stair(values(EVERY_DECAY_STEPS, k * EVERY_DECAY_STEPS))) == {k}
    assert set(stair(values(EVERY_DECAY_STEPS, k * EVERY_DECAY_STEPS - 1))) == {k - 1}


@pytest.mark.slow
def test_stairs_of_constant_decay_steps_are_on_time():
    assert LATE[0] == 41
    sample = {*LATE[:150], *range(1, 101)}
    schedules = {n: exponential_decay(1.0, n, STAIR, staircase=True) for n in sample}
    jitted = jax.jit(lambda k: [schedule(k * n) for n, schedule in schedules.items()])
    for k in (1, 2, 41):
        assert set(stair(jitted(k))) == {k}
        assert set(stair([schedules[n](k * n) for n in LATE[:50]])) == {k}


@pytest.mark.many(4)
@pytest.mark.parametrize("decay_steps", [0.1, 0.5, 1.7, 2.5, 41.0, 1e3])
def test_stairs_of_float_decay_steps_are_the_exact_quotient(decay_steps):
    steps = np.arange(200, dtype=np.int32)
    exact = [int(Fraction(int(step)) // Fraction(float(np.float32(decay_steps)))) for step in steps]
    schedule = exponential_decay(1.0, decay_steps, STAIR, staircase=True)
    np.testing.assert_array_equal(stair(schedule(steps)), exact)
    np.testing.assert_array_equal(stair(jax.jit(schedule)(steps)), exact)
    np.testing.assert_array_equal(stair(schedule(steps.astype(np.float32))), exact)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_exponential_decay_is_its_formula(jit):
    steps = np.arange(0, 100000, 997, dtype=np.int32)
    values = jit(exponential_decay(0.045, 5000, 0.94))(steps)
    np.testing.assert_allclose(values, 0.045 * 0.94 ** (steps / 5000), rtol=1e-5)


@pytest.mark.parametrize("staircase", [False, True])
def test_exponential_decay_takes_traced_hyperparameters(staircase):
    traced = jax.jit(lambda rate, n, base: exponential_decay(rate, n, base, staircase)(7))
    expected = exponential_decay(0.1, 3, 0.5, staircase)(7)
    np.testing.assert_allclose(traced(0.1, 3, 0.5), expected, rtol=1e-6)


@pytest.mark.parametrize("staircase", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_exponential_decay_has_the_dtype_of_its_learning_rate(dtype, staircase):
    assert exponential_decay(dtype(0.1), 10, 0.5, staircase)(jnp.int32(3)).dtype == dtype
    assert exponential_decay(0.1, 10, dtype(0.5), staircase)(jnp.int32(3)).dtype == jnp.float32


def test_exponential_decay_in_float64(x64):
    values = exponential_decay(np.float64(0.1), 7, 0.9)(STEPS)
    np.testing.assert_allclose(values, 0.1 * 0.9 ** (STEPS / 7), rtol=1e-14)


@pytest.mark.parametrize("staircase", [False, True])
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("decay_steps", [2**31, 2**40, np.int64(2**33)])
def test_decay_steps_beyond_int32_are_a_schedule_that_hardly_falls(decay_steps, jit, staircase):
    steps = jnp.array([0, 10**6, 2**30])
    found = jit(exponential_decay(0.1, decay_steps, 0.5, staircase))(steps)
    exponent = 0 * steps if staircase else np.asarray(steps) / float(decay_steps)
    np.testing.assert_allclose(found, 0.1 * 0.5 ** np.asarray(exponent), rtol=1e-6)


@pytest.mark.parametrize("staircase", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_16_bit_learning_rate_counts_all_steps(dtype, staircase):
    # float16 ends at 65504; in it 70000 / 100000 is infinity * 0
    schedule = exponential_decay(dtype(0.5), 100_000, 0.25, staircase)
    wide = exponential_decay(0.5, 100_000, 0.25, staircase)
    for step in (0, 257, 70_000, 200_000):
        assert schedule(jnp.int32(step)) == wide(jnp.int32(step)).astype(dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1e39, 10, 0.5), r"learning_rate=1e\+39 is out of range. Pass a finite number"),
        ((0.1, 1e-46, 0.5), "decay_steps=1e-46 is out of range. Pass a number above 0"),
        ((0.1, 10, 1e39), r"decay_rate=1e\+39 is out of range"),
        ((0.1, None, 0.5), "decay_steps=None is out of range"),
    ],
)
def test_a_schedule_of_nothing_or_infinity_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        exponential_decay(*arguments)
