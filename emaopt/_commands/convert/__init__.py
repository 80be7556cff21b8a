"""A checkpoint of TF1 as one of Orbax, and back, in parts that fit into memory.

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
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from emaopt._commands.paths import absolute, is_tf1, load_tensorflow
from emaopt._names import AVERAGE
from emaopt._tree.paths import KeyPath, Tree
from emaopt.checkpoint._contents import DIGESTS
from emaopt.checkpoint._digest import digests, with_own_digest
from emaopt.checkpoint._items import check_leaves, inventory
from emaopt.checkpoint._leaf import parts, shape, size
from emaopt.checkpoint._run import locate
from emaopt.checkpoint._stored import Stored
from emaopt.tf1._files import Checkpoint, cast, write

from .layout import Form, Origin, in_orbax, in_tf1


BYTES_AT_ONCE = 2**26  # read, or written


def convert(
    source: str,
    destination: str,
    averages: bool = False,
    swapped: bool = False,
    average_name: str = AVERAGE,
) -> None:
    """Write the other format.

    `averages`: the averages only, under the names of the variables. `swapped`: the checkpoint of
    TF1 is of the form that its `swapping_saver` writes. `average_name`: as in `emaopt.tf1.load`.
    """
    here, there = absolute(source), absolute(destination)
    form = Form(averages, swapped, average_name)
    to_orbax = is_tf1(here)
    if there.exists() or Path(f"{there}.index").exists():
        raise FileExistsError(f"{there} exists. Pass another DESTINATION")
    load_tensorflow()
    (_to_orbax if to_orbax else _to_tf1)(here, there, form)


def _to_orbax(source: Path, destination: Path, form: Form) -> None:
    checkpoint = Checkpoint(source)
    paths = in_orbax(checkpoint.stored, form)
    if strings := [name for name in paths if checkpoint.stored[name][1].kind == "O"]:
        raise ValueError(f"{source} holds strings, which Orbax cannot save: {', '.join(strings)}")
    abstract = {name: jax.ShapeDtypeStruct(*checkpoint.stored[name]) for name in paths}
    for item, tree in _items(abstract, paths):
        check_leaves(item, tree)
    temporary = Path(f"{destination}.tmp{os.getpid()}")
    found: dict[KeyPath, Any] = {}
    try:
        for part in _parts({name: size(*checkpoint.stored[name]) for name in paths}):
            found |= _save(temporary, checkpoint, {name: paths[name] for name in part})
        items = {path[0] for path in found}
        each = {i: [found[path] for path in sorted(found) if path[0] == i] for i in items}
        _assemble(temporary, {item: with_own_digest(np.asarray(each[item])) for item in items})
        (temporary / DIGESTS).rename(destination)
    finally:
        if temporary.exists():
            temporary.rmtree()


def _save(directory: Path, checkpoint: Checkpoint, paths: dict[str, KeyPath]) -> dict[KeyPath, Any]:
    """Save some variables; returns their digests."""
    values = {name: checkpoint.value(name) for name in paths}
    with _without_copies():
        for item, tree in _items(values, paths):
            ocp.partial.save(directory / item, tree)
    return {paths[name]: digests([value])[0] for name, value in values.items()}


def _without_copies() -> ocp.Context:
    """Orbax without a copy of each array, and without another one, compressed."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.use_compression = False
    return context


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


def _to_tf1(source: Path, destination: Path, form: Form) -> None:
    stored = Stored(locate(source, None))
    variables, steps = in_tf1(stored, form)
    if not variables:
        raise ValueError(f"{source} holds no arrays")
    _check_one_step(stored, steps)
    sizes = {n: size(shape(stored.leaf(v.path)), v.dtype) for n, v in sorted(variables.items())}
    groups = ({name: variables[name] for name in part} for part in _parts(sizes))
    write(destination, (_read(stored, group) for group in groups))


def _check_one_step(stored: Stored, steps: list[KeyPath]) -> None:
    """TF1 has one global step."""
    read = _read(stored, {"/".join(path): Origin(path, np.dtype(np.int64)) for path in steps})
    if len(set(map(int, read.values()))) > 1:
        found = ", ".join(f"{name} is {value}" for name, value in read.items())
        raise ValueError(f"TF1 has one global step: {found}. Pass --averages")


def _read(stored: Stored, variables: dict[str, Origin]) -> dict[str, np.ndarray]:
    """The values of some variables, verified."""
    loaded = stored.read(path for path, _ in variables.values())
    values = {}
    for name, (path, dtype) in variables.items():
        value = np.asarray(loaded.pop(path))
        exact = cast(value, dtype)
        values[name] = value if exact is None else exact
    return values


def _parts(sizes: dict[str, int]) -> Iterator[list[str]]:
    """The names in groups that fit into memory; a bar shows how many bytes are done."""
    total = sum(sizes.values())
    # on a terminal only, if it takes more than 2 seconds
    with tqdm(
        total=total, desc="converting", unit="B", unit_scale=True, delay=2, disable=None
    ) as bar:
        for part in parts(sizes, BYTES_AT_ONCE):
            yield part
            bar.update(sum(sizes[name] for name in part))
