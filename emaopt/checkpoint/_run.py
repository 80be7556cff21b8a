"""The checkpoints of a run: which are finished, and which one is meant."""

import re
from typing import Any

from etils.epath import Path


FINISHED = "_CHECKPOINT_METADATA"  # the file that a finished checkpoint has


def finished_steps(directory: Path) -> dict[int, Path]:
    """The finished checkpoints of a run, by step: directories named `120` or `step_120`.

    Only the names are read: one damaged checkpoint must not hide the others.
    """
    if not directory.is_dir():
        return {}
    named = [(re.fullmatch(r"(?:.+_)?(\d+)", path.name), path) for path in directory.iterdir()]
    return {int(name[1]): path for name, path in named if name and (path / FINISHED).exists()}


def locate(path: Any, step: int | None) -> Path:
    """One checkpoint: `path` itself, or a step of the run that is there."""
    path = Path(path)
    if not path.is_absolute():
        raise ValueError(f"path={str(path)!r} is relative. Pass an absolute path.")
    if step is None and any((path / file).exists() for file in (FINISHED, "_METADATA")):
        return path
    found = finished_steps(path)
    if not found and (Path(f"{path}.index").exists() or any(path.glob("*.index"))):
        raise ValueError(f"path={str(path)!r} is of TF1. Call emaopt.tf1.load, or emaopt convert.")
    if not path.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} is not a directory. Pass a checkpoint or run.")
    return pick(found, step, path)


def pick(found: dict[int, Path], step: int | None, directory: Any) -> Path:
    """The checkpoint of a step, the newest by default."""
    if not found:
        raise FileNotFoundError(f"{directory} holds no finished checkpoint. Pass another path.")
    if step is not None and step not in found:
        raise FileNotFoundError(f"step={step} is not in {directory}. Pass one of {sorted(found)}.")
    return found[max(found) if step is None else step]
