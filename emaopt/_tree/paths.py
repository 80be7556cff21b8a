"""The names of leaves: a leaf is named by its key path, joined with a slash."""

from typing import Any, TypeVar

import jax


Tree = Any
KeyPath = tuple[str, ...]
Params = TypeVar("Params")  # a tree that comes back of the type that it was
State = TypeVar("State")


def is_none(x) -> bool:
    """Whether a node is an absent leaf."""
    return x is None


def leaf_names(tree: Tree) -> list[str]:
    """The name of every leaf, absent ones too, in flattening order: `conv/kernel`."""
    return ["/".join(path) for path in leaf_paths(tree)]


def key_paths(tree: Tree) -> list[KeyPath]:
    """The whole key path of every leaf that is there, as Orbax names it on disk."""
    return [tuple(map(key_name, keys)) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def leaf_paths(tree: Tree) -> list[KeyPath]:
    """The key path of every leaf as strings; an NNX Variable's own `value` is not part of it."""
    variables = {keys for keys, _ in _variables(tree)}
    return [
        tuple(map(key_name, keys[:-1] if keys[:-1] in variables else keys))
        for keys, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)[0]
    ]


def shared_paths(tree: Tree) -> list[list[KeyPath]]:
    """The key paths of every NNX Variable that a module has in several places: tied weights."""
    places: dict[int, list[KeyPath]] = {}
    for keys, variable in _variables(tree):
        places.setdefault(id(variable), []).append(tuple(map(key_name, keys)))
    return [paths for paths in places.values() if len(paths) > 1]


def _variables(tree: Tree) -> list[tuple[Any, Any]]:
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is None or _is_variable(x)
    )
    return [(keys, node) for keys, node in nodes if _is_variable(node)]


def _is_variable(x) -> bool:
    return any(
        base.__name__ == "Variable" and base.__module__.startswith("flax.nnx")
        for base in type(x).__mro__
    )


def key_name(key) -> str:
    """One step of a key path: a dict key, a position or a field."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
