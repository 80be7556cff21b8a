"""Load a training state: as it was, or what fits of it."""

from typing import Any

from etils.epath import Path
from orbax.checkpoint import v1 as ocp

from emaopt._average.find import average_paths, averages, swap
from emaopt._tree.paths import KeyPath, Params, State, Tree

from ._errors import MismatchError
from ._partial import refuse_snapshot, restore_part
from ._place import SWAPPED
from ._run import check_checkpointer, is_finished, pick
from ._stored import Stored
from ._trees import with_model, without_model


def resume(
    checkpointer: ocp.training.Checkpointer,
    /,
    params: Params,
    opt_state: State,
    *,
    step: int | None = None,
    **rest: Any,
) -> tuple[Params, State, dict[str, Any]]:
    """Load a training state as it was when it was saved, bit for bit.

    The templates say where each leaf goes: onto the sharding of an array or abstract array, onto
    the host for a NumPy array. An uncommitted array gives an uncommitted one.

    Args:
        checkpointer: that of the run.
        params: like the parameters that were saved, real or abstract (`jax.eval_shape`).
        opt_state: like the state that was saved, for example `tx.init(params)`.
        step: which checkpoint, `int` or an integer array []; by default the newest.
        rest: like the rest that was saved: `batch_stats=...`, `epoch=0`. A counter that was saved
            as `step` needs no template: it comes back as it was saved.

    Returns:
        Parameters, state, and a dict with the rest.

    Raises:
        MismatchError: names, shapes or dtypes differ. It names the leaves; nothing was read.
        DamagedError: a file is missing, cut off, or not what was saved.
        FileNotFoundError: there is no such step.
    """
    stored = _newest(checkpointer, step)
    if "params" not in stored.items:
        refuse_snapshot(stored, "Pass the step or the run of a full checkpoint.")
    markers = {path for path in stored.items.get("opt_state", ()) if path[-1] == SWAPPED}
    state = without_model(params, opt_state)
    names, like = as_saved(params, state, markers, f"checkpoint {stored.path}")
    if "rest" in stored.items and ("step",) in stored.items["rest"]:
        rest = {"step": stored.forms([("rest", "step")])["rest", "step"], **rest}
    if rest or "rest" in stored.items:
        like["rest"] = rest
    loaded = stored.load(like)
    params, state = loaded["params"], loaded["opt_state"]
    for name in names:
        params, state = swap(params, state, name)
    return params, with_model(params, state, opt_state), loaded.get("rest", {})


def resume_partial(
    checkpointer: ocp.training.Checkpointer,
    /,
    params: Params,
    opt_state: State,
    *,
    step: int | None = None,
    **rest: Any,
) -> tuple[Params, State, dict[str, Any], dict[str, str]]:
    """Load what fits of a training state: with another optimizer, average, ledger, or a new head.

    What is stored is restored, and what is not stays as it was passed. An average that is not
    stored starts as the restored parameters, and counts from there. Averages and slots are found
    in another place of the chain, too. An average may be stored in another way than it was
    (`accumulator_dtype`).

    Args:
        checkpointer: that of the run.
        params: the parameters of the model to go on with. Where something may be missing they are
            arrays, not abstract.
        opt_state: the state of the optimizer to go on with, for example `tx.init(params)`.
        step: which checkpoint, `int` or an integer array []; by default the newest.
        rest: like the rest that is wanted: `batch_stats=...`, `epoch=0`.

    Returns:
        `(params, opt_state, rest, skipped)`. `skipped` says, by the name of a leaf
        (`params/head/kernel`), why it was not restored; also what is stored and not passed.

    Raises:
        MismatchError: no leaf of `params` is stored, or an abstract leaf is not.
        DamagedError: a file is missing, cut off, or not what was saved.
        FileNotFoundError: there is no such step.
    """
    stored = _newest(checkpointer, step)
    state = without_model(params, opt_state)
    new_params, state, rest, skipped = restore_part(stored, params, state, rest)
    return new_params, with_model(new_params, state, opt_state), rest, skipped


def _newest(checkpointer: ocp.training.Checkpointer, step: int | None) -> Stored:
    """Find a checkpoint of the run, by default the newest that is finished."""
    check_checkpointer(checkpointer)
    checkpointer.wait()
    listed = {c.step: Path(c.path) for c in checkpointer.checkpoints}
    found = {number: path for number, path in listed.items() if is_finished(path)}
    return Stored(pick(found, step, checkpointer.directory))


def as_saved(
    params: Tree, opt_state: Tree, markers: set[KeyPath], found: str
) -> tuple[list[str], dict[str, Tree]]:
    """Return the names of the averages that were swapped, and the trees as they stand on disk."""
    names = dict(zip(average_paths(opt_state), averages(opt_state), strict=True))
    swapped = {marker[:-1] for marker in markers}
    if not swapped <= names.keys():
        raise MismatchError(
            f"{found} has its averages at {sorted('/'.join(node) for node in swapped)}, "
            f"opt_state has {['/'.join(node) for node in names]}. Pass the state of the optimizer "
            "that was saved; for the averages alone, restore_averages."
        )
    chosen = [names[node] for node in sorted(swapped)]
    for name in chosen:
        params, opt_state = swap(params, opt_state, name)
    return chosen, {"params": params, "opt_state": opt_state}
