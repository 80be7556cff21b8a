"""Write a checkpoint of Orbax, block by block.

Orbax's `ocp.partial.save` writes a leaf at a time, which may be gigabytes where layers are stacked,
and only the item `state`. So the arrays are written by TensorStore, in blocks, and Orbax writes the
rest: the files that say what is in a checkpoint, around arrays of one number, which the real ones
replace.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils.epath import Path
from orbax.checkpoint import v1 as ocp

from emaopt._tree.paths import KeyPath, Tree, key_paths, logical
from emaopt.checkpoint._digest import digest_of_block
from emaopt.checkpoint._errors import cause
from emaopt.checkpoint._frame import write_frame
from emaopt.checkpoint._items import checked

from ._blocks import form_of
from ._processes import is_first
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
        self.is_alone = jax.process_count() == 1
        self.structure = jax.tree.structure(tree)
        self.on_disk = {logical(path): path for path in key_paths(tree)}
        checked("params", jax.tree.unflatten(self.structure, [leaves[n] for n in self.on_disk]))
        self._stores: dict[KeyPath, Any] = {}
        # to wait for the disk after each of many files would take most of the time; what a loss of
        # power leaves is noticed by the digests
        self._context = ts.Context({"file_io_sync": False})

    def start(self, about: dict[str, Any]) -> None:
        """Do nothing: the files that say what is in the checkpoint come last."""

    def put(self, group: list[tuple[Block, np.ndarray]]) -> list[Callable[[], Any]]:
        """Start to write some blocks. What is returned waits for each."""
        creating = {b.name: self._create(b) for b, _ in group if b.name not in self._stores}
        # blocks come leaf by leaf: only the last leaf goes on in the next group
        self._stores |= {name: future.result() for name, future in creating.items()}
        writes = [self._stores[b.name][b.index].write(value).result for b, value in group]
        last = group[-1][0].name
        self._stores = {last: self._stores[last]}
        return writes

    def finish(self, destination: Path, digest: dict[KeyPath, int], about: dict[str, Any]) -> None:
        """Make a checkpoint of what was written, and give it its name. All processes call this.

        Args:
            destination: Where it goes.
            digest: The digest of each array by name.
            about: What its metadata says.
        """
        others = [name for name in self.leaves if name not in digest]
        found = digest | {name: digest_of_block(self.leaves[name], (), ()) for name in others}
        if is_first():
            self._write_numbers(others)
        small = [
            np.zeros((1,) * len(self.leaves[n].shape), self.leaves[n].dtype)
            if n in digest
            else self.leaves[n]
            for n in self.on_disk
        ]
        items = {"params": jax.tree.unflatten(self.structure, small)}
        digests = {("params", *self.on_disk[name]): x for name, x in found.items()}
        arrays = {"params": self.directory / "params"}
        whole = self.directory / WHOLE
        different = {} if self.is_alone else {"use_ocdbt": False}
        context = ocp.Context()
        context.array.saving.use_zarr3 = False
        with context:
            write_frame(whole, items, arrays, digests, about, **different)
        if is_first():
            whole.rename(destination)

    def _write_numbers(self, names: list[KeyPath]) -> None:
        """Write the numbers that are no arrays. Strings lie in a file of Orbax."""
        given = {n: np.asarray(x) for n in names if not isinstance(x := self.leaves[n], str)}
        group = [(Block(n, (), form_of(x), ()), x) for n, x in given.items()]
        for wait in self.put(group) if group else []:
            wait()

    def _create(self, block: Block) -> Any:
        """Start to create an array on disk, or to open what another process has created."""
        name = ".".join(self.on_disk[block.name])
        where = f"{self.directory}/params/"
        is_local = "://" not in where
        base: Any = {"driver": "file", "path": where} if is_local else where
        kvstore: Any = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        if not self.is_alone:  # several processes cannot write to one database
            kvstore = {**base, "path": f"{where}{name}/"} if is_local else f"{where}{name}/"
        spec = {
            "driver": "zarr",
            "kvstore": kvstore,
            "dtype": block.form.dtype.name,
            "metadata": {
                "shape": list(block.form.shape),
                "chunks": list(block.shape),
                "compressor": None,
            },
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, create=True, open=True, context=self._context)


@contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turn every error of Orbax and TensorStore into one line that has its cause."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{destination} cannot be written. {cause(error)}") from error
