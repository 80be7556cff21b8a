"""Read averages and parameters block by block, and compare them with their digests in the end."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from emaopt._tree.paths import KeyPath

from ._digest import digest_of_block
from ._errors import unreadable
from ._item import LeafError
from ._place import DIGESTS, Place, evaluated
from ._stored import Stored
from ._verify import compare


OPEN_AT_ONCE = 256  # arrays of a checkpoint
Index = tuple[slice, ...]


class Blocks:
    """Read leaves of a checkpoint block by block.

    Args:
        stored: the checkpoint.
        advice: what to do if it is damaged, for errors.

    Attributes:
        digests: what was read, as partial digests by the path on disk.
    """

    def __init__(self, stored: Stored, advice: str):
        self.stored, self.advice = stored, advice
        self.digests: dict[KeyPath, int] = {}
        self._opened: dict[KeyPath, Any] = {}

    def chunks(self, places: Iterable[Place]) -> list[tuple[int, ...]]:
        """Return the shape of what is read at once of each leaf."""
        places = list(places)
        opened = self._open([place.path for place in places])
        return [
            # of a lazy average all rows, which the times of all bring up to date
            tuple(opened[place.path].shape)
            if place.then is not None
            # of a scalar, TensorStore says None
            else tuple(opened[place.path].chunk_layout.read_chunk.shape or ())
            for place in places
        ]

    def start(self, wanted: Iterable[tuple[Place, Index]]) -> list[Callable[[], np.ndarray]]:
        """Start to read some blocks. What is returned waits for each."""
        wanted = list(wanted)
        eager = [place for place, _ in wanted if place.then is None]
        opened = self._open([p for x in eager for p in (x.path, x.residue) if p is not None])
        return [self._start(place, index, opened) for place, index in wanted]

    def check(self, digests: dict[KeyPath, int]) -> None:
        """Raise if what was read is not what was saved.

        Args:
            digests: the sum of `self.digests` over all processes.

        Raises:
            DamagedError: a leaf, or the digests, are not what was saved.
        """
        for item in {path[0] for path in digests}:
            recorded = self.stored.read([(DIGESTS, item)])[(DIGESTS, item)]
            now = {path[1:]: x % 2**32 for path, x in digests.items() if path[0] == item}
            what = f"checkpoint {self.stored.path}: "
            compare(what, item, recorded, self.stored.items[item].paths, now, self.advice)

    def _start(
        self, place: Place, index: Index, opened: dict[KeyPath, Any]
    ) -> Callable[[], np.ndarray]:
        if place.then is not None:
            return lambda: np.asarray(self.stored.averages({"": place})[""])[index]
        paths = [path for path in (place.path, place.residue) if path is not None]
        reading = {path: opened[path][index].read() for path in paths}
        shapes = {path: opened[path].shape for path in paths}

        def wait() -> np.ndarray:
            values = {path: self._end(path, reading, index, shapes[path]) for path in paths}
            return np.asarray(evaluated(place, values))

        return wait

    def _open(self, paths: list[KeyPath]) -> dict[KeyPath, Any]:
        """Open some arrays, or find them open."""
        new = {path[0]: [] for path in paths if path not in self._opened}
        for path in dict.fromkeys(paths):
            if path not in self._opened:
                new[path[0]].append(path[1:])
        found = {path: self._opened[path] for path in paths if path in self._opened}
        for item, own in new.items():
            try:
                opened = self.stored.items[item].open(own)
            except LeafError as error:
                place = item, *error.path
                raise unreadable(self.stored.path, place, error, self.advice) from error
            found |= {(item, *path): array for path, array in opened.items()}
        # TensorStore keeps some kB for each
        self._opened = found if len(self._opened) > OPEN_AT_ONCE else self._opened | found
        return found

    def _end(
        self, path: KeyPath, reading: dict[KeyPath, Any], index: Index, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Wait for a part of an array, and note its digest."""
        try:
            value = np.asarray(reading.pop(path).result())
        except Exception as error:  # TensorStore's errors have many types
            raise unreadable(self.stored.path, path, error, self.advice) from error
        if (path[0],) in self.stored.items.get(DIGESTS, ()):
            part = digest_of_block(value, [part.start for part in index], shape)
            self.digests[path] = self.digests.get(path, 0) + part
        return value
