"""Write averages to `.safetensors`: one file, or several with an index as Hugging Face's.

The index is `model.safetensors.index.json`: `{"metadata": {"total_size": ...}, "weight_map": {name:
file}}`. Beside the tensors of a file stand our names of them and their digests, in its metadata.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from emaopt._safetensors import INDEX, Tensor, headers_of
from emaopt._tree.checks import check_array
from emaopt._tree.leaves import parts
from emaopt._tree.paths import Tree, few

from ._digest import digests
from ._errors import DamagedError, MismatchError, missing, saving, shortened
from ._leaf import are_floating, differs, like_leaf, target_of
from ._trees import named_leaves


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def as_bytes(max_shard_size: int | str) -> int:
    """Return a size in bytes, which may be text: `"5GB"`, as Hugging Face writes it."""
    found = re.fullmatch(r"([0-9]+)\s*([KMGT]I?B|)", str(max_shard_size).upper())
    if not found or int(found[1]) < 1:
        raise ValueError(
            f"max_shard_size={max_shard_size!r} is no size. Pass bytes, or text like '5GB'."
        )
    return int(found[1]) * _UNITS[found[2]]


def write_shards(
    destination: Path,
    sizes: dict[str, int],
    theirs: dict[str, str],
    values: Callable[[Sequence[str]], dict[str, np.ndarray]],
    most: int,
    texts: dict[str, Any],
) -> None:
    """Write tensors to one file, or to several and an index. The index is written last.

    Args:
        destination: the file; of several, the name that they start with.
        sizes: the bytes of each tensor, by our name.
        theirs: the name of each tensor in the files, by our name.
        values: a function that reads some tensors, by our names.
        most: the most bytes of a file.
        texts: the metadata of each file.
    """
    groups = list(parts(sizes, most))
    stem = str(destination).removesuffix(".safetensors")
    index = Path(stem + INDEX)
    files = [Path(f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors") for i in range(len(groups))]
    files = [destination] if len(groups) == 1 else files
    for path in (index, *files):
        if path.exists():
            raise FileExistsError(f"destination={path} exists. Remove it or pass another path.")
    save_file = _writer(destination)
    texts = {key: x if isinstance(x, str) else json.dumps(x) for key, x in texts.items()}
    written: list[Path] = []
    try:
        for file, part in zip(files, groups, strict=True):
            arrays = values(part)
            found = np.asarray(digests([arrays[own] for own in part]))
            own = {
                "names": json.dumps({theirs[own]: own for own in part}),
                "digests": json.dumps(
                    dict(zip(map(theirs.get, part), found.tolist(), strict=False))
                ),
            }
            named = {theirs[own]: _in_a_row(arrays[own]) for own in part}
            with saving(f"destination={destination}"):
                _whole(file, lambda path, n=named, t=texts | own: save_file(n, path, t))
            written.append(file)
        if len(groups) > 1:
            of = {
                theirs[own]: file.name
                for file, part in zip(files, groups, strict=True)
                for own in part
            }
            about = {"metadata": {"total_size": sum(sizes.values()), **texts}, "weight_map": of}
            with saving(f"destination={destination}"):
                _whole(index, lambda path: Path(path).write_text(json.dumps(about, indent=2)))
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        raise


def _writer(destination: Path) -> Callable[..., None]:
    """Return the function of safetensors that writes a file, or raise if it is not installed."""
    try:
        from safetensors.numpy import save_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"destination={destination} needs the package safetensors: pip install safetensors"
        ) from error
    return save_file


def _in_a_row(x: np.ndarray) -> np.ndarray:
    """Return an array whose elements are next to each other, as safetensors writes them."""
    return x if x.flags.c_contiguous else np.ascontiguousarray(x)


def _whole(path: Path, write: Callable[[str], Any]) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        write(os.fspath(temporary))
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path, like: Tree, cast: bool) -> Tree:
    """Load averages from a `.safetensors` file or from those of an index: `restore_averages`.

    Only the tensors that are asked for are read, and of a sharded one each process's parts.
    """
    wanted = named_leaves(like)
    for name, leaf in wanted.items():
        check_array("/".join(name), leaf, "like")
    found, recorded = _found(path)
    known = {tuple(name.split("/")): name for name in found}
    there = {name: leaf for name, leaf in wanted.items() if name in known}
    problems = missing([name for name in wanted if name not in known], list(known))
    for name, leaf in there.items():
        stored = found[known[name]]
        free = cast or are_floating(leaf, stored)
        problems += shortened([differs("/".join(name), leaf, stored, leaf if free else None)])
    if problems := [problem for problem in problems if problem]:
        raise MismatchError(
            f"{path} does not hold what was asked for; nothing was read.\n  "
            + "\n  ".join(problems)
            + "\nPass trees like those that were saved."
        )
    values = {name: _value(found[known[name]], leaf) for name, leaf in there.items()}
    checked = [name for name in values if known[name] in recorded]
    now = np.asarray(digests([values[name] for name in checked])).tolist()
    bad = [name for name, x in zip(checked, now, strict=False) if recorded[known[name]] != x]
    if bad:
        raise DamagedError(
            f"{path}: {few('/'.join(name) for name in bad)} is damaged: its bits are not those "
            "that were written. Export it again."
        )
    leaves = [like_leaf(values[name], leaf, "/".join(name)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _found(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return where each tensor is, by our name, and the digests that were recorded."""
    found: dict[str, Tensor] = {}
    recorded: dict[str, int] = {}
    for file, (inside, texts) in headers_of(path).items():
        try:
            ours = json.loads(texts.get("names", "{}"))
            told = json.loads(texts.get("digests", "{}"))
        except ValueError as error:
            raise DamagedError(f"{file} has damaged metadata ({error}).") from error
        found |= {ours.get(name, name): x for name, x in inside.items()}
        recorded |= {ours.get(name, name): digest for name, digest in told.items()}
    return found, recorded


def _value(tensor: Tensor, leaf: Any) -> Any:
    """Read a tensor to where its template is, in its own dtype."""
    target = target_of(leaf, jax.ShapeDtypeStruct(tensor.shape, tensor.dtype))
    if target.sharding is not None:
        return jax.make_array_from_callback(
            tensor.shape, target.sharding, lambda index: tensor.part(index or ())
        )
    value = tensor.value()
    return jax.device_put(value) if target.on_device else value
