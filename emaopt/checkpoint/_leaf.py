"""One leaf as it is stored and as it is asked for: shapes, dtypes, and from one to the other."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def shape(leaf: Any) -> tuple:
    """The shape; a number and a string have none."""
    return np.shape(_raw(leaf)) if isinstance(leaf, (int, float, bool, str)) else _raw(leaf).shape


def _raw(leaf: Any) -> Any:
    """Keys are stored as the integers they are made of."""
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf)
    return leaf


def same_kind(a: Any, b: Any) -> bool:
    """Whether two leaves have the same dtype; of a Python number, only its kind counts."""
    if hasattr(a, "dtype") and hasattr(b, "dtype"):
        return _raw(a).dtype == _raw(b).dtype
    kind = lambda x: np.dtype(x.dtype).kind if hasattr(x, "dtype") else np.asarray(x).dtype.kind
    return kind(a) == kind(b)


def as_stored(leaf: Any, stored: Any) -> Any:
    """A template that reads what is stored, without conversion, to where `leaf` is."""
    if not hasattr(stored, "dtype"):
        return stored
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return np.empty(stored.shape, stored.dtype)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)


def like_leaf(value: Any, leaf: Any) -> Any:
    """What was read, as `leaf` is: an array of its dtype, or a number."""
    if not hasattr(leaf, "dtype"):
        return type(leaf)(value) if hasattr(value, "dtype") else value
    if not hasattr(value, "dtype"):
        return jnp.asarray(value, leaf.dtype)
    return value if value.dtype == leaf.dtype else value.astype(leaf.dtype)


def size(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of the values; of strings, only their number is known."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def parts(sizes: dict[Any, int], at_once: int) -> Iterator[list[Any]]:
    """The keys in groups of so many bytes, to be read one after the other."""
    part, used = [], 0
    for key, bytes_ in sizes.items():
        if part and used + bytes_ > at_once:
            yield part
            part, used = [], 0
        part.append(key)
        used += bytes_
    yield part
