"""What is written: the items of a checkpoint, what it says it holds, and the digests."""

from typing import Any

from orbax.checkpoint import v1 as ocp

from emaopt._average.ema import SwappedEmaState
from emaopt._average.find import averages, swap
from emaopt._tree.paths import KeyPath, Tree

from ._contents import DIGESTS
from ._digest import digests
from ._stored import leaves_by_path


def items_of(
    checkpointer: ocp.training.Checkpointer,
    params: Tree,
    opt_state: Tree,
    name: str | None,
    digest: bool,
    rest: dict[str, Any],
) -> dict[str, Tree]:
    """The items of a training state: the averages are in `params`, the parameters in the shadow."""
    if not checkpointer.directory.is_absolute():
        raise ValueError(
            f"checkpointer writes to {str(checkpointer.directory)!r}, which is relative, and Orbax "
            "cannot. Make it with an absolute path: os.path.abspath."
        )
    if any(isinstance(state, SwappedEmaState) for state in averages(opt_state).values()):
        raise ValueError(
            "opt_state is swapped already. Pass the state that training goes on with: save swaps."
        )
    averaged, swapped = swap(params, opt_state, name)
    items = {"params": averaged, "opt_state": swapped} | ({"rest": rest} if rest else {})
    for item, tree in items.items():
        check_leaves(item, tree)
    return with_digests(items) if digest else items


def inventory(items: dict[str, Tree]) -> dict:
    """What a checkpoint says it holds, so that an item that is gone is missed."""
    return {"emaopt": {"items": sorted(items)}}


def with_digests(items: dict[str, Tree]) -> dict[str, Tree]:
    """The items and, for each, the digests of its leaves in the order of their sorted paths."""
    found = {}
    for item, tree in items.items():
        leaves = leaves_by_path(tree)
        found[item] = digests([leaves[path] for path in sorted(leaves)])
    return items | {DIGESTS: found}


def check_leaves(item: str, tree: Tree) -> None:
    """Raise if Orbax could not save the tree, or not read it back."""
    seen: dict[str, KeyPath] = {}
    for path, leaf in leaves_by_path(tree).items():
        name = "/".join((item, *path))
        stored = ".".join(path)  # Orbax's own joint
        if stored in seen:
            raise ValueError(
                f"{name} and {'/'.join((item, *seen[stored]))} would be stored under one name. "
                "Rename one: a '.' inside a key collides with nesting."
            )
        seen[stored] = path
        if isinstance(leaf, bool):
            raise ValueError(
                f"{name} is a Python bool, which Orbax cannot read back. Pass np.asarray({leaf})."
            )
        if getattr(leaf, "size", 1) == 0:
            raise ValueError(
                f"{name} has no elements, which Orbax cannot save. Leave it out, or mask it: None."
            )
