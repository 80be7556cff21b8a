"""Say what will be added up, and do it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from etils.epath import Path

from emaopt._tree.paths import KeyPath
from emaopt.checkpoint._digest import digest_of_block
from emaopt.checkpoint._run import check_writable
from emaopt.checkpoint._unfinished import remove, remove_unfinished, temporary

from ._blocks import form_of
from ._find import StoredTree
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
        is stored. The checkpoint
        has digests, as `emaopt.checkpoint.export_averages` writes them, and gets its name when all
        is written.

        Args:
            destination: The absolute path of the new checkpoint; it ends in `.safetensors`, if it
                is to be such a file.
            progress: Is called with the bytes of each block that was read.

        Raises:
            FileExistsError: There is something at the destination.
            ValueError: Something is not finite, or could not be read back.
            DamagedError: Something is not what was saved.
            OSError: The destination cannot be written. It names the cause, such as a full disk.
        """
        if jax.process_count() > 1:
            raise ValueError(
                f"there are {jax.process_count()} processes of JAX, and one adds up. Call it, or "
                "emaopt merge, in a program of its own, without jax.distributed"
            )
        destination = Path(destination)
        if destination.exists():
            raise FileExistsError(f"{destination} exists. Remove it or pass another path")
        is_file = destination.suffix == ".safetensors"
        if not is_file:
            check_writable("destination", destination)
        directory = temporary(destination)
        others = self.others
        numbers = {
            n: self.base.value(n) for n in others if not hasattr(self.base.leaves[n], "dtype")
        }
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
            if jax.process_index() == 0:
                with writing(destination):
                    remove_unfinished(destination)
                    directory.mkdir(parents=True)
                    writer.start(self.about)
            digest = self._add_up(writer, destination, parts, progress)
            if jax.process_index() == 0:
                with writing(destination):
                    writer.finish(destination, digest, self.about)
        finally:
            if jax.process_index() == 0:
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
        terms = {name: len(part.terms) for part in parts for name in part.leaves}
        waiting: list[Callable[[], Any]] = []
        processes = jax.process_index(), jax.process_count()
        for group in summed(self.base, parts, *processes):
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
        read = [(tree, path) for tree in trees for path in sorted(tree.digests)]
        partial = [tree.digests[path] for tree, path in read] + [digest[name] for name in names]
        total = [x % 2**32 for x in partial]
        for tree in trees:
            tree.check({p: x for (t, p), x in zip(read, total, strict=False) if t is tree})
        return {n: x % 2**32 for n, x in zip(names, total[len(read) :], strict=True)}

    def _check_room(self, destination: Path) -> None:
        """Raise if the disk has less room than the checkpoint takes."""
        forms = [form_of(x).nbytes for x in self.base.leaves.values() if hasattr(x, "shape")]
        above = next((p for p in destination.parents if p.exists()), None)
        if "://" in str(destination) or above is None:
            return
        free = shutil.disk_usage(above).free
        if free < sum(forms):
            raise OSError(
                f"{destination} needs {sum(forms) / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free. "
                "Pass a path on another disk"
            )
