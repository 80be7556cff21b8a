"""Paths on the command line: what they name, of TF1 or of Orbax."""

import importlib
import os
import sys

from etils.epath import Path

from emaopt.checkpoint._run import FINISHED, finished_steps


def absolute(path: str) -> Path:
    """A path of the command line: one here, or one in a cloud, `gs://...`."""
    return Path(path if "://" in path else os.path.abspath(path))


def is_tf1(path: Path) -> bool:
    """Whether there is a checkpoint of TF1, not of Orbax; an error if there is neither."""
    if path.is_dir():
        if finished_steps(path) or any((path / file).exists() for file in (FINISHED, "_METADATA")):
            return False
        if (path / "checkpoint").exists() or any(path.glob("*.index")):
            return True
        raise ValueError(
            f"{path} holds no finished checkpoint, neither of Orbax nor of TF1. Pass a run, one "
            "checkpoint, or a prefix such as model.ckpt-20"
        )
    if path.exists() or Path(f"{path}.index").exists():
        return True
    known = sorted(file.name for file in path.parent.glob("*") if file.suffix != ".meta")[:9]
    there = f". {path.parent} has {', '.join(known)}" if known else ""
    raise FileNotFoundError(f"{path} does not exist{there}")


def load_tensorflow() -> None:
    """Load it without what its libraries print about this machine."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        importlib.import_module("tensorflow")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
