"""Save the averages of a state alone: small checkpoints, to be merged or evaluated later."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from emaopt._average.ema import EmaState, SwappedEmaState
from emaopt._average.find import average_paths, averages
from emaopt._average.rounding import Stored
from emaopt._tree.devices import in_memory
from emaopt._tree.leaves import by_path, from_paths
from emaopt._tree.paths import KeyPath, Tree

from ._digest import in_turn
from ._items import checked
from ._trees import without_model
from ._write import write


def snapshot(
    checkpointer: ocp.training.Checkpointer,
    step: int,
    /,
    opt_state: Tree,
    dtype: DTypeLike | None = None,
    *,
    digest: bool = True,
    force: bool = False,
    overwrite: bool = False,
    metrics: Any = None,
    custom_metadata: dict[str, Any] | None = None,
) -> bool:
    """Save the averages of a state alone, without parameters and optimizer: a light checkpoint.

    It holds every average with its steps and its ledger, where a checkpoint of `save` has it. All
    that reads averages reads it: `restore_averages`, `watch`, `export_averages`, and the commands
    `ls`, `diff` and `merge`. Training cannot go on from it. Save it to a directory of its own, with
    a checkpointer of its own: Orbax's policies then keep the newest full checkpoints, and all
    snapshots.

    Args:
        checkpointer: yours, with its directory and its policies.
        step: the number of the step, `int` or an integer array [].
        opt_state: the state of a chain with `emaopt.ema` in it, not swapped.
        dtype: what floating-point averages are stored in: float32, bfloat16 or float16. By default
            as they are, with the residue of `compensated`; otherwise the residue is added first.
            The averages that are cast are on the devices until they are copied to the host.
        digest: whether to save a number per leaf, which loading compares.
        force: save although a policy says no, or another save is running.
        overwrite: replace a checkpoint of this step.
        metrics: Orbax's.
        custom_metadata: Orbax's: a dict for JSON, beside emaopt's own key `emaopt`.

    Returns:
        Whether it was saved: `False` where a policy says no.

    Raises:
        ValueError: there is no average, it is swapped, or rows of a table are not up to date. Or
            `dtype` is another one, or does not hold a number (65504 is the largest of float16). It
            names the leaf, and nothing is written.
        OSError: the checkpoint could not be written. It names the cause, such as a full disk.

    Example:
        >>> import tempfile
        >>> import emaopt
        >>> run, state = tempfile.mkdtemp(), emaopt.ema(0.5).init({"w": jnp.ones(2)})
        >>> with ocp.training.Checkpointer(run) as checkpointer:
        ...     snapshot(checkpointer, 1, state, jnp.bfloat16)
        True
    """
    given: dict[str, Any] = {"digest": digest, "custom_metadata": custom_metadata}
    given |= {"force": force, "overwrite": overwrite, "metrics": metrics}
    trees = partial(averages_alone, opt_state, dtype)
    return write(checkpointer, "save_checkpointables", step, trees, **given)


def averages_alone(opt_state: Tree, dtype: DTypeLike | None) -> dict[str, Tree]:
    """Return the item `opt_state` with nothing but the averages in it, each in its place."""
    opt_state = without_model(None, opt_state)
    found = dict(zip(average_paths(opt_state), averages(opt_state).values(), strict=True))
    if not found:
        raise ValueError(
            "opt_state holds no average. Pass the state of a chain with emaopt.ema in it."
        )
    item: Tree = {}
    for path, state in found.items():
        kept = _current("/".join(path), state)
        kept = kept if dtype is None else _cast("/".join(path), kept, _checked_dtype(dtype))
        item = _placed(item, path, kept)
    return {"opt_state": checked("opt_state", item)}


def _placed(item: Tree, path: KeyPath, state: EmaState) -> Tree:
    """Return the item with an average at its path, as a whole state has it on disk."""
    if not path:
        return state
    return item | {path[0]: _placed(item.get(path[0], {}), path[1:], state)}


def _current(name: str, state: EmaState) -> EmaState:
    """Return an average whose shadow is its value.

    Raises:
        ValueError: it is swapped, or some rows of it have rested since they were touched.
    """
    if isinstance(state, SwappedEmaState):
        raise ValueError(
            f"opt_state is swapped: average {name!r} is in the parameters. Pass the state before "
            "emaopt.swap."
        )
    if state.rows is None:
        return state
    now = np.asarray(state.rows.now)
    for path, then in by_path(state.rows.then).items():
        if then is not None and not np.array_equal(then, np.broadcast_to(now, then.shape)):
            raise ValueError(
                f"rows of {'/'.join(path)!r} have rested, and their average in opt_state is not up "
                "to date. Pass opt_state as params, opt_state = emaopt.swap(*emaopt.swap(params, "
                "opt_state)) returns it."
            )
    return state._replace(rows=None)


def _checked_dtype(dtype: DTypeLike) -> np.dtype:
    known = (jnp.float32, jnp.bfloat16, jnp.float16)
    if jnp.dtype(dtype) not in known:
        raise ValueError(
            f"dtype={jnp.dtype(dtype)} is out of range. Pass float32, bfloat16, float16, or None."
        )
    return jnp.dtype(dtype)


def _cast(name: str, state: EmaState, dtype: np.dtype) -> EmaState:
    """Return an average in another dtype, its residue added.

    Orbax casts, too, by an option for each leaf (`scoped_storage_options_creator`). Here it is done
    before: the digests are then of the bits that are written, where two programs may round NaN and
    the smallest numbers in two ways; and half of the bytes go to the host.
    """
    residue = by_path(state.residue) if state.residue is not None else {}
    shadow = by_path(state.shadow)
    leaves = {p: Stored(x, residue.get(p)) for p, x in shadow.items() if _is_floating(x)}
    new = dict(zip(leaves, in_turn(_cast_leaf, leaves.values(), dtype), strict=True))
    lost = [path for path, (_, holds) in new.items() if not holds]
    if lost:
        raise ValueError(
            f"dtype={dtype} does not hold {'/'.join((name, 'shadow', *lost[0]))}: a number becomes "
            "infinite. Pass bfloat16 or float32."
        )
    shadow |= {path: x for path, (x, _) in new.items()}
    return state._replace(shadow=from_paths(state.shadow, shadow), residue=None)


def _is_floating(x: Any) -> bool:
    return x is not None and jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _cast_leaf(stored: Stored, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """Return a leaf in a dtype, and whether all that was finite is so still."""
    return _in_dtype(jax.tree.map(in_memory, stored), dtype)


@partial(jax.jit, static_argnums=1)
def _in_dtype(stored: Stored, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    value = stored.value()
    new = value.astype(dtype)
    return new, jnp.all(jnp.isfinite(value) == jnp.isfinite(new))
