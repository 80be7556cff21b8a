"""Read the parameters or an average in a checkpoint of Orbax, block by block."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from emaopt._tree.paths import KeyPath, Tree, few, key_paths, logical, printable
from emaopt.checkpoint import MismatchError
from emaopt.checkpoint._blocks import Blocks
from emaopt.checkpoint._place import Place
from emaopt.checkpoint._stored import Stored

from ._blocks import Index


_PARAMS = ("params", "model_params")  # what libraries call the node with the parameters
_ADVICE = "Leave that step out."  # a sum can do without a damaged checkpoint
_STATE = r"(^|_)opt"  # how the keys of an optimizer's state start


class OrbaxTree:
    """Read a tree of arrays in a checkpoint of Orbax.

    Attributes:
        path: The checkpoint, for errors.
        tree: The structure of the parameters, with names at the leaves.
        leaves: Every leaf by name: an abstract array, a number or a string.
        digests: What was read, as partial digests by the path on disk.
    """

    def __init__(self, stored: Stored, tree: Tree, places: dict[KeyPath, Place]):
        self.stored, self.tree, self.places = stored, tree, places
        self.path = stored.path
        forms = stored.forms({place.path for place in places.values()})
        self.leaves: dict[KeyPath, Any] = {n: forms[p.path] for n, p in places.items()}
        self._blocks = Blocks(stored, _ADVICE)
        self.digests = self._blocks.digests

    @classmethod
    def plain(cls, stored: Stored, tree: Tree, paths: dict[KeyPath, KeyPath]) -> "OrbaxTree":
        """Return the tree of leaves that are read as they lie, by name."""
        return cls(stored, tree, {name: Place(at, None, at) for name, at in paths.items()})

    def chunks(self, names: list[KeyPath]) -> dict[KeyPath, tuple[int, ...]]:
        """Return what is read at once of each leaf."""
        shapes = self._blocks.chunks(self.places[name] for name in names)
        return dict(zip(names, shapes, strict=True))

    def start(self, wanted: list[tuple[KeyPath, Index]]) -> list[Callable[[], np.ndarray]]:
        """Start to read some blocks. What is returned waits for each."""
        return self._blocks.start((self.places[name], index) for name, index in wanted)

    def value(self, name: KeyPath) -> Any:
        """Read a whole leaf that may be no array."""
        path = self.places[name].path
        return self.stored.read([path])[path]

    def check(self, digests: dict[KeyPath, int]) -> None:
        """Raise if what was read is not what was saved.

        Args:
            digests: The sum of `self.digests` over all processes.
        """
        self._blocks.check(digests)


def plain_parameters(stored: Stored, node: str | None) -> OrbaxTree:
    """Return the parameters of a checkpoint, as the last step left them.

    Args:
        stored: The checkpoint, of whatever library.
        node: Where they lie, such as `state/params`; by default that is found out.

    Raises:
        MismatchError: Nothing or several nodes may be the parameters. The error lists them.
    """
    root = _root(stored, node)
    tree, paths = stored.tree_of(root), stored.contents.below(root)
    in_order = [logical(path) for path in key_paths(tree)]
    return OrbaxTree.plain(stored, tree, {name: paths[name] for name in in_order})


def _root(stored: Stored, node: str | None) -> KeyPath:
    """Find the node that holds the parameters."""
    paths = stored.saved()
    nodes = {path[:i]: None for path in paths for i in range(1, len(path))}
    if node is not None:
        return _only(stored, node, list(nodes))
    if stored.contents.averages:
        return stored.contents.root
    called = [path for path in nodes if path[-1] in _PARAMS and not _is_state(path)]
    if not called:
        tops = {path[:2] if len(stored.items) == 1 else path[:1] for path in paths}
        called = [path for path in tops if path in nodes and not _is_state(path)]
        alone = {path[:1] for path in paths}
        if len(alone) == 1 and not any(map(_is_state, tops)):  # nothing but parameters
            called = list(alone)
    least = min(map(len, called), default=0)
    found = sorted(path for path in called if len(path) == least)
    if len(found) != 1:
        known = found or sorted(path for path in nodes if len(path) < 3)
        what = "in several places" if found else "nowhere"
        raise MismatchError(
            f"checkpoint {stored.path} has parameters {what}. Say where they lie: --params NODE, "
            f"or params= in Python, with one of {_shown(known)}"
        )
    return found[0]


def _only(stored: Stored, node: str, nodes: list[KeyPath]) -> KeyPath:
    """Return the one node of a name: its whole path, or the end of it."""
    keys = tuple(filter(None, node.split("/")))
    whole = [path for path in nodes if tuple(filter(None, path)) == keys]
    found = whole or [path for path in nodes if path[-len(keys) :] == keys]
    least = min(map(len, found), default=0)
    found = [path for path in found if len(path) == least]
    if len(found) != 1:
        known = found or sorted(path for path in nodes if len(path) < 3)
        what = "several nodes" if found else "no node"
        raise MismatchError(
            f"params={node!r} is {what} of checkpoint {stored.path}. Pass one of {_shown(known)}"
        )
    return found[0]


def _shown(nodes: Iterable[KeyPath]) -> str:
    return few(printable("/".join(filter(None, node))) for node in nodes)


def _is_state(path: KeyPath) -> bool:
    return any(re.search(_STATE, key.lower()) for key in path)
