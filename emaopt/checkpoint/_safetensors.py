"""Read `.safetensors` files: a header in JSON, then the values of all tensors.

The header is preceded by its length in 8 bytes. It has the dtype, the shape and the first and last
byte of each tensor. https://github.com/huggingface/safetensors describes the format.
"""

import json
import os
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from ._errors import DamagedError


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
