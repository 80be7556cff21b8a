"""Map over the leaves of several trees side by side. `None` is an absent leaf and stays absent."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .paths import KeyPath, Tree, few, is_none, leaf_names, leaf_paths


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves of a tree in flattening order, absent ones too."""
    return jax.tree.leaves(tree, is_leaf=is_none)


def by_path(tree: Tree) -> dict[KeyPath, Any]:
    """Return the leaves of a tree, absent ones too, by their key path.

    Raises:
        ValueError: two leaves have the same path, so a dict would lose one of them.
    """
    paths, found = leaf_paths(tree), leaves(tree)
    named = dict(zip(paths, found, strict=True))
    if len(named) < len(paths):
        twice = next(path for path, number in Counter(paths).items() if number > 1)
        raise ValueError(f"two leaves have the key path {twice}. Rename one of them.")
    return named


def from_paths(tree: Tree, values: dict[KeyPath, Any]) -> Tree:
    """Return the tree with the value of each key path at its leaf: the inverse of `by_path`."""
    structure = jax.tree.structure(tree, is_leaf=is_none)
    return structure.unflatten(values[path] for path in leaf_paths(tree))


def zip_leaves(**trees: Tree) -> tuple[list[tuple], Any]:
    """Return the leaves of several trees side by side, and the structure of the first tree.

    The keywords are the names that an error uses. A leaf may be `None` in any tree.
    """
    (first, tree), *others = trees.items()
    leaves_, treedef = jax.tree.flatten(tree, is_leaf=is_none)
    columns = [leaves_]
    for name, other in others:
        try:
            columns.append(treedef.flatten_up_to(other))
        except (ValueError, TypeError) as error:
            raise ValueError(_mismatch(first, tree, name, other, error)) from None
    return list(zip(*columns, strict=True)), treedef


def tree_map(f: Callable, **trees: Tree) -> Tree:
    """Return a tree of `f(*leaves)`. A leaf that is absent in the first tree stays absent."""
    rows, treedef = zip_leaves(**trees)
    return treedef.unflatten([None if row[0] is None else f(*row) for row in rows])


def map_leaves(f: Callable, results: int, **trees: Tree) -> tuple[Tree, ...]:
    """Return several trees at once, one for each result of `f(name, *leaves)`.

    `f` is called for absent leaves too: it gets `None` and decides what that means. With
    `results=0` the results of `f` are ignored.

    Args:
        f: gets the name of a leaf, and the leaf of each tree; returns a tuple of `results` leaves.
        results: how many trees to return.
        trees: the trees, by the names that an error uses. The first one has the structure.

    Returns:
        `results` trees with the structure of the first tree.

    Raises:
        ValueError: a tree does not have the structure of the first one.

    Example:
        >>> map_leaves(lambda name, x, y: (x + y, name), 2, a={"w": 1}, b={"w": 2})
        ({'w': 3}, {'w': 'w'})
    """
    rows, treedef = zip_leaves(**trees)
    names = leaf_names(next(iter(trees.values())))
    found = [f(name, *row) for name, row in zip(names, rows, strict=True)]
    return tuple(treedef.unflatten(row[i] for row in found) for i in range(results))


def parts(sizes: dict[Any, int], at_once: int) -> Iterator[list[Any]]:
    """Yield the keys in groups of so many bytes, to be read or written one after the other.

    >>> list(parts({"a": 3, "b": 3, "c": 9, "d": 1}, 6))
    [['a', 'b'], ['c'], ['d']]
    """
    part, used = [], 0
    for key, bytes_ in sizes.items():
        if part and used + bytes_ > at_once:
            yield part
            part, used = [], 0
        part.append(key)
        used += bytes_
    yield part


def _mismatch(first: str, tree: Tree, name: str, other: Tree, error: Exception) -> str:
    """Return the error about trees of different structure: the leaves that only one of them has."""
    ours, theirs = set(leaf_names(tree)), set(leaf_names(other))
    only = [
        f"only in {where}: {few(sorted(names))}"
        for where, names in ((first, ours - theirs), (name, theirs - ours))
        if names
    ]
    return (
        f"{name} does not have the tree structure of {first}: "
        + ("; ".join(only) or str(error).rstrip("."))
        + f". Pass {first} and {name} made from the same parameters."
    )


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Return the parameters after their updates, rounded as `optax.apply_updates` rounds them.

    Raises:
        ValueError: an update has another shape than its parameter, which would take that shape on.
    """
    rows, treedef = zip_leaves(params=params, updates=updates)
    for i, (p, u) in enumerate(rows):
        if p is not None and getattr(u, "shape", ()) not in ((), np.shape(p)):
            raise ValueError(
                f"updates has shape {u.shape} at leaf {leaf_names(params)[i]!r} where params has "
                f"{np.shape(p)}. Pass updates and params made from the same parameters."
            )
    return treedef.unflatten(None if p is None else apply_update(p, u) for p, u in rows)


def apply_update(p: Any, u: Any) -> Any:
    """Return one parameter after its update, rounded as `optax.apply_updates` rounds it.

    An absent update (`None`, or the float0 that JAX gives integers) leaves the parameter.
    """
    if u is None or getattr(u, "dtype", None) == jax.dtypes.float0:
        return p
    if jnp.issubdtype(jnp.result_type(p), jax.dtypes.prng_key):
        return p
    return optax.apply_updates(p, u)
