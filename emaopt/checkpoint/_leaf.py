"""Convert a leaf as it is stored to the shape and the dtype that are asked for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from emaopt._tree.checks import describe
from emaopt._tree.paths import printable


class Target(NamedTuple):
    """Choose where a leaf is read to: the host, the default device (uncommitted), or a sharding."""

    on_device: bool = False
    sharding: Any = None


HOST = Target()


def is_key(leaf: Any) -> bool:
    """Tell whether a leaf is an array of random keys, real or abstract."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def shape(leaf: Any) -> tuple[int, ...]:
    """Return the shape as it is on disk; a number and a string have none."""
    return tuple(_on_disk(leaf).shape) if hasattr(leaf, "shape") else np.shape(leaf)


def same_kind(a: Any, b: Any) -> bool:
    """Tell whether two leaves have the same dtype on disk; of a Python number, the same kind."""
    if _is_array(a) and _is_array(b):
        return _on_disk(a).dtype == _on_disk(b).dtype
    return _kind(a) == _kind(b)


def are_floating(*leaves: Any) -> bool:
    """Tell whether all leaves are arrays of floating-point numbers."""
    return all(_is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)


def _on_disk(leaf: Any) -> Any:
    """Return a leaf as it is stored. Random keys are stored as integers."""
    return jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and not isinstance(leaf, str)


def _kind(leaf: Any) -> str:
    return np.dtype(leaf.dtype).kind if _is_array(leaf) else np.asarray(leaf).dtype.kind


def differs(name: str, leaf: Any, stored: Any, also: Any = None) -> str:
    """Say what is wrong with the shape or dtype that was asked for; "" if nothing is.

    Args:
        name: the name of the leaf.
        leaf: the template.
        stored: the form of the stored leaf.
        also: another form whose dtype is fine.
    """
    name = printable(name)
    if shape(leaf) != shape(stored):
        return f"{name} has shape {shape(stored)}, asked for as {shape(leaf)}"
    if not (same_kind(leaf, stored) or (also is not None and same_kind(leaf, also))):
        return f"{name} is {describe(stored)}, asked for as {describe(leaf)}"
    return ""


def target_of(leaf: Any, stored: Any) -> Target:
    """Return where a stored leaf is read to, so that it comes to where its template is.

    A committed array, and an abstract one with a sharding, say a sharding. An uncommitted one gives
    an uncommitted value: committed to one device, it could not be used beside sharded arrays.

    Args:
        leaf: the template.
        stored: the form of the stored leaf. JAX cannot hold 64 bits (unless it is told to), so
            these are read to the host.
    """
    fits = _is_array(stored) and jax.dtypes.canonicalize_dtype(stored.dtype) == stored.dtype
    if is_key(leaf) or not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) or not fits:
        return HOST
    return Target(on_device=True, sharding=_sharding(leaf))


def _sharding(leaf: jax.Array | jax.ShapeDtypeStruct) -> Any:
    """Return the sharding of a template, `None` if it is not committed to one."""
    is_free = isinstance(leaf, jax.Array) and not getattr(leaf, "committed", True)
    return None if is_free else leaf.sharding


def like_leaf(value: Any, leaf: Any, name: str, impl: str | None = None) -> Any:
    """Turn what was read into what the template is: an array of its dtype, a key, or a number.

    Args:
        value: what was read: an array, a Python number, a string.
        leaf: the template.
        name: the name of the leaf, for errors.
        impl: of a random key, its kind.

    Raises:
        ValueError: the template's dtype does not hold the value.
    """
    if not _is_array(leaf):
        return type(leaf)(value.item() if _is_array(value) else value)
    if is_key(leaf):
        own = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else impl
        if impl not in (None, own):  # of another kind the same numbers are another key
            raise ValueError(
                f"{name} is a random key of {impl!r}, asked for as {own!r}. Pass a key of that "
                f"kind: jax.random.key(0, impl={impl!r})."
            )
        value = jax.random.wrap_key_data(jnp.asarray(value), impl=own)
    elif not _is_array(value):
        value = _exactly(value, leaf.dtype, name)
    elif value.dtype != leaf.dtype:
        value = value.astype(leaf.dtype)
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        is_there = isinstance(value, jax.Array) and not is_key(leaf)
        return value if is_there else jax.device_put(value, _sharding(leaf))
    return value[()] if isinstance(leaf, np.generic) else value


def _exactly(value: Any, wanted: Any, name: str) -> np.ndarray:
    """Return a Python number as an array, or raise if the dtype does not hold it."""
    given = np.asarray(value)
    with np.errstate(over="ignore", invalid="ignore"):
        result = given.astype(wanted)
        if not np.array_equal(
            result.astype(given.dtype), given, equal_nan=given.dtype.kind in "fc"
        ):
            raise ValueError(
                f"{name} is {value!r}, which {np.dtype(wanted)} does not hold exactly. Pass a "
                f"Python {type(value).__name__}."
            )
    return result


def savable(leaf: Any, name: str) -> Any:
    """Return a leaf as Orbax saves and reads it: NumPy's scalars, and bools, as arrays.

    Raises:
        ValueError: the leaf could not be read back. It says which one, before anything is written.
    """
    if isinstance(leaf, str):
        return str(leaf)
    if isinstance(leaf, (bool, complex, np.generic)):
        leaf = np.asarray(leaf)
    if isinstance(leaf, int) and not -(2**63) <= leaf < 2**63:
        raise ValueError(f"{name} is {leaf}, which 64 bits do not hold. Pass a str.")
    if isinstance(leaf, (int, float)):
        return leaf
    if not hasattr(leaf, "dtype"):
        raise ValueError(
            f"{name} is a {type(leaf).__name__}, which a checkpoint cannot hold. Pass arrays, "
            "numbers and strings; of an Equinox module, eqx.filter(model, eqx.is_array)."
        )
    if not is_key(leaf) and not _is_storable(np.dtype(leaf.dtype)):
        raise ValueError(
            f"{name} has dtype {leaf.dtype}, which a checkpoint cannot hold. Pass numbers of a "
            "dtype that TensorStore has, in this machine's byte order, or a str."
        )
    if leaf.size == 0:
        raise ValueError(
            f"{name} has no elements, which Orbax cannot save. Leave it out, or mask it: None."
        )
    return leaf


def _is_storable(dtype: np.dtype) -> bool:
    """Return whether TensorStore has such numbers. Of 4 bits a float has no digest."""
    is_number = dtype == np.bool_ or jnp.issubdtype(dtype, jnp.number)
    is_known = hasattr(ts, dtype.name) and not dtype.name.startswith("float4")
    return is_number and is_known and dtype.isnative
