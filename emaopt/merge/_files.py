"""Read the parameters in `.safetensors` files, and in a checkpoint of TF1, block by block."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from emaopt._names import role
from emaopt._safetensors import tensors_in
from emaopt._tree.checks import written_names
from emaopt._tree.paths import KeyPath, Tree, nested
from emaopt.tf1._files import Checkpoint

from ._blocks import Index


_AHEAD = ThreadPoolExecutor(1)  # reads a block while another one is added up


class SafetensorsTree:
    """Read the tensors of a `.safetensors` file, or of all shards in a directory.

    Attributes:
        path: The file or the directory.
        tree: The structure, with names at the leaves: `conv/kernel` is nested.
        leaves: Every tensor by name, abstract.
        digests: Nothing: such a file has none.
    """

    def __init__(self, path: Path):
        self.path = path
        self.digests: dict[KeyPath, int] = {}
        self._tensors = {
            tuple(name.split("/")): tensor for name, tensor in tensors_in(path).items()
        }
        self.leaves = {
            name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
            for name, tensor in self._tensors.items()
        }
        self.tree: Tree = _nested(self.leaves)

    def chunks(self, names: list[KeyPath]) -> dict[KeyPath, tuple[int, ...]]:
        """Return what is read at once of each tensor: a single number."""
        return {name: (1,) * len(self.leaves[name].shape) for name in names}

    def start(self, wanted: list[tuple[KeyPath, Index]]) -> list[Callable[[], np.ndarray]]:
        """Start to read some blocks. What is returned waits for each."""
        return [_AHEAD.submit(self._tensors[name].part, index).result for name, index in wanted]

    def check(self, digests: dict[KeyPath, int]) -> None:
        """Do nothing: there is no digest to compare with."""


class Tf1Tree:
    """Read the variables in a checkpoint of TF1, without slots, powers and averages.

    Attributes:
        path: The prefix.
        tree: The structure, with names at the leaves: `conv/kernel` is nested.
        leaves: Every variable by name, abstract.
        digests: Nothing: TF1 compares its own when it reads.
    """

    def __init__(self, path: Path):
        self.path = path
        self.digests: dict[KeyPath, int] = {}
        self._checkpoint = Checkpoint(path)
        stored = self._checkpoint.stored
        self.leaves = {
            tuple(name.split("/")): jax.ShapeDtypeStruct(shape, dtype)
            for name, (shape, dtype) in stored.items()
            if role(name, stored)[0] == "variable" and dtype.kind != "O"
        }
        self.tree: Tree = _nested(self.leaves)

    def chunks(self, names: list[KeyPath]) -> dict[KeyPath, tuple[int, ...]]:
        """Return what is read at once of each variable: all of it."""
        return {name: self.leaves[name].shape for name in names}

    def start(self, wanted: list[tuple[KeyPath, Index]]) -> list[Callable[[], np.ndarray]]:
        """Start to read some blocks. What is returned waits for each."""
        read = lambda name, index: self._checkpoint.value("/".join(name))[index]
        return [_AHEAD.submit(read, name, index).result for name, index in wanted]

    def check(self, digests: dict[KeyPath, int]) -> None:
        """Do nothing: TensorFlow compared its checksums."""


def _nested(leaves: dict[KeyPath, Any]) -> Tree:
    """Return nested dicts of leaves, whose names are refused if two are written alike."""
    written_names(leaves, leaves.values())
    return nested(leaves)
