"""Find the node that holds the parameters of an average."""

from collections import Counter
from collections.abc import Collection

from emaopt._tree.paths import KeyPath

from ._place import DIGESTS, is_in, shared_start


_OF_OPTIMIZERS = {"slots", "acc_grads"}  # fields of emaopt's optimizers and of optax.MultiSteps
_SLOTS = {"mu", "nu", "trace"}  # fields of Optax's optimizers


def candidates_for(
    names: Collection[KeyPath], paths: Collection[KeyPath], averages: Collection[KeyPath]
) -> list[KeyPath]:
    """Find the nodes that hold most of some names, those far from every average first.

    Slots have the same names, but stand in the optimizer's state, beside the average. They are none
    of those, nor are the leaves of an average.

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
    outside = [root for root in outside if not _is_slot(root, averages)]
    most = max((held[root] for root in outside), default=0)
    best = (root for root in outside if held[root] == most)
    return sorted(best, key=lambda root: rank(root, averages))


def rank(root: KeyPath, averages: Collection[KeyPath]) -> tuple:
    """Return a key to sort nodes by: those that are likely to hold parameters first."""
    near = max((len(shared_start([root, node])) for node in averages), default=0)
    return near, len(root), "params" not in root, root


def _is_slot(root: KeyPath, averages: Collection[KeyPath]) -> bool:
    """Return whether a node is a slot of the optimizer in the chain of an average, by its path.

    A link of a chain has a position, as the average has, and then the name of the slot:
    `0/slots/momentum` and `0/0/mu` beside `1`. The name of a network, `0/critic`, is in the path of
    its average too. `optax.MultiSteps` keeps a sum of gradients. In `optax.named_chain` links have
    names in place of positions: then the usual names of slots tell.
    """
    if "params" in root:
        return False
    known = {key for node in averages for key in node}
    for node in averages:
        start = len(shared_start([root, node]))
        keys = (*root[start : start + 1], *node[start : start + 1])
        names = [key for key in root[start + 1 :] if not key.isdecimal() and key not in known]
        if len(keys) == 2 and all(map(str.isdecimal, keys)) and names:
            return True
    return not _OF_OPTIMIZERS.isdisjoint(root) or root[-1] in _SLOTS


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

    def distance(key: str, i: int) -> tuple:
        """Return how far a key is from where it stands in the path of the average."""
        return node[i : i + 1] != (key,), node.index(key) if key in node else len(node)

    # without parameters, as of a state that was saved alone, a node that is not there
    best, *others = candidates_for(names, paths, averages) or [("params",)]
    for root in others:
        differ = [i for i, (a, b) in enumerate(zip(root, best, strict=False)) if a != b]
        if len(root) == len(best) and len(differ) == 1:
            (i,) = differ
            if distance(root[i], i) < distance(best[i], i):
                best = root
    return best
