"""TensorFlow 1's checkpoints: go on with a TF1 run in JAX, and hand it back.

A state of emaopt is exactly TF1's variables, so a checkpoint is read and written by name, leaf by
leaf. `emaopt.names` says which name a leaf has; `rename` leads from there to other names.

Nothing here changes a value. What does not fit is listed, all of it in one error, before anything
is read into a tree or written to disk.
"""

import difflib
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import numpy as np

from emaopt._names import average_name, role
from emaopt._tree.checks import describe
from emaopt._tree.numbers import dtype_of
from emaopt._tree.paths import Params, State, Tree

from ._files import Checkpoint, cast, check_prefix, write
from ._rename import (
    SLIM as SLIM,
    TF_LAYERS as TF_LAYERS,
    AverageName,
    Leaf,
    Rename,
    Shape,
    depthwise as depthwise,
    leaves_in_tf1,
)


if importlib.util.find_spec("tensorflow") is None:
    raise ModuleNotFoundError(
        'emaopt.tf1 needs TensorFlow: pip install "emaopt[tf1]"', name="tensorflow"
    )


class Variable(NamedTuple):
    """A variable of a checkpoint: what TF1 keeps in it, and the leaf that it would become."""

    name: str
    shape: Shape
    dtype: str
    role: str
    becomes: str


@overload
def load(
    path: Any,
    params: Params,
    opt_state: State,
    *,
    swapped: bool = False,
    name: str | None = None,
    rename: Rename | None = None,
    average_name: AverageName = average_name,
    strict: Literal[True] = True,
) -> tuple[Params, State]: ...
@overload
def load(
    path: Any,
    params: Params,
    opt_state: State,
    *,
    swapped: bool = False,
    name: str | None = None,
    rename: Rename | None = None,
    average_name: AverageName = average_name,
    strict: bool,
) -> tuple[Params, State, dict[str, str]]: ...
def load(
    path: Any,
    params: Tree,
    opt_state: Tree,
    *,
    swapped: bool = False,
    name: str | None = None,
    rename: Rename | None = None,
    average_name: AverageName = average_name,
    strict: bool = True,
) -> tuple[Any, ...]:
    """`(params, opt_state)` like those given, with the values of a TF1 checkpoint.

    `path`: a prefix, `run/model.ckpt-20`, or a directory (its newest). `params` and `opt_state`:
    from `tx.init`, or abstract (`jax.eval_shape`), with the dtypes and shardings wanted. Every step
    in the state is TF1's `global_step`.

    `swapped`: the checkpoint is from TF1's `swapping_saver`, with the averages under the names of
    the variables; with several averages of a leaf, `name` says which one, as in `emaopt.swap`.

    `rename`: from names here to TF1's, where they differ; slots and averages follow their
    parameter. A dict (any name of `emaopt.names`, those of a state too), a function of the
    parameter's name, or rules `(pattern, replacement)`, each applied with `re.sub` to what the one
    before made of the name, such as `TF_LAYERS`; a third item makes TF1's shape from the shape
    here (`depthwise`). `average_name`: the `name=` of TF1's `ExponentialMovingAverage`, the whole
    name with `{}` for the variable's, or a function from that to the average's.

    Several optimizers in one graph: TF1 numbers their powers (`beta1_power_1`) as they were made,
    `emaopt.names(opt_state)` by their place in the state. A dict sets right what differs.

    A leaf may be wider than its variable (TF1's slots are as narrow as their variable); one that
    would lose a bit is refused. All that is missing, left over or of another shape or dtype is
    listed in one ValueError. With `strict=False` these leaves stay as they are, and the result is
    `(params, opt_state, skipped)`, `skipped` from each TF1 name to the reason.
    """
    checkpoint = Checkpoint(path)
    leaves, problems = leaves_in_tf1(params, opt_state, swapped, name, rename, average_name)
    _refuse(f"checkpoint {checkpoint.prefix}: nothing was loaded", problems)
    skipped = _skipped(checkpoint, leaves)
    if strict:
        _refuse(
            f"checkpoint {checkpoint.prefix} is not what params and opt_state are; nothing was "
            "loaded",
            skipped.values(),
            "Pass rename= or average_name= where names differ, the state of the optimizer that was "
            "saved, or strict=False to go on without these.",
        )
    _refuse(
        f"checkpoint {checkpoint.prefix}: nothing was loaded",
        [
            f"{leaf.own} is abstract and would stay so: {skipped[leaf.name]}"
            for leaf in leaves
            if leaf.name in skipped and isinstance(leaf.value, jax.ShapeDtypeStruct)
        ],
    )
    values = [leaf.value if leaf.name in skipped else _read(checkpoint, leaf) for leaf in leaves]
    result = jax.tree.unflatten(jax.tree.structure((params, opt_state)), values)
    return result if strict else (*result, skipped)


def save(
    path: Any,
    params: Tree,
    opt_state: Tree,
    *,
    swapped: bool = False,
    name: str | None = None,
    rename: Rename | None = None,
    average_name: AverageName = average_name,
) -> None:
    """Write a checkpoint that TF1's `Saver.restore` takes; `swapped`: its `swapping_saver`.

    `path`: a prefix, such as `run/model.ckpt-20`; beside it, the file `checkpoint` comes to name it
    as the newest. The arguments are those of `load`, which gets back what was saved, bit for bit.

    `global_step` is int64. A slot or an average has the dtype of its variable, as in TF1, if that
    loses no bit, and its own otherwise: to hand half-precision training back, round the state
    first. Leaves of other transformations are written too, under their key paths; TF1 does not
    look at them.
    """
    check_prefix(path)
    leaves, problems = leaves_in_tf1(params, opt_state, swapped, name, rename, average_name)
    values: dict[str, np.ndarray] = {}
    for leaf in leaves if not problems else ():
        if isinstance(leaf.value, jax.ShapeDtypeStruct):
            problems.append(f"{leaf.own} is abstract: {describe(leaf.value)}")
            continue
        value = np.asarray(leaf.value).reshape(leaf.shape)
        kept = cast(value, leaf.dtype)
        value = value if kept is None else kept
        first = values.setdefault(leaf.name, value)
        if first is not value and first.tobytes() != value.tobytes():
            problems.append(f"{leaf.name} is one variable in TF1: it cannot be {first} and {value}")
    _refuse(f"checkpoint {path}: nothing was written", problems)
    write(path, [dict(sorted(values.items()))])  # sorted, as TF1 does


def inspect(path: Any) -> list[Variable]:
    """The variables of a checkpoint, by name; what TF1 keeps in each, and what it would become."""
    stored = Checkpoint(path).stored
    return [
        Variable(name, shape, str(dtype), *role(name, stored))
        for name, (shape, dtype) in sorted(stored.items())
    ]


def _skipped(checkpoint: Checkpoint, leaves: Sequence[Leaf]) -> dict[str, str]:
    """The variables that do not fit, missing ones and unused ones, and why."""
    unused = checkpoint.stored.keys() - {leaf.name for leaf in leaves}
    found: dict[str, str] = {}
    for leaf in leaves:
        if why := _why_not(checkpoint, leaf, unused if len(found) < 20 else ()):
            found[leaf.name] = why
    for name in sorted(unused):
        found[name] = f"{name} is not used: {role(name, checkpoint.stored)[0]}"
    return found


def _why_not(checkpoint: Checkpoint, leaf: Leaf, unused: Iterable[str]) -> str | None:
    name = leaf.name if leaf.name == leaf.own else f"{leaf.name} ({leaf.own} here)"
    if leaf.name not in checkpoint.stored:
        if f"{leaf.name}/part_0" in checkpoint.stored:
            return f"{name} is cut into {leaf.name}/part_0, ..., saved without their places"
        close = difflib.get_close_matches(leaf.name, unused, 3)
        return f"{name} is missing" + (f"; close: {', '.join(close)}" if close else "")
    shape, dtype = checkpoint.stored[leaf.name]
    if shape != leaf.shape:
        return f"{name} has shape {shape} in the checkpoint, {leaf.shape} here"
    here = dtype_of(leaf.value)
    if not any(_holds(other, dtype) for other in (here, leaf.dtype)):
        enable = f"; jax_enable_x64 makes {dtype}" * (dtype.itemsize == 8)
        return f"{name} is {dtype} in the checkpoint, {here} here{enable}"
    if not _holds(here, dtype) and cast(checkpoint.value(leaf.name), here) is None:
        return f"{name} would lose bits: it is {dtype} in the checkpoint, {here} here"
    return None


def _read(checkpoint: Checkpoint, leaf: Leaf) -> Any:
    """The value of a leaf, of its dtype and where it is."""
    value = checkpoint.value(leaf.name).reshape(np.shape(leaf.value)).astype(dtype_of(leaf.value))
    if isinstance(leaf.value, (jax.Array, jax.ShapeDtypeStruct)):
        return jax.device_put(value, leaf.value.sharding)
    return value if hasattr(leaf.value, "dtype") else type(leaf.value)(value)


def _refuse(what: str, problems: Iterable[str], advice: str = "") -> None:
    """Raise if there is any problem, with all of them."""
    if problems := list(problems):
        raise ValueError("\n  ".join([f"{what}.", *problems]) + (advice and f"\n{advice}"))


def _holds(wide: np.dtype, narrow: np.dtype) -> bool:
    """Whether all values of a dtype are values of another one, of the same kind."""
    kind = {"V": "f"}  # bfloat16
    same = kind.get(wide.kind, wide.kind) == kind.get(narrow.kind, narrow.kind)
    return same and np.can_cast(narrow, wide)
