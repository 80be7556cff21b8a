"""Run `emaopt diff`: compare two checkpoints, or the averages of one with its parameters.

Two checkpoints of Orbax are compared by the names that `emaopt ls` shows. If one is of TF1, both
are compared by TF1's names: the other one is converted as `emaopt convert` would do it. A part of
each is read at a time.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from emaopt._names import AVERAGE, origin
from emaopt._safetensors import newest_tensors, tensors_in
from emaopt._tree.checks import describe
from emaopt._tree.leaves import parts
from emaopt._tree.numbers import bytes_of, dtype_of, is_inexact
from emaopt._tree.paths import KeyPath, printable
from emaopt.checkpoint._run import locate
from emaopt.checkpoint._stored import Stored
from emaopt.tf1._files import Checkpoint, cast

from . import paths
from .convert.layout import Form, in_tf1, with_residue
from .paths import Path
from .progress import watched


BYTES_AT_ONCE = 2**25  # of each checkpoint that are read at once
ELEMENTS_AT_ONCE = 2**20  # that are compared at once
WIDTH = 80  # of a line; a name that is longer has a line of its own, so that it can be copied whole


class Side(NamedTuple):
    """Hold one side of a comparison. `sizes`: bytes, by name; `read`: read some values, by name."""

    sizes: dict[str, int]
    read: Callable[[list[str]], dict[str, Any]]


class Compared(NamedTuple):
    """Hold the comparison of one leaf.

    `a`, `b`: dtype and shape. `max_abs`: the largest difference of an element. `relative`: the L2
    norm of the difference, divided by the larger one of both norms. Where the shapes differ or the
    values are strings, there are no numbers. `squares`: the three norms, squared.
    """

    name: str
    a: str
    b: str
    equal: bool
    max_abs: float | None = None
    relative: float | None = None
    squares: tuple[float, ...] = ()


class Difference(NamedTuple):
    """Hold the leaves on both sides, those that differ most first, and names on one side only."""

    leaves: list[Compared]
    only_in_a: list[str]
    only_in_b: list[str]

    @property
    def equal(self) -> bool:
        """Return whether names, shapes, dtypes and values are the same."""
        return not (self.only_in_a or self.only_in_b) and all(x.equal for x in self.leaves)

    def total(self) -> tuple[float, float]:
        """Return `max_abs` and `relative` of all floating-point leaves together."""
        found = [leaf for leaf in self.leaves if leaf.squares]
        squares = np.sum([(0.0, 0.0, 0.0), *(leaf.squares for leaf in found)], axis=0)
        most = np.max([leaf.max_abs or 0.0 for leaf in found], initial=0.0)
        return float(most), _relative(*squares)


def command(a: str, b: str | None, as_json: bool) -> int:
    """Compare, print what differs, and return the exit code: 1 if anything differs."""
    found = compare(a, b)
    with suppress(BrokenPipeError):  # the reader has seen enough; the exit code is still wanted
        show(found, a, b, as_json)
    return 0 if found.equal else 1


def compare(a: str, b: str | None = None) -> Difference:
    """Compare two checkpoints, or the averages of one with its parameters."""
    here = paths.find(a)
    there = None if b is None else paths.find(b)
    if paths.TF1 in (here.format, there and there.format):
        paths.load_tensorflow()
    if there is None:
        return _compare(*_averages_and_parameters(here))
    by_tf1 = paths.TF1 in (here.format, there.format)
    return _compare(_side(here, by_tf1), _side(there, by_tf1))


def _side(place: paths.Place, by_tf1: bool) -> Side:
    """Return one side. `by_tf1`: whether the leaves have TF1's names."""
    if place.format == paths.TF1:
        return _of_tf1(place.path)
    if place.format == paths.SAFETENSORS:
        return _of_safetensors(place.path)
    return _renamed(place.path) if by_tf1 else _as_stored(place.path)


def _averages_and_parameters(place: paths.Place) -> tuple[Side, Side]:
    if place.format == paths.TF1:
        return _averages_of_tf1(place.path)
    if place.format == paths.ORBAX:
        return _averages_of_orbax(place.path)
    raise _no_average(place.path)


def show(found: Difference, a: str, b: str | None, as_json: bool) -> None:
    """Print a difference: all leaves as JSON, or what differs as text."""
    largest, relative = found.total()
    if as_json:
        rows = [
            {k: _finite(x) for k, x in leaf._asdict().items() if k != "squares"}
            for leaf in found.leaves
        ]
        about = {"a": a, "b": b, "equal": found.equal}
        total = {"max_abs": _finite(largest), "relative": _finite(relative)}
        only = {"only_in_a": found.only_in_a, "only_in_b": found.only_in_b}
        print(json.dumps({**about, "total": total, "leaves": rows, **only}, indent=1))
        return
    if found.equal:
        print(f"{len(found.leaves)} leaves, all equal")
        return
    differ = [leaf for leaf in found.leaves if not leaf.equal]
    if differ:
        print(f"{'max abs':>10}  {'relative':>10}  leaf")
    for leaf in differ:
        numbers = (f"{'-' if x is None else f'{x:.3g}':>10}" for x in (leaf.max_abs, leaf.relative))
        note = f": {leaf.a} in A, {leaf.b} in B" if leaf.a != leaf.b else ""
        row, name = "  ".join(numbers), f"{printable(leaf.name)}{note}"
        print(row, name, sep="  " if len(row) + len(name) + 2 <= WIDTH else "\n  ")
    for side, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        for name in names:
            print(f"only in {side}: {printable(name)}")
    print(
        f"\n{len(differ)} of {len(found.leaves)} common leaves differ\n"
        f"without integers, together: max abs {largest:.3g}, relative {relative:.3g}"
    )


def _of_tf1(path: Path) -> Side:
    checkpoint = Checkpoint(path)
    sizes = {name: bytes_of(*about) for name, about in sorted(checkpoint.stored.items())}
    return Side(sizes, lambda names: {name: checkpoint.value(name) for name in names})


def _of_safetensors(path: Path) -> Side:
    found = tensors_in(newest_tensors(path))
    sizes = {name: bytes_of(tensor.shape, tensor.dtype) for name, tensor in found.items()}
    return Side(sizes, lambda names: {name: found[name].value() for name in names})


def _as_stored(path: Path) -> Side:
    stored = Stored(locate(path, None))
    names = paths.shown(stored.saved())
    by_name = {name: path for path, name in names.items()}
    return _in_orbax(stored, dict(sorted(by_name.items())))


def _in_orbax(
    stored: Stored, at: dict[str, KeyPath], residues: dict[str, KeyPath] | None = None
) -> Side:
    """Return some leaves of a checkpoint of Orbax.

    Args:
        stored: The checkpoint.
        at: Their key paths, by name.
        residues: What is added to some of them, by name.
    """
    added = residues or {}

    def read(names):
        values = stored.read({part[name] for part in (at, added) for name in names if name in part})
        found = {name: values[at[name]] for name in names}
        for name in names:
            if name in added:
                residue = np.asarray(values[added[name]])
                found[name] = with_residue(np.asarray(found[name]), residue)
        return found

    leaves = {name: stored.leaf(path) for name, path in at.items()}
    return Side({name: bytes_of(np.shape(x), dtype_of(x)) for name, x in leaves.items()}, read)


def _renamed(path: Path) -> Side:
    """Return a checkpoint of Orbax by TF1's names, in TF1's dtypes where they lose no bit."""
    stored = Stored(locate(path, None))
    variables, _ = in_tf1(stored, Form(averages=False, swapped=False, average_name=AVERAGE))
    plain = _in_orbax(stored, {n: variable.path for n, variable in sorted(variables.items())})

    def read(names):
        values = {name: np.asarray(x) for name, x in plain.read(names).items()}
        exact = {name: cast(x, variables[name].dtype) for name, x in values.items()}
        return {name: values[name] if x is None else x for name, x in exact.items()}

    return Side(plain.sizes, read)


def _averages_of_tf1(path: Path) -> tuple[Side, Side]:
    side = _of_tf1(path)
    found = {name: origin(name) for name in side.sizes}
    pairs = {
        of + number: (name, of)
        for name, (of, kind, number) in found.items()
        if kind == AVERAGE and of in side.sizes
    }
    _check_any(pairs, path)

    def select(which: int) -> Side:
        names = {name: pair[which] for name, pair in pairs.items()}

        def read(wanted):
            values = side.read([names[name] for name in wanted])
            return {name: values[names[name]] for name in wanted}

        return Side({name: side.sizes[at] for name, at in names.items()}, read)

    return select(0), select(1)


def _averages_of_orbax(path: Path) -> tuple[Side, Side]:
    stored = Stored(locate(path, None))
    contents = stored.contents
    pairs = [
        (average, name, at)
        for average in contents.averages.values()
        for name, at in average.leaves.items()
        if name in contents.params
    ]
    times = Counter(name for _, name, _ in pairs)
    averaged, residues, parameters = {}, {}, {}
    for average, name, at in pairs:
        # of several averages, each is called by where it is
        called = "/".join(name if times[name] == 1 else (*average.at, *name))
        averaged[called], parameters[called] = at, contents.params[name]
        if name in average.residues:
            residues[called] = average.residues[name]
    _check_any(averaged, path)
    return _in_orbax(stored, averaged, residues), _in_orbax(stored, parameters)


def _check_any(found: dict[str, Any], path: Path) -> None:
    if not found:
        raise _no_average(path)


def _no_average(path: Path) -> ValueError:
    return ValueError(f"{path} holds no average to compare with its parameters. Pass B as well")


def _compare(a: Side, b: Side) -> Difference:
    common = {name: bytes_ for name, bytes_ in a.sizes.items() if name in b.sizes}
    leaves = []
    for part in watched(parts(common, BYTES_AT_ONCE), common, "compared"):
        ours, theirs = a.read(part), b.read(part)
        leaves += [_leaf(name, ours.pop(name), theirs.pop(name)) for name in part]
    return Difference(
        sorted(leaves, key=_rank),
        [name for name in a.sizes if name not in b.sizes],
        [name for name in b.sizes if name not in a.sizes],
    )


def _rank(leaf: Compared) -> tuple:
    """Return a key to sort by: unequal leaves first, and before them those without a number."""
    far = [math.inf if x is None or math.isnan(x) else x for x in (leaf.relative, leaf.max_abs)]
    return leaf.equal, *(-x for x in far), leaf.name


def _leaf(name: str, x: Any, y: Any) -> Compared:
    x, y = np.asarray(x), np.asarray(y)
    about = name, describe(x), describe(y)
    same = about[1] == about[2]
    if x.shape != y.shape:
        return Compared(*about, equal=False)
    if x.dtype.kind in "OSU" or y.dtype.kind in "OSU":
        return Compared(*about, equal=same and bool(np.all(x == y)))
    x, y = x.ravel(), y.ravel()
    most, squares = 0.0, np.zeros(3)
    for start in range(0, x.size, ELEMENTS_AT_ONCE):
        p, q = x[start : start + ELEMENTS_AT_ONCE], y[start : start + ELEMENTS_AT_ONCE]
        same = same and bool(np.all((p == q) | ((p != p) & (q != q))))
        p, q = _wide(p), _wide(q)
        with np.errstate(invalid="ignore", over="ignore"):
            distance = np.where((p == q) | (np.isnan(p) & np.isnan(q)), 0, np.abs(p - q))
            most = np.maximum(most, np.max(distance))
            norms = (np.sum(np.abs(v) ** 2, where=np.isfinite(v)) for v in (p, q))
            squares += [np.sum(distance**2), *norms]
    counted = tuple(squares.tolist()) if is_inexact(x) else ()  # a step would outweigh the rest
    return Compared(*about, same, float(most), _relative(*squares), counted)


def _relative(difference: float, a: float, b: float) -> float:
    with np.errstate(invalid="ignore", divide="ignore"):
        return 0.0 if difference == 0 else float(np.sqrt(np.divide(difference, max(a, b))))


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _finite(x: Any) -> Any:
    """Return `None` for NaN and infinity, which JSON has not."""
    return None if isinstance(x, float) and not math.isfinite(x) else x
