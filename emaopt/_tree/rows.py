"""Train sparsely: only the few rows of an embedding table that a batch looks up.

TF1 has `IndexedSlices` for this. Here it is a view: `rows` lists the ids of a batch once each,
`take` copies these rows out of the parameters and the optimizer state, an ordinary step trains the
small trees, and `put` writes the rows back. A step costs what the rows cost, and the rows that the
batch does not look up stay as they are, as in TF1.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from .checks import check_unique, describe
from .numbers import is_concrete, is_inexact
from .paths import State, Tree, leaf_names
from .tables import check_can_be_taken, owners_of


PADDING = 2**31 - 1  # fills up `Rows.ids`: outside every table, so `put` writes nothing for it
OUTSIDE = 2**31 - 2  # stands for every id that cannot be in a table: a negative one, for example
# Padding rows have this value, or the smallest of their dtype. A zero would do harm: Adagrad's
# 0 / sqrt(0) is NaN, and `optax.apply_if_finite` would refuse the step.
_TINY = 2.0**-100


class Rows(NamedTuple):
    """Hold the ids of the rows that a batch needs of one table.

    `ids`: int32 [size], the distinct ids, ascending; unused places at the end hold 2**31 - 1.
    `positions`: int32, shaped like the ids that `rows` was given: where each id stands in `ids`,
    and so in the small table. It is a dict if the ids were one.
    """

    ids: jax.Array
    positions: Any


def rows(ids: Any, size: int | None = None) -> Rows:
    """Return the distinct ids of a batch, and the position of each id among them.

    The model looks up `positions` in the small table of `take`, in place of `ids` in the whole
    table. It works under `jit`, where `size` fixes the shape. TF1's `tf.unique` in
    `_deduplicate_indexed_slices`.

    Args:
        ids: The row numbers that the batch looks up, an integer array of any shape; repeated ids
            are fine. Several lookups in one table: a dict of such arrays.
        size: How many rows the view holds, at least the number of distinct ids. By default the
            number of ids, which is always enough. A smaller one makes the step cheaper. Too small
            a `size` is an error; under `jit`, where the ids cannot be seen, every row of the view
            is then NaN, so that the loss is NaN, and `put` leaves the whole table as it was.

    Returns:
        `Rows(ids, positions)`.

    Raises:
        ValueError: The ids are not integers, one is negative or above 2**31 - 3, or `size` is too
            small.

    Example:
        >>> found = rows(jnp.array([7, 3, 7]))
        >>> found.ids.tolist(), found.positions.tolist()
        ([3, 7, 2147483647], [1, 0, 1])
    """
    lookups, treedef = jax.tree.flatten(ids) if isinstance(ids, Mapping) else ([ids], None)
    lookups = [_checked_ids(x) for x in lookups]
    flat = jnp.concatenate([x.ravel() for x in lookups])
    if size is None:
        size = flat.size
    if not isinstance(size, (int, np.integer)) or size < 0:
        raise ValueError(f"size={size!r} is not a number of rows. Pass an integer, 0 or more.")
    needed = np.unique(flat).size if size < flat.size and is_concrete(flat) else 0
    if needed > size:
        raise ValueError(
            f"size={size} is too small: ids has {needed} distinct ids. Pass size={needed} or more, "
            "or leave it out."
        )
    if not flat.size:
        return Rows(jnp.full(size, PADDING, jnp.int32), ids)
    distinct, places = _distinct(flat, int(size))
    ends = np.cumsum([x.size for x in lookups])[:-1]
    parts = jnp.split(places, ends)
    positions = [part.reshape(x.shape) for part, x in zip(parts, lookups, strict=True)]
    return Rows(distinct, positions[0] if treedef is None else treedef.unflatten(positions))


def _checked_ids(ids) -> jax.Array:
    """Return the ids as int32, where every id that cannot be in a table is `OUTSIDE`."""
    ids = ids if hasattr(ids, "dtype") else np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids has dtype {ids.dtype}. Pass integers, the numbers of rows.")
    if is_concrete(ids):
        seen = np.asarray(ids)
        if bad := seen[(seen < 0) | (seen >= OUTSIDE)].tolist():
            raise ValueError(
                f"ids holds {bad[0]}, which is not a row number. Pass ids from 0 to the number of "
                "rows, less one; a hash needs `% number_of_rows` first."
            )
        return jnp.asarray(seen.astype(np.int32))
    if ids.dtype.itemsize < 4:
        ids = ids.astype(jnp.int32)
    last = jnp.asarray(OUTSIDE, ids.dtype)
    return jnp.where(ids < 0, last, jnp.minimum(ids, last)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def _distinct(flat: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Return the distinct ids in `size` places, and where each id is. By sorting.

    `jnp.unique` with its inverse does the same in three times the time on a CPU.
    """
    ordered = jnp.sort(flat)
    is_new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    rank = jnp.cumsum(is_new, dtype=jnp.int32) - 1
    distinct = jnp.full(size, PADDING, jnp.int32).at[rank].set(ordered, mode="drop")
    # Ids without a place would be lost without a word. So all rows become NaN, none is written.
    if size < flat.size:
        distinct = jnp.where(rank[-1] >= size, OUTSIDE, distinct)
    return distinct, jnp.searchsorted(distinct, flat).astype(jnp.int32)


def take(tree: State, tables: Mapping[str, Rows]) -> State:
    """Return a small tree: the rows of a batch in place of each table, all else as it is.

    It takes the rows of the table, of its slots (momentum, Adagrad's accumulator, Adam's m and v,
    in the states of Optax's optimizers too) and of its averages made with `ema(decay, rows=mask)`.
    A transformation steps on the small trees as on any; `put` writes the rows back. Only scalars
    such as the step and Adam's powers move for all rows, so the rows that no batch looks up stay,
    as with TF1's sparse gradients: `emaopt.adam` becomes TF1's `LazyAdamOptimizer`. Whatever acts
    without a gradient, such as `optax.add_decayed_weights`, acts on the rows of the view alone.

    An id outside the table is an error. Under `jit`, where it cannot be seen, its row is NaN, and
    `put` writes nothing for it. `optax.apply_if_finite` around the chain then skips the step.

    Args:
        tree: The parameters, an optimizer state, or both, `(params, opt_state)`. Of a state alone,
            the leaves of a table are those whose names end with the name of the table.
        tables: `{name: Rows}`. A name is that of the parameter, as `emaopt.names(params)` has it.

    Returns:
        A tree of the same structure. Each array of a table has `size` rows in it.

    Raises:
        ValueError: A name is not in the tree, an id is outside its table, an average of the table
            was made without `rows=`, or the state is that of `optax.MultiSteps`.

    Example:
        >>> params = {"table": jnp.array([[1.0], [2.0], [3.0]]), "bias": jnp.array([0.5])}
        >>> take(params, {"table": rows(jnp.array([2, 0]))})
        {'bias': Array([0.5], dtype=float32), 'table': Array([[1.],
               [3.]], dtype=float32)}
    """
    leaves, treedef, tables_of = _find(tree, tables)
    small = [
        x if table is None else _gather(x, table.ids)
        for x, table in zip(leaves, tables_of, strict=True)
    ]
    return treedef.unflatten(small)


def put(tree: State, small: State, tables: Mapping[str, Rows]) -> State:
    """Return the tree with the rows of a small tree written back; all else is taken from `small`.

    It writes in place if the tree is donated: `jax.jit(step, donate_argnums=...)`.

    Args:
        tree: What `take` was given.
        small: What `take` returned, after a step.
        tables: The same `{name: Rows}`. Two views of one size cannot be told apart, so the rows of
            another view would be overwritten.

    Returns:
        A tree of the structure, shapes and dtypes of `tree`.

    Raises:
        ValueError: `small` has another structure, or an array of another shape or dtype than a
            view of `tree` has.

    Example:
        >>> params = {"table": jnp.array([[1.0], [2.0], [3.0]])}
        >>> tables = {"table": rows(jnp.array([2, 0]))}
        >>> small = take(params, tables)
        >>> put(params, {"table": 10 * small["table"]}, tables)
        {'table': Array([[10.],
               [ 2.],
               [30.]], dtype=float32)}
    """
    leaves, treedef, tables_of = _find(tree, tables)
    try:
        new = treedef.flatten_up_to(small)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"small does not have the structure of tree: {str(error).rstrip('.')}. Pass what "
            "take(tree, tables) gave, after the step."
        ) from None
    names = leaf_names(treedef.unflatten([None] * len(leaves)))
    for name, x, y, table in zip(names, leaves, new, tables_of, strict=True):
        _check_view(name, x, y, table)
    return treedef.unflatten(
        y if table is None else _scatter(x, y, table.ids)
        for x, y, table in zip(leaves, new, tables_of, strict=True)
    )


def _gather(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Return these rows of an array; padding is tiny, and the row of an id outside is NaN."""
    x = jnp.asarray(x)
    if jax.typeof(x).memory_space == jax.memory.Space.Host:
        raise ValueError(
            "tree has the average of a table in the memory of the host, where no device can look "
            "rows up. Leave it on the devices: emaopt.on_host is for averages of all rows."
        )
    return _rows_of(x, ids, _sharding(x, is_view=True))


@functools.partial(jax.jit, static_argnums=2)
def _rows_of(x: jax.Array, ids: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Return the rows of an array that has them in the memory of the devices.

    Always compiled. Outside of `jit`, what `_as_vectors` returns would be a copy of the table.
    """
    tiny, missing, table = 0, 0, x
    if is_inexact(x):
        tiny, missing = max(_TINY, float(jnp.finfo(x.dtype).tiny)), jnp.nan
        table = jax.lax.platform_dependent(x, cpu=_as_vectors, default=lambda x: x)
    found = table.at[ids].get(mode="clip", indices_are_sorted=True, out_sharding=sharding)
    shape = (ids.size,) + (1,) * (x.ndim - 1)
    is_there, is_padding = (ids < x.shape[0]).reshape(shape), (ids == PADDING).reshape(shape)
    other = jnp.where(is_padding, jnp.asarray(tiny, x.dtype), jnp.asarray(missing, x.dtype))
    return jnp.where(is_there, found, other)


def _as_vectors(table: jax.Array) -> jax.Array:
    """Return the table as it is, in a way that makes a CPU read each row in vectors.

    A row of 64 numbers that is only copied becomes 64 copies of one number: LLVM unrolls so short
    a loop before it looks for vectors. Such a gather waits for one row after the other, and takes
    three times as long. The choice between a number and NaN makes the loop longer. XLA computes
    it for the rows that it reads, never for the whole table.
    """
    return jnp.where(table != table, jnp.asarray(jnp.nan, table.dtype), table)


def _scatter(x: jax.Array, rows: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the array with these rows in it; ids outside, such as padding, are dropped."""
    x = jnp.asarray(x)
    return x.at[ids].set(
        rows,
        mode="drop",
        indices_are_sorted=True,
        unique_indices=True,
        out_sharding=_sharding(x, is_view=False),
    )


def _sharding(table: jax.Array, is_view: bool) -> NamedSharding | None:
    """Return the sharding of a table or a view of it, where shardings are part of the types.

    In a mesh of explicit axes JAX does not guess it. The rows of a view are the same everywhere.
    """
    sharding = jax.typeof(table).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = PartitionSpec(None, *sharding.spec[1:]) if is_view else sharding.spec
    return NamedSharding(sharding.mesh, spec)  # a spec alone needs `jax.set_mesh` around it


def _find(tree: Tree, tables: Mapping[str, Rows]) -> tuple[list, Any, list[Rows | None]]:
    """Return the leaves of a tree, its structure, and the `Rows` of each leaf that has rows."""
    if not isinstance(tables, Mapping) or not all(isinstance(x, Rows) for x in tables.values()):
        raise ValueError(
            "tables is not a dict of Rows. Pass {name: emaopt.rows(ids)}, with the name of the "
            "table in emaopt.names(params)."
        )
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_absent)
    names = leaf_names(treedef.unflatten(None if _is_absent(x) else x for x in leaves))
    check_unique(names, leaves)
    owners = owners_of(tree, names, tables)
    tables_of: list[Rows | None] = [None] * len(leaves)
    for name, table in tables.items():
        places = [i for i, owner in enumerate(owners) if owner == name]
        arrays = [i for i in places if getattr(leaves[i], "ndim", 0) > 0]
        if not arrays:
            raise ValueError(f"tree has no array at leaf {name!r}. Leave it out of tables.")
        # the parameter, if it is in the tree; of a state alone the widest: Adafactor keeps sums of
        # rows and of columns beside it, step counts are []
        own = [i for i in arrays if names[i] in (name, f"0/{name}")] or arrays
        whole = leaves[max(own, key=lambda i: leaves[i].ndim)]
        _check_inside(name, table, whole.shape[0])
        for i in arrays:
            if whole.ndim > 1 and leaves[i].shape[1:] == whole.shape:
                raise ValueError(
                    f"tree has {describe(leaves[i])} at {names[i]!r}, a history of the table "
                    f"{name!r}, of which no rows can be taken. Pass the state of an optimizer "
                    "without one (L-BFGS has one)."
                )
            if leaves[i].shape[0] == whole.shape[0]:
                check_can_be_taken(name, names[i], names)
                tables_of[i] = table
    return leaves, treedef, tables_of


def _is_absent(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _check_inside(name: str, table: Rows, number: int) -> None:
    """Raise if an id that can be seen is not in the table."""
    if not is_concrete(table.ids):
        return
    ids = np.asarray(table.ids)
    ids = ids[ids != PADDING]
    if ids.size and ids.max() >= number:
        raise ValueError(
            f"tables[{name!r}] has the id {ids.max()}, and the table has {number} rows. Pass ids "
            f"from 0 to {number - 1}."
        )


def _check_view(name: str, x: Any, y: Any, table: Rows | None) -> None:
    """Raise unless a leaf of the small tree is one of a view."""
    if _is_absent(x) or not hasattr(x, "shape"):
        return
    shape = x.shape if table is None else (table.ids.size, *x.shape[1:])
    if getattr(y, "shape", None) != shape or y.dtype != x.dtype:
        raise ValueError(
            f"small has {describe(y)} at leaf {name!r}, where a view of tree with these tables has "
            f"{x.dtype}[{','.join(map(str, shape))}]. Pass what take(tree, tables) gave, after the "
            "step, and the same tables."
        )
