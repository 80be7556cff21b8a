"""Run `emaopt ls`: list the leaves of a checkpoint of TF1, Orbax or safetensors. No value is read.

Every leaf has a role: a variable, the average of one, a slot of one (`slot m of w`), a power, the
global step. In a checkpoint that `emaopt.checkpoint.save` wrote, `params` holds the averages and
the shadow holds the raw parameters.
"""

import json
import shutil
import sys
from typing import NamedTuple

import numpy as np

from emaopt._names import role
from emaopt._safetensors import newest_tensors, tensors_in
from emaopt._tree.numbers import bytes_of, dtype_of
from emaopt._tree.paths import printable
from emaopt.checkpoint._run import locate
from emaopt.checkpoint._stored import Stored
from emaopt.tf1 import inspect

from . import paths
from .convert.layout import ITEM, OTHER


WIDTH = 80  # of a table that is not shown on a terminal


class Row(NamedTuple):
    """Hold a leaf of a checkpoint, as it is listed."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    bytes: int


def command(checkpoint: str, averages: bool = False, as_json: bool = False) -> None:
    """Print the leaves of a checkpoint.

    Args:
        checkpoint: What the command line names.
        averages: Whether to list the averages only.
        as_json: Whether to print JSON in place of a table.
    """
    place = paths.find(checkpoint)
    path = place.path
    if place.format == paths.TF1:
        rows = rows_of_tf1(path)
    elif place.format == paths.SAFETENSORS:
        path = newest_tensors(path)
        rows = rows_of_safetensors(path)
    else:
        path = locate(path, None)
        rows = rows_of_orbax(Stored(path))
    if averages:
        rows = [row for row in rows if row.role.startswith("average of ")]
        if not rows:
            raise ValueError(f"{path} holds no average. Leave out --averages to see what it holds")
    total = sum(row.bytes for row in rows)
    if as_json:
        leaves = [row._asdict() for row in rows]
        print(json.dumps({"checkpoint": str(path), "leaves": leaves, "bytes": total}, indent=1))
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    lines = table(rows, width)
    end, place = f"{len(rows)} leaves, {total:,} bytes:", printable(str(path))
    fits = len(end) + 1 + len(place) <= width
    print("\n".join([*lines, "", f"{end} {place}" if fits else f"{end}\n  {place}"]))


def rows_of_tf1(path: paths.Path) -> list[Row]:
    """Return the variables of a checkpoint of TF1, by name."""
    paths.load_tensorflow()
    return [
        Row(v.name, v.shape, v.dtype, v.role, bytes_of(v.shape, v.dtype)) for v in inspect(path)
    ]


def rows_of_safetensors(path: paths.Path) -> list[Row]:
    """Return the tensors of a `.safetensors` file, or of several that are one model, by name."""
    found = tensors_in(path)
    return [
        Row(name, x.shape, str(x.dtype), role(name, found)[0], bytes_of(x.shape, x.dtype))
        for name, x in found.items()
    ]


def rows_of_orbax(stored: Stored) -> list[Row]:
    """Return the leaves of a checkpoint of Orbax, by name."""
    contents, names = stored.contents, paths.shown(stored.paths())
    converted = {path[-1] for path in names if path[:2] == (ITEM, OTHER)}
    known = converted | {"/".join(name) for name in contents.stored_params}
    rows = []
    for path, name in names.items():
        what = role(path[-1], known)[0] if path[:2] == (ITEM, OTHER) else contents.role(path)
        leaf = stored.leaf(path)
        shape, dtype = np.shape(leaf), str(dtype_of(leaf))
        rows.append(Row(name, shape, dtype, what, bytes_of(shape, dtype)))
    return sorted(rows)


def table(rows: list[Row], width: int) -> list[str]:
    """Return the lines of a table: the leaves in groups, under the place and the role of a group.

    A name that is too long for the width has a line of its own, so that it can be copied whole.
    """
    groups: dict[str, list[tuple[str, Row]]] = {}
    for row in rows:
        title, name = _group(row)
        groups.setdefault(title, []).append((name, row))
    lines: list[str] = []
    for title, members in groups.items():
        lines += [*([""] if lines else []), printable(title)]
        cells = [
            (printable(name), f"[{','.join(map(str, row.shape))}]", row.dtype, f"{row.bytes:,}")
            for name, row in members
        ]
        _, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
        room = max(16, width - sum(widths) - 2 * len(widths) - 2)
        longest = min(room, max(len(name) for name, *_ in cells))
        for name, dims, dtype, length in cells:
            if len(name) > room:
                lines.append(f"  {name}")
                name = ""
            numbers = f"{dims:{widths[0]}}  {dtype:{widths[1]}}  {length:>{widths[2]}}"
            lines.append(f"  {name:{longest}}  {numbers}")
    return lines


def _group(row: Row) -> tuple[str, str]:
    """Return the title of the group that a leaf is listed in, and its name there."""
    kind, of, owner = row.role.partition(" of ")
    if of and row.name.endswith(f"/{owner}"):  # Orbax: opt_state/0/slots/m/w
        place = row.name.removesuffix(f"/{owner}")
        return kind if place == kind else f"{place}: {kind}", owner
    if of and row.name.startswith(f"{owner}/"):  # TF1: w/Adam
        return f"*{row.name.removeprefix(owner)}: {kind}", owner
    return kind, row.name
