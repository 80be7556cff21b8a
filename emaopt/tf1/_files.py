"""Read and write TF1's checkpoint files, by TensorFlow, which is loaded at the first call."""

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from emaopt._extras import require
from emaopt._tree.checks import check_path

from ._rename import Shape


ENDING = r"\.(index|meta|data-\d+-of-\d+)$"  # of the files that belong to one prefix
_PATTERN = r"[*?\[\\]"  # TensorFlow takes these characters of a path for a pattern


class Checkpoint:
    """Read a checkpoint on disk.

    `prefix`: where it is. `stored`: the shape and the dtype of every variable, by name.
    """

    def __init__(self, path: Any):
        check_path("path", path)
        given = os.fspath(path)
        self.prefix, known = _prefix(re.sub(ENDING, "", given))
        there = f" It has {known}." if known else ""
        try:
            self._reader = self._open()
            shapes = self._reader.get_variable_to_shape_map()
            dtypes = self._reader.get_variable_to_dtype_map()
            self.stored: dict[str, tuple[Shape, np.dtype]] = {
                name: (tuple(shape), np.dtype(dtypes[name].as_numpy_dtype))
                for name, shape in shapes.items()
            }
        except Exception as error:
            raise ValueError(
                f"path={given!r} is not a checkpoint of TF1: {_reason(error)}. Pass the prefix of "
                f"one, such as run/model.ckpt-20, or its directory.{there}"
            ) from error

    def _open(self) -> Any:
        """Open the checkpoint for reading.

        TensorFlow finds nothing where the path has a `[` in it. There it reads through links, which
        go away with this object.
        """
        tf = tensorflow()
        if not re.search(_PATTERN, self.prefix) or "://" in self.prefix:
            return tf.train.load_checkpoint(self.prefix)
        links = tempfile.mkdtemp(prefix="emaopt-")
        weakref.finalize(self, shutil.rmtree, links, ignore_errors=True)
        directory, base = os.path.split(os.path.abspath(self.prefix))
        for file in os.listdir(directory):
            ending = file[len(base) :]
            if file.startswith(base) and (not ending or re.fullmatch(ENDING, ending)):
                os.symlink(os.path.join(directory, file), os.path.join(links, f"x{ending}"))
        return tf.train.load_checkpoint(os.path.join(links, "x"))

    def value(self, name: str) -> np.ndarray:
        """Read the value of a variable."""
        try:
            return np.asarray(self._reader.get_tensor(name))
        except Exception as error:  # of many types: a cut-off file is an IndexError
            raise ValueError(
                f"checkpoint {self.prefix}: {name} cannot be read, the data is cut off, missing or "
                f"damaged. ({type(error).__name__}: {_reason(error)}) Use another checkpoint."
            ) from error


def _prefix(path: str) -> tuple[str, list[str]]:
    """Find the prefix that a path means, and the prefixes that are in its directory."""
    tf = tensorflow()
    directory = path if tf.io.gfile.isdir(path) else os.path.dirname(path)
    files = tf.io.gfile.listdir(directory or os.curdir) if tf.io.gfile.isdir(directory) else []
    known = sorted(file.removesuffix(".index") for file in files if file.endswith(".index"))
    if not known and _is_orbax(tf, path):
        raise ValueError(
            f"path={path!r} is of Orbax. Call emaopt.checkpoint.resume or restore_averages, or "
            "emaopt convert."
        )
    for file in (path, f"{path}.index", os.path.join(path, "checkpoint")):
        if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
            # to read a pipe or a device would wait forever
            raise ValueError(f"{file} is not a file. Pass the prefix of a checkpoint.")
    if directory != path:
        return path, known
    state = tf.train.get_checkpoint_state(path)
    if state is None:
        raise ValueError(
            f"path={path!r} has no file 'checkpoint' that names its newest one. Pass a prefix, "
            f"such as {os.path.join(path, 'model.ckpt-20')}."
            + (f" It has {known}." if known else "")
        )
    return state.model_checkpoint_path, known


def _is_orbax(tf: Any, path: str) -> bool:
    """Return whether a directory is a checkpoint of Orbax, or has one below it."""
    if not tf.io.gfile.isdir(path):
        return False
    below = [os.path.join(path, entry) for entry in tf.io.gfile.listdir(path)]
    return any(
        tf.io.gfile.exists(os.path.join(each, "_CHECKPOINT_METADATA")) for each in (path, *below)
    )


def check_prefix(path: Any) -> None:
    """Raise unless a checkpoint can be written with this prefix, and be found again."""
    check_path("path", path)
    path = os.fspath(path)
    tf = tensorflow()
    directory, base = os.path.split(path)
    example = os.path.join(directory, "model.ckpt-20")
    if not base or tf.io.gfile.isdir(path):
        example = os.path.join(path, "model.ckpt-20")
        raise ValueError(f"path={path!r} is a directory. Pass a prefix, such as {example}.")
    if ending := re.search(ENDING, base):
        raise ValueError(
            f"path={path!r} ends like a file of a checkpoint. Pass the prefix, "
            f"{path.removesuffix(ending[0])}."
        )
    if re.search(_PATTERN, path):
        raise ValueError(
            f"path={path!r} has a *, ?, [ or \\ in it. TensorFlow takes that for a pattern and "
            f"could not read the checkpoint. Pass another path, such as {example}."
        )
    newest = os.path.join(directory, "checkpoint")
    if tf.io.gfile.exists(newest) and tf.train.get_checkpoint_state(directory or os.curdir) is None:
        raise ValueError(
            f"{newest} is not the file in which TF1 names its newest checkpoint, and would be "
            "overwritten. Pass a path in another directory."
        )


def write(path: Any, parts: Iterable[dict[str, np.ndarray]]) -> None:
    """Write a checkpoint, all of it or nothing, and name it as the newest one.

    Args:
        path: The prefix.
        parts: The values by name. One part is in memory at a time.
    """
    tf = tensorflow()
    directory, base = os.path.split(os.fspath(path))
    directory = directory or os.curdir
    temporary = os.path.join(directory, f"{base}.tmp{os.getpid()}")
    prefixes: list[str] = []
    try:
        with _writing(path):
            tf.io.gfile.makedirs(temporary)
        for part in parts:
            prefixes.append(os.path.join(temporary, str(len(prefixes))))
            with _writing(path):
                _save(tf, prefixes[-1], part)
            del part  # before the next one is read
        with _writing(path):
            with tf.Graph().as_default(), _session(tf) as session:
                session.run(
                    tf.raw_ops.MergeV2Checkpoints(
                        checkpoint_prefixes=prefixes,
                        destination_prefix=os.path.join(directory, base),
                        delete_old_dirs=False,
                    )
                )
            _note_newest(tf, directory, base, temporary)
    finally:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.rmtree(temporary)


@contextmanager
def _writing(path: Any) -> Iterator[None]:
    """Turn every error of TensorFlow into one line that has its cause."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{path} cannot be written: {_reason(error)}") from error


def cast(value: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """Return the same values in another dtype, or `None` if a bit would be lost."""
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = value.astype(dtype)
        return narrow if narrow.astype(value.dtype).tobytes() == value.tobytes() else None


def tensorflow() -> Any:
    """Load TensorFlow."""
    return require("tensorflow", "tf1")


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
    """Open a session of the current graph. It takes no memory of the GPU, which is JAX's."""
    return tf.compat.v1.Session(config=tf.compat.v1.ConfigProto(device_count={"GPU": 0}))


def _note_newest(tf: Any, directory: str, base: str, temporary: str) -> None:
    """Name a checkpoint as the newest in the file `checkpoint`, after those that it has."""
    state = tf.train.get_checkpoint_state(directory)
    older = state.all_model_checkpoint_paths if state else []
    names = [os.path.relpath(path, directory) for path in older]
    names = [*(name for name in names if name != base), base]
    # a root, because TensorFlow makes paths relative to a directory that has none
    state = tf.compat.v1.train.generate_checkpoint_state_proto(os.sep, base, names)
    new = os.path.join(temporary, "checkpoint")
    with tf.io.gfile.GFile(new, "w") as file:
        file.write(str(state))
    tf.io.gfile.rename(new, os.path.join(directory, "checkpoint"), overwrite=True)


def _reason(error: BaseException) -> str:
    """Return what TensorFlow says in one line: of an error in a graph, the line with the cause."""
    text = str(error)
    in_graph = re.search(r"(.+)\n\s*\[\[\{\{node", text)
    line = in_graph[1] if in_graph else (text.splitlines() or [type(error).__name__])[0]
    return line.strip().rstrip(".")
