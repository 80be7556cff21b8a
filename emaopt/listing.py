"""What is in a checkpoint, of TF1 or of Orbax: its leaves, and what each one is. No value is read.

A variable, the average of one, a slot of one (`slot m of w`), a power, the global step; in a
checkpoint that `emaopt.checkpoint.save` wrote, `params` holds the averages and the shadow the raw
parameters.
"""

import importlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from etils.epath import Path

from emaopt._names import role
from emaopt._tree import dtype_of
from emaopt.checkpoint._digest import DIGESTS
from emaopt.checkpoint._index import (
    MARKER,
    STEP,
    Index,
    KeyPath,
    in_shadows,
    params_in,
    root_of_params,
)
from emaopt.checkpoint._leaf import shape
from emaopt.checkpoint._stored import MARK, Stored, finished_steps, locate


TF1, OTHER = "tf1", "other"  # the item, and the dict in it, of what Orbax has no place for


class Leaf(NamedTuple):
    """A leaf of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    bytes: int


def show(checkpoint: str, as_json: bool = False) -> None:
    """Print a table, as wide as the terminal at most, or JSON."""
    path = absolute(checkpoint)
    if is_tf1(path):
        found = tf1_leaves(path)
    else:
        path = locate(path, None)
        found = orbax_leaves(Stored(path))
    total = sum(leaf.bytes for leaf in found)
    if as_json:
        rows = [leaf._asdict() for leaf in found]
        print(json.dumps({"checkpoint": str(path), "leaves": rows, "bytes": total}, indent=1))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join([*table(found, width), "", f"{len(found)} leaves, {total:,} bytes: {path}"]))


def absolute(path: str) -> Path:
    """A path of the command line: one here, or one in a cloud, `gs://...`."""
    return Path(path if "://" in path else os.path.abspath(path))


def is_tf1(path: Path) -> bool:
    """Whether there is a checkpoint of TF1, not of Orbax; an error if there is neither."""
    if path.is_dir():
        if finished_steps(path) or any((path / file).exists() for file in (MARK, "_METADATA")):
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


def tf1_leaves(path: Path) -> list[Leaf]:
    """The variables of a checkpoint of TF1, by name."""
    from emaopt.tf1 import inspect  # for Orbax, TensorFlow need not be there

    load_tensorflow()
    return [Leaf(v.name, v.shape, v.dtype, v.role, size(v.shape, v.dtype)) for v in inspect(path)]


def orbax_leaves(stored: Stored) -> list[Leaf]:
    """The leaves of a checkpoint of Orbax, by name."""
    roles = _roles(stored.index())
    rows = []
    for path, what in roles.items():
        leaf = stored.leaf(path)
        dtype = str(dtype_of(leaf))
        name = "/".join(filter(None, path))
        rows.append(Leaf(name, tuple(shape(leaf)), dtype, what, size(shape(leaf), dtype)))
    return sorted(rows)


def _roles(index: Index) -> dict[KeyPath, str]:
    """What each leaf is, by its path on disk."""
    shadows = in_shadows(index)
    swapped = {leaf for leaf, is_swapped in shadows.values() if is_swapped}
    root, params = root_of_params(index), params_in(index)
    known = {path[-1] for path in index if path[:2] == (TF1, OTHER)} | set(map("/".join, params))

    def what(path: KeyPath) -> str:
        if path[:2] == (TF1, OTHER):
            return role(path[-1], known)[0]
        if path in shadows:
            leaf, is_swapped = shadows[path]
            return f"{'raw parameter' if is_swapped else 'average'} of {'/'.join(leaf)}"
        if path[: len(root)] == root:
            leaf = path[len(root) :]
            return f"average of {'/'.join(leaf)}" if leaf in swapped else "variable"
        if path[0] == DIGESTS:
            return f"digests of {path[-1]}"
        if path[-1] in (STEP, MARKER):
            return {STEP: "global step", MARKER: "mark of a swap"}[path[-1]]
        if path[-2:-1] == ("powers",):
            return "power"
        if path[-2:-1] == ("ledger",):
            return "ledger"
        for i in range(2, len(path)):
            if path[i:] in params:
                kind = path[i - 1] if path[i - 1] == "residue" else f"slot {path[i - 1]}"
                return f"{kind} of {'/'.join(path[i:])}"
        return "rest"

    return {path: what(key) for key, path in index.items()}


def table(leaves: list[Leaf], width: int | None) -> list[str]:
    """Lines of aligned columns; names and roles are cut in the middle where they do not fit."""
    rows = [("name", "shape", "dtype", "bytes", "role")]
    for leaf in leaves:
        dims = "[" + ",".join(map(str, leaf.shape)) + "]"
        rows.append((leaf.name, dims, leaf.dtype, f"{leaf.bytes:,}", leaf.role))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    over = 0 if width is None else sum(widths) + 8 - width
    if over > 0:
        room = max(16, widths[0] + widths[4] - over)
        widths[0] = max(min(widths[0], room // 2), room - widths[4])
        widths[4] = room - widths[0]
    lines = []
    for name, dims, dtype, size, what in rows:
        cells = (
            f"{_cut(name, widths[0]):{widths[0]}}",
            f"{dims:{widths[1]}}",
            f"{dtype:{widths[2]}}",
            f"{size:>{widths[3]}}",
            _cut(what, widths[4]),
        )
        lines.append("  ".join(cells))
    return lines


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    start = (width - 1) // 2
    return f"{text[:start]}…{text[start + 1 - width :]}"


def size(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of the values; of strings, only their number is known."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def parts(sizes: dict[Any, int], at_once: int) -> Iterator[list[Any]]:
    """The keys in groups of so many bytes, to be read one after the other."""
    part, used = [], 0
    for key, bytes_ in sizes.items():
        if part and used + bytes_ > at_once:
            yield part
            part, used = [], 0
        part.append(key)
        used += bytes_
    yield part
