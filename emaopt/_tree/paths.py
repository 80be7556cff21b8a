"""The names of leaves: a leaf is named by its key path, joined with a slash."""

from collections.abc import Iterable
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


def called(name: str, paths: Iterable[KeyPath]) -> list[KeyPath]:
    """Return the paths that a name means: those in which its steps stand, in this order.

    This is what `name=` means wherever an average is chosen: in a state, and in a checkpoint. A
    path that is the name comes first; then those that have all its steps in a row; then those
    where other steps lie between, as the fields of a wrapper do: `x/1` is
    `inner_states/x/inner_state/1`. Only the best of these three are returned.

    Args:
        name: steps of a path, joined with a slash, as in `emaopt.averages(opt_state)`.
        paths: the path of each average.

    Example:
        >>> called("fast", [("gen", "fast"), ("disc", "fast"), ("disc", "slow")])
        [('gen', 'fast'), ('disc', 'fast')]
    """
    paths = list(paths)
    steps = tuple(name.split("/"))
    whole = [path for path in paths if path == steps]
    in_a_row = [path for path in paths if _position(steps, path) is not None]
    return whole or in_a_row or [path for path in paths if _in_order(steps, path)]


def _position(steps: KeyPath, path: KeyPath) -> int | None:
    """Return where the steps stand in a row in a path, or `None`."""
    starts = range(len(path) - len(steps) + 1)
    return next((i for i in starts if path[i : i + len(steps)] == steps), None)


def _in_order(steps: KeyPath, path: KeyPath) -> bool:
    rest = iter(path)
    return all(step in rest for step in steps)  # `in` reads on from where the last step was


def key_name(key) -> str:
    """One step of a key path: a dict key, a position or a field."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
