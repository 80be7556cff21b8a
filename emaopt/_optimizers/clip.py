"""Functions of the gradients: clipping by value, norm, average norm and global norm.

In TF1's order of operations, so "not clipped" is `x * c / c`: the same number for most c. Norms
are computed in float32 or wider. A zero gradient stays zero, and the derivative there is finite.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from emaopt._tree.checks import check
from emaopt._tree.leaves import map_leaves, tree_map, zip_leaves
from emaopt._tree.numbers import is_concrete, scalar, wide
from emaopt._tree.packing import check_unpacked
from emaopt._tree.paths import Tree


def clip_by_value(clip_value_min: Any, clip_value_max: Any) -> optax.GradientTransformation:
    """Each element between two bounds: `max(min(x, clip_value_max), clip_value_min)`.

    A bound is a scalar, or a tree like the gradients with a scalar or an array for each leaf;
    `None` is no bound. NaN stays NaN. TF1's `tf.clip_by_value`.

    >>> clip_by_value(-1.0, 2.0).update({"w": jnp.array([-3.0, 1.0, 5.0])}, optax.EmptyState())[0]
    {'w': Array([-1.,  1.,  2.], dtype=float32)}
    """
    for lo, hi in _pairs(clip_value_min, clip_value_max):
        if lo is None or hi is None or not (is_concrete(lo) and is_concrete(hi)):
            continue
        if not np.all(np.asarray(lo) <= np.asarray(hi)):
            raise ValueError(
                f"clip_value_min={lo} is above clip_value_max={hi} or is not a number. Swap them."
            )

    def clip(x, lo, hi):
        x = jnp.asarray(x)
        for name, bound in (("clip_value_min", lo), ("clip_value_max", hi)):
            if not _fits(np.shape(bound), x.shape):
                raise ValueError(
                    f"{name} has shape {np.shape(bound)} at a leaf of shape {x.shape}. Pass a "
                    "scalar, or a tree with an array of the leaf's shape."
                )
        x = x if hi is None else jnp.minimum(x, scalar(hi, x.dtype))
        return x if lo is None else jnp.maximum(x, scalar(lo, x.dtype))

    def update(updates, state, params=None):
        del params
        everywhere = lambda bound: (
            bound if _is_tree(bound) else jax.tree.map(lambda _: bound, updates)
        )
        clipped = tree_map(
            clip,
            updates=updates,
            clip_value_min=everywhere(clip_value_min),
            clip_value_max=everywhere(clip_value_max),
        )
        return clipped, state

    return optax.GradientTransformation(optax.init_empty_state, update)


def clip_by_norm(
    clip_norm: ArrayLike, axes: int | tuple[int, ...] | list[int] | None = None
) -> optax.GradientTransformation:
    """Each leaf scaled down to an L2 norm of at most `clip_norm`: `x * c / max(norm(x), c)`.

    `axes`: the norm is over these axes, each slice of the leaf by itself; over all by default.
    The derivative at a zero gradient is the identity. TF1's `tf.clip_by_norm`.

    >>> clip_by_norm(2.5).update({"w": jnp.array([3.0, 4.0])}, optax.EmptyState())[0]
    {'w': Array([1.5, 2. ], dtype=float32)}
    """
    _check_norm(clip_norm)
    if axes is not None:
        axes = tuple(axes) if isinstance(axes, (list, tuple)) else (axes,)
        if not all(isinstance(axis, (int, np.integer)) for axis in axes):
            raise ValueError(
                f"axes={axes} are not whole numbers. Pass an int or a tuple of ints; leave them "
                'static: optax.inject_hyperparams(clip_by_norm, static_args="axes").'
            )

    def clip(x, c):
        norm = _norm(jnp.sum(x * x, axis=axes, keepdims=True))
        return x * c / jnp.maximum(norm, c)

    def update(updates, state, params=None):
        del params
        check_unpacked("updates", updates, "Wrap it: emaopt.unpacked(clip_by_norm(...)).")
        _check_axes(axes, updates)
        return _per_leaf(clip, updates, clip_norm), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def clip_by_average_norm(clip_norm: ArrayLike) -> optax.GradientTransformation:
    """Each leaf scaled down to an average norm of at most `clip_norm`.

    The average norm of n elements is `norm(x) / n` (not the root mean square); the leaf becomes
    `x * c * min(n / norm(x), 1 / c)`. TF1's `tf.clip_by_average_norm`.

    >>> clip_by_average_norm(1.25).update({"w": jnp.array([3.0, 4.0])}, optax.EmptyState())[0]
    {'w': Array([1.5, 2. ], dtype=float32)}
    """
    _check_norm(clip_norm)

    def clip(x, c):
        squares = jnp.sum(x * x)
        inverse = jnp.where(squares == 0, jnp.inf, jax.lax.rsqrt(_nonzero(squares)))
        return x * c * jnp.minimum(inverse * x.size, 1 / c)

    def update(updates, state, params=None):
        del params
        check_unpacked("updates", updates, "Wrap it: emaopt.unpacked(clip_by_average_norm(...)).")
        return _per_leaf(clip, updates, clip_norm), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def clip_by_global_norm(clip_norm: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """All leaves scaled by one factor, down to a global norm of at most `clip_norm`.

    `x * c * min(1 / norm, 1 / c)`. `update(..., use_norm=norm)` takes a norm that is known already
    and believes it. A norm that is infinite or NaN makes every element NaN, so that
    `optax.apply_if_finite` sees it. TF1's `tf.clip_by_global_norm`.

    >>> grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    >>> clip_by_global_norm(2.5).update(grads, optax.EmptyState())[0]
    {'a': Array([1.5], dtype=float32), 'b': Array([2.], dtype=float32)}
    """
    _check_norm(clip_norm)

    def update(updates, state, params=None, *, use_norm=None, **extra):
        del params, extra
        norm = global_norm(updates) if use_norm is None else jnp.asarray(use_norm)
        if norm.shape != ():
            raise ValueError(f"use_norm has shape {norm.shape}. Pass a scalar.")
        norm = norm.astype(wide(norm.dtype))
        c = scalar(clip_norm, norm.dtype)
        scale = c * jnp.minimum(1 / _nonzero(norm, c), 1 / c)
        scale = jnp.where(jnp.isfinite(norm), scale, jnp.nan)
        return _per_leaf(jnp.multiply, updates, scale), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def global_norm(tree: Tree) -> jax.Array:
    """The L2 norm of all leaves together, a scalar: `sqrt(sum of x * x)`.

    Of the widest dtype among the leaves, float32 at least. Absent leaves count nothing. Its
    derivative at zero is zero. TF1's `tf.global_norm`.

    >>> global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0]), "c": None})
    Array(5., dtype=float32)
    """
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    leaves = [x.astype(wide(x.dtype)) for x in leaves]
    dtype = max((x.dtype for x in leaves), key=lambda d: d.itemsize, default=jnp.float32)
    squares = [jnp.zeros((), dtype), *(jnp.sum(x * x).astype(dtype) for x in leaves)]
    # the maximum changes nothing, NaN neither; without it XLA makes of the sum one addition per
    # leaf, and repeats them all inside every leaf that is scaled
    return _norm(jnp.sum(jnp.maximum(jnp.stack(squares), 0)))


def _norm(squares):
    """A square root whose derivative at zero is zero; infinity and NaN pass."""
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), squares)


def _nonzero(x, instead: Any = 1):
    return jnp.where(x == 0, instead, x)


def _per_leaf(f, updates: Tree, hyper: ArrayLike) -> Tree:
    """`f(x, hyper)` in float32 or wider, each leaf back in its own dtype."""

    def leaf(x):
        x = jnp.asarray(x)
        dtype = wide(x.dtype)
        return f(x.astype(dtype), scalar(hyper, dtype)).astype(x.dtype)

    return tree_map(leaf, updates=updates)


def _check_norm(clip_norm) -> None:
    check("clip_norm", clip_norm, lambda c: c > 0, "a number above 0")


def _check_axes(axes, updates: Tree) -> None:
    if axes is None:
        return

    def look(name: str, x) -> None:
        if x is not None and not all(-np.ndim(x) <= axis < np.ndim(x) for axis in axes):
            raise ValueError(
                f"axes={axes} is out of range at leaf {name!r}, which has {np.ndim(x)} axes. "
                "Clip such leaves apart: optax.masked(clip_by_norm(...), mask)."
            )

    map_leaves(look, 0, updates=updates)


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether an array broadcasts to the shape that is wanted."""
    tail = wanted[len(wanted) - len(shape) :]
    return len(shape) <= len(wanted) and all(n in (1, m) for n, m in zip(shape, tail, strict=True))


def _is_tree(bound) -> bool:
    return not jax.tree_util.treedef_is_leaf(jax.tree.structure(bound))


def _pairs(low, high):
    """The bounds side by side where both are given in the same form."""
    if _is_tree(low) and _is_tree(high):
        return zip_leaves(clip_value_min=low, clip_value_max=high)[0]
    if _is_tree(low) or _is_tree(high):
        trees, one = (low, high) if _is_tree(low) else (high, low)
        leaves = jax.tree.leaves(trees)
        return [(x, one) if _is_tree(low) else (one, x) for x in leaves]
    return [(low, high)]
