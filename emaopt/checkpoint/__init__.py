"""Save training states with Orbax, so that the averages stand under the original names.

`save` writes what `emaopt.swap` returns: the item `params` holds the averages, the item `opt_state`
the raw parameters in the place of the average. So nothing is stored twice, and plain Orbax finds
the averages where it looks for parameters. A marker in the tree (`SwappedEmaState`) keeps a program
that does not know about the swap from training on averages. The item `digests` holds one number per
leaf, which every load here compares.

Everything is found by key path in the checkpoint's own metadata. So the classes that were saved,
and the optimizer around the average, need not be known to read the averages.
"""

from functools import partial
from typing import Any

from etils.epath import Path
from orbax.checkpoint import v1 as ocp

from emaopt._safetensors import is_tensors
from emaopt._tree.checks import written_names
from emaopt._tree.paths import Params, Tree

from ._errors import DamagedError as DamagedError, MismatchError as MismatchError
from ._export import export_averages as export_averages
from ._items import items_of
from ._managers import from_items as from_items, items as items
from ._partial import load_params
from ._resume import resume as resume, resume_partial as resume_partial
from ._run import locate
from ._shards import load_tensors
from ._snapshot import snapshot as snapshot
from ._stored import Stored
from ._trees import named_leaves
from ._watch import watch as watch
from ._write import write


def save(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    /,
    params: Tree,
    opt_state: Tree,
    *,
    name: str | None = None,
    digest: bool = True,
    force: bool = False,
    overwrite: bool = False,
    metrics: Any = None,
    custom_metadata: dict[str, Any] | None = None,
    **rest: Any,
) -> bool:
    """Save a training state, with the averages under the names of the parameters.

    The checkpoint has the items `params` (the averages), `opt_state` (with the raw parameters in
    the place of the averages), `rest`, and `digests` (a number per leaf that loading compares). An
    NNX module is saved as its `nnx.state`.

    Args:
        checkpointer: yours, with its directory and its policies.
        step: the number of the step, `int` or an integer array [].
        params: the parameters, as training goes on with them.
        opt_state: the state of a chain with `emaopt.ema` in it, not swapped.
        name: which average, if there are several of the same parameters: a key of
            `emaopt.averages(opt_state)`.
        digest: whether to save a number per leaf. It costs one pass over all arrays.
        force: save although a policy says no, or another save is running. For the last step.
        overwrite: replace a checkpoint of this step.
        metrics: Orbax's: numbers by which a policy such as `BestN` chooses what to keep.
        custom_metadata: Orbax's: a dict for JSON, beside emaopt's own key `emaopt`.
        rest: whatever else is to be resumed, trees, numbers and strings: `batch_stats=...`,
            `epoch=3`, also `step=...`.

    Returns:
        Whether it was saved: `False` where a policy says no.

    Raises:
        ValueError: something could not be read back, such as an object, an array without elements,
            or one that Orbax's context casts. It names the leaf, and nothing is written.
        OSError: the checkpoint could not be written. It names the cause, such as a full disk.
    """
    given: dict[str, Any] = {"digest": digest, "custom_metadata": custom_metadata}
    given |= {"force": force, "overwrite": overwrite, "metrics": metrics}
    trees = partial(items_of, params, opt_state, name, rest)
    return write(checkpointer, "save_checkpointables", step, trees, **given)


def save_async(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    /,
    params: Tree,
    opt_state: Tree,
    *,
    name: str | None = None,
    digest: bool = True,
    force: bool = False,
    overwrite: bool = False,
    metrics: Any = None,
    custom_metadata: dict[str, Any] | None = None,
    **rest: Any,
) -> Any:
    """Save a training state in the background.

    When this returns, the arrays are copied or held, so the next step may donate them. While one
    save is running, Orbax's default policy skips the next; so pass `force=True` for the last step
    of a run, and call `checkpointer.wait()`. If a save fails in the background, Orbax raises it
    when the next save begins.

    Args:
        checkpointer: see `save`, as all other arguments.
        step: the number of the step.
        params: the parameters.
        opt_state: the state of the chain.
        name: which average.
        digest: whether to save a number per leaf.
        force: save although a policy says no, or another save is running.
        overwrite: replace a checkpoint of this step.
        metrics: Orbax's.
        custom_metadata: Orbax's.
        rest: whatever else is to be resumed.

    Returns:
        Orbax's response, whose `result()` waits; `None` where a policy says no.
    """
    given: dict[str, Any] = {"digest": digest, "custom_metadata": custom_metadata}
    given |= {"force": force, "overwrite": overwrite, "metrics": metrics}
    trees = partial(items_of, params, opt_state, name, rest)
    return write(checkpointer, "save_checkpointables_async", step, trees, **given)


def restore_params(path: Any, like: Params, *, step: int | None = None) -> Params:
    """Read the raw parameters of a checkpoint, not their averages; without the optimizer.

    It may be saved by `save` or by plain Orbax, with averages or without. Nothing else is read.

    Args:
        path: the absolute path of a run or of one checkpoint.
        like: the parameters, or some of them, real or abstract, with the shardings wanted.
        step: which checkpoint of a run; by default the newest that is finished.

    Returns:
        The parameters as the last step left them, with the structure and shardings of `like`.

    Raises:
        MismatchError: names, shapes or dtypes differ. It names the leaves; nothing was read.
        DamagedError: a file is missing, cut off, or not what was saved.
        FileNotFoundError: there is no such checkpoint.
    """
    return load_params(Stored(locate(path, step)), like)


def restore_averages(
    path: Any,
    like: Params,
    *,
    step: int | None = None,
    name: str | None = None,
    cast: bool = False,
) -> Params:
    """Read the averages of a checkpoint, without knowing the optimizer.

    It may be saved by `save`, `snapshot` or plain Orbax, with an `EmaState` anywhere in it. Leaves
    that have no average are the parameters. Nothing else is read. A `.safetensors` file, or the
    index of several, is read by the names of its tensors, or by those that `export_averages` had
    before `rename`. Its batch statistics are `{"batch_stats": ...}` in `like`.

    Args:
        path: the absolute path of a run, of one checkpoint, of a `.safetensors` file or of a
            `.safetensors.index.json`.
        like: the parameters, real or abstract, with the shardings wanted.
        step: which checkpoint of a run; by default the newest that is finished.
        name: which average, if there are several: a key of `emaopt.averages(opt_state)`, or keys
            of its path on disk, side by side.
        cast: whether `like` may have other dtypes than the parameters or the average.

    Returns:
        The averages, with the structure, dtypes and shardings of `like`.

    Raises:
        MismatchError: names, shapes or dtypes differ. It names the leaves; nothing was read.
        DamagedError: a file is missing, cut off, or not what was saved.
        FileNotFoundError: there is no such checkpoint.
    """
    if is_tensors(path):
        if step is not None or name is not None:
            raise ValueError(f"path={str(path)!r} holds one average. Leave step= and name= out.")
        return load_tensors(Path(path), like, cast)
    return Stored(locate(path, step)).load_averages(like, name, cast)


def sources(
    path: Any, like: Tree, *, step: int | None = None, name: str | None = None
) -> dict[str, str]:
    """Return what `restore_averages` reads: by the name of a leaf, its name in the checkpoint.

    Args:
        path: see `restore_averages`, as all other arguments.
        like: the parameters.
        step: which checkpoint of a run.
        name: which average.

    Returns:
        A dict from the name of each leaf of `like` to the name that is read for it.

    Raises:
        ValueError: two leaves of `like` have one name, because of a `/` in a key.
    """
    stored = Stored(locate(path, step))
    leaves = named_leaves(like)
    places = stored.contents.places(leaves, name)
    names = written_names(places, [leaves[leaf] for leaf in places])
    read = ["/".join(filter(None, place.path)) for place in places.values()]
    return dict(zip(names, read, strict=True))
