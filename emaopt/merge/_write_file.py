"""Write a `.safetensors` file, block by block."""

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from etils.epath import Path

from emaopt._safetensors import DTYPES
from emaopt._tree.checks import written_names
from emaopt._tree.paths import KeyPath

from ._blocks import form_of
from ._sum import Block


class SafetensorsWriter:
    """Write a `.safetensors` file.

    Args:
        directory: A temporary directory, in which the file is written.
        leaves: Every leaf by name: an abstract array, or a number.

    Raises:
        ValueError: A leaf is a string, or two have one name. Nothing was written.
    """

    def __init__(self, directory: Path, leaves: dict[KeyPath, Any]):
        self.file = directory / "tensors"
        names = written_names(leaves, leaves.values())
        for name, leaf in zip(names, leaves.values(), strict=True):
            if isinstance(leaf, str):
                raise ValueError(f"{name} is a string, which a .safetensors file cannot hold")
        self.leaves = {n: x if hasattr(x, "dtype") else np.asarray(x) for n, x in leaves.items()}
        self.header: dict[str, Any] = {}
        self._starts: dict[KeyPath, int] = {}
        end = 0
        for name, key in sorted(zip(names, self.leaves, strict=True)):
            form = form_of(self.leaves[key])
            kind = {np.dtype(own): code for code, own in DTYPES.items()}.get(form.dtype)
            if kind is None:
                raise ValueError(f"{name} is {form.dtype}, which a .safetensors file cannot hold")
            self._starts[key] = end
            self.header[name] = {
                "dtype": kind,
                "shape": list(form.shape),
                "data_offsets": [end, end + form.nbytes],
            }
            end += form.nbytes
        self._bytes = end

    def start(self, about: dict[str, Any]) -> None:
        """Write the header, and take the room for all tensors.

        A file with holes would let a full disk end the process when they are written to.
        """
        about = {"merged": json.dumps(about["merged"])}
        text = json.dumps({"__metadata__": about, **self.header}).encode()
        text += b" " * (-len(text) % 8)
        self._first = 8 + len(text)
        with open(self.file, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            if self._bytes:
                os.posix_fallocate(file.fileno(), self._first, self._bytes)

    def put(self, group: list[tuple[Block, np.ndarray]]) -> list[Callable[[], Any]]:
        """Write some blocks."""
        for block, value in group:
            self._map(block.name)[block.index] = value
        return []

    def finish(self, destination: Path, digest: dict[KeyPath, int], about: dict[str, Any]) -> None:
        """Write the numbers that are no arrays, and give the file its name."""
        for name in self.leaves.keys() - digest.keys():
            self._map(name)[...] = self.leaves[name]
        self.file.rename(destination)

    def _map(self, name: KeyPath) -> np.ndarray:
        leaf = self.leaves[name]
        start = self._first + self._starts[name]
        return np.memmap(self.file, leaf.dtype, "r+", start, tuple(leaf.shape) or (1,))
