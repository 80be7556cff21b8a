"""Name the leaves of a tree: a name is the key path, joined with a slash.

A name sees through whatever stands for one array. In `{"kernel": nn.Partitioned(x)}` the leaf is
`kernel`, not `kernel/value`: see `stands_for_array`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.tree_util import FlattenedIndexKey, GetAttrKey, tree_flatten_with_path


Tree = Any
KeyPath = tuple[str, ...]
Params = TypeVar("Params")  # a tree that is returned with the type that it had
State = TypeVar("State")


def is_none(x) -> bool:
    """Return whether a node is an absent leaf."""
    return x is None


def leaf_names(tree: Tree) -> list[str]:
    """Return the name of every leaf, absent ones too, in flattening order: `conv/kernel`."""
    return ["/".join(path) for path in leaf_paths(tree)]


def key_paths(tree: Tree) -> list[KeyPath]:
    """Return the whole key path of every leaf that is there, as Orbax names it on disk."""
    return [tuple(map(key_name, keys)) for keys, _ in tree_flatten_with_path(tree)[0]]


def leaf_paths(tree: Tree) -> list[KeyPath]:
    """Return the key path of every leaf, absent ones too, without the wrappers of single arrays."""
    is_leaf = lambda node: node is None or stands_for_array(node)
    paths = []
    for keys, node in tree_flatten_with_path(tree, is_leaf=is_leaf)[0]:
        # usually 1; a mask may have put a node without leaves in the place of the array
        inside = len(jax.tree.leaves(node, is_leaf=is_none))
        paths += [tuple(map(key_name, keys))] * inside
    return paths


def stands_for_array(node: Any) -> bool:
    """Return whether a node of a tree stands for one array, so that it is no level of a name.

    Examples are Linen's `Partitioned` and `LogicallyPartitioned`, NNX's `Variable` and haliax's
    `NamedArray`. None of these packages is imported. A node stands for an array if

    * it is registered with JAX, and is no container (dict, list, tuple, named tuple, any other
      mapping or sequence) and no module (a class with a base named `Module`: Equinox, NNX), whose
      fields are levels even where there is only one, as in `eqx.nn.Embedding`;
    * it has exactly one child, which is a leaf or stands for an array itself;
    * the child is its `value` or its `array`, or has no name, or the class says itself that it is
      an array (it has `shape` and `dtype`) or a box (it has `unbox`).
    """
    if isinstance(node, _NO_WRAPPERS):
        return False
    if any(base.__name__ == "Module" for base in type(node).__mro__):
        return False
    children = tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if len(children) != 1:
        return False
    keys, child = children[0]
    if not keys:  # a leaf
        return False
    return _is_named_as_array(type(node), keys[0]) and (
        jax.tree_util.all_leaves([child], is_leaf=is_none) or stands_for_array(child)
    )


# arrays and numbers stand first, because most nodes are such
_NO_WRAPPERS = (
    *(jax.Array, np.ndarray, np.generic, str, bool, int, float, complex, type(None)),
    *(dict, list, tuple, Mapping, Sequence),
)


def _is_named_as_array(kind: type, key: Any) -> bool:
    if isinstance(key, FlattenedIndexKey):
        return True
    if isinstance(key, GetAttrKey) and key.name in ("value", "array"):
        return True
    return hasattr(kind, "unbox") or (hasattr(kind, "shape") and hasattr(kind, "dtype"))


def logical(path: KeyPath) -> KeyPath:
    """Return a key path without the `value` that a box around an array puts at its end."""
    return path[:-1] if path[-1:] == ("value",) else path


def shared_paths(tree: Tree) -> list[list[KeyPath]]:
    """Return the key paths of every NNX Variable that stands in several places: tied weights."""
    places: dict[int, list[KeyPath]] = {}
    nodes, _ = tree_flatten_with_path(tree, is_leaf=lambda x: x is None or _is_variable(x))
    for keys, node in nodes:
        if _is_variable(node):
            places.setdefault(id(node), []).append(tuple(map(key_name, keys)))
    return [paths for paths in places.values() if len(paths) > 1]


def _is_variable(x: Any) -> bool:
    return any(
        base.__name__ == "Variable" and base.__module__.startswith("flax.nnx")
        for base in type(x).__mro__
    )


def called(name: str, paths: Iterable[KeyPath]) -> list[KeyPath]:
    """Return the paths that a name means: the paths that contain its steps in this order.

    This is what `name=` means wherever an average is chosen: in a state, and in a checkpoint. The
    best kind of match wins. Best is a path equal to the name. Then come paths with all steps of the
    name in a row. Then come paths with other steps in between, such as the fields of a wrapper:
    `x/1` means `inner_states/x/inner_state/1`.

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
    """Return the position in a path from which the steps stand in a row, or `None`."""
    starts = range(len(path) - len(steps) + 1)
    return next((i for i in starts if path[i : i + len(steps)] == steps), None)


def _in_order(steps: KeyPath, path: KeyPath) -> bool:
    rest = iter(path)
    return all(step in rest for step in steps)  # `in` reads on from where the last step was


def printable(name: str) -> str:
    r"""Return a name that is safe to print: control characters are escaped, `\x1b`, `\n`.

    Use it in tables and errors that show names from a file. `repr` escapes names already.

    >>> print(printable("conv/kernel"), printable("a\nb"))
    conv/kernel a\nb
    """
    if name.isprintable():
        return name
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name
    )


def few(names: Iterable[str]) -> str:
    """Return names as an error lists them: the first twenty, and how many more there are.

    >>> few(["a", "b"]), few(map(str, range(2000)))[-20:]
    ('a, b', '18, 19 and 1980 more')
    """
    names = list(names)
    rest = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(printable, names[:20])) + rest


def key_name(key) -> str:
    """Return one step of a key path as a string: a dict key, a position or a field."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def nested(leaves: dict[KeyPath, Any]) -> Tree:
    """Return nested dicts of leaves, by their key paths.

    Raises:
        ValueError: one path is the start of another one.
    """
    tree: Tree = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{'/'.join(path)} lies below another array. Rename one of them")
        node[path[-1]] = leaf
    return tree
