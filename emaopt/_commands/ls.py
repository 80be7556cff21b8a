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
from emaopt.checkpoint._leaf import shape, size
from emaopt.checkpoint._run import locate
from emaopt.checkpoint._stored import Stored

from .convert.layout import OTHER, TF1
from .paths import absolute, is_tf1, load_tensorflow


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


def tf1_leaves(path: Path) -> list[Leaf]:
    """The variables of a checkpoint of TF1, by name."""
    from emaopt.tf1 import inspect

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
