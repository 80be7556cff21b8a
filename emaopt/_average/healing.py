"""An average that one bad value cannot poison.

NaN and Inf never leave an average by themselves: `shadow -= (shadow - nan) * rate` is NaN for ever.
`optax.apply_if_finite` around the chain keeps bad gradients out; `heal` around the average keeps
out parameters that are bad already, and mends a shadow that is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from emaopt._tree.devices import beside, in_memory, stay
from emaopt._tree.leaves import apply_update, by_path, from_paths, tree_map
from emaopt._tree.numbers import is_inexact
from emaopt._tree.paths import Tree

from .ema import EmaState
from .lazy import settled


class HealState(NamedTuple):
    """`healed`: how often each leaf was started again, int32 [], like the parameters."""

    healed: Tree
    state: Tree


def heal(average: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An average whose leaves stay finite: `heal(ema(decay))`, last in the chain.

    Leaf by leaf, after the update: where the new parameters made the shadow NaN or Inf, it stays as
    it was; where it was not finite before, it starts again from the new parameters as soon as they
    are, and `healed` counts one. One pass more over parameters and shadow. The updates pass
    unchanged, so parameters that are NaN stay so: the averages are what to go back to.
    `overwrite(n, heal(ema(decay)))`, not the other way round, feeds back no bad shadow.

    >>> import emaopt
    >>> tx = heal(emaopt.ema(0.5))
    >>> params = jnp.array([1.0])
    >>> _, state = tx.update(jnp.array([jnp.nan]), tx.init(params), params)
    >>> emaopt.average(params, state)
    Array([1.], dtype=float32)
    """
    inner = optax.with_extra_args_support(average)

    def init(params):
        count = lambda p: beside(params, jnp.zeros((), jnp.int32))
        return HealState(tree_map(count, params=params), inner.init(params))

    def update(updates, state, params=None, **extra):
        updates, new = inner.update(updates, state.state, params, **extra)
        values = by_path(tree_map(apply_update, params=params, updates=updates))
        healed = by_path(state.healed)

        def mend(before, after):
            if not _is_average(after):
                return after
            near, mended = (jax.tree.map(in_memory, state) for state in (before, after))
            near = settled(by_path(params), near)
            return jax.tree.map(stay, before, _mend(near, mended, values, healed))

        mended = jax.tree.map(mend, state.state, new, is_leaf=_is_average)
        return updates, HealState(from_paths(state.healed, healed), mended)

    return optax.GradientTransformationExtraArgs(init, update)


def _mend(before: EmaState, after: EmaState, values: dict, healed: dict) -> EmaState:
    """The average after an update, its bad leaves mended; counts what is started again."""
    shadow, residue = by_path(after.shadow), by_path(after.residue)
    low = by_path(before.residue)
    for path, old in by_path(before.shadow).items():
        if old is None or values[path] is None or not is_inexact(old):
            continue
        value = jnp.asarray(values[path])
        finite = tuple(map(_is_finite, (old, shadow[path], value)))
        shadow[path] = _choose(finite, old, shadow[path], value.astype(old.dtype))
        if low.get(path) is not None:
            residue[path] = _choose(finite, low[path], residue[path], 0)
        healed[path] += (~finite[0] & finite[2]).astype(jnp.int32)
    return after._replace(
        shadow=from_paths(after.shadow, shadow), residue=from_paths(after.residue, residue)
    )


def _choose(finite: tuple, old, new, value):
    """The new one if old and new are finite, the value if the old one is not and the value is."""
    was, stays, starts = finite
    return jnp.where(was, jnp.where(stays, new, old), jnp.where(starts, value, old))


def _is_average(node) -> bool:
    return isinstance(node, EmaState)


def _is_finite(x):
    return jnp.all(jnp.isfinite(x))
