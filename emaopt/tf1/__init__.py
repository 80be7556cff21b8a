"""TensorFlow 1's checkpoints: go on with a TF1 run in JAX, and hand it back.

A state of emaopt is exactly TF1's variables, so a checkpoint is read and written by name, leaf by
leaf. `emaopt.names` says which name a leaf has; `rename` leads from there to other names.

Nothing here changes a value. What does not fit is listed, all of it in one error, before anything
is read into a tree or written to disk.
"""

import difflib
import importlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from emaopt._names import average_name, role
from emaopt._tree import Tree, describe

from ._rename import (
    SLIM as SLIM,
    TF_LAYERS as TF_LAYERS,
    AverageName,
    Leaf,
    Rename,
    Shape,
    depthwise as depthwise,
    dtype_of,
    leaves_in_tf1,
)


_INSTALL = 'emaopt.tf1 needs TensorFlow: pip install "emaopt[tf1]"'


class Variable(NamedTuple):
    """A variable of a checkpoint: what TF1 keeps in it, and the leaf that it would become."""

    name: str
    shape: Shape
    dtype: str
    role: str
    becomes: str


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
    here (`depthwise`). `average_name`: the `name=` of TF1's `ExponentialMovingAverage`, or a
    function from a variable's name to its average's.

    A leaf may be wider than its variable (TF1's slots are as narrow as their variable); one that
    would lose a bit is refused. All that is missing, left over or of another shape or dtype is
    listed in one ValueError. With `strict=False` these leaves stay as they are, and the result is
    `(params, opt_state, skipped)`, `skipped` from each TF1 name to the reason.
    """
    checkpoint = _Checkpoint(path)
    leaves, problems = leaves_in_tf1(params, opt_state, swapped, name, rename, average_name)
    _refuse(f"checkpoint {checkpoint.prefix}: nothing was loaded", problems)
    skipped = checkpoint.skipped(leaves)
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
    values = [leaf.value if leaf.name in skipped else checkpoint.read(leaf) for leaf in leaves]
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
    tf = _tensorflow()
    directory, base = _split(tf, path)
    leaves, problems = leaves_in_tf1(params, opt_state, swapped, name, rename, average_name)
    values: dict[str, np.ndarray] = {}
    for leaf in leaves if not problems else ():
        if isinstance(leaf.value, jax.ShapeDtypeStruct):
            problems.append(f"{leaf.own} is abstract: {describe(leaf.value)}")
            continue
        value = np.asarray(leaf.value).reshape(leaf.shape)
        kept = _cast(value, leaf.dtype)
        value = value if kept is None else kept
        first = values.setdefault(leaf.name, value)
        if first is not value and first.tobytes() != value.tobytes():
            problems.append(f"{leaf.name} is one variable in TF1: it cannot be {first} and {value}")
    _refuse(f"checkpoint {path}: nothing was written", problems)
    values = dict(sorted(values.items()))  # as TF1 does
    tf.io.gfile.makedirs(directory)
    _write(tf, os.path.join(directory, base), values)
    _note_newest(tf, directory, base)


def inspect(path: Any) -> list[Variable]:
    """The variables of a checkpoint, by name; what TF1 keeps in each, and what it would become."""
    stored = _Checkpoint(path).stored
    return [
        Variable(name, shape, str(dtype), *role(name, stored))
        for name, (shape, dtype) in sorted(stored.items())
    ]


class _Checkpoint:
    """A checkpoint on disk. `stored`: the shape and dtype of every variable."""

    def __init__(self, path: Any):
        self.tf = _tensorflow()
        path = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", os.fspath(path))
        directory = path if self.tf.io.gfile.isdir(path) else os.path.dirname(path)
        found = self.tf.io.gfile.glob(os.path.join(directory, "*.index"))
        known = f"It has {sorted(map(_prefix, found))}." if found else ""
        self.prefix = self.tf.train.latest_checkpoint(path) if directory == path else path
        if self.prefix is None:
            raise ValueError(
                f"path={path!r} has no file 'checkpoint' that names its newest one. Pass a prefix, "
                f"such as {os.path.join(path, 'model.ckpt-20')}. {known}".rstrip()
            )
        try:
            self.reader = self.tf.train.load_checkpoint(self.prefix)
        except (self.tf.errors.OpError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"path={path!r} is no checkpoint of TF1: {_first_line(error)}. Pass the prefix of "
                f"one, such as run/model.ckpt-20, or its directory. {known}".rstrip()
            ) from error
        dtypes = self.reader.get_variable_to_dtype_map()
        self.stored: dict[str, tuple[Shape, np.dtype]] = {
            name: (tuple(shape), np.dtype(dtypes[name].as_numpy_dtype))
            for name, shape in self.reader.get_variable_to_shape_map().items()
        }

    def skipped(self, leaves: Sequence[Leaf]) -> dict[str, str]:
        """The variables that do not fit, missing ones and unused ones, and why."""
        unused = self.stored.keys() - {leaf.name for leaf in leaves}
        found: dict[str, str] = {}
        for leaf in leaves:
            if why := self._why_not(leaf, unused if len(found) < 20 else ()):
                found[leaf.name] = why
        for name in sorted(unused):
            found[name] = f"{name} is not used: {role(name, self.stored)[0]}"
        return found

    def _why_not(self, leaf: Leaf, unused: Iterable[str]) -> str | None:
        name = leaf.name if leaf.name == leaf.own else f"{leaf.name} ({leaf.own} here)"
        if leaf.name not in self.stored:
            if f"{leaf.name}/part_0" in self.stored:
                return f"{name} is cut into {leaf.name}/part_0, ..., saved without their places"
            close = difflib.get_close_matches(leaf.name, unused, 3)
            return f"{name} is missing" + (f"; close: {', '.join(close)}" if close else "")
        shape, dtype = self.stored[leaf.name]
        if shape != leaf.shape:
            return f"{name} has shape {shape} in the checkpoint, {leaf.shape} here"
        here = dtype_of(leaf.value)
        if not any(_holds(other, dtype) for other in (here, leaf.dtype)):
            enable = f"; jax_enable_x64 makes {dtype}" * (dtype.itemsize == 8)
            return f"{name} is {dtype} in the checkpoint, {here} here{enable}"
        if not _holds(here, dtype) and _cast(self._value(leaf.name), here) is None:
            return f"{name} would lose bits: it is {dtype} in the checkpoint, {here} here"
        return None

    def read(self, leaf: Leaf) -> Any:
        """The value of a leaf, of its dtype and where it is."""
        value = self._value(leaf.name).reshape(np.shape(leaf.value)).astype(dtype_of(leaf.value))
        if isinstance(leaf.value, (jax.Array, jax.ShapeDtypeStruct)):
            return jax.device_put(value, leaf.value.sharding)
        return value if hasattr(leaf.value, "dtype") else type(leaf.value)(value)

    def _value(self, name: str) -> np.ndarray:
        try:
            return np.asarray(self.reader.get_tensor(name))
        except (self.tf.errors.OpError, RuntimeError) as error:
            raise ValueError(
                f"checkpoint {self.prefix}: {name} cannot be read, the data is cut off, missing or "
                f"damaged. ({_first_line(error)}) Use another checkpoint."
            ) from error


def _tensorflow() -> Any:
    try:
        return importlib.import_module("tensorflow")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_INSTALL, name=error.name) from error


def _refuse(what: str, problems: Iterable[str], advice: str = "") -> None:
    """Raise if there is any problem, with all of them."""
    if problems := list(problems):
        raise ValueError("\n  ".join([f"{what}.", *problems]) + (advice and f"\n{advice}"))


def _holds(wide: np.dtype, narrow: np.dtype) -> bool:
    """Whether all values of a dtype are values of another one, of the same kind."""
    kind = {"V": "f"}  # bfloat16
    same = kind.get(wide.kind, wide.kind) == kind.get(narrow.kind, narrow.kind)
    return same and np.can_cast(narrow, wide)


def _cast(value: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """The same values in another dtype; nothing if a bit would be lost."""
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore", invalid="ignore"):
        cast = value.astype(dtype)
        return cast if cast.astype(value.dtype).tobytes() == value.tobytes() else None


def _split(tf: Any, path: Any) -> tuple[str, str]:
    """The directory and the name of a prefix to write to."""
    directory, base = os.path.split(os.fspath(path))
    if not base or tf.io.gfile.isdir(os.fspath(path)):
        raise ValueError(
            f"path={str(path)!r} is a directory. Pass a prefix, such as "
            f"{os.path.join(path, 'model.ckpt-20')}."
        )
    return directory or os.curdir, base


def _write(tf: Any, prefix: str, values: dict[str, np.ndarray]) -> None:
    """The values under their names."""
    with tf.Graph().as_default(), _session(tf) as session:
        tensors = [tf.compat.v1.placeholder(x.dtype, x.shape) for x in values.values()]
        written = tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=list(values),
            shape_and_slices=[""] * len(values),
            tensors=tensors,
        )
        session.run(written, dict(zip(tensors, values.values(), strict=True)))


def _session(tf: Any) -> Any:
    """A session of the current graph. The GPU's memory is JAX's."""
    return tf.compat.v1.Session(config=tf.compat.v1.ConfigProto(device_count={"GPU": 0}))


def _note_newest(tf: Any, directory: str, base: str) -> None:
    """Name a checkpoint as the newest in the file `checkpoint`, after those that it has."""
    state = tf.train.get_checkpoint_state(directory)
    older = (
        [os.path.relpath(p, directory) for p in state.all_model_checkpoint_paths] if state else []
    )
    names = [*(name for name in older if name != base), base]
    # a root, because paths are made relative to a directory that has none
    state = tf.compat.v1.train.generate_checkpoint_state_proto(os.sep, base, names)
    temporary = os.path.join(directory, f"checkpoint.tmp{os.getpid()}")
    with tf.io.gfile.GFile(temporary, "w") as file:
        file.write(str(state))
    tf.io.gfile.rename(temporary, os.path.join(directory, "checkpoint"), overwrite=True)


def _prefix(index: str) -> str:
    return os.path.basename(index).removesuffix(".index")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".")
