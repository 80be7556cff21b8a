"""Read `.safetensors` files: a header in JSON, then the values of all tensors.

The header is preceded by its length in 8 bytes. It has the dtype, the shape and the first and last
byte of each tensor. https://github.com/huggingface/safetensors describes the format.

A model may be in several files, the shards, with an index: `{"weight_map": {name: file}}`.
"""

import json
import os
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from emaopt._files import DamagedError, numbered, read_json
from emaopt._tree.paths import few


INDEX = ".safetensors.index.json"  # the end of the name of an index
_SHARD = r"(.+-)[0-9]+-of-([0-9]+)\.safetensors"
DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    **{
        f"{kind}{bits}": f"{name}{bits}"
        for kind, name, sizes in (
            ("I", "int", (8, 16, 32, 64)),
            ("U", "uint", (8, 16, 32, 64)),
            ("F", "float", (16, 32, 64)),
            ("C", "complex", (64,)),
        )
        for bits in sizes
    },
}


class Tensor(NamedTuple):
    """Hold where a tensor is. `start`: its first byte in the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    def value(self) -> np.ndarray:
        """Read the whole tensor."""
        count = int(np.prod(self.shape, dtype=object))
        flat = np.fromfile(os.fspath(self.file), self.dtype, count, offset=self.start)
        return flat.reshape(self.shape)

    def part(self, index: tuple[slice, ...]) -> np.ndarray:
        """Read a part of the tensor, and nothing else of it."""
        if not self.shape:  # a map of no axes cannot be cut
            return self.value()
        return np.array(
            np.memmap(os.fspath(self.file), self.dtype, "r", self.start, self.shape)[index]
        )


class Header(NamedTuple):
    """Hold what is in a file: every tensor by name, and the texts of its metadata."""

    tensors: dict[str, Tensor]
    texts: dict[str, str]


def read_header(path: Path) -> Header:
    """Read the header of a file. No value is read.

    Raises:
        DamagedError: the file is missing, cut off, or its header does not fit.
    """
    try:
        return _header(path)
    except Exception as error:  # a header that is no JSON, or not of this form: many types
        raise DamagedError(
            f"{path} is damaged, or no .safetensors file ({type(error).__name__}: {error}). Pass "
            "another file"
        ) from error


def _header(path: Path) -> Header:
    size = os.path.getsize(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"a header of {length} bytes in {size}")
        header: dict[str, Any] = json.loads(file.read(length))
    texts = header.pop("__metadata__", None) or {}
    spans = sorted((*map(int, about["data_offsets"]), name) for name, about in header.items())
    found = {}
    before = 0
    for begin, end, name in spans:
        code, shape = header[name]["dtype"], tuple(map(int, header[name]["shape"]))
        if code not in DTYPES:
            raise ValueError(f"{name} has the dtype {code}, which is not known")
        dtype = jnp.dtype(DTYPES[code])
        if begin != before or end - begin != dtype.itemsize * np.prod(shape, dtype=object):
            raise ValueError(
                f"{name} is {dtype}{list(shape)}, and its bytes are {begin} to {end}; those before "
                f"it end at {before}"
            )
        if 8 + length + end > size:
            raise ValueError(f"{name} is cut off")
        found[name] = Tensor(path, shape, dtype, 8 + length + begin)
        before = end
    return Header(dict(sorted(found.items())), texts)


# ---- a model in several files, and the models of a run -------------------------------------------


def is_tensors(path: Any) -> bool:
    """Tell whether a path is that of a `.safetensors` file, or of the index of several."""
    return str(path).endswith((".safetensors", INDEX))


def holds_tensors(path: Path) -> bool:
    """Tell whether there is a `.safetensors` file, an index of several, or a directory of them."""
    if path.is_dir():
        return any(is_tensors(file) for file in path.iterdir())
    return is_tensors(path) and (path.exists() or _beside(path).exists())


def tensor_steps(run: Path) -> dict[int, Path]:
    """Return the files, or the directories of files, whose names end in a step, by the step.

    There are none where an index says that all files are one checkpoint.
    """
    if not run.is_dir() or any(run.glob(f"*{INDEX}")):
        return {}
    files = [path for path in sorted(run.iterdir()) if holds_tensors(path)]
    return numbered(run, {path: path.name.removesuffix(".safetensors") for path in files})


def newest_tensors(path: Path) -> Path:
    """Return the newest checkpoint of a run of `.safetensors` files, or the one that is there."""
    steps = tensor_steps(path)
    return steps[max(steps)] if steps else path


def headers_of(path: Path) -> dict[Path, Header]:
    """Read the headers of a checkpoint by file. No value is read.

    Args:
        path: a file, an index, or a directory with one; without an index, all files in it.

    Raises:
        FileNotFoundError: there is nothing of this name.
        DamagedError: a file or a tensor is missing, twice there, or cut off.
    """
    told = _told(path)
    if lost := [file.name for file in told if not file.exists()]:
        raise DamagedError(f"{path} lacks {few(lost)}. Copy all shards.")
    headers = {file: read_header(file) for file in told}
    home: dict[str, Path] = {}
    for file, names in told.items():
        inside = headers[file].tensors
        if lost := [name for name in names if name not in inside]:
            raise DamagedError(f"{file} lacks {few(lost)}, which the index names. Copy it again.")
        for name in inside:
            if name in home:
                raise DamagedError(
                    f"{name} is in {home[name]} and in {file.name}. Pass one of them, or move one "
                    "to another place."
                )
            home[name] = file
    return headers


def tensors_in(path: Path) -> dict[str, Tensor]:
    """Find every tensor of a checkpoint by its name in the files: see `headers_of`."""
    headers = headers_of(path).values()
    found = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    return dict(sorted(found.items()))


def _told(path: Path) -> dict[Path, list[str]]:
    """Return the files of a checkpoint, and the tensors that an index says are in each."""
    if index := _index_of(path):
        files: dict[Path, list[str]] = {}
        try:
            for name, file in read_json(index)["weight_map"].items():
                files.setdefault(index.parent / file, []).append(name)
        except Exception as error:
            raise DamagedError(f"{index} is damaged, or no index ({error}).") from error
        return files
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"path={str(path)!r} is not there. Pass a file or its index.")
        return {path: []}
    names = {file.name for file in path.glob("*.safetensors")}
    for found in filter(None, [re.fullmatch(_SHARD, name) for name in names]):
        stem, count = found.groups()
        numbers = range(1, int(count) + 1)
        names = names.union(f"{stem}{i:0{len(count)}}-of-{count}.safetensors" for i in numbers)
    return {path / name: [] for name in sorted(names)}


def _index_of(path: Path) -> Path | None:
    """Return the index that says which files a checkpoint has, if there is one."""
    if path.is_dir():
        found = sorted(path.glob(f"*{INDEX}"))
        if len(found) > 1:
            raise ValueError(f"{path} has several models. Pass one of {few(map(str, found))}.")
        return found[0] if found else None
    beside = _beside(path)
    return beside if beside.exists() and (beside == path or not path.exists()) else None


def _beside(path: Path) -> Path:
    """Return the index of the file that a model would be in one piece; an index as it is."""
    text = str(path)
    return path if text.endswith(INDEX) else Path(text.removesuffix(".safetensors") + INDEX)
