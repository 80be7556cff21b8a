"""Clip gradients: by value, norm, average norm and global norm.

The order of operations is that of TF1. So gradients that need no clipping are still multiplied and
divided by the bound, and may change in the last bit. Norms are computed in float32 or wider. The
norm of complex numbers is the root of the sum of |x|**2. A zero gradient stays zero, and the
derivative there is finite.

With `clip_norm=float("inf")` the gradients pass unchanged. So they do in float32 with any
`clip_norm` from 1.9e19 on, because its square overflows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from emaopt._tree.calls import shows_its_call
from emaopt._tree.checks import NUMBER, Range, check, check_scalar
from emaopt._tree.leaves import map_leaves, tree_map, zip_leaves
from emaopt._tree.numbers import is_concrete, real_dtype, scalar, wide
from emaopt._tree.packing import check_unpacked
from emaopt._tree.paths import Tree

from .numerics import fits


_SMALLEST = float(np.finfo(np.float32).tiny)
_CLIP_NORM = Range(lambda c: c >= _SMALLEST, "a number above 0; float('inf') is no clipping")


@shows_its_call
def clip_by_value(clip_value_min: Any, clip_value_max: Any) -> optax.GradientTransformation:
    """Clip each element to a range, as TF1's `tf.clip_by_value`.

    `max(min(x, clip_value_max), clip_value_min)`. NaN stays NaN. For complex numbers, real and
    imaginary part are clipped separately.

    Args:
        clip_value_min: the lower bound: a scalar, a tree like the gradients with a scalar or an
            array for each leaf, or `None` for no bound.
        clip_value_max: the upper bound, likewise.

    Returns:
        A transformation without state.

    Raises:
        ValueError: a lower bound is above its upper bound or NaN, or a bound does not fit its leaf.

    Example:
        >>> tx = clip_by_value(-1.0, 2.0)
        >>> tx.update({"w": jnp.array([-3.0, 1.0, 5.0])}, optax.EmptyState())[0]
        {'w': Array([-1.,  1.,  2.], dtype=float32)}
    """
    for low, high in _pairs(clip_value_min, clip_value_max):
        for name, bound in (("clip_value_min", low), ("clip_value_max", high)):
            if bound is not None:
                check(name, bound, *NUMBER)
        if low is None or high is None or not (is_concrete(low) and is_concrete(high)):
            continue
        if not np.all(np.asarray(low) <= np.asarray(high)):
            raise ValueError(
                f"clip_value_min={low} is above clip_value_max={high} or is not a number. Pass two "
                "numbers, the smaller one as clip_value_min."
            )

    def everywhere(bound: Any, updates: Tree) -> Tree:
        return bound if _is_tree(bound) else jax.tree.map(lambda _: bound, updates)

    def update(updates, state, params=None):
        del params
        clipped = tree_map(
            _clip_to_range,
            updates=updates,
            clip_value_min=everywhere(clip_value_min, updates),
            clip_value_max=everywhere(clip_value_max, updates),
        )
        return clipped, state

    return optax.GradientTransformation(optax.init_empty_state, update)


@shows_its_call
def clip_by_norm(
    clip_norm: ArrayLike, axes: int | tuple[int, ...] | list[int] | None = None
) -> optax.GradientTransformation:
    """Scale each leaf down to an L2 norm of at most `clip_norm`, as TF1's `tf.clip_by_norm`.

    `x * c / max(norm(x), c)`. The derivative at a zero gradient is the identity.

    Args:
        clip_norm: a number above 0; infinity is no clipping.
        axes: the axes that a norm is taken over; each slice along the other axes is clipped by
            itself. By default all axes, so the whole leaf has one norm.

    Returns:
        A transformation without state.

    Raises:
        ValueError: `clip_norm` is not above 0, `axes` are not whole numbers, a leaf has fewer axes,
            or the gradients are packed.

    Example:
        >>> clip_by_norm(2.5).update({"w": jnp.array([3.0, 4.0])}, optax.EmptyState())[0]
        {'w': Array([1.5, 2. ], dtype=float32)}
    """
    check_scalar("clip_norm", clip_norm, *_CLIP_NORM)
    if axes is not None:
        axes = tuple(axes) if isinstance(axes, (list, tuple)) else (axes,)
        if not all(isinstance(axis, (int, np.integer)) for axis in axes):
            raise ValueError(
                f"axes={axes} are not whole numbers. Pass an int or a tuple of ints; leave them "
                'static: optax.inject_hyperparams(clip_by_norm, static_args="axes").'
            )

    def clip(c: Any, x: jax.Array) -> jax.Array:
        norm = _root(jnp.sum(_squares(x), axis=axes, keepdims=True))
        return _by_parts(lambda x: x * c / jnp.maximum(norm, c), x)

    def update(updates, state, params=None):
        del params
        check_unpacked("updates", updates, "Wrap it: emaopt.on_leaves(clip_by_norm(...)).")
        _check_axes(axes, updates)
        return _per_leaf(lambda x: _unless_boundless(clip, x, clip_norm), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


@shows_its_call
def clip_by_average_norm(clip_norm: ArrayLike) -> optax.GradientTransformation:
    """Scale each leaf down to an average norm, as TF1's `tf.clip_by_average_norm`.

    The average norm of n elements is `norm(x) / n` (not the root mean square). The leaf becomes
    `x * c * min(n / norm(x), 1 / c)`.

    Args:
        clip_norm: a number above 0; infinity is no clipping.

    Raises:
        ValueError: `clip_norm` is not above 0, or the gradients are packed.

    Example:
        >>> clip_by_average_norm(1.25).update({"w": jnp.array([3.0, 4.0])}, optax.EmptyState())[0]
        {'w': Array([1.5, 2. ], dtype=float32)}
    """
    check_scalar("clip_norm", clip_norm, *_CLIP_NORM)

    def clip(c: Any, x: jax.Array) -> jax.Array:
        squares = jnp.sum(_squares(x))
        inverse = jax.lax.rsqrt(jnp.where(squares == 0, 1, squares))
        scale = jnp.where(squares == 0, 1 / c, jnp.minimum(inverse * x.size, 1 / c))
        return _by_parts(lambda x: x * c * scale, x)

    def update(updates, state, params=None):
        del params
        check_unpacked("updates", updates, "Wrap it: emaopt.on_leaves(clip_by_average_norm(...)).")
        return _per_leaf(lambda x: _unless_boundless(clip, x, clip_norm), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


@shows_its_call
def clip_by_global_norm(clip_norm: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Scale all leaves by one factor, down to a global norm of at most `clip_norm`.

    `x * c * min(1 / norm, 1 / c)`. A norm that is infinite or NaN makes every element NaN, so that
    `optax.apply_if_finite` sees it. TF1's `tf.clip_by_global_norm`.

    Under `jax.jit` with sharded gradients the norm is that of the whole arrays. Inside
    `jax.shard_map` each device sees only its own shards, and would clip by their norm. There pass
    the norm of all shards with `use_norm`, as in the second example. Add replicated leaves to that
    norm once, outside of the `psum`.

    Args:
        clip_norm: a number above 0; infinity is no clipping.

    Returns:
        A transformation without state. `update(..., use_norm=norm)` uses a norm that you computed
        already. An array is not checked.

    Raises:
        ValueError: `clip_norm` is not above 0, or `use_norm` is not a scalar.

    Example:
        >>> grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
        >>> clip_by_global_norm(2.5).update(grads, optax.EmptyState())[0]
        {'a': Array([1.5], dtype=float32), 'b': Array([2.], dtype=float32)}
        >>> def clip_shards(shards):
        ...     norm = jnp.sqrt(jax.lax.psum(global_norm(shards) ** 2, "data"))
        ...     return clip_by_global_norm(2.5).update(shards, optax.EmptyState(), use_norm=norm)[0]
    """
    check_scalar("clip_norm", clip_norm, *_CLIP_NORM)

    def update(updates, state, params=None, *, use_norm=None, **extra):
        del params, extra
        norm: Any = global_norm(updates) if use_norm is None else use_norm
        if not hasattr(norm, "dtype"):  # a Python number, maybe a whole one beyond int32
            check_scalar("use_norm", norm, lambda x: ~(x < 0) | ~np.isfinite(x), "0 or above")
            norm = np.float32(norm)
        if np.shape(norm) != ():
            raise ValueError(f"use_norm has shape {np.shape(norm)}. Pass a scalar.")
        norm = jnp.asarray(norm).astype(wide(norm.dtype))
        scale = _unless_boundless(partial(_scale, norm), jnp.ones((), norm.dtype), clip_norm)
        return _per_leaf(
            lambda x: _by_parts(lambda x: x * scale.astype(x.dtype), x), updates
        ), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def global_norm(tree: Tree) -> jax.Array:
    """Return the L2 norm of all leaves together, as TF1's `tf.global_norm`.

    `sqrt(sum of |x|**2)`, a scalar of the widest dtype among the leaves, at least float32. Absent
    leaves are skipped. The derivative at zero is zero. Inside `jax.shard_map` it is the norm of the
    shards of one device: see `clip_by_global_norm`.

    Example:
        >>> global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0]), "c": None})
        Array(5., dtype=float32)
    """
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree) if not _is_float0(x)]
    sums = [jnp.sum(_squares(x.astype(wide(x.dtype)))) for x in leaves]
    dtype = max((x.dtype for x in sums), key=lambda d: d.itemsize, default=jnp.float32)
    squares = [jnp.zeros((), dtype), *(x.astype(dtype) for x in sums)]
    # The maximum changes no value, not even NaN. Without it XLA turns the sum into one addition per
    # leaf, and repeats all of them inside every leaf that is scaled: the time to compile then grows
    # with the square of the number of leaves.
    return _root(jnp.sum(jnp.maximum(jnp.stack(squares), 0)))


def _clip_to_range(x: ArrayLike, low: Any, high: Any) -> Any:
    """Return one leaf between its bounds."""
    if _is_float0(x):
        return x
    x = jnp.asarray(x)
    for name, bound in (("clip_value_min", low), ("clip_value_max", high)):
        if not fits(np.shape(bound), x.shape):
            raise ValueError(
                f"{name} has shape {np.shape(bound)} at a leaf of shape {x.shape}. Pass a "
                "scalar, or a tree with an array of the leaf's shape."
            )

    def clip(x: jax.Array) -> jax.Array:
        x = x if high is None else jnp.minimum(x, _bound(high, x.dtype))
        return x if low is None else jnp.maximum(x, _bound(low, x.dtype))

    return _by_parts(clip, x)


def _bound(bound: Any, dtype: np.dtype) -> Any:
    """Return a bound in the dtype of a leaf. A whole number outside its range becomes its end."""
    if jnp.issubdtype(dtype, jnp.integer) and not isinstance(bound, jax.Array):
        bound = np.clip(np.asarray(bound), jnp.iinfo(dtype).min, jnp.iinfo(dtype).max)
    with np.errstate(over="ignore"):  # 1e39 is infinite in float32, so no bound
        return scalar(bound, dtype)


def _unless_boundless(clip: Callable, x: jax.Array, clip_norm: ArrayLike) -> jax.Array:
    """Return `clip(c, x)` with `c` in the dtype of `x`, or `x` where no norm can reach `c`.

    A norm is a root, so it is at most the root of the largest number. With an infinite bound, TF1's
    formulas would give NaN, `x * inf / inf`; with a bound whose inverse is 0 they would give 0.
    """
    dtype = real_dtype(x.dtype)
    with np.errstate(over="ignore"):
        c = scalar(clip_norm, dtype)
    largest = np.sqrt(jnp.finfo(dtype).max)
    if is_concrete(c):
        return x if c >= largest else clip(c, x)
    return jnp.where(c >= largest, x, clip(jnp.minimum(c, largest), x))


def _scale(norm: jax.Array, c: Any, one: jax.Array) -> jax.Array:
    """Return the factor of all leaves; NaN if their norm is not finite."""
    scale = c * jnp.minimum(one / jnp.where(norm == 0, c, norm), one / c)
    # inf - inf and nan - nan are NaN. A constant NaN would trip jax_debug_nans even where unused.
    return jnp.where(jnp.isfinite(norm), scale, norm - norm)


def _root(squares: jax.Array) -> jax.Array:
    """Return the square root, with a derivative of zero at zero. NaN stays NaN.

    Without the selects XLA replaces the norm of one element, sqrt(x * x), by |x|. That does not
    overflow where TF1's norm does.
    """
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), squares)


def _squares(x: jax.Array) -> jax.Array:
    """Return |x|**2 of each element, real."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def _by_parts(f: Callable, x: jax.Array) -> jax.Array:
    """Return `f(x)`. For complex numbers apply `f` to real and imaginary part separately."""
    return jax.lax.complex(f(x.real), f(x.imag)) if jnp.iscomplexobj(x) else f(x)


def _per_leaf(f: Callable, updates: Tree) -> Tree:
    """Return `f` of each leaf, computed in float32 or wider and given back in its own dtype."""

    def leaf(x):
        if _is_float0(x):
            return x
        x = jnp.asarray(x)
        return f(x.astype(wide(x.dtype))).astype(x.dtype)

    return tree_map(leaf, updates=updates)


def _is_float0(x: Any) -> bool:
    """Return whether a gradient is float0, as `jax.grad(..., allow_int=True)` gives integers."""
    return getattr(x, "dtype", None) == jax.dtypes.float0


def _check_axes(axes: tuple[int, ...] | None, updates: Tree) -> None:
    """Raise if a leaf does not have the axes."""
    if axes is None:
        return

    def look(name: str, x) -> None:
        if x is not None and not all(-np.ndim(x) <= axis < np.ndim(x) for axis in axes):
            raise ValueError(
                f"axes={axes} is out of range at leaf {name!r}, which has {np.ndim(x)} axes. "
                "Clip such leaves apart: optax.masked(clip_by_norm(...), mask)."
            )

    map_leaves(look, 0, updates=updates)


def _is_tree(bound: Any) -> bool:
    """Return whether a bound is a tree, not one value for all leaves."""
    return not jax.tree_util.treedef_is_leaf(jax.tree.structure(bound))


def _pairs(low: Any, high: Any) -> list[tuple]:
    """Return lower and upper bounds side by side, where both are given."""
    if _is_tree(low) and _is_tree(high):
        return zip_leaves(clip_value_min=low, clip_value_max=high)[0]
    if _is_tree(low) or _is_tree(high):
        trees, one = (low, high) if _is_tree(low) else (high, low)
        leaves = jax.tree.leaves(trees)
        return [(x, one) if _is_tree(low) else (one, x) for x in leaves]
    return [(low, high)]
