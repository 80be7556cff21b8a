"""Find the checkpoints that the command line names, and check the path of a new one."""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from etils.epath import Path

from emaopt._extras import require
from emaopt._files import remove as remove_whole, remove_unfinished, temporary as temporary
from emaopt._safetensors import holds_tensors, tensor_steps
from emaopt._tree.paths import KeyPath, printable
from emaopt.checkpoint._run import holds_checkpoints


TF1, ORBAX, SAFETENSORS = "TF1", "Orbax", "safetensors"


class Place(NamedTuple):
    """Hold the path and the format of a checkpoint or a run."""

    path: Path
    format: str


def absolute(path: str) -> Path:
    """Return a path of the command line as an absolute one; `gs://...` is one already."""
    with _reaching(path):
        return Path(path if "://" in path else os.path.abspath(path))


def find(path: str) -> Place:
    """Find the checkpoint or the run that an argument means.

    A directory may hold it one level below. Then a line on stderr says which one is meant.
    """
    there = absolute(path)
    with _reaching(path):
        format_ = _format(there)
    return Place(there, format_) if format_ else _near(there)


@contextmanager
def _reaching(path: Any) -> Iterator[None]:
    """Turn every error of a file system, which may be in a cloud, into one line with its path."""
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{path} cannot be reached: {type(error).__name__}: {error}. Pass a path on this "
            "machine, or one that etils.epath.Path can open"
        ) from error


def _near(path: Path) -> Place:
    """Find the only run that is one level below a directory, or say what there is instead."""
    if not path.is_dir():
        known = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
        known = [name for name in known if not name.endswith(".meta")][:9]
        there = f". {path.parent} has {', '.join(known)}" if known else ""
        raise FileNotFoundError(f"{path} does not exist{there}")
    below = [child for child in sorted(path.iterdir()) if child.is_dir() and _format(child)]
    if below and all(map(holds_tensors, below)) and tensor_steps(path):
        return Place(path, SAFETENSORS)
    if not below:
        raise ValueError(
            f"{path} holds no finished checkpoint of Orbax, TF1 or safetensors. Pass a run, one "
            "checkpoint, or a prefix such as model.ckpt-20"
        )
    if len(below) > 1:
        raise ValueError(
            f"{path} holds several runs. Pass one of: {', '.join(str(run) for run in below[:9])}"
        )
    say(f"the run is one level below, in {below[0].name}")
    return Place(below[0], str(_format(below[0])))


def _format(path: Path) -> str | None:
    """Return the format of the checkpoint or the run at a path, or `None` if there is none."""
    if path.is_dir():
        if holds_checkpoints(path):
            return ORBAX
        files = (path / "checkpoint").exists() or any(
            file.name.endswith(".index") for file in path.iterdir()
        )
        if files:
            return TF1
        return SAFETENSORS if holds_tensors(path) else None
    if holds_tensors(path):
        return SAFETENSORS
    return TF1 if path.exists() or Path(f"{path}.index").exists() else None


def check_new(path: Path) -> None:
    """Raise if a new checkpoint would overwrite anything. Remove what an interrupted one left."""
    with _reaching(path):
        files = list(path.parent.iterdir()) if path.parent.is_dir() else []
    for file in files:
        if re.fullmatch(re.escape(path.name) + r"(\.index|\.meta|\.data-\d+-of-\d+)?", file.name):
            raise FileExistsError(f"{file} exists. Pass another DESTINATION")
    for file in remove_unfinished(path):
        say(f"removed {file}, which an interrupted command left")


def remove(path: Path) -> None:
    """Remove a directory that threads of Orbax may still write to, or say that it is left."""
    if not remove_whole(path):
        say(f"{path} is left. The next command with this DESTINATION removes it")


def say(text: str) -> None:
    """Print a line about the work to stderr."""
    print(f"emaopt: {printable(text)}.", file=sys.stderr)


def load_tensorflow() -> None:
    """Load TensorFlow without what its libraries print about this machine."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        require("tensorflow", "tf1")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def shown(paths: Iterable[KeyPath]) -> dict[KeyPath, str]:
    """Return the name of each leaf of Orbax: its key path, joined with a slash.

    Where two names would be the same, because a key has a slash in it, that one is escaped.
    """
    joined = {path: "/".join(filter(None, path)) for path in paths}
    times = Counter(joined.values())
    return {
        path: name if times[name] == 1 else "/".join(k.replace("/", "\\/") for k in path if k)
        for path, name in joined.items()
    }
