"""Name what is written until it is whole, and remove what an interrupted program left of it."""

import os
import re
import shutil
import time

from etils.epath import Path


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
