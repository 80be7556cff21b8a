"""Choose dtypes. State is never narrower than float32 unless the user asks: see `wide`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_inexact(x: Any) -> bool:
    """Return whether a leaf holds floating-point or complex numbers, not integers or keys."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def dtype_of(leaf: Any) -> Any:
    """Return the dtype of a leaf, which may be a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def wide(dtype: Any) -> np.dtype:
    """Return the dtype of state and arithmetic for values of `dtype`: float32 or wider."""
    enough = jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 4
    return jnp.dtype(dtype if enough else jnp.float32)


def bytes_of(shape: tuple[int, ...], dtype: Any) -> int:
    """Return the bytes of the values; of strings, only their number is known."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def real_dtype(dtype: Any) -> np.dtype:
    """Return the dtype of the real and imaginary parts. A real dtype is returned as it is."""
    return jnp.finfo(dtype).dtype


def is_concrete(x: Any) -> bool:
    """Return whether a value is known now and can be checked: a number or array, not traced."""
    return not isinstance(x, Tracer)


def scalar(x: Any, dtype: Any) -> Any:
    """Return a hyper-parameter rounded to `dtype`, before anything is computed with it."""
    return x.astype(dtype) if isinstance(x, jax.Array) else np.asarray(x, dtype)[()]
