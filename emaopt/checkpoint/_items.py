"""Make what is written: the items of a checkpoint, its inventory, and the digests."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from emaopt._average.ema import SwappedEmaState
from emaopt._average.find import averages, swap
from emaopt._tree.checks import written_names
from emaopt._tree.devices import refuse_deleted
from emaopt._tree.paths import Tree

from ._digest import digests
from ._leaf import savable
from ._place import DIGESTS, STAMP
from ._trees import leaves_by_path, plain, without_model


def items_of(
    params: Tree, opt_state: Tree, name: str | None, rest: dict[str, Any]
) -> dict[str, Tree]:
    """Return the items of a training state: averages in `params`, raw parameters in the shadow.

    Raises:
        ValueError: Orbax could not write the state, or not read it back. Nothing was written.
    """
    if any(isinstance(state, SwappedEmaState) for state in averages(opt_state).values()):
        raise ValueError(
            "opt_state is swapped already: its averages are in params. Pass the state before "
            "emaopt.swap; save calls it."
        )
    averaged, swapped = swap(params, without_model(params, opt_state), name)
    items = {"params": averaged, "opt_state": swapped} | ({"rest": rest} if rest else {})
    return {item: checked(item, tree) for item, tree in items.items()}


def checked(item: str, tree: Tree) -> Tree:
    """Return a tree as Orbax saves it and reads it back.

    Raises:
        ValueError: it could not read it back. The error names the leaf.
        RuntimeError: a step that donates its arguments deleted a leaf.
    """
    tree = plain(tree)
    leaves = leaves_by_path(tree)
    if item == "params" and not leaves:
        raise ValueError("params has no leaves, so nothing could be saved. Pass the parameters.")
    paths = [(item, *path) for path in leaves]
    for path, leaf in zip(paths, leaves.values(), strict=True):
        name = "/".join(path)
        refuse_deleted(f"what is saved as {name!r} is a deleted array", leaf)
    written_names(paths, leaves.values(), ".")  # Orbax joins keys with a dot
    saved = [
        savable(leaf, "/".join(path)) for path, leaf in zip(paths, leaves.values(), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), saved)


def inventory(items: dict[str, Tree], stamp: Sequence[int] | None = None) -> dict[str, Any]:
    """Return what a checkpoint says it holds, so that an item that is gone is missed.

    Args:
        items: its items.
        stamp: which save it is, see `new_stamp`.
    """
    stamped = {} if stamp is None else {STAMP: list(stamp)}
    return {"emaopt": {"items": sorted(items)} | stamped}


def new_stamp(step: int) -> list[int]:
    """Return four 32-bit words for a save: its step (two of them), and a random number.

    They stand in the digests and in the metadata of the checkpoint, so that items which somebody
    put together from two checkpoints are noticed.
    """
    return [step % 2**32, step // 2**32, *np.frombuffer(os.urandom(8), np.uint32).tolist()]


def with_digests(items: dict[str, Tree], stamp: Sequence[int] | None = None) -> dict[str, Tree]:
    """Return the items and, for each, the digests of its leaves in the order of their paths."""
    found: dict[str, Any] = {}
    for item, tree in items.items():
        leaves = leaves_by_path(tree)
        found[item] = digests([leaves[path] for path in sorted(leaves)])
    if stamp is not None:
        found[STAMP] = np.asarray(stamp, np.uint32)
    return items | {DIGESTS: found}
