"""Add up trees on disk, block by block, in float64."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from emaopt._tree.paths import KeyPath

from ._blocks import ELEMENTS_AT_ONCE, Form, Index, block_shape, blocks, form_of
from ._find import StoredTree


LEAVES_AT_ONCE = 128  # whose chunks are looked at, at the same time
IN_CACHE = 2**15  # elements that are cast, multiplied and added without leaving the cache


class Term(NamedTuple):
    """Hold a tree and its factor; `None` stands for a copy."""

    tree: StoredTree
    factor: float | None


class Part(NamedTuple):
    """Hold leaves that are the sum of the same terms."""

    leaves: list[KeyPath]
    terms: list[Term]


@dataclass(frozen=True)
class Block:
    """Hold a block of a leaf of the sum."""

    name: KeyPath
    index: Index
    form: Form  # of the whole leaf
    shape: tuple[int, ...]  # of the blocks that the leaf is cut into

    @property
    def size(self) -> int:
        """Return the number of its elements."""
        return int(np.prod([part.stop - part.start for part in self.index], dtype=np.int64))


class _Read:
    """Hold a group of blocks of one term, to be read at the same time."""

    def __init__(self, group: list[Block], terms: list[Term], number: int):
        self.group, self.terms = group, terms
        self.term, self.is_last = terms[number], number == len(terms) - 1
        self.is_small = sum(block.size for block in group) <= ELEMENTS_AT_ONCE
        self._waiting: list[Any] = []

    def start(self) -> None:
        """Start to read, unless that is done."""
        if not self._waiting:
            wanted = [(block.name, block.index) for block in self.group]
            self._waiting = self.term.tree.start(wanted)

    def values(self) -> Iterator[tuple[Block, np.ndarray]]:
        """Yield the blocks as they come. None is kept."""
        self.start()
        self._waiting.reverse()
        for block in self.group:
            yield block, self._waiting.pop()()


def summed(
    base: StoredTree, parts: list[Part], process: int = 0, processes: int = 1
) -> Iterator[list[tuple[Block, np.ndarray]]]:
    """Yield the blocks of the sum, a few at a time, in the dtypes of the base.

    Args:
        base: The tree whose chunks the blocks are made of.
        parts: What is added up.
        process: Which process this is. It gets its share of the blocks.
        processes: How many there are.

    Raises:
        ValueError: Something is not finite. The error names the checkpoint and the leaf.
    """
    totals: list[np.ndarray | None] = []
    for read in _ahead(_reads(base, parts, process, processes)):
        totals = totals or [None] * len(read.group)
        for i, (_, value) in enumerate(read.values()):
            factor = read.term.factor
            totals[i] = value if factor is None else _added(totals[i], value, factor)
            del value  # before the next one is waited for
        if read.is_last:
            totals.reverse()
            yield [(block, _rounded(block, totals.pop(), read.terms)) for block in read.group]


def _reads(base: StoredTree, parts: list[Part], process: int, processes: int) -> Iterator[_Read]:
    """Yield what is to be read, in order."""
    count = itertools.count()
    for part in parts:
        mine = (b for b in _blocks_of(base, part.leaves) if next(count) % processes == process)
        for group in _groups(mine):
            for number in range(len(part.terms)):
                yield _Read(group, part.terms, number)


def _blocks_of(base: StoredTree, leaves: list[KeyPath]) -> Iterator[Block]:
    for start in range(0, len(leaves), LEAVES_AT_ONCE):
        names = leaves[start : start + LEAVES_AT_ONCE]
        for name, chunk in base.chunks(names).items():
            form = form_of(base.leaves[name])
            shape = block_shape(form, chunk)
            for index in blocks(form.shape, shape):
                yield Block(name, index, form, shape)


def _groups(of: Iterable[Block]) -> Iterator[list[Block]]:
    """Yield blocks in groups that fit into memory."""
    group, size = [], 0
    for block in of:
        if group and size + block.size > ELEMENTS_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(block)
        size += block.size
    if group:
        yield group


def _ahead(reads: Iterable[_Read]) -> Iterator[_Read]:
    """Yield the same reads, the next one started, where both fit into memory."""
    waiting: _Read | None = None
    for read in reads:
        if waiting is not None:
            if waiting.is_small and read.is_small:
                read.start()
            yield waiting
        waiting = read
    if waiting is not None:
        yield waiting


def _added(total: np.ndarray | None, value: np.ndarray, factor: float) -> np.ndarray:
    """Return a sum plus a block times its factor. The sum is changed in place.

    In pieces that stay in the cache of the processor: a pass over memory costs more than the
    arithmetic.
    """
    dtype = _wide(value.dtype)
    is_first = total is None
    result = np.empty(value.shape, dtype) if total is None else total
    given, out = value.reshape(-1), result.reshape(-1)
    scratch = np.empty(min(IN_CACHE, given.size), dtype)
    for start in range(0, given.size, IN_CACHE):
        part = out[start : start + IN_CACHE]
        term = part if is_first else scratch[: part.size]
        np.copyto(term, given[start : start + IN_CACHE], casting="unsafe")
        term *= factor
        if not is_first:
            part += term
    return result


def _wide(dtype: np.dtype) -> np.dtype:
    """Return the dtype of sums: float64, and more for float64, whose last digit is then right."""
    if dtype.kind == "c":
        return np.dtype(np.clongdouble if dtype.itemsize == 16 else np.complex128)
    return np.dtype(np.longdouble if dtype == np.float64 else np.float64)


def _rounded(block: Block, total: np.ndarray | None, terms: list[Term]) -> np.ndarray:
    """Return a finished block in the dtype of its leaf.

    Raises:
        ValueError: It is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.asarray(total).astype(block.form.dtype, copy=False)
    if terms[0].factor is not None and not np.isfinite(value).all():
        _blame(block, terms)
    return value


def _blame(block: Block, terms: list[Term]) -> None:
    """Raise an error that names the checkpoint which is not finite."""
    leaf = "/".join(block.name)
    for tree, _ in terms:
        if not np.isfinite(tree.start([(block.name, block.index)])[0]()).all():
            raise ValueError(
                f"{tree.path} is not finite at leaf {leaf!r}. Move that checkpoint to another "
                "place, or take the later ones alone: --last N"
            )
    raise ValueError(
        f"the sum is too large for {block.form.dtype} at leaf {leaf!r}. Pass another target, whose "
        "factors are smaller"
    )
