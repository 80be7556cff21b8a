"""Keep NaN and infinity out of an average.

NaN and infinity never leave an average by themselves: `shadow -= (shadow - nan) * rate` is NaN from
then on. `optax.apply_if_finite` around the chain keeps bad gradients out. `heal` around the average
keeps out parameters that are bad already, and mends a shadow that is bad.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from emaopt._tree.calls import shows_its_call
from emaopt._tree.checks import check_own_state, check_transformation
from emaopt._tree.devices import beside, in_memory, stay
from emaopt._tree.leaves import apply_updates, by_path, from_paths, tree_map
from emaopt._tree.numbers import is_inexact, wide
from emaopt._tree.paths import KeyPath, Tree

from .ema import EmaState
from .lazy import settled


class HealState(NamedTuple):
    """Hold the state of `heal`. `healed`: int32 [] for each leaf, how often it was started again.

    `state` is the state of the wrapped average.
    """

    healed: Tree
    state: Tree


class _Finite(NamedTuple):
    """Record whether all elements of a leaf are finite, bool []: in shadow and new value."""

    shadow: Any
    value: Any


@shows_its_call
def heal(average: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Keep NaN and infinity out of an average: `heal(ema(decay))`, last in the chain.

    It works leaf by leaf, after each update. Where a new parameter is NaN or infinite, the shadow
    of its leaf stays as it was. Where the shadow was not finite before, it starts again from the
    new parameters as soon as they are finite, and `healed` counts one. An element whose update
    overflows, between two finite numbers of opposite signs above 1.7e38, stays as it was. In
    TF1, and in `ema` alone, it becomes infinite.

    The updates pass unchanged, so parameters that are NaN stay NaN: the averages are what to go
    back to. Write `overwrite(n, heal(ema(decay)))`, not the other way round, to feed back no bad
    shadow. It costs a sum over the parameters and over the shadow.

    Args:
        average: `ema(decay)`, or what Optax wraps around it.

    Returns:
        A transformation with state `HealState`.

    Example:
        >>> import emaopt
        >>> tx = heal(emaopt.ema(0.5))
        >>> params = jnp.array([1.0])
        >>> _, state = tx.update(jnp.array([jnp.nan]), tx.init(params), params)
        >>> emaopt.average(params, state)
        Array([1.], dtype=float32)
    """
    check_transformation("average", average, "emaopt.ema(decay)")
    inner = optax.with_extra_args_support(average)

    def init(params: Tree) -> HealState:
        count = lambda p: beside(params, jnp.zeros((), jnp.int32))
        state = inner.init(params)
        if not any(map(_is_average, jax.tree.leaves(state, is_leaf=_is_average))):
            raise ValueError("average holds no average. Pass emaopt.ema(decay).")
        return HealState(tree_map(count, params=params), state)

    def update(updates, state, params=None, **extra):
        check_own_state("heal", HealState, state)
        updates, new = inner.update(updates, state.state, params, **extra)
        values = by_path(apply_updates(params, updates))
        healed = by_path(state.healed)
        nodes, treedef = jax.tree.flatten(state.state, is_leaf=_is_average)
        before = [_settled(x, params) if _is_average(x) else x for x in nodes]
        finite = _are_finite([_looked_at(x, values) for x in before])
        after = []
        for node, old, new_node, found in zip(
            nodes, before, treedef.flatten_up_to(new), finite, strict=True
        ):
            if _is_average(node):
                mended = _mend(old, jax.tree.map(in_memory, new_node), values, found, healed)
                new_node = jax.tree.map(stay, node, mended)
            after.append(new_node)
        return updates, HealState(from_paths(state.healed, healed), treedef.unflatten(after))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_average(node: Any) -> bool:
    return isinstance(node, EmaState)


def _settled(state: EmaState, params: Tree) -> EmaState:
    """Return an average in the memory of the devices, with all updates made in its tables."""
    return settled(by_path(params), jax.tree.map(in_memory, state))


def _looked_at(before: Any, values: dict[KeyPath, Any]) -> dict[KeyPath, _Finite]:
    """Return the shadow and the value of every averaged leaf that has a value."""
    if not _is_average(before):
        return {}
    return {
        path: _Finite(old, jnp.asarray(values[path]))
        for path, old in by_path(before.shadow).items()
        if old is not None and values[path] is not None and is_inexact(old)
    }


def _are_finite(trees: list[dict[KeyPath, _Finite]]) -> list[dict[KeyPath, _Finite]]:
    """Return in the place of each array whether all its elements are finite.

    Each array is summed: XLA on CPU takes three to five times as long for `all(isfinite(x))`. If a
    sum is finite, so are its elements. If a sum is not, that may be an overflow of finite elements;
    in that rare case all arrays are looked at element by element. Nothing large leaves the `cond`,
    so the shadow is still updated in place. Its branches are functions of the module: as lambdas
    they would be compiled again at each call where there is no `jit` around.
    """
    arrays, structure = jax.tree.flatten(trees)
    if not arrays:
        return trees
    total = jnp.sum(jnp.stack([_sum(x) for x in arrays]))
    finite = jax.lax.cond(jnp.isfinite(total), _all_finite, _each_finite, arrays)
    return structure.unflatten(finite)


def _sum(x: jax.Array) -> jax.Array:
    total = jnp.sum(x, dtype=wide(x.dtype))
    return (jnp.real(total) + jnp.imag(total)).astype(jnp.float32)


def _all_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.ones((), bool) for _ in arrays]


def _each_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    # not all(isfinite(x)): XLA on CPU would keep an array of booleans for each leaf
    return [jnp.max(_size(x), initial=0) < jnp.inf for x in arrays]


def _size(x: jax.Array) -> jax.Array:
    """Return abs(x), of a complex number the larger part: its abs may overflow."""
    if jnp.iscomplexobj(x):
        return jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
    return jnp.abs(x)


def _mend(
    before: EmaState,
    after: EmaState,
    values: dict[KeyPath, Any],
    finite: dict[KeyPath, _Finite],
    healed: dict[KeyPath, Any],
) -> EmaState:
    """Return the average after an update, its bad leaves mended. Count in `healed`, in place."""
    shadow, residue = by_path(after.shadow), by_path(after.residue)
    old_shadow, old_residue = by_path(before.shadow), by_path(before.residue)
    for path, found in finite.items():
        old, value = old_shadow[path], jnp.asarray(values[path])
        taken = found.value & jnp.isfinite(shadow[path])
        shadow[path] = _choose(found, taken, old, shadow[path], value.astype(old.dtype))
        if old_residue.get(path) is not None:
            residue[path] = _choose(found, taken, old_residue[path], residue[path], 0)
        healed[path] += (~found.shadow & found.value).astype(jnp.int32)
    return after._replace(
        shadow=from_paths(after.shadow, shadow), residue=from_paths(after.residue, residue)
    )


def _choose(finite: _Finite, taken: jax.Array, old: Any, new: Any, value: Any) -> jax.Array:
    """Return the new number where it is taken; the value where the shadow starts again."""
    return jnp.where(finite.shadow, jnp.where(taken, new, old), jnp.where(finite.value, value, old))
