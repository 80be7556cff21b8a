"""Let several processes of JAX write one checkpoint together."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Tell whether this is the process that names, moves and removes files."""
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """Return the value of every process, when all have called this.

    Args:
        value: What JSON can hold.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


@contextmanager
def together() -> Iterator[None]:
    """Raise in every process if one of them raises in the block.

    Without it the others would wait for a process that is gone.
    """
    try:
        yield
    except Exception as error:
        gathered(f"{type(error).__name__}: {error}")
        raise
    for process, said in enumerate(gathered("")):
        if said:
            raise RuntimeError(f"process {process} could not go on. {said}")
