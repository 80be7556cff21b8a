"""Compare what was read with the digests that were saved with it."""

from collections.abc import Sequence
from typing import Any

from emaopt._tree.paths import KeyPath, few

from ._digest import damaged
from ._errors import DamagedError


def verify(
    what: str, item: str, recorded: Any, paths: Sequence[KeyPath], values: dict[KeyPath, Any]
) -> None:
    """Raise unless the leaves of an item are those whose digests were recorded.

    Args:
        what: which checkpoint it is, for errors: `checkpoint /run/3: `.
        item: the name of the item.
        recorded: the digests of all its leaves, in the order of their paths.
        paths: the paths of all its leaves.
        values: some of its leaves, by path.

    Raises:
        DamagedError: a leaf, or the digests, are not what was saved.
    """
    paths = sorted(paths)
    order = {path: i for i, path in enumerate(paths)}
    bad = damaged(recorded, len(paths), {order[path]: x for path, x in values.items()})
    if bad is None:
        raise DamagedError(
            f"{what}the digests of item {item!r} are damaged, or of another item, so its data "
            "cannot be trusted. Use another step."
        )
    if bad:
        names = few("/".join((item, *paths[i])) for i in bad)
        raise DamagedError(
            f"{what}{names} is damaged: its bits are not those that were saved. Use another step."
        )
