"""Have Orbax write the items of a checkpoint, with their digests and what it says it holds."""

from collections.abc import Callable
from typing import Any

from orbax.checkpoint import v1 as ocp

from emaopt._tree.paths import Tree

from ._context import check_context
from ._errors import saving
from ._items import inventory, new_stamp, with_digests
from ._run import as_step, check_checkpointer, check_writable


def _checked_step(checkpointer: ocp.training.Checkpointer, step: Any, overwrite: bool) -> int:
    """Return the step as a number, if a checkpoint of it can be written.

    Raises:
        ValueError: it is no number, Orbax cannot write there, or the step is there already.
    """
    check_checkpointer(checkpointer)
    step = as_step(step)
    directory = checkpointer.directory
    if not overwrite and any(c.step == step for c in checkpointer.checkpoints):
        raise ValueError(
            f"step={step} is in {directory} already. Pass another step, or overwrite=True."
        )
    if not directory.is_absolute() and "://" not in str(directory):
        raise ValueError(
            f"checkpointer writes to {str(directory)!r}, which is relative, and Orbax cannot. Make "
            "it with an absolute path: os.path.abspath."
        )
    check_writable("checkpointer.directory", directory)
    return step


def write(
    checkpointer: ocp.training.Checkpointer,
    method: str,
    step: Any,
    make_items: Callable[[], dict[str, Tree]],
    *,
    digest: bool,
    custom_metadata: dict[str, Any] | None,
    overwrite: bool,
    **orbax: Any,
) -> Any:
    """Have Orbax write items by one of its methods, and return its response.

    Args:
        checkpointer: that of the run.
        method: `save_checkpointables` or `save_checkpointables_async`.
        step: the number of the step, as the user gave it.
        make_items: returns the trees of the checkpoint, checked. It is called if they can be
            written there.
        digest: whether to add the item `digests`.
        custom_metadata: what the user wants to stand beside `emaopt`.
        overwrite: whether to replace a checkpoint of this step.
        orbax: Orbax's other arguments.

    Raises:
        ValueError: it cannot be written there, or Orbax's context would cast a leaf.
        OSError: the checkpoint could not be written. It names the cause.
    """
    step = _checked_step(checkpointer, step, overwrite)
    items = make_items()
    check_context(checkpointer, items)
    stamp = new_stamp(step) if digest else None
    if digest:
        items = with_digests(items, stamp)
    about = {**(custom_metadata or {}), **inventory(items, stamp)}
    with saving(f"checkpoint {checkpointer.directory}, step {step},"):
        return getattr(checkpointer, method)(
            step, items, custom_metadata=about, overwrite=overwrite, **orbax
        )
