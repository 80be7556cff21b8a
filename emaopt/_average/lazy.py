"""Average the rows of a table, and bring a row up to date when a batch looks it up.

TF1's average moves every row at every step. A row that no batch touches keeps its value, so that
its average only comes nearer to this value: each update multiplies the distance by `1 - rate`, and
the rates follow from the decay alone. So one sum of `log(1 - rate)` for the whole average, and the
sum as it was when a row was last touched, say how far the average of that row has come:

    shadow = value + (shadow - value) * exp(now - then)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._tree.devices import beside, in_memory
from emaopt._tree.leaves import by_path, from_paths, tree_map, zip_leaves
from emaopt._tree.numbers import is_inexact, wide
from emaopt._tree.paths import KeyPath, Tree, leaf_names

from .rounding import Compensated, Draw, Nearest, Rounding, Stored, add, widen


Mask = Tree | Callable[[Tree], Tree]


class Rested(NamedTuple):
    """Record how long the rows of tables have rested. Times are float32 [3], or float64.

    `now`: the sum of `log(1 - rate)` over the updates so far, what rounding took from it, and how
    often it began again because an update copied (rate 1, logarithm minus infinity). `then`: like
    the parameters, [rows, 3] where the mask is true: `now` when a row was last touched. `None`
    elsewhere.
    """

    now: jax.Array
    then: Tree


def start(values: Tree, mask: Mask) -> Rested:
    """Return the times of a new average. `mask`: which leaves are tables."""
    found = mask(values) if callable(mask) else mask
    leaves, treedef = zip_leaves(values=values, rows=found)
    names = leaf_names(values)
    chosen = [_is_table(name, *leaf) for name, leaf in zip(names, leaves, strict=True)]
    if not any(chosen):
        raise ValueError(
            f"rows is true at no leaf of params, which has {', '.join(map(repr, names[:8]))}. Pass "
            "a mask that is true for the tables, or leave it out."
        )
    tables = [x if is_table else None for (x, _), is_table in zip(leaves, chosen, strict=True)]
    dtype = np.dtype(np.float32)
    for table in tables:
        if table is not None:
            dtype = np.promote_types(dtype, jnp.finfo(wide(jnp.result_type(table))).dtype)
    then = [None if table is None else _zeros(table, dtype) for table in tables]
    return Rested(beside(values, jnp.zeros(3, dtype)), treedef.unflatten(then))


def _is_table(name: str, x: Any, chosen: Any) -> bool:
    """Return whether the mask is true for a leaf, and raise where it cannot be."""
    if x is None or chosen is None:
        return False
    if not isinstance(chosen, (bool, jnp.bool_)):
        raise ValueError(
            f"rows is not a mask: it has {chosen!r} at leaf {name!r}. Pass a tree of booleans like "
            'params, or a function that makes one: emaopt.matching("embedding").'
        )
    if chosen and (not is_inexact(x) or jnp.ndim(x) == 0):
        raise ValueError(
            f"rows is true at leaf {name!r}, which is not a table of floating-point numbers. Pass "
            "a mask that is true for tables, [rows, ...]."
        )
    return bool(chosen)


def _zeros(table: Any, dtype: Any) -> jax.Array:
    """Return [rows, 3] zeros, sharded over rows as the table is.

    They are made from the table. A constant has no sharding under jit.
    """
    if isinstance(table, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda x: _zeros(x, dtype), table)
    table = jnp.asarray(table)
    if any(jax.typeof(table).sharding.spec[1:]):  # JAX takes no column of an explicit sharding
        column = jnp.any(table != table, axis=tuple(range(1, table.ndim)))
    else:
        column = table[(slice(None), *(0,) * (table.ndim - 1))]
    zero = jnp.zeros_like(column, dtype=dtype)
    column = jnp.where(column == column, zero, zero)
    return jnp.broadcast_to(column[:, None], (table.shape[0], 3))


def touch(values: Tree, rested: Rested, rate: Any) -> Rested:
    """Return the times after an update of these values with this rate. Absent values rest on."""
    now = _advance(rested.now, rate)

    def leaf(then, x):
        if x is None:
            return then
        # Nothing is above infinity, but XLA does not know it. What `put` writes seems to depend on
        # what `take` read, so XLA does not copy all times to write before it reads.
        return jnp.where(then > jnp.inf, then, jnp.broadcast_to(now, then.shape))

    return Rested(now, tree_map(leaf, then=rested.then, values=values))


def _advance(now: jax.Array, rate: Any) -> jax.Array:
    """Return the time after an update with this rate."""
    total, lost, copies = now
    rate = jnp.asarray(rate).astype(now.dtype)
    is_copy = rate >= 1
    # Compensated: after 10**6 updates the sum may be 10**5, where float32 has steps of 0.008.
    new, low = add(total, lost, jnp.log1p(-jnp.where(is_copy, 0, rate)))
    # A copy ends all that was before it. Two in a row end the same, so they need not be counted:
    # a float32 counts to 2**24 only.
    again = copies + jnp.where(is_copy & (total < 0), 1, 0).astype(now.dtype)
    return jnp.stack([jnp.where(is_copy, 0, new), jnp.where(is_copy, 0, low), again])


def settled(
    values: dict[KeyPath, Any],
    state: Any,
    rounding: Rounding | None = None,
    is_known: bool = True,
) -> Any:
    """Return the average with every row of its tables brought up to date.

    Args:
        values: what the rows have rested at, by key path: the parameters. A leaf that is not
            in them, abstract, or of another shape stays as it is.
        state: the average, an `EmaState`. Without `rows`, it is returned as it is.
        rounding: how it is stored; by default as its dtype says.
        is_known: False makes the rows that have rested NaN, since `values` are others.
    """
    if state.rows is None:
        return state
    shadow = by_path(state.shadow)
    residue = by_path(state.residue) if state.residue is not None else {}
    then, now = by_path(state.rows.then), state.rows.now
    for i, (path, times) in enumerate(then.items()):
        value, old = values.get(path), Stored(shadow[path], residue.get(path))
        if not _can_settle(value, times, old):
            continue
        value, times, old = jax.tree.map(lambda x: in_memory(jnp.asarray(x)), (value, times, old))
        how = rounding or (Nearest if old.residue is None else Compensated)(old.shadow.dtype)
        share = _kept(now, times)
        if not is_known:
            share = jnp.where(share == 1, share, jnp.nan)
        # the place of a leaf draws for its update; a negative one draws other bits
        new = _settle(
            old, widen(value, wide(old.shadow.dtype)), share, how, Draw(state.step, -2 - i)
        )
        shadow[path] = new.shadow
        if path in residue:
            residue[path] = new.residue
        then[path] = jnp.broadcast_to(now, times.shape)
    return state._replace(
        shadow=from_paths(state.shadow, shadow),
        residue=from_paths(state.residue, residue) if residue else state.residue,
        rows=Rested(now, from_paths(state.rows.then, then)),
    )


def _can_settle(value: Any, times: Any, old: Stored) -> bool:
    """Return whether a leaf is a table, and its parameter is there."""
    arrays = [value, times, *old]
    if value is None or times is None or any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays):
        return False
    return np.shape(value) == np.shape(old.shadow)


def _kept(now: jax.Array, then: jax.Array) -> jax.Array:
    """Return the share of its distance to the value that each row still has, [rows]."""
    log = (now[0] - then[:, 0]) + (now[1] - then[:, 1])
    return jnp.where(then[:, 2] == now[2], jnp.exp(log), 0)


def _settle(
    before: Stored, value: jax.Array, share: jax.Array, rounding: Rounding, draw: Draw
) -> Stored:
    """Return the leaf of an average after its rows rested at a value.

    `share` [rows] is what `_kept` returns.
    """
    real = jnp.finfo(value.dtype).dtype
    share = share.astype(real).reshape(share.shape + (1,) * (value.ndim - 1))
    share = jnp.broadcast_to(share, value.shape)
    moved = rounding.approach(before, value, share.astype(value.dtype), draw)
    # A row that was touched at the last update keeps every bit. A value that is not finite moves
    # nothing: `heal` keeps the average of a row whose parameter is NaN.
    stays = (share == 1) | ~jnp.isfinite(value)
    return jax.tree.map(lambda new, old: jnp.where(stays, old, new), moved, before)
