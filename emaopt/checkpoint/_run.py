"""Find the checkpoints of a run: which are finished, and which one is meant."""

import errno
import os
import re
from typing import Any

import numpy as np
from etils.epath import Path

from emaopt._tree.checks import check_path


FINISHED = "_CHECKPOINT_METADATA"  # the file that a finished checkpoint has
METADATA = "_METADATA"  # the file that a tree has


def is_finished(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is finished.

    Raises:
        PermissionError: it may not be looked at, so that nobody can tell.
    """
    if "://" in str(checkpoint):
        return (checkpoint / FINISHED).exists()
    try:
        os.stat(checkpoint / FINISHED)
    except PermissionError:
        raise PermissionError(
            errno.EACCES, "checkpoint may not be read by this user", str(checkpoint)
        ) from None
    except OSError:
        return False
    return True


def holds_checkpoints(path: Path) -> bool:
    """Tell whether a directory is a run, a checkpoint, or an item of one."""
    files = (path / FINISHED, path / METADATA)
    return bool(finished_steps(path)) or any(file.exists() for file in files)


def finished_steps(directory: Path) -> dict[int, Path]:
    """Return the finished checkpoints of a run by step: those that Orbax lists.

    They are named `120`, or, if there are none, `step_120` or `step_00000120` with one prefix for
    all. Other directories (`best_7` beside `120`) are copies that somebody made. Only the names are
    read: one damaged checkpoint must not hide the others.

    Raises:
        ValueError: two directories are the same step, or there are several prefixes.
    """
    if not directory.is_dir():
        return {}
    named: dict[str, dict[str, Path]] = {}
    for path in sorted(directory.iterdir()):
        found = re.fullmatch(r"(?:(.+)_)?([0-9]+)", path.name)
        if found and is_finished(path):
            named.setdefault(found[1] or "", {})[found[2]] = path
    of_run = {"": named[""]} if "" in named else named
    if len(of_run) > 1:
        names = ", ".join(repr(max(paths.values()).name) for paths in of_run.values())
        raise ValueError(
            f"{directory} has checkpoints of several names: {names}. Pass one of them, or move "
            "those that are not of the run to another place."
        )
    steps: dict[int, Path] = {}
    for paths in of_run.values():
        for number, path in paths.items():
            if int(number) in steps:
                raise ValueError(
                    f"{directory} has step {int(number)} twice: {steps[int(number)].name!r} and "
                    f"{path.name!r}. Pass one of them, or move one to another place."
                )
            steps[int(number)] = path
    return steps


def locate(path: Any, step: Any = None) -> Path:
    """Find one checkpoint: `path` itself, or a step of the run that is there.

    Args:
        path: a checkpoint or a run, absolute.
        step: a whole number; `None` means the newest one.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be looked at, such as a cloud without a network.
        ValueError: the path is relative, of TF1, or inside a checkpoint.
    """
    path = as_path("path", path)
    try:
        return _located(path, step)
    except (ValueError, OSError):
        raise
    except Exception as error:  # the client of a cloud has types of its own
        first, _, _ = str(error).partition("\n")
        why = f"({type(error).__name__}: {first})"
        raise OSError(f"path={str(path)!r} cannot be looked at. {why}") from error


def _located(path: Path, step: Any) -> Path:
    if step is None:
        if is_finished(path):
            return path
        if (path / METADATA).exists():
            if is_finished(path.parent):
                raise ValueError(
                    f"path={str(path)!r} is an item of a checkpoint. Pass {str(path.parent)!r}."
                )
            return path
    found = finished_steps(path)
    if not found and (Path(f"{path}.index").exists() or any(path.glob("*.index"))):
        raise ValueError(f"path={str(path)!r} is of TF1. Call emaopt.tf1.load, or emaopt convert.")
    if not path.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} is not a directory. Pass a checkpoint or run.")
    return pick(found, step, path)


def as_path(argument: str, path: Any) -> Path:
    """Return an argument as an absolute path, or as an address in a cloud.

    Raises:
        ValueError: it is neither.
    """
    check_path(argument, path)
    path = Path(path)
    if not path.is_absolute() and "://" not in str(path):
        raise ValueError(f"{argument}={str(path)!r} is relative. Pass an absolute path.")
    return path


def pick(found: dict[int, Path], step: Any, directory: Any) -> Path:
    """Return the checkpoint of a step, the newest by default.

    Args:
        found: the checkpoints of a run, by step.
        step: a whole number, also an array; `None` means the newest one.
        directory: the run, for errors.
    """
    if not found:
        raise FileNotFoundError(f"{directory} holds no finished checkpoint. Pass another path.")
    wanted = max(found) if step is None else as_step(step)
    if wanted not in found:
        steps = sorted(found)
        listed = f"{steps[:20]} and {len(steps) - 20} more" if len(steps) > 20 else steps
        raise FileNotFoundError(f"step={wanted} is not in {directory}. Pass one of {listed}.")
    return found[wanted]


def as_step(step: Any, argument: str = "step") -> int:
    """Return the number of a step, which may be an integer array [].

    Raises:
        ValueError: it is no whole number. `int` would take 1.5 for 1, and "4" for 4.
    """
    number = np.asarray(step)
    if number.ndim or number.dtype.kind not in "iu" or number < 0:
        raise ValueError(
            f"{argument}={step!r} is not the number of a step. Pass an int, 0 or above."
        )
    return int(number)


def check_checkpointer(checkpointer: Any) -> None:
    """Raise unless it is a checkpointer of Orbax's version 1."""
    if not hasattr(checkpointer, "save_checkpointables"):
        raise ValueError(
            f"checkpointer is a {type(checkpointer).__name__}. Pass that of Orbax's version 1: "
            "orbax.checkpoint.v1.training.Checkpointer(directory), in a `with` statement."
        )


def check_writable(argument: str, path: Any) -> None:
    """Raise if Orbax would write a checkpoint there that nobody can read again.

    Orbax looks for the files of the processes with a pattern, in which `[0.1]` is one character.
    """
    if re.search(r"[*?\[]", str(path)):
        raise ValueError(
            f"{argument}={str(path)!r} has a *, ? or [ in it. Orbax takes that for a pattern and "
            "could not read the checkpoint again. Pass a path without it."
        )
