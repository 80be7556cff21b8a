"""Write a checkpoint of Orbax, block by block.

Orbax's `ocp.partial.save` writes a leaf at a time, which may be gigabytes where layers are stacked,
and only the item `state`. So the arrays are written by TensorStore, in blocks, and Orbax writes the
rest: the files that say what is in a checkpoint, around arrays of one number, which the real ones
replace.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils.epath import Path
from orbax.checkpoint import v1 as ocp

from emaopt._tree.paths import KeyPath, Tree, key_paths
from emaopt.checkpoint._digest import digests, with_own_digest
from emaopt.checkpoint._errors import cause
from emaopt.checkpoint._items import checked, inventory
from emaopt.checkpoint._place import DIGESTS
from emaopt.checkpoint._trees import logical

from ._sum import Block


WHOLE = "whole"  # what becomes the checkpoint, inside the temporary directory


class OrbaxWriter:
    """Write the item `params` of a checkpoint of Orbax.

    Args:
        directory: A temporary directory, in which everything is written.
        tree: The structure of the parameters.
        leaves: Every leaf by name: an abstract array, a number or a string.

    Raises:
        ValueError: Orbax could not read a leaf back. Nothing was written.
    """

    def __init__(self, directory: Path, tree: Tree, leaves: dict[KeyPath, Any]):
        self.directory, self.leaves = directory, leaves
        self.structure = jax.tree.structure(tree)
        self.on_disk = {logical(path): path for path in key_paths(tree)}
        checked("params", jax.tree.unflatten(self.structure, [leaves[n] for n in self.on_disk]))
        self._stores: dict[KeyPath, Any] = {}

    def start(self, about: dict[str, Any]) -> None:
        """Do nothing: the files that say what is in the checkpoint come last."""

    def put(self, block: Block, value: np.ndarray) -> Callable[[], Any]:
        """Start to write a block. What is returned waits for it."""
        if block.name not in self._stores:
            self._stores.clear()  # blocks come leaf by leaf
            self._stores[block.name] = self._array(block)
        return self._stores[block.name][block.index].write(value).result

    def finish(self, destination: Path, digest: dict[KeyPath, int], about: dict[str, Any]) -> None:
        """Make a checkpoint of what was written, and give it its name.

        Args:
            destination: Where it goes.
            digest: The digest of each array by name.
            about: What its metadata says.
        """
        found = {**digest}
        others = [name for name in self.leaves if name not in digest]
        if others:
            found |= dict(zip(others, digests([self.leaves[n] for n in others]), strict=False))
        in_order = sorted(self.on_disk, key=lambda name: self.on_disk[name])
        record = with_own_digest(np.asarray([int(found[n]) for n in in_order], np.uint32))
        small = [
            np.zeros((1,) * len(self.leaves[n].shape), self.leaves[n].dtype)
            if n in digest
            else self.leaves[n]
            for n in self.on_disk
        ]
        items = {
            "params": jax.tree.unflatten(self.structure, small),
            DIGESTS: {"params": np.asarray(record)},
        }
        whole = self.directory / WHOLE
        context = ocp.Context()
        # each array is a directory, which can be replaced, with a file that Orbax looks for
        context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = False
        with context, _silent():
            ocp.save_checkpointables(whole, items, custom_metadata=inventory(items) | about)
        arrays = {".".join(self.on_disk[name]) for name in digest}
        for file in list((whole / "params").iterdir()):
            if file.name not in arrays:
                file.rename(self.directory / "params" / file.name)
        (whole / "params").rmtree()
        (self.directory / "params").rename(whole / "params")
        whole.rename(destination)

    def _array(self, block: Block) -> Any:
        """Create an array on disk, or open it where another process has created it."""
        where = f"{self.directory}/params/{'.'.join(self.on_disk[block.name])}/"
        local = {"driver": "file", "path": where}
        spec = {
            "driver": "zarr",
            "kvstore": where if "://" in where else local,
            "dtype": block.form.dtype.name,
            "metadata": {
                "shape": list(block.form.shape),
                "chunks": list(block.shape),
                "compressor": None,
            },
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, create=True, open=True).result()


@contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turn every error of Orbax and TensorStore into one line that has its cause."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{destination} cannot be written. {cause(error)}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep Orbax from warning that no array is in its database of small files."""
    logger = logging.getLogger("absl")
    expected = lambda record: "Skipping merge of OCDBT" not in record.getMessage()
    logger.addFilter(expected)
    try:
        yield
    finally:
        logger.removeFilter(expected)
