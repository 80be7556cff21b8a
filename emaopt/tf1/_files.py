"""TF1's checkpoint files, by TensorFlow's own reader and writer, which the first call loads."""

import importlib
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from ._rename import Shape


class Checkpoint:
    """A checkpoint on disk. `stored`: the shape and dtype of every variable."""

    def __init__(self, path: Any):
        self.tf = _tensorflow()
        path = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", os.fspath(path))
        directory = path if self.tf.io.gfile.isdir(path) else os.path.dirname(path)
        found = self.tf.io.gfile.glob(os.path.join(directory, "*.index"))
        names = sorted(os.path.basename(file).removesuffix(".index") for file in found)
        known = f"It has {names}." if names else ""
        self.prefix = self.tf.train.latest_checkpoint(path) if directory == path else path
        orbax = (os.path.join(path, *sub, "_CHECKPOINT_METADATA") for sub in ((), ("*",)))
        if not names and any(map(self.tf.io.gfile.glob, orbax)):
            raise ValueError(
                f"path={path!r} is of Orbax. Call emaopt.checkpoint.resume or restore_averages, or "
                "emaopt convert."
            )
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

    def value(self, name: str) -> np.ndarray:
        """The value of a variable."""
        try:
            return np.asarray(self.reader.get_tensor(name))
        except (self.tf.errors.OpError, RuntimeError) as error:
            raise ValueError(
                f"checkpoint {self.prefix}: {name} cannot be read, the data is cut off, missing or "
                f"damaged. ({_first_line(error)}) Use another checkpoint."
            ) from error


def check_prefix(path: Any) -> None:
    """Raise unless a checkpoint can have this name."""
    path = os.fspath(path)
    if not os.path.basename(path) or _tensorflow().io.gfile.isdir(path):
        raise ValueError(
            f"path={path!r} is a directory. Pass a prefix, such as "
            f"{os.path.join(path, 'model.ckpt-20')}."
        )


def write(path: Any, parts: Iterable[dict[str, np.ndarray]]) -> None:
    """Write the values under their names, all of them or nothing, and note that it is the newest.

    One part is in memory at a time.
    """
    tf = _tensorflow()
    directory, base = os.path.split(os.fspath(path))
    directory = directory or os.curdir
    temporary = os.path.join(directory, f"{base}.tmp{os.getpid()}")
    prefixes: list[str] = []
    try:
        tf.io.gfile.makedirs(temporary)
        for part in parts:
            prefixes.append(os.path.join(temporary, str(len(prefixes))))
            _save(tf, prefixes[-1], part)
            del part  # before the next one is read
        with tf.Graph().as_default(), _session(tf) as session:
            session.run(
                tf.raw_ops.MergeV2Checkpoints(
                    checkpoint_prefixes=prefixes, destination_prefix=os.path.join(directory, base)
                )
            )
        _note_newest(tf, directory, base)
    except tf.errors.OpError as error:
        raise OSError(f"{path} cannot be written: {_first_line(error)}") from error
    finally:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.rmtree(temporary)


def cast(value: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """The same values in another dtype; nothing if a bit would be lost."""
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = value.astype(dtype)
        return narrow if narrow.astype(value.dtype).tobytes() == value.tobytes() else None


def _tensorflow() -> Any:
    return importlib.import_module("tensorflow")


def _save(tf: Any, prefix: str, values: dict[str, np.ndarray]) -> None:
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


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".")
