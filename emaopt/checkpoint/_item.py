"""Read one item of a checkpoint: a tree on disk, leaf by leaf.

Orbax's `ocp.load` and `ocp.checkpointables_metadata` read more than is asked for, and TensorStore
keeps 8 kB for every leaf that they look at; so names come from the file `_METADATA`, and shapes
and values from the arrays that are asked for, through TensorStore.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils.epath import Path

from emaopt._files import read_json
from emaopt._tree.paths import KeyPath, Tree, key_paths

from ._leaf import Target
from ._run import METADATA


STRINGS = "_strings.json"  # the file with those of its leaves that are strings
ALIGNMENT = 64  # of arrays that JAX on CPU does not copy
_SEQUENCE = 1  # Orbax's type of a key that is a position
_EMPTY = {"Dict": {}, "List": [], "Tuple": []}  # what Orbax calls a node without leaves


class Item:
    """Read a tree on disk.

    Args:
        directory: where it is; it has a file `_METADATA`.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        about = read_json(directory / METADATA)
        self._zarr3 = bool(about.get("use_zarr3"))
        self._ocdbt = bool(about.get("use_ocdbt", True))
        self._kinds: dict[KeyPath, str] = {}
        self._forms: dict[KeyPath, Any] = {}
        entries = []
        for entry in about["tree_metadata"].values():
            keys = entry["key_metadata"]
            value = entry["value_metadata"]
            path = tuple(str(key["key"]) for key in keys)
            types = tuple(key["key_type"] for key in keys)
            kind = value["value_type"]
            if value.get("skip_deserialize"):
                entries.append((path, types, _EMPTY.get(kind)))
            else:
                entries.append((path, types, "/".join(path)))
                self._kinds[path] = kind
        self.tree: Tree = _nested(entries)  # every leaf is a string
        self.paths: list[KeyPath] = key_paths(self.tree)  # in flattening order
        self._context = ts.Context()

    def __iter__(self) -> Iterator[KeyPath]:
        return iter(self.paths)

    def __contains__(self, path: object) -> bool:
        return path in self._kinds

    def forms(self, paths: Iterable[KeyPath]) -> dict[KeyPath, Any]:
        """Return some leaves without their values; only their metadata is read.

        An array is a `jax.ShapeDtypeStruct`, a Python number 0 of its type, a string empty.

        Raises:
            LeafError: the metadata of a leaf cannot be read.
        """
        paths = list(paths)
        name = "zarr.json" if self._zarr3 else ".zarray"
        pending = {}
        for path in dict.fromkeys(paths):
            if path in self._forms:
                continue
            if self._kinds[path] == "string":
                self._forms[path] = ""
                continue
            with _naming(path):
                store = ts.KvStore.open(spec=self._kvstore(path), context=self._context)
                pending[path] = store.result().read(name)
        for path, file in pending.items():
            with _naming(path):
                about = json.loads(file.result().value)
                dtype = _dtype(about["data_type" if self._zarr3 else "dtype"])
                is_number = self._kinds[path] == "scalar"
                abstract = jax.ShapeDtypeStruct(tuple(about["shape"]), dtype)
                self._forms[path] = np.zeros((), dtype).item() if is_number else abstract
        return {path: self._forms[path] for path in paths}

    def read(self, targets: dict[KeyPath, Target]) -> dict[KeyPath, Any]:
        """Read some leaves, each to where its target says: arrays, Python numbers and strings.

        Raises:
            LeafError: a leaf cannot be read; it says which one.
        """
        strings = [path for path in targets if self._kinds[path] == "string"]
        values: dict[KeyPath, Any] = {}
        for path in strings:
            with _naming(path):
                values[path] = str(read_json(self.directory / STRINGS)[".".join(path)])
        opened = {}
        for path in targets:
            if path not in values:
                with _naming(path):
                    opened[path] = ts.open(self._spec(path), open=True, context=self._context)
        reading: dict[KeyPath, _Reading] = {}
        for path, array in opened.items():
            with _naming(path):
                reading[path] = _start(array.result(), targets[path])
        for path in list(reading):
            with _naming(path):
                value = _finish(reading.pop(path), targets[path])
                is_number = self._kinds[path] == "scalar" and isinstance(value, np.ndarray)
                values[path] = value.item() if is_number else value
        return {path: values[path] for path in targets}

    def open(self, paths: Iterable[KeyPath]) -> dict[KeyPath, ts.TensorStore]:
        """Open the arrays of some leaves, of which parts can be read.

        Raises:
            LeafError: one cannot be opened; the error says which leaf it is.
        """
        opening = {}
        for path in paths:
            with _naming(path):
                opening[path] = ts.open(self._spec(path), open=True, context=self._context)
        opened = {}
        for path, future in opening.items():
            with _naming(path):
                opened[path] = future.result()
        return opened

    def key_impl(self, path: KeyPath) -> str | None:
        """Return the kind of random key that a leaf was saved as, `None` if it was none."""
        for file in (self.directory / "array_metadatas").glob("process_*"):
            for entry in read_json(file)["array_metadatas"]:
                about = entry["array_metadata"]
                if about["param_name"] == ".".join(path):
                    return (about.get("ext_metadata") or {}).get("random_key_impl")
        return None

    def _kvstore(self, path: KeyPath) -> Any:
        where = str(self.directory)
        below = "".join(f"{name}/" for name in [".".join(path)] if name)
        is_local = "://" not in where
        if self._ocdbt:
            base: Any = {"driver": "file", "path": f"{where}/"} if is_local else f"{where}/"
            return {"driver": "ocdbt", "base": base, "path": below}
        return {"driver": "file", "path": f"{where}/{below}"} if is_local else f"{where}/{below}"

    def _spec(self, path: KeyPath) -> dict[str, Any]:
        return {"driver": "zarr3" if self._zarr3 else "zarr", "kvstore": self._kvstore(path)}


class LeafError(Exception):
    """Report a leaf that cannot be read; `__cause__` says why."""

    def __init__(self, path: KeyPath):
        super().__init__("/".join(path))
        self.path = path


@contextmanager
def _naming(path: KeyPath) -> Iterator[None]:
    """Say which leaf it was, whatever is raised: TensorStore's errors have many types."""
    try:
        yield
    except Exception as error:
        raise LeafError(path) from error


class _Reading(NamedTuple):
    """Hold an array that is being read: for each shard, its memory and the end of reading."""

    shape: tuple[int, ...]
    shards: dict[Any, tuple[np.ndarray, Any]]


def _start(array: ts.TensorStore, target: Target) -> _Reading:
    """Start to read an array: whole, or the shards that are to be on this process's devices."""
    shape = tuple(array.shape)
    if target.sharding is None:
        return _Reading(shape, {None: _into_memory(array)})
    indices = target.sharding.addressable_devices_indices_map(shape).values()
    shards = {_bounds(index): index for index in indices if index is not None}
    return _Reading(shape, {bounds: _into_memory(array[i]) for bounds, i in shards.items()})


def _into_memory(array: ts.TensorStore) -> tuple[np.ndarray, Any]:
    """Start to read into memory that JAX on CPU takes as it is.

    It copies arrays that do not begin at a multiple of 64 bytes, as those that TensorStore makes.
    """
    dtype = array.dtype.numpy_dtype
    size = int(np.prod(array.shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    values = memory[start : start + size].view(dtype).reshape(array.shape)
    source = array[ts.d[:].translate_to[0]] if array.rank else array
    return values, ts.array(values).write(source)


def _finish(reading: _Reading, target: Target) -> Any:
    """Wait for an array, and put it where it belongs."""
    read = {}
    for bounds, (values, writing) in reading.shards.items():
        writing.result()
        read[bounds] = values
    if target.sharding is not None:
        return jax.make_array_from_callback(
            reading.shape, target.sharding, lambda index: read[_bounds(index)]
        )
    return jax.device_put(read[None]) if target.on_device else read[None]


def _bounds(index: Any) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index)


def _dtype(name: Any) -> np.dtype:
    """Return the dtype of an array from Zarr's name of it, also where NumPy has no such dtype."""
    try:
        return np.dtype(name)
    except TypeError:
        return jnp.dtype(getattr(jnp, name))


def _nested(entries: Iterable[tuple[KeyPath, tuple[int, ...], Any]]) -> Tree:
    """Build a tree of key paths, types of keys, and leaves: of dicts, and of lists by position."""
    root: dict = {}
    positions: set[int] = set()  # the ids of those dicts whose keys are positions
    for path, types, leaf in entries:
        if not path:
            return leaf
        node = root
        for key, kind in zip(path[:-1], types, strict=False):
            positions |= {id(node)} if kind == _SEQUENCE else set()
            node = node.setdefault(key, {})
        positions |= {id(node)} if types[-1] == _SEQUENCE else set()
        node[path[-1]] = leaf
    return _with_lists(root, positions)


def _with_lists(node: Any, positions: set[int]) -> Tree:
    """Turn those dicts into lists whose keys are 0, 1, ..., without a gap."""
    if not isinstance(node, dict):
        return node
    children = {key: _with_lists(child, positions) for key, child in node.items()}
    if id(node) in positions and set(children) == {str(i) for i in range(len(children))}:
        return [children[str(i)] for i in range(len(children))]
    return children
