"""A sum of trees in float64, leaf by leaf and shard by shard."""

from typing import Any

import jax
import numpy as np

from emaopt._tree.checks import check_shape
from emaopt._tree.leaves import by_path, from_paths, tree_map, zip_leaves
from emaopt._tree.numbers import dtype_of, is_inexact
from emaopt._tree.paths import KeyPath, Tree


FIRST = "the first snapshot"


class Sum:
    """A sum of trees that are like the first one."""

    def __init__(self, first: Tree):
        abstract = lambda x: jax.ShapeDtypeStruct(np.shape(x), dtype_of(x))
        self.like = tree_map(abstract, first=first)
        self.shardings = {
            path: x.sharding if isinstance(x, jax.Array) else None
            for path, x in by_path(first).items()
        }
        # of each averaged leaf, its pieces summed so far, by place; of another one, the newest
        self.sums: dict[KeyPath, Any] = {path: {} for path in self.shardings}

    def add(self, name: str, tree: Tree, factor: float) -> None:
        """Add a tree times a factor; with 0, only its structure is looked at."""
        rows, _ = zip_leaves(**{FIRST: self.like, name: tree})
        for path, (like, x) in zip(self.sums, rows, strict=True):
            leaf = "/".join(path)
            if like is not None:
                check_shape(leaf, **{FIRST: like, name: x})
            elif x is not None:
                check_shape(leaf, **{name: x, FIRST: like})
            if factor == 0:
                continue
            if like is None or not is_inexact(like):
                self.sums[path] = x
                continue
            for place, piece in _pieces(x, self.shardings[path]).items():
                term = np.array(piece, np.result_type(like.dtype, np.float64))
                if not np.isfinite(term).all():
                    raise ValueError(
                        f"{name} is not finite at leaf {leaf!r}. Leave that step out of the "
                        "snapshots and of the steps given to posthoc.weights."
                    )
                term *= factor
                if place in self.sums[path]:
                    term += self.sums[path][place]
                self.sums[path][place] = term

    def tree(self) -> Tree:
        """The sum, in the dtypes and shardings of the first tree. Nothing is left of it here."""
        leaves = {}
        for path, like in by_path(self.like).items():
            total = self.sums.pop(path)  # so that memory holds each leaf in float64 or rounded
            summed = like is not None and is_inexact(like)
            leaves[path] = _rounded(total, like, self.shardings[path]) if summed else total
        return from_paths(self.like, leaves)


def _pieces(x: Any, sharding: Any) -> dict[str | None, Any]:
    """A leaf, or its shards that are in this process, by place; no copies."""
    if sharding is None:
        return {None: x}
    if not isinstance(x, jax.Array) or x.sharding != sharding:
        x = jax.device_put(x, sharding)
    return {str(shard.index): shard.data for shard in x.addressable_shards}


def _rounded(total: dict[str | None, np.ndarray], like: Any, sharding: Any) -> Any:
    rounded = {place: x.astype(like.dtype) for place, x in total.items()}
    if sharding is None:
        return rounded[None]
    return jax.make_array_from_callback(like.shape, sharding, lambda at: rounded[str(at)])
