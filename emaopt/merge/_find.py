"""Find the checkpoints of a run, of any format, and the parameters in them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from etils.epath import Path

from emaopt._files import numbered
from emaopt._safetensors import holds_tensors, tensor_steps
from emaopt._tree.numbers import dtype_of, is_inexact
from emaopt._tree.paths import few
from emaopt.checkpoint._run import METADATA, finished_steps, is_finished, locate, pick
from emaopt.checkpoint._stored import Stored

from ._files import SafetensorsTree, Tf1Tree
from ._orbax import OrbaxTree, plain_parameters


ORBAX, SAFETENSORS, TF1 = "Orbax", "safetensors", "TF1"
StoredTree = OrbaxTree | SafetensorsTree | Tf1Tree


class Found(NamedTuple):
    """Hold the checkpoints of a run by step, and their format."""

    format: str
    steps: dict[int, Path]


def checkpoints(run: Path) -> Found:
    """Find the checkpoints of a run.

    They are Orbax's steps; or directories with `.safetensors` files in them, such files, or TF1's
    prefixes, whose names end in a number: `checkpoint-500`, `model_500.safetensors`,
    `model.ckpt-500`.

    Raises:
        ValueError: Two checkpoints have the same number.
    """
    if found := finished_steps(run):
        return Found(ORBAX, found)
    if found := tensor_steps(run):
        return Found(SAFETENSORS, found)
    indices = sorted(run.glob("*.index")) if run.is_dir() else []
    prefixes = {path.parent / path.name.removesuffix(".index"): path.stem for path in indices}
    return Found(TF1, numbered(run, prefixes))


def is_checkpoint(path: Path) -> bool:
    """Tell whether a path is a single checkpoint, and no run."""
    index = Path(f"{path}.index")
    return is_finished(path) or (path / METADATA).exists() or holds_tensors(path) or index.exists()


def newest(path: Path, at: int | None) -> tuple[str, Path]:
    """Find one checkpoint: the path itself, or that of a step of a run; by default its newest."""
    if at is None:
        if not path.is_dir() and holds_tensors(path):
            return SAFETENSORS, path
        if Path(f"{path}.index").exists():
            return TF1, path
    found = checkpoints(path)
    if found.steps:
        return found.format, pick(found.steps, at, path)
    if at is None and path.is_dir() and holds_tensors(path):
        return SAFETENSORS, path
    return ORBAX, locate(path, at)


def plain_tree(format_: str, path: Path, node: str | None) -> StoredTree:
    """Open the plain parameters of a checkpoint.

    Args:
        format_: `ORBAX`, `SAFETENSORS` or `TF1`.
        path: The checkpoint.
        node: Where the parameters lie in one of Orbax; by default that is found out.
    """
    if format_ == ORBAX:
        return plain_parameters(Stored(path), node)
    if node is not None:
        raise ValueError(
            f"params={node!r} says where parameters lie in a checkpoint of Orbax, and {path} is "
            f"of {format_}. Leave it out"
        )
    return SafetensorsTree(path) if format_ == SAFETENSORS else Tf1Tree(path)


def check_same(trees: Iterable[StoredTree]) -> None:
    """Raise unless all trees have the same leaves, in the same shapes and of the same kinds.

    float32 and bfloat16 are of one kind; whole numbers, complex ones and text are of others.

    Raises:
        ValueError: One differs from the last. The error names the checkpoint and its leaves.
    """
    *others, base = trees
    wanted: dict[Any, Any] = base.leaves
    for tree in others:
        lost = [name for name in wanted if name not in tree.leaves]
        more = [name for name in tree.leaves if name not in wanted]
        if lost or more:
            what = "lacks" if lost else "has also"
            names = few("/".join(name) for name in lost or more)
            raise ValueError(
                f"{tree.path} is of another tree than {base.path}: it {what} {names}. Leave it "
                "out, or pass checkpoints of one model"
            )
        for name, leaf in wanted.items():
            shapes = [getattr(x, "shape", ()) for x in (tree.leaves[name], leaf)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{'/'.join(name)} has shape {shapes[0]} in {tree.path}, and {shapes[1]} in "
                    f"{base.path}. Leave one out, or pass checkpoints of one model"
                )
            kinds = [_kind(x) for x in (tree.leaves[name], leaf)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"{'/'.join(name)} is {kinds[0]} in {tree.path}, and {kinds[1]} in "
                    f"{base.path}. Leave one out, or pass checkpoints of one model"
                )


def _kind(leaf: Any) -> str:
    """Return what a leaf is, in a word."""
    if isinstance(leaf, str):
        return "text"
    if not is_inexact(leaf):
        return "whole numbers"
    return "complex" if np.issubdtype(dtype_of(leaf), np.complexfloating) else "real"
