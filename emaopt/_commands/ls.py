"""What is in a checkpoint, of TF1 or of Orbax: its leaves, and what each one is. No value is read.

A variable, the average of one, a slot of one (`slot m of w`), a power, the global step; in a
checkpoint that `emaopt.checkpoint.save` wrote, `params` holds the averages and the shadow the raw
parameters.
"""

import json
import shutil
import sys
from typing import NamedTuple

from etils.epath import Path

from emaopt._names import role
from emaopt._tree.numbers import dtype_of
from emaopt.checkpoint._leaf import shape, size
from emaopt.checkpoint._run import locate
from emaopt.checkpoint._stored import Stored

from .convert.layout import OTHER, TF1
from .paths import absolute, is_tf1, load_tensorflow


class Row(NamedTuple):
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


def tf1_leaves(path: Path) -> list[Row]:
    """The variables of a checkpoint of TF1, by name."""
    from emaopt.tf1 import inspect

    load_tensorflow()
    return [Row(v.name, v.shape, v.dtype, v.role, size(v.shape, v.dtype)) for v in inspect(path)]


def orbax_leaves(stored: Stored) -> list[Row]:
    """The leaves of a checkpoint of Orbax, by name."""
    contents = stored.contents
    converted = {path[-1] for path in stored.paths() if path[:2] == (TF1, OTHER)}
    known = converted | {"/".join(name) for name in contents.stored_params}
    rows = []
    for path in stored.paths():
        what = role(path[-1], known)[0] if path[:2] == (TF1, OTHER) else contents.role(path)
        leaf = stored.leaf(path)
        dtype = str(dtype_of(leaf))
        name = "/".join(filter(None, path))
        rows.append(Row(name, tuple(shape(leaf)), dtype, what, size(shape(leaf), dtype)))
    return sorted(rows)


def table(leaves: list[Row], width: int | None) -> list[str]:
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
    for name, dims, dtype, length, what in rows:
        cells = (
            f"{_cut(name, widths[0]):{widths[0]}}",
            f"{dims:{widths[1]}}",
            f"{dtype:{widths[2]}}",
            f"{length:>{widths[3]}}",
            _cut(what, widths[4]),
        )
        lines.append("  ".join(cells))
    return lines


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    start = (width - 1) // 2
    return f"{text[:start]}…{text[start + 1 - width :]}"
