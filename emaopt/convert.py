"""A checkpoint of TF1 as one of Orbax, and back.

From TF1, by name alone, so that the optimizer need not be known:

    params      the variables, as nested dicts: `conv/kernel` is `{"conv": {"kernel": ...}}`
    tf1/step    the global step
    tf1/shadow  the averages, nested like the variables; `restore_averages` finds them here
    tf1/other   everything else under its own name: slots, powers, and what cannot be nested

Back from there, names, shapes, dtypes and bits are those that TF1 wrote. Any other checkpoint of
Orbax becomes what `emaopt.tf1.save` writes: an average that was swapped is an average again.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils.epath import Path
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from emaopt._ema import EmaState, SwappedEmaState
from emaopt._names import AVERAGE, STEP as GLOBAL_STEP, average_name, names, origin, role
from emaopt._optimizers import OptimizerState
from emaopt._tree import Tree
from emaopt.checkpoint._digest import DIGESTS, digests, with_own_digest
from emaopt.checkpoint._index import MARKER, SHADOW, STEP, KeyPath, in_shadows, params_in
from emaopt.checkpoint._items import check_leaves, inventory
from emaopt.checkpoint._leaf import shape
from emaopt.checkpoint._stored import Stored, locate
from emaopt.listing import OTHER, TF1, absolute, is_tf1, size
from emaopt.tf1 import _cast, _Checkpoint, _first_line, _note_newest, _session, _tensorflow, _write


AT_ONCE = 2**26  # bytes that are read, or written, at once


def convert(source: str, destination: str, averages: bool = False) -> None:
    """Write the other format; `averages`: the averages only, under the names of the variables."""
    here, there = absolute(source), absolute(destination)
    to_orbax = is_tf1(here)
    if there.exists() or Path(f"{there}.index").exists():
        raise FileExistsError(f"{there} exists. Pass another DESTINATION")
    (_to_orbax if to_orbax else _to_tf1)(here, there, averages)


def _bar(total: int, what: str) -> Any:
    """A progress bar, on a terminal only, if it takes more than 2 seconds."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=2, disable=None)


def _to_orbax(source: Path, destination: Path, averages: bool) -> None:
    checkpoint = _Checkpoint(source)
    sizes = {n: size(*spec) for n, spec in checkpoint.stored.items()}
    paths = _orbax_paths(checkpoint.stored, averages)
    if strings := [name for name in paths if checkpoint.stored[name][1].kind == "O"]:
        raise ValueError(f"{source} holds strings, which Orbax cannot save: {', '.join(strings)}")
    for item, tree in _items(
        {n: jax.ShapeDtypeStruct(*checkpoint.stored[n]) for n in paths}, paths
    ):
        check_leaves(item, tree)
    temporary = Path(f"{destination}.tmp{os.getpid()}")
    found: dict[KeyPath, Any] = {}
    try:
        with _bar(sum(sizes[name] for name in paths), "converting") as bar:
            for part in _parts(list(paths), sizes):
                values = {name: checkpoint._value(name) for name in part}
                for item, tree in _items(values, paths):
                    ocp.partial.save(temporary / item, tree)
                found |= {paths[name]: digests([value])[0] for name, value in values.items()}
                bar.update(sum(sizes[name] for name in part))
        items = {path[0] for path in found}
        each = {i: [found[path] for path in sorted(found) if path[0] == i] for i in items}
        _assemble(temporary, {item: with_own_digest(np.asarray(each[item])) for item in items})
        (temporary / DIGESTS).rename(destination)
    finally:
        if temporary.exists():
            temporary.rmtree()


def _items(values: dict[str, Any], paths: dict[str, KeyPath]) -> Iterable[tuple[str, Tree]]:
    """Nested dicts, by item."""
    items: dict[str, Any] = {}
    for name, value in values.items():
        node = items
        for key in paths[name][:-1]:
            node = node.setdefault(key, {})
        node[paths[name][-1]] = value
    return items.items()


def _assemble(directory: Path, found: dict[str, Any]) -> None:
    """One checkpoint of those that hold one item each. Orbax saves parts only of an only item."""
    whole = directory / DIGESTS
    items = {item: {"": np.zeros(1)} for item in found} | {DIGESTS: found}
    ocp.save_checkpointables(whole, items, custom_metadata=inventory(items))
    for item in found:
        ocp.partial.finalize(directory / item)
        (whole / item).rmtree()
        (directory / item / "state").rename(whole / item)


def _orbax_paths(stored: dict[str, Any], averages: bool) -> dict[str, KeyPath]:
    """Where each variable of TF1 goes in Orbax."""
    averaged = {of for of, *kind in map(origin, stored) if kind == [AVERAGE, ""]}
    if averages and not averaged:
        raise ValueError("SOURCE has no averages. Leave out --averages")
    nested: dict[KeyPath, dict[str, str]] = {("params",): {}, (TF1, SHADOW): {}}
    other = []
    for name in sorted(stored):
        of, *kind = origin(name)
        if kind == [AVERAGE, ""] and (averages or GLOBAL_STEP in stored):
            nested[("params",) if averages else (TF1, SHADOW)][of] = name
        elif role(name, stored)[0] == "variable":
            if not averages or name not in averaged:
                nested["params",][name] = name
        elif not averages:
            other.append(name)
    paths: dict[str, KeyPath] = {}
    for root, found in nested.items():
        for target, name in found.items():
            keys = tuple(target.split("/"))
            below_another = any("/".join(keys[:i]) in found for i in range(1, len(keys)))
            if below_another or not all(keys):
                other.append(name)
            else:
                paths[name] = (*root, *keys)
    return paths | {n: (TF1, STEP) if n == GLOBAL_STEP else (TF1, OTHER, n) for n in other}


class _Leaf(NamedTuple):
    """A variable to write: the leaf that it is read from, and its dtype if that loses no bit."""

    name: str
    path: KeyPath
    dtype: np.dtype
    bytes: int


def _to_tf1(source: Path, destination: Path, averages: bool) -> None:
    tf = _tensorflow()
    stored = Stored(locate(source, None))
    if averages:
        names_of = _averages(stored)
    elif TF1 in stored.items:
        names_of = _as_in_tf1(stored)
    else:
        names_of = _variables(stored)
    leaves = [
        _Leaf(name, path, dtype, size(shape(stored.leaf(path)), dtype))
        for name, (path, dtype) in sorted(names_of.items())
    ]
    if not leaves:
        raise ValueError(f"{source} holds no arrays")
    directory, base = os.path.split(str(destination))
    temporary = os.path.join(directory, f"{base}.tmp{os.getpid()}")
    prefixes: list[str] = []
    try:
        tf.io.gfile.makedirs(temporary)
        with _bar(sum(leaf.bytes for leaf in leaves), "converting") as bar:
            for part in _parts(leaves, {leaf: leaf.bytes for leaf in leaves}):
                prefixes.append(os.path.join(temporary, str(len(prefixes))))
                _write(tf, prefixes[-1], _read(stored, part))
                bar.update(sum(leaf.bytes for leaf in part))
        with tf.Graph().as_default(), _session(tf) as session:
            merge = tf.raw_ops.MergeV2Checkpoints
            session.run(merge(checkpoint_prefixes=prefixes, destination_prefix=str(destination)))
    except tf.errors.OpError as error:
        raise OSError(f"{destination} cannot be written: {_first_line(error)}") from error
    finally:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.rmtree(temporary)
    _note_newest(tf, directory, base)


def _parts(leaves: list[Any], sizes: dict[Any, int]) -> Iterator[list[Any]]:
    """The leaves in groups that fit into memory."""
    part, used = [], 0
    for leaf in leaves:
        if part and used + sizes[leaf] > AT_ONCE:
            yield part
            part, used = [], 0
        part.append(leaf)
        used += sizes[leaf]
    yield part


def _read(stored: Stored, leaves: list[_Leaf]) -> dict[str, np.ndarray]:
    """The values of some leaves, verified, by the names of their variables."""
    wanted: dict[str, dict[KeyPath, Any]] = {}
    for leaf in leaves:
        like = stored.leaf(leaf.path)
        like = np.empty(like.shape, like.dtype) if hasattr(like, "dtype") else like
        wanted.setdefault(leaf.path[0], {})[leaf.path[1:]] = like
    loaded = {item: stored.load_leaves(item, paths) for item, paths in wanted.items()}
    values = {}
    for leaf in leaves:
        value = np.asarray(loaded[leaf.path[0]].pop(leaf.path[1:]))
        cast = _cast(value, leaf.dtype)
        values[leaf.name] = value if cast is None else cast
    return values


def _averages(stored: Stored) -> dict[str, tuple[KeyPath, np.dtype]]:
    """The average of each parameter, or itself where it has none, under its name."""
    params = params_in(stored.index())
    sources = stored.averages(list(params), None)
    return {"/".join(name): (s.path, _dtype(s.param)) for name, s in sources.items()}


def _as_in_tf1(stored: Stored) -> dict[str, tuple[KeyPath, np.dtype]]:
    """The leaves of a checkpoint that was converted from TF1, as they were."""
    found = {}
    for path in stored.paths():
        item, *keys = path
        if path == (TF1, STEP):
            name = GLOBAL_STEP
        elif path[:2] == (TF1, SHADOW):
            name = average_name("/".join(keys[1:]))
        else:
            name = keys[-1] if item == TF1 else "/".join(keys)
        if item != DIGESTS:
            found[name] = path, _dtype(stored.leaf(path))
    return found


def _variables(stored: Stored) -> dict[str, tuple[KeyPath, np.dtype]]:
    """All leaves by their names in TF1; averages and parameters where they were before a swap."""
    index = stored.index()
    swapped = {index[path] for path, (_, is_swapped) in in_shadows(index).items() if is_swapped}
    params = params_in(index)
    found = {"/".join(name): path for name, path in params.items()}
    steps = []
    for name, path in _names_of_states(stored, set(params.values())):
        if name == GLOBAL_STEP:
            steps.append(path)
        elif path in swapped:
            variable = origin(name)[0]
            found[name], found[variable] = found[variable], path
        elif path[-1] != MARKER:
            found[name] = path
    dtypes = {name: _dtype(stored.leaf(path)) for name, path in found.items()}
    variables = {
        name: (path, dtypes.get(origin(name)[0], dtypes[name])) for name, path in found.items()
    }
    if steps:
        _check_one_step(stored, steps)
        variables[GLOBAL_STEP] = steps[0], np.dtype(np.int64)
    return variables


def _check_one_step(stored: Stored, steps: list[KeyPath]) -> None:
    """TF1 has one global step."""
    read = [_read(stored, [_Leaf(GLOBAL_STEP, path, np.dtype(np.int64), 8)]) for path in steps]
    values = [int(value[GLOBAL_STEP]) for value in read]
    if len(set(values)) > 1:
        found = ", ".join(f"{'/'.join(p)} is {v}" for p, v in zip(steps, values, strict=True))
        raise ValueError(f"TF1 has one global step: {found}. Pass --averages")


def _names_of_states(stored: Stored, params: set[KeyPath]) -> Iterator[tuple[str, KeyPath]]:
    """Every leaf that is no parameter: its name in TF1 and its path. Strings are left out."""
    paths: dict[int, KeyPath] = {}
    trees = {}
    for item, tree in stored.trees.items():
        tokens: list[Any] = []
        for path in ((item, *keys) for keys in stored.items[item]):
            leaf = stored.leaf(path)
            if item == DIGESTS or path in params or isinstance(leaf, str):
                tokens.append(None)
                continue
            tokens.append(jax.ShapeDtypeStruct(shape(leaf), _dtype(leaf)))
            paths[id(tokens[-1])] = path
        trees[item] = _states(jax.tree.unflatten(jax.tree.structure(tree), tokens))
    named = zip(jax.tree.leaves(names(trees)), jax.tree.leaves(trees), strict=True)
    return ((name, paths[id(token)]) for name, token in named)


def _states(node: Tree) -> Tree:
    """The dicts that were states as states again; without the `value` that NNX adds."""
    if isinstance(node, (list, tuple)):
        return [_states(each) for each in node]
    if not isinstance(node, dict):
        return node
    if set(node) == {"value"} and isinstance(node["value"], jax.ShapeDtypeStruct):
        return node["value"]
    node = {key: _states(each) for key, each in node.items()}
    for state in (EmaState, SwappedEmaState, OptimizerState):
        if set(node) == set(state._fields):
            return state(**node)
    return node


def _dtype(leaf: Any) -> np.dtype:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
