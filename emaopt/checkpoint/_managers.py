"""Hand a training state to any manager of Orbax, and take it back from it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from emaopt._average.find import swap
from emaopt._tree.paths import KeyPath, Params, State, Tree, few

from ._errors import MismatchError, missing
from ._items import inventory, items_of, new_stamp, with_digests
from ._place import DIGESTS, STAMP, SWAPPED, UNTOLD
from ._resume import as_saved
from ._trees import leaves_by_path, plain, with_model, without_model
from ._verify import verify


def items(
    params: Tree,
    opt_state: Tree,
    *,
    name: str | None = None,
    digest: bool = True,
    **rest: Any,
) -> tuple[dict[str, Tree], dict[str, Any]]:
    """Return what `save` writes: the items of a checkpoint, and its metadata. Nothing is written.

    For a manager that `save` does not take: Orbax's `CheckpointManager`, its emergency and
    multi-tier managers, those of Pathways. Save each item as a tree, or all of them as one tree,
    and pass the metadata as `custom_metadata` where there is such an argument. The directory is
    then read as any other is. `from_items` takes what the manager restored.

    With abstract trees the items are a template for the manager's `restore`. Nothing is computed.

    Args:
        params: the parameters, as training goes on with them; real or abstract.
        opt_state: the state of a chain with `emaopt.ema` in it, not swapped.
        name: which average, if there are several of the same parameters.
        digest: whether to add the item `digests`, a number per leaf that loading compares.
        rest: whatever else is to be resumed: `batch_stats=...`, `epoch=3`.

    Returns:
        `(items, metadata)`: `params` (the averages), `opt_state` (with the raw parameters in the
        place of the averages), `rest` and `digests`; and a dict for JSON with the key `emaopt`.

    Raises:
        ValueError: something could not be read back, as in `save`.

    Example:
        >>> import emaopt
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.ones(2)}
        >>> trees, metadata = items(params, emaopt.ema(0.5).init(params), epoch=3)
        >>> sorted(trees), trees["rest"]
        (['digests', 'opt_state', 'params', 'rest'], {'epoch': 3})
    """
    found = items_of(params, opt_state, name, rest)
    if not digest:
        return found, inventory(found)
    stamp = new_stamp(UNTOLD)
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(found))
    found = _with_room(found) if abstract else with_digests(found, stamp)
    return found, inventory(found, stamp)


def _with_room(trees: dict[str, Tree]) -> dict[str, Tree]:
    """Return the items with arrays for their digests, to be restored into."""
    sizes = {item: len(jax.tree.leaves(tree)) for item, tree in trees.items()}
    room = {item: np.zeros(size + 1, np.uint32) for item, size in sizes.items()}
    return trees | {DIGESTS: room | {STAMP: np.zeros(4, np.uint32)}}


def from_items(
    items: Mapping[str, Tree],
    /,
    params: Params,
    opt_state: State,
    **rest: Any,
) -> tuple[Params, State, dict[str, Any]]:
    """Return the training state of the items that a manager restored, verified; undo the swap.

    Args:
        items: what was restored, with the names of `items`: a dict, or Orbax's `Composite`.
        params: like the parameters that were saved, real or abstract, for their structure.
        opt_state: like the state that was saved, for example `tx.init(params)`.
        rest: like the rest that was saved.

    Returns:
        Parameters, state, and a dict with the rest.

    Raises:
        MismatchError: an item or a leaf is missing, or one too many. It names them.
        DamagedError: the bits of a leaf are not those that were saved. It names the leaf.

    Example:
        >>> import emaopt
        >>> import jax.numpy as jnp
        >>> from emaopt import checkpoint
        >>> params, state = {"w": jnp.ones(2)}, emaopt.ema(0.5).init({"w": jnp.zeros(2)})
        >>> trees, _ = checkpoint.items(params, state)
        >>> from_items(trees, params, state)[0]
        {'w': Array([1., 1.], dtype=float32)}
    """
    given = {item: tree for item, tree in items.items() if tree is not None}
    needed = ["params", "opt_state"] + ["rest"] * bool(rest)
    lost = [item for item in needed if item not in given]
    if lost:
        raise MismatchError(
            f"items has {few(map(repr, sorted(given)))}, and not {few(map(repr, lost))}. Pass what "
            "was restored of the items that checkpoint.items returned."
        )
    stored = {item: leaves_by_path(plain(tree)) for item, tree in given.items()}
    markers = {path for path in stored["opt_state"] if path[-1] == SWAPPED}
    state = without_model(params, opt_state)
    names, like = as_saved(params, state, markers, "items")
    like |= {"rest": rest} if rest or "rest" in given else {}
    _check_names(stored, like)
    _check_digests(stored, like)
    loaded = {}
    for item, tree in like.items():
        leaves = [stored[item][path] for path in leaves_by_path(tree)]
        loaded[item] = jax.tree.unflatten(jax.tree.structure(tree), leaves)
    params, state = loaded["params"], loaded["opt_state"]
    for name in names:
        params, state = swap(params, state, name)
    return params, with_model(params, state, opt_state), loaded.get("rest", {})


def _check_names(stored: dict[str, dict[KeyPath, Any]], like: dict[str, Tree]) -> None:
    """Raise unless the leaves that were restored are those of the templates."""
    problems = []
    for item, tree in like.items():
        wanted, known = leaves_by_path(tree), stored[item]
        lost = [(item, *path) for path in wanted if path not in known]
        others = [(item, *path) for path in known if path not in wanted]
        problems += missing(lost, others)
        if others:
            names = few("/".join(path) for path in others)
            problems.append(f"{names} was restored, and is not in what was passed")
    if problems:
        raise MismatchError("items does not fit what was passed: " + "; ".join(problems) + ".")


def _check_digests(stored: dict[str, dict[KeyPath, Any]], like: dict[str, Tree]) -> None:
    """Raise if the bits of a leaf are not those whose digest was saved."""
    for item in like:
        recorded = stored.get(DIGESTS, {}).get((item,))
        if recorded is not None:
            verify("", item, np.asarray(recorded), list(stored[item]), stored[item])
