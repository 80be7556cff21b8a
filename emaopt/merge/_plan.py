"""Say what will be added up, and do it."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from etils.epath import Path

from emaopt._files import numbered, remove, remove_unfinished, temporary
from emaopt._tree.paths import KeyPath
from emaopt.checkpoint._digest import digest_of_block
from emaopt.checkpoint._run import check_writable

from ._blocks import form_of
from ._find import StoredTree
from ._orbax import OrbaxTree
from ._processes import gathered, is_first, together
from ._sum import Part, Term, summed
from ._write import OrbaxWriter, writing
from ._write_file import SafetensorsWriter


Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Plan:
    """Hold what is added up, before any parameter is read.

    Attributes:
        base: The checkpoint that the structure, the dtypes, and all that is not averaged come from.
        parts: The leaves that are summed, and the terms of each sum.
        residual: How far the sum is from what is wanted, see `emaopt.posthoc.residual`.
        noise: The sum of the squared factors, where plain parameters are added up: so much of the
            noise of one checkpoint remains, if that of each is independent of the others.
        about: What the metadata of the new checkpoint says of it.
    """

    base: StoredTree
    parts: list[Part]
    residual: float
    noise: float | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def others(self) -> list[KeyPath]:
        """Return the leaves that are copied from the base."""
        summed_ = {name for part in self.parts for name in part.leaves}
        return [name for name in self.base.leaves if name not in summed_]

    @property
    def nbytes(self) -> int:
        """Return the bytes that are read."""
        forms = {n: form_of(x).nbytes for n, x in self.base.leaves.items() if hasattr(x, "shape")}
        copied = sum(forms.get(name, 0) for name in self.others)
        return copied + sum(
            sum(forms[name] for name in part.leaves) * len(part.terms) for part in self.parts
        )

    def write(self, destination: Any, progress: Progress = lambda bytes_: None) -> None:
        """Add up, and write a checkpoint of Orbax with the item `params`, or a `.safetensors` file.

        A block of every leaf is in memory at a time, at most 16 MB in float64 or one chunk of what
        is stored. Of several processes of JAX each adds up its share of the blocks; all must call
        this. The checkpoint has digests, as `emaopt.checkpoint.export_averages` writes them, and
        gets its name when all is written.

        Args:
            destination: The absolute path of the new checkpoint; it ends in `.safetensors`, if it
                is to be such a file.
            progress: Is called with the bytes of each block that was read.

        Raises:
            FileExistsError: There is something at the destination.
            ValueError: Something is not finite, or could not be read back; or the destination is
                inside a source, or would be a step of its run.
            DamagedError: Something is not what was saved.
            OSError: The destination cannot be written. It names the cause, such as a full disk.
            RuntimeError: Another process raised one of these.
        """
        destination = Path(destination)
        if destination.exists():
            raise FileExistsError(f"{destination} exists. Remove it or pass another path")
        for part in self.parts:
            for term in part.terms:
                _check_apart(destination, term.tree.path)
        is_file = destination.suffix == ".safetensors"
        if is_file and jax.process_count() > 1:
            raise ValueError(
                f"destination={str(destination)!r} is one file, and there are "
                f"{jax.process_count()} processes of JAX. Pass a directory, for Orbax"
            )
        if not is_file:
            check_writable("destination", destination)
        directory = temporary(destination, gathered(os.getpid())[0])
        others = self.others
        numbers: dict[KeyPath, Any] = {}
        if isinstance(self.base, OrbaxTree):  # the others hold arrays only
            names = [n for n in others if not hasattr(self.base.leaves[n], "dtype")]
            numbers = {name: self.base.value(name) for name in names}
        leaves = {**self.base.leaves, **numbers}
        arrays = [name for name in others if name not in numbers]
        parts = [*self.parts, *([Part(arrays, [Term(self.base, None)])] if arrays else [])]
        writer = (
            SafetensorsWriter(directory, leaves)
            if is_file
            else OrbaxWriter(directory, self.base.tree, leaves)
        )
        self._check_room(destination)
        try:
            with together(), writing(destination):
                if is_first():
                    remove_unfinished(destination)
                    directory.mkdir(parents=True)
                    writer.start(self.about)
            digest = self._add_up(writer, destination, parts, progress)
            with together(), writing(destination):
                writer.finish(destination, digest, self.about)
        finally:
            if is_first():
                remove(directory)

    def _add_up(
        self, writer: Any, destination: Path, parts: list[Part], progress: Progress
    ) -> dict[KeyPath, int]:
        """Write all blocks, and return the digest of every array."""
        trees = list({id(t.tree): t.tree for part in parts for t in part.terms}.values())
        for tree in trees:
            tree.digests.clear()  # of what another plan of the same run has read
        names = [name for part in parts for name in part.leaves]
        digest = dict.fromkeys(names, 0)
        with together():
            self._write_blocks(writer, destination, parts, progress, digest)
        own = [[[[*path], x % 2**32] for path, x in tree.digests.items()] for tree in trees]
        read: list[dict[KeyPath, int]] = [{} for _ in trees]
        total = dict.fromkeys(names, 0)
        for own_read, own_written in gathered([own, [digest[name] % 2**32 for name in names]]):
            for of_tree, parts_read in zip(read, own_read, strict=True):
                for path, x in parts_read:
                    of_tree[tuple(path)] = of_tree.get(tuple(path), 0) + x
            for name, x in zip(names, own_written, strict=True):
                total[name] += x
        for tree, of_tree in zip(trees, read, strict=True):
            tree.check(of_tree)
        return {name: x % 2**32 for name, x in total.items()}

    def _write_blocks(
        self,
        writer: Any,
        destination: Path,
        parts: list[Part],
        progress: Progress,
        digest: dict[KeyPath, int],
    ) -> None:
        """Write the blocks of this process, and add what they are to the digest of each array."""
        terms = {name: len(part.terms) for part in parts for name in part.leaves}
        waiting: list[Callable[[], Any]] = []
        for group in summed(self.base, parts, jax.process_index(), jax.process_count()):
            with writing(destination):
                for wait in waiting:
                    wait()
                waiting = writer.put(group)
            for block, value in group:
                start = [part.start for part in block.index]
                digest[block.name] += digest_of_block(value, start, block.form.shape)
                progress(value.nbytes * terms[block.name])
            del group
        with writing(destination):
            for wait in waiting:
                wait()

    def _check_room(self, destination: Path) -> None:
        """Raise if the disk has less room than the checkpoint takes."""
        if "://" in str(destination):  # a cloud
            return
        forms = [form_of(x).nbytes for x in self.base.leaves.values() if hasattr(x, "shape")]
        free = shutil.disk_usage(next(p for p in destination.parents if p.exists())).free
        if free < sum(forms):
            raise OSError(
                f"{destination} needs {sum(forms) / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free. "
                "Pass a path on another disk"
            )


def _check_apart(destination: Path, source: Path) -> None:
    """Raise if a new checkpoint would be taken for a part of a source, or for a step of its run."""
    if "://" not in str(destination):  # the same place by other names
        source, destination = (Path(os.path.realpath(path)) for path in (source, destination))
    if source in destination.parents:
        raise ValueError(f"{destination} is inside the checkpoint {source}. Pass another path")
    run = source.parent
    steps = [
        numbered(run, {path: path.name.removesuffix(".safetensors")})
        for path in (source, destination)
    ]
    if run == destination.parent and all(steps):
        raise ValueError(
            f"{destination} would be taken for a step of the run {run}. Pass another path"
        )
