"""Find the node that holds the parameters of an average."""

from collections import Counter
from collections.abc import Collection

from emaopt._tree.paths import KeyPath

from ._place import DIGESTS, is_in, shared_start


def candidates_for(
    names: Collection[KeyPath], paths: Collection[KeyPath], averages: Collection[KeyPath]
) -> list[KeyPath]:
    """Find the nodes that hold most of some names, those far from every average first.

    Slots have the same names, but stand in the optimizer's state, beside the average.

    Args:
        names: names of leaves, by their path below the node.
        paths: every leaf of the checkpoint.
        averages: the nodes of all averages, which are none of those.
    """
    names = set(names)
    held = Counter(
        path[:i]
        for path in paths
        if path[0] != DIGESTS
        for i in range(1, len(path) + 1)
        if path[i:] in names
    )
    outside = [root for root in held if not any(is_in(root, node) for node in averages)]
    most = max((held[root] for root in outside), default=0)
    best = (root for root in outside if held[root] == most)
    return sorted(best, key=lambda root: rank(root, averages))


def rank(root: KeyPath, averages: Collection[KeyPath]) -> tuple:
    """Return a key to sort nodes by: those that are likely to hold parameters first."""
    near = max((len(shared_start([root, node])) for node in averages), default=0)
    return near, len(root), "params" not in root, root


def root_beside(
    node: KeyPath,
    names: Collection[KeyPath],
    paths: Collection[KeyPath],
    averages: Collection[KeyPath],
) -> KeyPath:
    """Find the parameters of an average: of several networks, those in the same place.

    Args:
        node: where the average is.
        names: what it averages.
        paths: see `candidates_for`, as `averages`.
        averages: the nodes of all averages.
    """

    def place_in_node(key: str) -> int:
        return node.index(key) if key in node else len(node)

    best, *others = candidates_for(names, paths, averages) or [("",)]
    for root in others:
        differ = [i for i, (a, b) in enumerate(zip(root, best, strict=False)) if a != b]
        if len(root) == len(best) and len(differ) == 1:
            (i,) = differ
            if place_in_node(root[i]) < place_in_node(best[i]):
                best = root
    return best
