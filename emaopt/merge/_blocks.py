"""Cut arrays into blocks that fit into memory."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


ELEMENTS_AT_ONCE = 2**21  # of a sum in float64: 16 MB. Half of it takes up to 1.5 times as long.

Index = tuple[slice, ...]


class Form(NamedTuple):
    """Hold the shape and the dtype of an array on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def form_of(leaf: Any) -> Form:
    """Return the form of an array, real or abstract."""
    return Form(tuple(leaf.shape), np.dtype(leaf.dtype))


def block_shape(form: Form, chunk: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the blocks that an array is cut into.

    A block is made of whole chunks, the last axes first, because a part of a chunk cannot be read
    without the rest of it. A chunk that is too large is a block of its own.

    Args:
        form: The array.
        chunk: What is read at once; ones, if every element can be read alone.

    Returns:
        A shape that starts at a multiple of itself in every axis.
    """
    block = [max(1, min(own, whole)) for own, whole in zip(chunk, form.shape, strict=True)]
    for axis in reversed(range(len(block))):
        room = max(1, ELEMENTS_AT_ONCE // math.prod(block))
        block[axis] = min(max(1, form.shape[axis]), block[axis] * room)
        if block[axis] < form.shape[axis]:
            break
    return tuple(block)


def blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> Iterator[Index]:
    """Yield the index of each block of an array; nothing, if it has no elements."""
    starts = [range(0, whole, own) for whole, own in zip(shape, block, strict=True)]
    for corner in itertools.product(*starts):
        ends = map(min, map(sum, zip(corner, block, strict=True)), shape)
        yield tuple(map(slice, corner, ends))
