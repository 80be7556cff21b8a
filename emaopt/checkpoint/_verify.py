"""Compare what was read with the digests that were saved with it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from emaopt._tree.paths import KeyPath, few

from ._digest import digests, is_record
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
    now = np.asarray(digests(list(values.values()))).tolist()
    compare(what, item, recorded, paths, dict(zip(values, now, strict=False)))


def compare(
    what: str,
    item: str,
    recorded: Any,
    paths: Sequence[KeyPath],
    now: dict[KeyPath, int],
    advice: str = "Use another step.",
) -> None:
    """Raise unless the digests of some leaves are those that were recorded.

    Args:
        what: see `verify`, as `item`, `recorded` and `paths`.
        item: the name of the item.
        recorded: the digests of all its leaves.
        paths: the paths of all its leaves.
        now: the digests of what was read, by path.
        advice: what to do, for errors.

    Raises:
        DamagedError: a leaf, or the digests, are not what was saved.
    """
    recorded = np.asarray(recorded)
    if not is_record(recorded, len(paths)):
        raise DamagedError(
            f"{what}the digests of item {item!r} are damaged, or of another item, so its data "
            f"cannot be trusted. {advice}"
        )
    saved = dict(zip(sorted(paths), recorded.tolist(), strict=False))
    if bad := [path for path in sorted(now) if now[path] != saved[path]]:
        names = few("/".join((item, *path)) for path in bad)
        raise DamagedError(
            f"{what}{names} is damaged: its bits are not those that were saved. {advice}"
        )
