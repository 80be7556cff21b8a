"""Read small files, name what is written until it is whole, and remove what is left of it."""

import json
import os
import re
import shutil
import stat
import time
from typing import Any

from etils.epath import Path


class DamagedError(ValueError):
    """Report a file of the checkpoint that is missing, cut off, or not what was saved."""


def read_file(path: Path) -> bytes:
    """Read a whole file; a FIFO or a device in its place would never end."""
    if "://" not in str(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path.name} is no regular file")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object."""
    found = json.loads(read_file(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return found


def numbered(run: Path, names: dict[Path, str]) -> dict[int, Path]:
    """Return those paths whose names end in a number, by the number: `checkpoint-500`.

    A shard, `model-00001-of-00002`, has no number of this kind.

    Raises:
        ValueError: two paths have the same number.
    """
    steps: dict[int, Path] = {}
    for path, name in names.items():
        found = re.search(r"([0-9]+)$", name)
        if not found or re.search(r"-of-[0-9]+$", name):
            continue
        step = int(found[1])
        if step in steps:
            raise ValueError(
                f"{run} has step {step} twice: {steps[step].name!r} and {path.name!r}. Move one "
                "to another place."
            )
        steps[step] = path
    return steps


def temporary(path: Path, process: int | None = None) -> Path:
    """Return where a checkpoint is written before it is whole: beside it, with a process's id.

    The name is also that of `emaopt.tf1.save`.
    """
    return Path(f"{path}.tmp{os.getpid() if process is None else process}")


def remove_unfinished(path: Path) -> list[Path]:
    """Remove what processes that are gone left of a checkpoint, and return what that was."""
    if "://" in str(path) or not path.parent.is_dir():
        return []
    removed = []
    for file in list(path.parent.iterdir()):
        process = re.fullmatch(re.escape(path.name) + r"\.tmp(\d+)", file.name)
        if process and not _is_running(int(process[1])):
            shutil.rmtree(file)
            removed.append(file)
    return removed


def remove(path: Path) -> bool:
    """Remove a directory that threads of Orbax may still write to; `False` if it is left."""
    for _ in range(50):
        if not path.exists():
            return True
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)
    return not path.exists()


def _is_running(process: int) -> bool:
    """Return whether another process of this id runs on this machine."""
    if process == os.getpid():
        return False  # in a container, the process that was killed had the same one
    try:
        os.kill(process, 0)
    except PermissionError:  # it is of another user
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
