"""Write what a checkpoint says of itself, around arrays that are written in another way.

Orbax writes a whole item, or one item leaf by leaf. Who writes several items part by part writes
the arrays first, and then what Orbax writes around them.
"""

import json
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from orbax.checkpoint import v1 as ocp

from emaopt._files import read_json
from emaopt._tree.paths import KeyPath, Tree

from ._digest import with_own_digest
from ._item import STRINGS
from ._items import inventory
from ._place import DIGESTS
from ._run import METADATA


def write_frame(
    path: Path,
    items: dict[str, Tree],
    arrays: dict[str, Path],
    digests: dict[KeyPath, Any],
    custom_metadata: dict[str, Any] | None = None,
    **about: Any,
) -> None:
    """Write a checkpoint whose arrays are there already. All processes call this.

    Args:
        path: where it goes.
        items: its items, with an array of one number in the place of each that is there.
        arrays: by item, the directory that the arrays are in; it becomes the item. Where it lacks
            the file that says what is in it, it gets that of `items`.
        digests: the digest of each leaf by its path, the item first.
        custom_metadata: what else the metadata hold.
        about: what is different in the file that says what is in an item.
    """
    record = {}
    for item in items:
        own = [int(digests[leaf]) for leaf in sorted(digests) if leaf[0] == item]
        record[item] = np.asarray(with_own_digest(np.asarray(own, np.uint32)))
    items = items | {DIGESTS: record}
    metadata = inventory(items) | (custom_metadata or {})
    ocp.save_checkpointables(path, items, custom_metadata=metadata)
    if jax.process_index() == 0:
        for item, directory in arrays.items():
            _exchange(path / item, directory, about)


def _exchange(item: Path, arrays: Path, about: dict[str, Any]) -> None:
    """Put the arrays of an item in the place of those of one number."""
    if not (arrays / METADATA).exists():
        (item / METADATA).rename(arrays / METADATA)
        if (item / STRINGS).exists():
            (item / STRINGS).rename(arrays / STRINGS)
    if about:
        metadata = arrays / METADATA
        metadata.write_text(json.dumps(read_json(metadata) | about))
    item.rmtree()
    arrays.rename(item)
