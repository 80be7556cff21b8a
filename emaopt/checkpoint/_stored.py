"""A checkpoint on disk, by key path: what it holds, where its averages are, and its leaves.

Everything is found in the checkpoint's own metadata. A leaf is one path, the item first:
`("opt_state", "1", "shadow", "conv", "kernel")`; a checkpoint without items is the one item "".
"""

import difflib
import re
import warnings
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from orbax.checkpoint import v1 as ocp

from emaopt._tree.checks import describe
from emaopt._tree.paths import KeyPath, Tree, key_paths

from ._contents import DIGESTS, Contents, logical
from ._digest import damaged
from ._errors import DamagedError, MismatchError
from ._leaf import as_stored, like_leaf, same_kind, shape
from ._run import FINISHED


class Stored:
    """One checkpoint: `items`, the metadata of each item by key path."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.trees = _read_metadata(path)
        except Exception as error:
            raise DamagedError(
                f"checkpoint {path}: what is in it cannot be read, a file is damaged, cut off or "
                f"missing. {_cause(error)} Use another step."
            ) from error
        self.items = {item: leaves_by_path(tree) for item, tree in self.trees.items()}

    def load(self, like: dict[str, Tree]) -> dict[str, Tree]:
        """Whole items, each in the structure of its `like`."""
        problems: list[str] = []
        for item, tree in like.items():
            if item not in self.items:
                problems.append(f"there is no item {item!r}, only {', '.join(sorted(self.items))}")
                continue
            wanted, stored = leaves_by_path(tree), self.items[item]
            for path, leaf in wanted.items():
                problems += self._problems((item, *path), leaf, [stored.get(path)])
            problems += [
                f"{'/'.join((item, *path))} is stored, but not in what was passed"
                for path in stored
                if path not in wanted
            ]
        self.refuse(problems)
        return {item: self._load_item(item, tree) for item, tree in like.items()}

    def load_averages(self, like: Tree, name: str | None, cast: bool) -> Tree:
        """Load the averages, in the structure, dtypes and shardings of `like`."""
        wanted = {logical(path): leaf for path, leaf in leaves_by_path(like).items()}
        places = self.contents.places(wanted, name)
        problems: list[str] = []
        by_item: dict[str, dict[KeyPath, Any]] = {}
        for leaf_name, leaf in wanted.items():
            if leaf_name not in places:
                problems.append(self._missing(leaf_name, [logical(p[1:]) for p in self.paths()]))
                continue
            path, _, param = places[leaf_name]
            stored = self.leaf(path)
            problems += self._problems(path, leaf, [leaf] if cast else [stored, self.leaf(param)])
            by_item.setdefault(path[0], {})[path[1:]] = as_stored(leaf, stored)
        if not places:
            problems += [f"pass that part alone, like[{k!r}]" for k in self._above(wanted, name)]
        self.refuse(problems)
        loaded: dict[KeyPath, Any] = {
            (item, *path): value
            for item, leaves in by_item.items()
            for path, value in self.load_leaves(item, leaves).items()
        }
        values = [like_leaf(loaded[places[n].path], leaf) for n, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), values)

    @cached_property
    def contents(self) -> Contents:
        """What lies where: averages, parameters, and the rest."""
        return Contents(self.paths(), self.path)

    def params_like(self) -> Tree:
        """Return the stored parameters as empty NumPy arrays: the default for `like`."""
        contents = self.contents
        contents.called(None)  # there must be an average
        tree = self.trees[contents.root[0]]
        for key in contents.root[1:]:
            tree = tree[int(key) if isinstance(tree, (list, tuple)) else key]
        names = [logical(path) for path in key_paths(tree)]
        like = [self.leaf(contents.params[name]) for name in names]
        empty = lambda x: np.empty(x.shape, x.dtype) if hasattr(x, "dtype") else x
        return jax.tree.unflatten(jax.tree.structure(tree), map(empty, like))

    def paths(self) -> list[KeyPath]:
        """Every leaf of the checkpoint."""
        return [(item, *path) for item, leaves in self.items.items() for path in leaves]

    def leaf(self, path: KeyPath) -> Any:
        """What the metadata says of a leaf."""
        return self.items[path[0]][path[1:]]

    def read(self, paths: Iterable[KeyPath]) -> dict[KeyPath, Any]:
        """Some leaves, verified, on the host."""
        wanted: dict[str, dict[KeyPath, Any]] = {}
        for path in paths:
            like = self.leaf(path)
            like = np.empty(like.shape, like.dtype) if hasattr(like, "dtype") else like
            wanted.setdefault(path[0], {})[path[1:]] = like
        return {
            (item, *keys): value
            for item, leaves in wanted.items()
            for keys, value in self.load_leaves(item, leaves).items()
        }

    def refuse(self, problems: list[str]) -> None:
        """Raise if there is any problem, with all of them."""
        if problems:
            raise MismatchError(
                f"checkpoint {self.path} does not hold what was asked for; nothing was read.\n  "
                + "\n  ".join(problems)
                + "\nPass trees like those that were saved."
            )

    def _above(self, wanted: Collection[KeyPath], name: str | None) -> list[str]:
        """The keys below which `like` has leaves of the checkpoint, as Linen's variables do."""
        below = {path[:1]: [p[1:] for p in wanted if p[:1] == path[:1]] for path in wanted}
        return [
            key[0]
            for key, names in below.items()
            if len(self.contents.places(names, name)) == len(names)
        ]

    def _problems(self, path: KeyPath, leaf: Any, allowed: list) -> list[str]:
        item, keys = path[0], path[1:]
        stored = self.items[item].get(keys)
        name = "/".join(path)
        if stored is None:
            return [self._missing(keys, self.items[item])]
        if shape(leaf) != shape(stored):
            return [f"{name} has shape {shape(stored)}, asked for as {shape(leaf)}"]
        if not any(same_kind(leaf, other) for other in allowed):
            return [f"{name} is {describe(stored)}, asked for as {describe(leaf)}"]
        return []

    def _missing(self, path: KeyPath, known: Iterable[KeyPath]) -> str:
        close = difflib.get_close_matches("/".join(path), map("/".join, known), 3)
        return f"{'/'.join(path)} is missing" + (f"; close: {', '.join(close)}" if close else "")

    def _load_item(self, item: str, like: Tree) -> Tree:
        wanted = leaves_by_path(like)
        stored = self.items[item]
        values = self.load_leaves(item, {p: as_stored(x, stored[p]) for p, x in wanted.items()})
        ordered = [like_leaf(values[path], leaf) for path, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), ordered)

    def load_leaves(self, item: str, wanted: dict[KeyPath, Any]) -> dict[KeyPath, Any]:
        """Some leaves of an item, verified; the others are not read."""
        try:
            values = self._read(item, wanted)
        except Exception as error:
            bad = [path for path, leaf in wanted.items() if not self._can_read(item, path, leaf)]
            names = ", ".join("/".join((item, *path)) for path in bad) or f"item {item}"
            raise DamagedError(
                f"checkpoint {self.path}: {names} cannot be read, the data is cut off, missing or "
                f"damaged. {_cause(error)} Use another step."
            ) from error
        if (item,) in self.items.get(DIGESTS, {}):
            self._verify(item, values)
        return values

    def _verify(self, item: str, values: dict[KeyPath, Any]) -> None:
        meta = self.items[DIGESTS][(item,)]
        wanted = {(item,): np.empty(meta.shape, meta.dtype)}
        recorded = self.load_leaves(DIGESTS, wanted)[(item,)]
        paths = sorted(self.items[item])
        order = {leaf: i for i, leaf in enumerate(paths)}
        bad = damaged(recorded, {order[leaf]: value for leaf, value in values.items()})
        if bad is None:
            raise DamagedError(
                f"checkpoint {self.path}: the digests of item {item!r} are damaged, so its data "
                "cannot be trusted. Use another step."
            )
        if bad:
            raise DamagedError(
                f"checkpoint {self.path}: {', '.join('/'.join((item, *paths[i])) for i in bad)} is "
                "damaged: its bits are not those that were saved. Use another step."
            )

    def _read(self, item: str, wanted: dict[KeyPath, Any]) -> dict[KeyPath, Any]:
        tree = self.trees[item]
        template = jax.tree.unflatten(
            jax.tree.structure(tree),
            [wanted.get(path, ocp.PLACEHOLDER) for path in self.items[item]],
        )
        loaded = ocp.load(self.path, template, checkpointable_name=item or None)
        return {p: x for p, x in leaves_by_path(loaded).items() if p in wanted}

    def _can_read(self, item: str, path: KeyPath, leaf: Any) -> bool:
        try:
            self._read(item, {path: leaf})
        except Exception:
            return False
        return True


def leaves_by_path(tree: Tree) -> dict[KeyPath, Any]:
    """The leaves by their key path on disk, in flattening order."""
    return dict(zip(key_paths(tree), jax.tree.leaves(tree), strict=True))


def _read_metadata(path: Path) -> dict[str, Tree]:
    if not (path / FINISHED).exists() or (path / "_METADATA").exists():
        return {"": ocp.metadata(path, checkpointable_name=None).metadata}
    found = ocp.checkpointables_metadata(path)
    trees = found.metadata
    note: Any = found.custom_metadata
    expected = note["emaopt"]["items"] if note and "emaopt" in note else []
    missing = sorted(set(expected) - set(trees))
    if missing or not trees:
        raise ValueError(f"The items {missing} are missing.")
    for item, tree in trees.items():
        if tree is None:
            with warnings.catch_warnings(action="ignore"):
                ocp.load(path, checkpointable_name=item)  # raises why
            raise ValueError(f"Orbax cannot read the item {item}.")
    return trees


def _cause(error: BaseException) -> str:
    """The innermost reason, without TensorStore's dump; the leaf that it names, as we name it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split(" [tensorstore_spec=")[0].split("\n")[0]
    text = re.sub(
        r'reading "([^"]+)/zarr.json"', lambda m: f"reading {m[1].replace('.', '/')}", text
    )
    return f"({type(error).__name__}: {text[:400]})"
