"""Read and write TensorFlow 1's checkpoints: go on with a TF1 run in JAX, and hand it back.

A state of emaopt is exactly TF1's variables. So a checkpoint is read and written by name, leaf by
leaf. `emaopt.names` returns the name of each leaf, and the argument `rename` maps it to another.

No value is changed here. One error lists everything that does not fit, before anything is read into
a tree or written to disk.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._average.match import settle, with_rows, without_rows
from emaopt._names import AVERAGE, average_name, names, role
from emaopt._tree.checks import describe
from emaopt._tree.devices import refuse_deleted
from emaopt._tree.numbers import dtype_of
from emaopt._tree.paths import Params, State, Tree

from ._files import Checkpoint, cast, check_prefix, write
from ._leaves import PARAMETER, Leaf, leaves_in_tf1, residues
from ._rename import (
    SLIM as SLIM,
    TF_LAYERS as TF_LAYERS,
    AverageName as AverageName,
    Naming,
    Rename as Rename,
    Shape,
    depthwise as depthwise,
)


class Variable(NamedTuple):
    """Describe a variable of a checkpoint.

    `name`, `shape`, `dtype`: as TF1 has them. `role`: what it is, such as `slot m of w`.
    `becomes`: the leaf that it would become here, such as `opt_state: slots/m/w`.
    """

    name: str
    shape: Shape
    dtype: str
    role: str
    becomes: str


def load(
    path: Any,
    params: Params,
    opt_state: State,
    *,
    swapped: bool = False,
    name: str | None = None,
    rename: Rename | None = None,
    average_name: AverageName = average_name,
) -> tuple[Params, State]:
    """Load a TF1 checkpoint into parameters and state, to go on with its run.

    Every leaf must be in the checkpoint, and every variable of the checkpoint must be a leaf;
    `load_partial` loads what fits.

    With several optimizers in one graph, TF1 numbers their powers (`beta1_power_1`) in the order in
    which they were made. `emaopt.names(opt_state)` numbers them by their place in the state. Where
    the two differ, pass a dict as `rename`.

    Args:
        path: A prefix, such as `run/model.ckpt-20`, or a directory, which means its newest
            checkpoint.
        params: The parameters, real or abstract (`jax.eval_shape`), with the dtypes and shardings
            that are wanted.
        opt_state: The state from `tx.init`, real or abstract. Every step in it becomes TF1's
            `global_step`.
        swapped: Whether TF1's `swapping_saver` wrote the checkpoint, with the averages under the
            names of the variables.
        name: With `swapped` and several averages of a leaf: the one that was swapped, as in
            `emaopt.swap`.
        rename: TF1's names, where they differ from `emaopt.names`. Slots and averages follow their
            parameter. A dict (from any name in parameters and state), a function of the parameter's
            name, or a list of rules `(pattern, replacement)`, such as `TF_LAYERS`. Each rule is
            applied with `re.sub` to the name that the rule before it made. A third item makes TF1's
            shape from the shape here, as in `depthwise`.
        average_name: TF1's names of the averages: the `name=` of its `ExponentialMovingAverage`, a
            whole name with `{}` in place of the variable's, or a function from the variable's name
            to the average's.

    Returns:
        `(params, opt_state)`, like those given, with the values of the checkpoint.

    Raises:
        ValueError: If a leaf or a variable is left over, or differs in shape or dtype. All of them
            are listed. A leaf may be wider than its variable (TF1's slots are as narrow as their
            variable), but no bit may be lost.
    """
    checkpoint = Checkpoint(path)
    naming = Naming(rename, average_name)
    like, opt_state = opt_state, without_rows(opt_state)
    leaves, skipped = _compare(checkpoint, params, opt_state, naming, swapped, name)
    _refuse(
        f"checkpoint {checkpoint.prefix} is not what params and opt_state are; nothing was loaded",
        skipped.values(),
        "Pass rename= or average_name= where names differ, or the state of the optimizer that was "
        "saved. Or call emaopt.tf1.load_partial to go on without these.",
    )
    values = [_read(checkpoint, leaf) for leaf in leaves]
    params, opt_state = jax.tree.unflatten(jax.tree.structure((params, opt_state)), values)
    return params, with_rows(opt_state, like)


def load_partial(
    path: Any,
    params: Params,
    opt_state: State,
    *,
    swapped: bool = False,
    name: str | None = None,
    rename: Rename | None = None,
    average_name: AverageName = average_name,
) -> tuple[Params, State, dict[str, str]]:
    """Load what fits of a TF1 checkpoint, and keep the rest: a new head, optimizer or average.

    A leaf that is not in the checkpoint, or has another shape or dtype there, stays as passed. An
    average that is not there starts as a copy of the loaded parameters. TF1's
    `init_from_checkpoint` and `warm_start`.

    Args:
        path: As for `load`.
        params: As for `load`. A leaf that is not loaded must not be abstract.
        opt_state: As for `load`. An average that starts anew has TF1's `global_step` too, if the
            checkpoint has one.
        swapped: As for `load`.
        name: As for `load`.
        rename: As for `load`.
        average_name: As for `load`.

    Returns:
        `(params, opt_state, skipped)`. `skipped` says why a variable was not loaded, by its name.
    """
    checkpoint = Checkpoint(path)
    naming = Naming(rename, average_name)
    like, opt_state = opt_state, without_rows(settle(params, opt_state))
    leaves, skipped = _compare(checkpoint, params, opt_state, naming, swapped, name)
    parameters = {leaf.of for leaf in leaves if leaf.kind == PARAMETER}
    starts: dict[str, str] = {}  # from the leaf of an average to the parameter that it starts as
    for leaf in leaves:
        if leaf.kind == AVERAGE and leaf.name in skipped and leaf.of in parameters:
            starts[leaf.own] = leaf.of
            if leaf.name != leaf.of:  # the average of an integer is the integer itself
                skipped[leaf.name] += f"; the average starts as {leaf.of}"
    shadows = {residue: own for residue, own in residues(names(opt_state)).items() if own in starts}
    _refuse(
        f"checkpoint {checkpoint.prefix}: nothing was loaded",
        [
            f"{leaf.own} is abstract and would stay so: {skipped[leaf.name]}"
            for leaf in leaves
            if leaf.name in skipped and isinstance(leaf.value, jax.ShapeDtypeStruct)
            if leaf.own not in starts and leaf.own not in shadows
        ],
    )
    values: dict[str, Any] = {}
    found: list[Any] = []
    for leaf in leaves:
        value = leaf.value
        if leaf.name not in skipped:
            value = _read(checkpoint, leaf)
        elif leaf.kind != PARAMETER and leaf.own in starts:
            value = _like(values[starts[leaf.own]], leaf.value)
        elif leaf.own in shadows:  # what rounding took from the average when it started
            start = jnp.asarray(values[starts[shadows[leaf.own]]])
            rounded = start.astype(leaf.value.dtype).astype(start.dtype)
            value = _like(start - rounded, leaf.value)
        if leaf.kind == PARAMETER:
            values[leaf.of] = value
        found.append(value)
    params, opt_state = jax.tree.unflatten(jax.tree.structure((params, opt_state)), found)
    return params, with_rows(opt_state, like), skipped


def save(
    path: Any,
    params: Tree,
    opt_state: Tree,
    *,
    swapped: bool = False,
    name: str | None = None,
    rename: Rename | None = None,
    average_name: AverageName = average_name,
    like: Any = None,
) -> None:
    """Write a TF1 checkpoint, to hand a run back: `Saver.restore` takes it.

    A slot or an average is written in the dtype of its variable, as in TF1, if that loses no bit,
    and otherwise in its own. To hand half-precision training back, round the state first. Leaves of
    other transformations are written too, under their key paths; TF1 ignores them.

    Args:
        path: A prefix, such as `run/model.ckpt-20`. The file `checkpoint` beside it then names it
            as the newest.
        params: The parameters.
        opt_state: The state.
        swapped: Whether to write what TF1's `swapping_saver` writes, with the averages under the
            names of the variables.
        name: As for `load`.
        rename: As for `load`.
        average_name: As for `load`.
        like: The prefix or directory of a checkpoint of the same graph, usually the one that was
            loaded. Every variable gets the dtype that it has there; `global_step` is int32 in most
            programs, and int64 without this. Variables that emaopt does not hold, such as the
            statistics of layers, are copied from there.

    Raises:
        ValueError: If two leaves would have one name, or a leaf is abstract. With `like`, also if
            a parameter is not there, or a leaf has another shape or would lose bits. Nothing is
            written then.
    """
    check_prefix(path)
    original = None if like is None else Checkpoint(like)
    naming = Naming(rename, average_name)
    opt_state = without_rows(settle(params, opt_state))
    leaves, problems = leaves_in_tf1(params, opt_state, naming, swapped, name)
    values: dict[str, np.ndarray] = {}
    for leaf in leaves if not problems else ():
        if isinstance(leaf.value, jax.ShapeDtypeStruct):
            problems.append(f"{leaf.own} is abstract: {describe(leaf.value)}")
            continue
        value = _in_tf1(leaf, original, problems)
        first = values.setdefault(leaf.name, value)
        if first is not value and first.tobytes() != value.tobytes():
            problems.append(f"{leaf.name} is one variable in TF1: it cannot be {first} and {value}")
    _refuse(f"checkpoint {path}: nothing was written", problems)
    if original is not None:
        others = original.stored.keys() - values.keys()
        values |= {other: original.value(other) for other in others}
    write(path, [dict(sorted(values.items()))])  # sorted, as TF1 does


def inspect(path: Any) -> list[Variable]:
    """List the variables of a TF1 checkpoint, by name. No value is read."""
    stored = Checkpoint(path).stored
    return [
        Variable(name, shape, str(dtype), *role(name, stored))
        for name, (shape, dtype) in sorted(stored.items())
    ]


def _compare(
    checkpoint: Checkpoint,
    params: Tree,
    opt_state: Tree,
    naming: Naming,
    swapped: bool,
    name: str | None,
) -> tuple[list[Leaf], dict[str, str]]:
    """Return the leaves, and the reason why a variable is missing, differs or is not used."""
    leaves, problems = leaves_in_tf1(params, opt_state, naming, swapped, name)
    _refuse(f"checkpoint {checkpoint.prefix}: nothing was loaded", problems)
    unused = sorted(checkpoint.stored.keys() - {leaf.name for leaf in leaves})
    skipped: dict[str, str] = {}
    for leaf in leaves:
        if why := _why_not(checkpoint, leaf, unused if len(skipped) < 20 else ()):
            skipped[leaf.name] = why
    for variable in unused:
        skipped[variable] = f"{variable} is not used: {role(variable, checkpoint.stored)[0]}"
    return leaves, skipped


def _why_not(checkpoint: Checkpoint, leaf: Leaf, unused: Sequence[str]) -> str | None:
    """Say why a leaf cannot be loaded."""
    name = leaf.name if leaf.name == leaf.own else f"{leaf.name} ({leaf.own} here)"
    if leaf.name not in checkpoint.stored:
        if f"{leaf.name}/part_0" in checkpoint.stored:
            return f"{name} is cut into {leaf.name}/part_0, ..., saved without their places"
        return f"{name} is missing{_close(leaf.name, unused)}"
    shape, dtype = checkpoint.stored[leaf.name]
    if shape != leaf.shape:
        return f"{name} has shape {shape} in the checkpoint, {leaf.shape} here"
    here = dtype_of(leaf.value)
    if not any(_holds(other, dtype) for other in (here, leaf.dtype)):
        enable = f"; jax_enable_x64 makes {dtype}" * (dtype.kind in "iuf" and dtype.itemsize == 8)
        return f"{name} is {dtype} in the checkpoint, {here} here{enable}"
    if not _holds(here, dtype) and cast(checkpoint.value(leaf.name), here) is None:
        return f"{name} would lose bits: it is {dtype} in the checkpoint, {here} here"
    return None


def _in_tf1(leaf: Leaf, original: Checkpoint | None, problems: list[str]) -> np.ndarray:
    """Return the value of a leaf as TF1 has it. `problems`: where to say what does not fit."""
    refuse_deleted(f"what is saved as {leaf.own!r} is a deleted array", leaf.value)
    value = np.asarray(leaf.value).reshape(leaf.shape)
    if original is None or leaf.name not in original.stored:
        if original is not None and leaf.kind == PARAMETER:
            close = _close(leaf.name, sorted(original.stored))
            problems.append(f"{leaf.name} is not in like={original.prefix}{close}")
        narrow = cast(value, leaf.dtype)
        return value if narrow is None else narrow
    shape, dtype = original.stored[leaf.name]
    exact = cast(value, dtype)
    if shape != leaf.shape:
        problems.append(f"{leaf.name} has shape {leaf.shape} here, {shape} in {original.prefix}")
    elif exact is None:
        problems.append(
            f"{leaf.name} would lose bits: it is {value.dtype} here, {dtype} in "
            f"{original.prefix}. Round it to {dtype}"
        )
    return value if exact is None else exact


def _close(name: str, known: Sequence[str]) -> str:
    """Return the names that are nearly this one, for the end of a complaint."""
    close = difflib.get_close_matches(name, known, 3)
    return f"; close: {', '.join(close)}" if close else ""


def _read(checkpoint: Checkpoint, leaf: Leaf) -> Any:
    """Read the value of a leaf."""
    return _like(checkpoint.value(leaf.name).reshape(np.shape(leaf.value)), leaf.value)


def _like(value: Any, leaf: Any) -> Any:
    """Copy a value to the dtype and the place of a leaf."""
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        if isinstance(value, jax.Array):  # a copy: the next step may donate both
            value = jnp.array(value, leaf.dtype, copy=True)
        else:
            value = value.astype(leaf.dtype)
        return jax.device_put(value, leaf.sharding)
    value = np.asarray(value).astype(dtype_of(leaf))
    return value if hasattr(leaf, "dtype") else type(leaf)(value)


def _refuse(what: str, problems: Iterable[str], advice: str = "") -> None:
    """Raise if there is any problem, with all of them."""
    if problems := list(problems):
        raise ValueError("\n  ".join([f"{what}.", *problems]) + (advice and f"\n{advice}"))


def _holds(wide: np.dtype, narrow: np.dtype) -> bool:
    """Return whether all values of a dtype are values of another one, of the same kind."""
    kind = {"V": "f"}  # bfloat16
    same = kind.get(wide.kind, wide.kind) == kind.get(narrow.kind, narrow.kind)
    return same and np.can_cast(narrow, wide)
