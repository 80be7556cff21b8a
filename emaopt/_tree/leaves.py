"""Leaves of several trees side by side. `None` is an absent leaf and stays absent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .paths import Tree, is_none, leaf_names


def zip_leaves(**trees: Tree) -> tuple[list[tuple], Any]:
    """The leaves of several trees side by side, and the structure of the first tree.

    The keywords are the names that an error uses. A leaf may be `None` in any tree.
    """
    (first, tree), *others = trees.items()
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_none)
    columns = [leaves]
    for name, other in others:
        try:
            columns.append(treedef.flatten_up_to(other))
        except (ValueError, TypeError) as error:
            raise ValueError(_mismatch(first, tree, name, other, error)) from None
    return list(zip(*columns, strict=True)), treedef


def tree_map(f: Callable, **trees: Tree) -> Tree:
    """`f` of the leaves side by side; absent where the leaf of the first tree is absent."""
    rows, treedef = zip_leaves(**trees)
    return treedef.unflatten([None if row[0] is None else f(*row) for row in rows])


def _mismatch(first: str, tree: Tree, name: str, other: Tree, error: Exception) -> str:
    ours, theirs = set(leaf_names(tree)), set(leaf_names(other))
    only = [
        f"only in {where}: {', '.join(sorted(names))}"
        for where, names in ((first, ours - theirs), (name, theirs - ours))
        if names
    ]
    return (
        f"{name} does not have the tree structure of {first}: "
        + ("; ".join(only) or str(error).rstrip("."))
        + f". Pass {first} and {name} made from the same parameters."
    )


def apply_update(p, u):
    """One parameter after its update, rounded as `optax.apply_updates` rounds it.

    An absent update (`None`, or the float0 that JAX gives integers) leaves the parameter.
    """
    if u is None or getattr(u, "dtype", None) == jax.dtypes.float0:
        return p
    if jnp.issubdtype(jnp.result_type(p), jax.dtypes.prng_key):
        return p
    return optax.apply_updates(p, u)
