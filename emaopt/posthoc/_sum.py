"""Add up trees in float64, leaf by leaf and shard by shard."""

from typing import Any

import jax
import numpy as np

from emaopt._tree.checks import check_shape
from emaopt._tree.leaves import zip_leaves
from emaopt._tree.numbers import dtype_of, is_inexact
from emaopt._tree.paths import Tree, is_none, leaf_names


FIRST = "the first snapshot"


class Sum:
    """Add up trees that are like the first one.

    There is one total per leaf. The total of floating-point numbers is a `_Total`; any other leaf
    has the last value, `_Last`.
    """

    def __init__(self, first: Tree):
        leaves, self.treedef = jax.tree.flatten(first, is_leaf=is_none)
        self.names = leaf_names(first)
        self.like = [_abstract(x) for x in leaves]
        shardings = [x.sharding if isinstance(x, jax.Array) else None for x in leaves]
        self.totals: list[_Total | _Last] = [
            _Total(like, sharding) if like is not None and is_inexact(like) else _Last()
            for like, sharding in zip(self.like, shardings, strict=True)
        ]

    def add(self, name: str, tree: Tree, factor: float) -> None:
        """Add a tree times a factor. With factor 0, only its structure is looked at."""
        first = self.treedef.unflatten(self.like)
        rows, _ = zip_leaves(**{FIRST: first, name: tree})
        for leaf, total, (like, x) in zip(self.names, self.totals, rows, strict=True):
            _check_alike(leaf, name, like, x)
            if factor != 0 and not total.add(x, factor):
                raise ValueError(
                    f"{name} is not finite at leaf {leaf!r}. Leave that step out of the "
                    "snapshots and of the steps given to posthoc.weights."
                )

    def tree(self) -> Tree:
        """Return the sum, in the dtypes and shardings of the first tree. Nothing is left here."""
        leaves = []
        for j in range(len(self.totals)):
            total = self.totals[j]
            # The float64 sum of a leaf is freed before the next leaf is rounded. Otherwise the
            # whole sum and the whole result would be in memory at once.
            self.totals[j] = _Last()
            leaves.append(total.value())
        return self.treedef.unflatten(leaves)


class _Last:
    """Keep the last value of a leaf that is not summed: an integer, a key, an absent leaf."""

    def __init__(self) -> None:
        self.x: Any = None

    def add(self, x: Any, factor: float) -> bool:
        """Take a value in place of the last one."""
        del factor
        self.x = x
        return True

    def value(self) -> Any:
        """Return the last value."""
        return self.x


class _Total:
    """Add up one leaf in float64, in the pieces of its sharding."""

    def __init__(self, like: jax.ShapeDtypeStruct, sharding: Any):
        self.like, self.sharding = like, sharding
        self.pieces: dict[str | None, np.ndarray] = {}

    def add(self, x: Any, factor: float) -> bool:
        """Add a leaf times a factor; False if it is not finite."""
        dtype = np.result_type(self.like.dtype, np.float64)
        for place, piece in _pieces(x, self.sharding).items():
            term = np.array(piece, dtype)  # a copy: changed in place below
            if not np.isfinite(term).all():
                return False
            term *= factor
            if place in self.pieces:
                term += self.pieces[place]
            self.pieces[place] = term
        return True

    def value(self) -> Any:
        """Return the sum in the dtype and the sharding of the first leaf."""
        rounded = {place: x.astype(self.like.dtype) for place, x in self.pieces.items()}
        if self.sharding is None:
            return rounded[None]
        of_shard = lambda index: rounded[str(index)]
        return jax.make_array_from_callback(self.like.shape, self.sharding, of_shard)


def _abstract(x: Any) -> jax.ShapeDtypeStruct | None:
    """Return the shape and the dtype of a leaf; an absent one is absent."""
    return None if x is None else jax.ShapeDtypeStruct(np.shape(x), dtype_of(x))


def _check_alike(leaf: str, name: str, like: Any, x: Any) -> None:
    """Raise unless a leaf is there in both trees, with one shape, or in neither."""
    if like is not None:
        check_shape(leaf, **{FIRST: like, name: x})
    elif x is not None:
        check_shape(leaf, **{name: x, FIRST: like})


def _pieces(x: Any, sharding: Any) -> dict[str | None, Any]:
    """Return a leaf, or its shards that are in this process, by place; no copies."""
    if sharding is None:
        return {None: x}
    if not isinstance(x, jax.Array) or x.sharding != sharding:
        x = jax.device_put(x, sharding)
    return {str(shard.index): shard.data for shard in x.addressable_shards}
