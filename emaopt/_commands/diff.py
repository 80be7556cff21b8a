"""How far apart two checkpoints are, of TF1 or of Orbax; or the averages of one and its parameters.

Two of Orbax are compared by the names that `emaopt ls` shows. If one is of TF1, both are by TF1's
names: the one of Orbax is what `emaopt convert` would make of it. A part of each is read at a time.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from etils.epath import Path

from emaopt._names import AVERAGE, origin
from emaopt._tree.checks import describe
from emaopt._tree.numbers import dtype_of, is_inexact
from emaopt._tree.paths import KeyPath
from emaopt.checkpoint._contents import DIGESTS
from emaopt.checkpoint._leaf import parts, shape, size
from emaopt.checkpoint._run import locate
from emaopt.checkpoint._stored import Stored

from .paths import absolute, is_tf1


BYTES_AT_ONCE = 2**25  # of each checkpoint, read
ELEMENTS_AT_ONCE = 2**20  # compared


class Side(NamedTuple):
    """What is compared. `sizes`: bytes, by name; `read`: some values, by name."""

    sizes: dict[str, int]
    read: Callable[[list[str]], dict[str, Any]]


class Compared(NamedTuple):
    """A leaf on both sides: dtype and shape, the largest difference, and that of the norms.

    `relative`: the L2 norm of the difference, of the larger one of both norms. Where the shapes
    differ or the values are strings, there are no numbers.
    """

    name: str
    a: str
    b: str
    equal: bool
    max_abs: float | None = None
    relative: float | None = None
    squares: tuple[float, ...] = ()


class Difference(NamedTuple):
    """The leaves on both sides, those that differ most first, and those on one side."""

    leaves: list[Compared]
    only_in_a: list[str]
    only_in_b: list[str]

    @property
    def equal(self) -> bool:
        """Whether names, shapes, dtypes and values are the same."""
        return not (self.only_in_a or self.only_in_b) and all(x.equal for x in self.leaves)

    def total(self) -> tuple[float, float]:
        """`max_abs` and `relative` of all floating-point leaves together."""
        found = [leaf for leaf in self.leaves if leaf.squares]
        squares = np.sum([(0.0, 0.0, 0.0), *(leaf.squares for leaf in found)], axis=0)
        most = np.max([leaf.max_abs or 0.0 for leaf in found], initial=0.0)
        return float(most), _relative(*squares)


def compare(a: str, b: str | None = None) -> Difference:
    """Two checkpoints; of one alone, the averages and their parameters."""
    here = absolute(a)
    if b is None:
        return _compare(*(_averages_of_tf1 if is_tf1(here) else _averages_of_orbax)(here))
    sides = {path: is_tf1(path) for path in (here, absolute(b))}
    of_orbax = _renamed if any(sides.values()) else _as_stored
    return _compare(*((_of_tf1 if sides[p] else of_orbax)(p) for p in (here, absolute(b))))


def show(found: Difference, a: str, b: str | None, as_json: bool) -> None:
    """Print it: as JSON, all of it; as text, what differs."""
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
        print(*numbers, f"{leaf.name}{note}", sep="  ")
    for side, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        for name in names:
            print(f"only in {side}: {name}")
    print(
        f"\n{len(differ)} of {len(found.leaves)} common leaves differ; "
        f"without integers, together: max abs {largest:.3g}, relative {relative:.3g}"
    )


def _of_tf1(path: Path) -> Side:
    from emaopt.tf1._files import Checkpoint

    checkpoint = Checkpoint(path)
    sizes = {name: size(*about) for name, about in sorted(checkpoint.stored.items())}
    return Side(sizes, lambda names: {name: checkpoint.value(name) for name in names})


def _as_stored(path: Path) -> Side:
    stored = Stored(locate(path, None))
    paths = {"/".join(filter(None, p)): p for p in stored.paths() if p[0] != DIGESTS}
    return _in_orbax(stored, dict(sorted(paths.items())))


def _in_orbax(stored: Stored, paths: dict[str, KeyPath]) -> Side:
    def read(names):
        values = stored.read({paths[name] for name in names})
        return {name: values[paths[name]] for name in names}

    leaves = {name: stored.leaf(path) for name, path in paths.items()}
    return Side({name: size(shape(x), dtype_of(x)) for name, x in leaves.items()}, read)


def _renamed(path: Path) -> Side:
    """A checkpoint of Orbax by TF1's names, in TF1's dtypes where they lose no bit."""
    from emaopt.tf1._files import cast

    from .convert.layout import Form, in_tf1

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
        (average.at, name, at)
        for average in contents.averages.values()
        for name, at in average.leaves.items()
        if name in contents.params
    ]
    times = Counter(name for _, name, _ in pairs)
    averaged, parameters = {}, {}
    for node, name, at in pairs:
        # of several averages, each is called by where it is
        called = "/".join(name if times[name] == 1 else (*node, *name))
        averaged[called], parameters[called] = at, contents.params[name]
    _check_any(averaged, path)
    return _in_orbax(stored, averaged), _in_orbax(stored, parameters)


def _check_any(found: dict[str, Any], path: Path) -> None:
    if not found:
        raise ValueError(f"{path} holds no average to compare with its parameters. Pass B as well")


def _compare(a: Side, b: Side) -> Difference:
    common = {name: bytes_ for name, bytes_ in a.sizes.items() if name in b.sizes}
    leaves = []
    for part in _watched(parts(common, BYTES_AT_ONCE), common):
        ours, theirs = a.read(part), b.read(part)
        leaves += [_leaf(name, ours.pop(name), theirs.pop(name)) for name in part]
    return Difference(
        sorted(leaves, key=_rank),
        [name for name in a.sizes if name not in b.sizes],
        [name for name in b.sizes if name not in a.sizes],
    )


def _rank(leaf: Compared) -> tuple:
    """What differs before what does not, and first what has no number, or NaN."""
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
    """JSON has neither NaN nor infinity."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _watched(parts: Iterator[list[str]], sizes: dict[str, int]) -> Iterator[list[str]]:
    """The same; a terminal is told after 2 seconds how far it is."""
    start, done, told = monotonic(), 0, ""
    for part in parts:
        yield part
        done += sum(sizes[name] for name in part)
        if sys.stderr.isatty() and monotonic() - start > 2:
            told = f"compared {done / sum(sizes.values()):4.0%}"
            print(f"\r{told}", end="", file=sys.stderr, flush=True)
    if told:
        print(f"\r{' ' * len(told)}\r", end="", file=sys.stderr, flush=True)
