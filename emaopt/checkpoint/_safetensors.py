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
    """Describe a tensor in a file. `start`: its first byte in the file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int


def tensors(path: Path) -> dict[str, Tensor]:
    """Read the header: every tensor, by name. No value is read."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the header: every tensor, by name, and the metadata beside them.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return _header(path)
    except Exception as error:  # a header that is no JSON, or not of this form: many types
        raise ValueError(
            f"{path} is damaged, or no .safetensors file ({type(error).__name__}: {error}). Pass "
            "another file"
        ) from error


def _header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = os.path.getsize(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"a header of {length} bytes in {size}")
        header: dict[str, Any] = json.loads(file.read(length))
    texts = header.pop("__metadata__", None) or {}
    found = {}
    for name, about in sorted(header.items()):
        tensor = Tensor(
            tuple(map(int, about["shape"])),
            jnp.dtype(DTYPES[about["dtype"]]),
            8 + length + int(about["data_offsets"][0]),
        )
        if tensor.start + tensor.dtype.itemsize * np.prod(tensor.shape, dtype=object) > size:
            raise ValueError(f"{name} is cut off")
        found[name] = tensor
    return found, texts


def tensor_value(path: Path, tensor: Tensor) -> np.ndarray:
    """Read the value of a tensor."""
    count = int(np.prod(tensor.shape, dtype=object))
    flat = np.fromfile(os.fspath(path), tensor.dtype, count, offset=tensor.start)
    return flat.reshape(tensor.shape)


def tensor_part(path: Path, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
    """Read a part of a tensor, and nothing else of it."""
    if not tensor.shape:  # a map of no axes cannot be cut
        return tensor_value(path, tensor)
    return np.array(
        np.memmap(os.fspath(path), tensor.dtype, "r", tensor.start, tensor.shape)[index]
    )
