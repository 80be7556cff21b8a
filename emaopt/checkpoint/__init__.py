"""Orbax checkpoints in which the averages stand under the original names.

`save` writes what `emaopt.swap` returns: the item `params` holds the averages, the item
`opt_state` the raw parameters in the shadow's place, so nothing is stored twice and plain Orbax
finds the averages where it looks for parameters. A marker in the tree (`SwappedEmaState`) keeps
anything but `resume` from training on them. The item `digests` holds one number per leaf, which
every load here compares.

Everything is read by key path from the checkpoint's own metadata, so the classes that were saved,
and the optimizer around the average, need not be known.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from orbax.checkpoint import v1 as ocp

from emaopt._average.find import average_paths, averages, swap
from emaopt._tree.paths import KeyPath, Params, State, Tree, key_paths, leaf_names

from ._contents import SWAPPED, logical
from ._errors import DamagedError as DamagedError, MismatchError as MismatchError
from ._items import inventory, items_of, with_digests
from ._run import FINISHED, finished_steps, locate, pick
from ._stored import Stored


def save(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    params: Tree,
    opt_state: Tree,
    *,
    name: str | None = None,
    digest: bool = True,
    **rest: Any,
) -> bool:
    """Save, with the averages under the original names; whether it was (policies may say no).

    Items: `params` (the averages), `opt_state` (the raw parameters in the shadow's place), `rest`
    (a dict of whatever else is given: `batch_stats=...`, `epoch=...`), and with `digest` a number
    per leaf that loading compares. With several averages of the same parameters, `name` says which
    one. `checkpointer` is yours: its directory, its policies.
    """
    _check_checkpointer(checkpointer)
    items = items_of(checkpointer, params, opt_state, name, digest, rest)
    return checkpointer.save_checkpointables(step, items, custom_metadata=inventory(items))


def save_async(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    params: Tree,
    opt_state: Tree,
    *,
    name: str | None = None,
    digest: bool = True,
    **rest: Any,
) -> Any:
    """`save` in the background: Orbax's response, `None` where a policy says no.

    The arrays are on their way when this returns, so donating them is safe. `result()` waits.
    """
    _check_checkpointer(checkpointer)
    items = items_of(checkpointer, params, opt_state, name, digest, rest)
    return checkpointer.save_checkpointables_async(step, items, custom_metadata=inventory(items))


def resume(
    checkpointer: ocp.training.Checkpointer,
    params: Params,
    opt_state: State,
    *,
    step: int | None = None,
    **rest: Any,
) -> tuple[Params, State, dict[str, Any]]:
    """`(params, opt_state, rest)` as they were when saved, bit for bit; from the newest step.

    `params`, `opt_state` and `rest` are like what was saved: from `tx.init`, or abstract
    (`jax.eval_shape`), with shardings if there are any. Leaves are restored with the shardings
    given, onto whatever mesh that is.
    """
    _check_checkpointer(checkpointer)
    checkpointer.wait()
    listed = {c.step: Path(c.path) for c in checkpointer.checkpoints}
    found = {step: path for step, path in listed.items() if (path / FINISHED).exists()}
    stored = Stored(pick(found, step, checkpointer.directory))
    markers = {path for path in stored.items.get("opt_state", {}) if path[-1] == SWAPPED}
    names, like = _as_saved(params, opt_state, markers, stored.path)
    if rest or "rest" in stored.items:
        like["rest"] = rest
    loaded = stored.load(like)
    params, opt_state = loaded["params"], loaded["opt_state"]
    for name in names:
        params, opt_state = swap(params, opt_state, name)
    return params, opt_state, loaded.get("rest", {})


def _check_checkpointer(checkpointer: Any) -> None:
    if not hasattr(checkpointer, "save_checkpointables"):
        raise ValueError(
            f"checkpointer is a {type(checkpointer).__name__}. Pass that of Orbax's version 1: "
            "orbax.checkpoint.v1.training.Checkpointer(directory), in a `with` statement."
        )


def _as_saved(
    params: Tree, opt_state: Tree, markers: set[KeyPath], path: Path
) -> tuple[list[str], dict[str, Tree]]:
    """The trees as they stand on disk, and the names of the averages that were swapped."""
    names = dict(zip(average_paths(opt_state), averages(opt_state), strict=True))
    swapped = {marker[:-1] for marker in markers}
    if not swapped <= names.keys():
        raise MismatchError(
            f"checkpoint {path} has its averages at {sorted('/'.join(node) for node in swapped)}, "
            f"opt_state has {['/'.join(node) for node in names]}. Pass the state of the optimizer "
            "that was saved; for the averages alone, restore_averages."
        )
    chosen = [names[node] for node in sorted(swapped)]
    for name in chosen:
        params, opt_state = swap(params, opt_state, name)
    return chosen, {"params": params, "opt_state": opt_state}


def restore_averages(
    path: Any,
    like: Params,
    *,
    step: int | None = None,
    name: str | None = None,
    cast: bool = False,
) -> Params:
    """The averages of a checkpoint, like `like`, without knowing the optimizer.

    `path`: a run directory (its newest finished step, or `step`) or one checkpoint, saved here or
    by plain Orbax, with an `EmaState` anywhere in it. Leaves that have no average are the
    parameters. Only what is returned is read. `like`: the parameters, real or abstract, with the
    shardings wanted. The dtypes are those of `like`, which must be the parameters' or the
    average's unless `cast`.
    """
    return Stored(locate(path, step)).load_averages(like, name, cast)


def sources(path: Any, like: Tree, *, step: int | None = None) -> dict[str, str]:
    """Return what `restore_averages` reads: by the name of a leaf, its name in the checkpoint."""
    stored = Stored(locate(path, step))
    places = stored.contents.places([logical(keys) for keys in key_paths(like)], None)
    return {"/".join(leaf): "/".join(filter(None, p.path)) for leaf, p in places.items()}


def watch(
    directory: Any,
    like: Params,
    *,
    interval: float = 10.0,
    timeout: float | None = None,
    after: int | None = None,
) -> Iterator[tuple[int, Params]]:
    """`(step, averages)` of each checkpoint as it is finished, beside a trainer at work.

    Reads only. Every `interval` seconds; the newest one first where several are waiting; those
    that the trainer deletes meanwhile are passed over, so one that cannot be read is an error only
    if it is still there an interval (at least 2 seconds) later. Ends after `timeout` seconds
    without a new one. `after`: only later steps.
    """
    if interval <= 0:
        raise ValueError(f"interval={interval} is out of range. Pass seconds, above 0.")
    directory, done, unreadable = Path(directory), set(), {}
    since = time.monotonic()
    while True:
        found = finished_steps(directory)
        done &= found.keys()
        new = [s for s in found.keys() - done if after is None or s > after]
        now = time.monotonic()
        if new:
            newest = max(new)
            try:
                averaged = restore_averages(found[newest], like)
            except (DamagedError, OSError):
                first = unreadable.setdefault(newest, now)
                if newest in finished_steps(directory) and now - first > max(interval, 2.0):
                    raise
                time.sleep(min(interval, 0.1))
                continue
            done.add(newest)
            yield newest, averaged
            since = time.monotonic()
        elif timeout is not None and now - since >= timeout:
            return
        else:
            time.sleep(interval)


def export_averages(
    source: Any, destination: Any, *, like: Tree = None, step: int | None = None
) -> None:
    """Write the averages alone, for serving: an Orbax checkpoint with the item `params`.

    A `destination` that ends in `.safetensors` becomes such a file, with names like
    `conv/kernel`. Without `like`: the tree, shapes and dtypes of the parameters in `source`.
    """
    stored = Stored(locate(source, step))
    destination = Path(destination)
    if destination.exists():
        raise FileExistsError(f"destination={destination} exists. Remove it or pass another path.")
    averaged = stored.load_averages(stored.params_like() if like is None else like, None, False)
    if destination.suffix != ".safetensors":
        items = with_digests({"params": averaged})
        ocp.save_checkpointables(destination, items, custom_metadata=inventory(items))
        return
    try:
        from safetensors.numpy import save_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"destination={destination} needs the package safetensors: pip install safetensors"
        ) from error
    leaves = (np.asarray(x) for x in jax.tree.leaves(averaged))
    save_file(dict(zip(leaf_names(averaged), leaves, strict=True)), destination)
