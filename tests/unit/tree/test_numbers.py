"""The dtypes of state and arithmetic, and what can be averaged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emaopt._tree import numbers


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float8_e4m3fn", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
        ("complex64", "complex64"),
        ("int32", "float32"),
        ("bool", "float32"),
    ],
)
def test_state_is_float32_or_wider(dtype, wide):
    assert numbers.wide(jnp.dtype(dtype)) == jnp.dtype(wide)


@pytest.mark.parametrize(
    ("value", "inexact"),
    [
        (1.0, True),
        (np.float16(1), True),
        (jnp.ones((), jnp.bfloat16), True),
        (1j, True),
        (1, False),
        (True, False),
        (jax.random.key(0), False),
    ],
)
def test_what_can_be_averaged_is_inexact(value, inexact):
    assert numbers.is_inexact(value) is inexact


def test_a_traced_value_is_not_concrete():
    seen = []
    jax.jit(lambda x: seen.append(numbers.is_concrete(x)))(1.0)
    assert seen == [False]
    assert all(map(numbers.is_concrete, (1.0, np.ones(2), jnp.ones(2))))


def test_a_scalar_is_rounded_before_anything_is_computed_with_it():
    assert numbers.scalar(0.1, jnp.float32) == np.float32(0.1)
    assert numbers.scalar(0.999, jnp.bfloat16) == 1
    assert numbers.scalar(jnp.float32(0.1), jnp.float16).dtype == jnp.float16
    assert jax.jit(lambda x: numbers.scalar(x, jnp.float16))(0.1).dtype == jnp.float16
