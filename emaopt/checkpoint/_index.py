"""Where the parameters and the averages are in a checkpoint, by the key paths of its leaves.

A leaf is one path, the item first: `("opt_state", "1", "shadow", "conv", "kernel")`.
"""

from collections import Counter
from collections.abc import Iterable


KeyPath = tuple[str, ...]
Index = dict[KeyPath, KeyPath]  # from paths without NNX's `value` to those on disk
SHADOW, STEP, MARKER = "shadow", "step", "emaopt_swapped"


def logical(path: KeyPath) -> KeyPath:
    """A key path without the `value` that NNX puts at the end of it."""
    return path[:-1] if path[-1:] == ("value",) else path


def average_nodes(index: Iterable[KeyPath]) -> dict[KeyPath, bool]:
    """Every average, a node with a `shadow` and a `step`: its path, and whether it is swapped."""
    index = set(index)
    found = {
        path[:i]
        for path in index
        for i, key in enumerate(path)
        if key == SHADOW and (*path[:i], STEP) in index
    }
    return {node: (*node, MARKER) in index for node in sorted(found)}


def in_shadows(index: Iterable[KeyPath]) -> dict[KeyPath, tuple[KeyPath, bool]]:
    """The leaves of all shadows: the name of each, and whether it is swapped with its parameter."""
    index = set(index)
    nodes = average_nodes(index)
    return {
        path: (path[len(node) + 1 :], swapped)
        for path in index
        for node, swapped in nodes.items()
        if path[: len(node) + 1] == (*node, SHADOW)
    }


def root_of_params(index: Iterable[KeyPath]) -> KeyPath:
    """The node that the parameters are in: beside the averages, or else named `params`."""
    index = set(index)
    if averaged := {leaf for leaf, _ in in_shadows(index).values()}:
        return root_for(index, average_nodes(index), averaged)
    named = [p[: i + 1] for p in index for i, key in enumerate(p) if key == "params"]
    return min(named, key=lambda path: (len(path), path), default=("",))


def root_for(index: Iterable[KeyPath], nodes: Iterable[KeyPath], names: set[KeyPath]) -> KeyPath:
    """The node that the parameters of these names are in.

    Of the nodes outside the averages, the one that holds most of the names and has the least of
    its path in common with an average: beside the optimizer's state, not in it.
    """
    held = Counter(path[:i] for path in index for i in range(1, len(path)) if path[i:] in names)
    outside = [root for root in held if not any(root[: len(node)] == node for node in nodes)]

    def rank(root: KeyPath):
        return -held[root], max((_shared(root, node) for node in nodes), default=0), len(root), root

    return min(outside, key=rank, default=("",))


def params_in(index: Index) -> Index:
    """The parameters: from each one's name to its path on disk."""
    root = root_of_params(index)
    return {path[len(root) :]: at for path, at in index.items() if path[: len(root)] == root}


def _shared(a: KeyPath, b: KeyPath) -> int:
    """The length of the common start."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return (*same, False).index(False)
