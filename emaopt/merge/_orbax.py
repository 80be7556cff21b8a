"""Read the parameters or an average in a checkpoint of Orbax, block by block."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from emaopt._tree.paths import KeyPath, Tree, few, key_paths, logical, printable
from emaopt.checkpoint import DamagedError, MismatchError
from emaopt.checkpoint._digest import digest_of_block
from emaopt.checkpoint._errors import cause
from emaopt.checkpoint._item import LeafError
from emaopt.checkpoint._place import DIGESTS, Place, evaluated
from emaopt.checkpoint._stored import Stored
from emaopt.checkpoint._verify import compare

from ._blocks import Index


OPEN_AT_ONCE = 256  # arrays of a checkpoint
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
        self.digests: dict[KeyPath, int] = {}
        self._opened: dict[KeyPath, Any] = {}

    def chunks(self, names: list[KeyPath]) -> dict[KeyPath, tuple[int, ...]]:
        """Return what is read at once of each leaf."""
        own = {name: self.places[name] for name in names}
        opened = self._open([place.path for place in own.values()])
        return {
            # of a lazy average all rows, which the times of all bring up to date
            name: tuple(self.leaves[name].shape)
            if place.then is not None
            # of a scalar, TensorStore says None
            else tuple(opened[place.path].chunk_layout.read_chunk.shape or ())
            for name, place in own.items()
        }

    def start(self, wanted: list[tuple[KeyPath, Index]]) -> list[Callable[[], np.ndarray]]:
        """Start to read some blocks. What is returned waits for each."""
        places = [self.places[name] for name, _ in wanted]
        eager = [place for place in places if place.then is None]
        opened = self._open([p for x in eager for p in (x.path, x.residue) if p is not None])
        return [
            self._start(name, place, index, opened)
            for (name, index), place in zip(wanted, places, strict=True)
        ]

    def _start(
        self, name: KeyPath, place: Place, index: Index, opened: dict[KeyPath, Any]
    ) -> Callable[[], np.ndarray]:
        if place.then is not None:
            return lambda: np.asarray(self.stored.averages({name: place})[name])[index]
        paths = [path for path in (place.path, place.residue) if path is not None]
        reading = {path: opened[path][index].read() for path in paths}
        shapes = {path: opened[path].shape for path in paths}

        def wait() -> np.ndarray:
            values = {path: self._end(path, reading, index, shapes[path]) for path in paths}
            return np.asarray(evaluated(place, values))

        return wait

    def value(self, name: KeyPath) -> Any:
        """Read a whole leaf that may be no array."""
        path = self.places[name].path
        return self.stored.read([path])[path]

    def check(self, digests: dict[KeyPath, int]) -> None:
        """Raise if what was read is not what was saved.

        Args:
            digests: The sum of `self.digests` over all processes.
        """
        for item in {path[0] for path in digests}:
            recorded = self.stored.read([(DIGESTS, item)])[(DIGESTS, item)]
            now = {path[1:]: x % 2**32 for path, x in digests.items() if path[0] == item}
            what = f"checkpoint {self.path}: "
            compare(what, item, recorded, self.stored.items[item].paths, now, _ADVICE)

    def _open(self, paths: list[KeyPath]) -> dict[KeyPath, Any]:
        """Open some arrays, or find them open."""
        new = {path[0]: [] for path in paths if path not in self._opened}
        for path in dict.fromkeys(paths):
            if path not in self._opened:
                new[path[0]].append(path[1:])
        found = {path: self._opened[path] for path in paths if path in self._opened}
        for item, own in new.items():
            try:
                opened = self.stored.items[item].open(own)
            except LeafError as error:
                raise self._unreadable((item, *error.path), error) from error
            found |= {(item, *path): array for path, array in opened.items()}
        # TensorStore keeps some kB for each
        self._opened = found if len(self._opened) > OPEN_AT_ONCE else self._opened | found
        return found

    def _end(
        self, path: KeyPath, reading: dict[KeyPath, Any], index: Index, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Wait for a part of an array, and note its digest."""
        try:
            value = np.asarray(reading.pop(path).result())
        except Exception as error:  # TensorStore's errors have many types
            raise self._unreadable(path, error) from error
        if (path[0],) in self.stored.items.get(DIGESTS, ()):
            part = digest_of_block(value, [part.start for part in index], shape)
            self.digests[path] = self.digests.get(path, 0) + part
        return value

    def _unreadable(self, path: KeyPath, error: Exception) -> DamagedError:
        leaf = printable("/".join(filter(None, path)))
        return DamagedError(
            f"checkpoint {self.path}: {leaf} cannot be read, the data is cut off, missing or "
            f"damaged. {cause(error)} {_ADVICE}"
        )


def plain_parameters(stored: Stored, node: str | None) -> OrbaxTree:
    """Return the parameters of a checkpoint, as the last step left them.

    Args:
        stored: The checkpoint, of whatever library.
        node: Where they lie, such as `state/params`; by default that is found out.

    Raises:
        MismatchError: Nothing or several nodes may be the parameters. The error lists them.
    """
    contents = stored.contents
    root = _root(stored, node)
    if contents.averages and root == contents.root:  # a swap with the averages is undone
        paths = contents.params
    else:
        start = len(root)
        below = {logical(path): path for path in stored.paths() if path[:start] == root}
        paths = {path[start:]: at for path, at in below.items()}
    tree = stored.items[root[0]].tree
    for key in root[1:]:
        tree = tree[int(key) if isinstance(tree, list) else key]
    places = {name: Place(at, None, at) for name, at in paths.items()}
    named = {logical(path): path for path in key_paths(tree)}
    return OrbaxTree(stored, tree, {name: places[name] for name in named})


def _root(stored: Stored, node: str | None) -> KeyPath:
    """Find the node that holds the parameters."""
    paths = [path for path in stored.paths() if path[0] != DIGESTS]
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
