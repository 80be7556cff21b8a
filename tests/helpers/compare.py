"""Compare two trees of arrays, and say which leaf differs, where and by how much."""

import jax
import jax.numpy as jnp
import numpy as np


def bitwise(got, want):
    """Assert that two trees have the same structure, and their leaves the same dtype and bits.

    >>> bitwise({"w": jnp.float32(1)}, {"w": jnp.float32(1)})
    >>> bitwise({"w": jnp.float32([1, 2])}, {"w": jnp.float32([1, 3])})
    Traceback (most recent call last):
    AssertionError: ['w']: 1 of 2 elements differ, the first at (1,): 2.0, not 3.0
    """
    __tracebackhide__ = True
    for name, x, y in _pairs(got, want):
        _check(name, _form(x), _form(y))
        _check_none(_bits(x) != _bits(y), name, x, y)


def close(got, want, rtol=1e-6, atol=1e-7, of_largest=0.0):
    """Assert that two trees have the same structure, dtypes, and nearly the same numbers.

    A reference in double precision, a float64 of NumPy or a `float`, stands for every dtype.

    Args:
        got: What was computed.
        want: What it should be.
        rtol: The largest deviation, as a share of each element of `want`.
        atol: The same as a number; what is allowed is the sum.
        of_largest: The same, as a share of the largest element of the leaf of `want`.

    >>> close(np.float32([1.000001, 2]), np.float32([1, 2]), rtol=1e-5)
    >>> close(np.float32([1.5, 2]), np.float32([1, 2]), rtol=0.1)
    Traceback (most recent call last):
    AssertionError: the leaf: 1 of 2 elements differ, the first at (0,): 1.5, not 1.0
    """
    __tracebackhide__ = True
    for name, x, y in _pairs(got, want):
        double = isinstance(y, float) or getattr(y, "dtype", None) == np.float64
        _check(name, np.shape(x) if double else _form(x), np.shape(y) if double else _form(y))
        wide = _wide(x)
        a, b = np.asarray(_data(x)).astype(wide), np.asarray(_data(y)).astype(wide)
        size = np.abs(np.where(np.isfinite(b), b, 0))
        allowed = atol + rtol * size + of_largest * np.max(size, initial=0)
        with np.errstate(invalid="ignore"):  # the difference of two infinities
            same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= allowed)
        _check_none(~same, name, x, y)


def near(got, want, share=1e-6):
    """Assert the same as `close`, up to a share of the largest element of each leaf."""
    __tracebackhide__ = True
    close(got, want, rtol=0, atol=0, of_largest=share)


def equal(got, want):
    """Assert that two trees have the same structure, dtypes and numbers; 0.0 equals -0.0."""
    __tracebackhide__ = True
    close(got, want, rtol=0, atol=0)


def _pairs(got, want):
    """Return the name, the leaf got and the leaf wanted, of trees that have the same form."""
    __tracebackhide__ = True
    _check("the structure", jax.tree.structure(got), jax.tree.structure(want))
    paths, leaves = jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
    for (path, x), y in zip(paths, leaves, strict=True):
        yield jax.tree_util.keystr(path) or "the leaf", x, y


def _check(name, got, want):
    __tracebackhide__ = True
    if got != want:
        raise AssertionError(f"{name} is {got}, not {want}")


def _check_none(differ, name, x, y):
    """Raise if elements differ. `differ` may have one more axis than the leaves: the bytes."""
    __tracebackhide__ = True
    if np.any(differ):
        places = np.argwhere(np.reshape(differ, (*np.shape(x), -1)).any(-1))
        first = tuple(map(int, places[0]))
        a, b = (np.asarray(_data(leaf))[first] for leaf in (x, y))
        number = f"{len(places)} of {np.size(x)} elements differ"
        raise AssertionError(f"{name}: {number}, the first at {first}: {a}, not {b}")


def _form(x):
    return f"{getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}"


def _data(x):
    """Return the leaf as numbers: the data of random keys."""
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


def _wide(x):
    """Return the dtype in which differences are taken."""
    return np.complex128 if np.iscomplexobj(_data(x)) else np.float64


def _bits(x):
    """Return the bytes of every element, in a last axis; of what is no number, itself."""
    x = np.asarray(_data(x))
    if x.dtype.kind in "OUS":
        return x
    return np.frombuffer(x.tobytes(), np.uint8).reshape(*x.shape, x.dtype.itemsize)
