"""Run `emaopt convert`: write a checkpoint of TF1 as one of Orbax, or back, a part at a time.

From TF1, by name alone, so that the optimizer need not be known:

    params      the variables, as nested dicts: `conv/kernel` is `{"conv": {"kernel": ...}}`
    tf1/step    the global step
    tf1/shadow  the averages, nested like the variables; `restore_averages` finds them here
    tf1/other   everything else under its own name: slots, powers, and what cannot be nested

Converted back, it has the names, shapes, dtypes and bits that TF1 wrote. Any other checkpoint of
Orbax is converted to what `emaopt.tf1.save` writes. A checkpoint that was saved swapped is read as
if it had not been.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from emaopt._commands.paths import (
    SAFETENSORS,
    TF1,
    Path,
    absolute,
    check_new,
    find,
    load_tensorflow,
    remove,
    temporary,
)
from emaopt._commands.progress import watched
from emaopt._names import AVERAGE
from emaopt._tree.leaves import parts
from emaopt._tree.numbers import bytes_of
from emaopt._tree.paths import KeyPath, nested
from emaopt.checkpoint._digest import digests
from emaopt.checkpoint._frame import write_frame
from emaopt.checkpoint._items import checked
from emaopt.checkpoint._run import check_writable, locate
from emaopt.checkpoint._stored import Stored
from emaopt.tf1._files import Checkpoint, cast, check_prefix, write

from .layout import Form, Origin, in_orbax, in_tf1, with_residue


BYTES_AT_ONCE = 2**26  # that are read, or written, at once
WHOLE = "whole"  # what becomes the checkpoint, inside the temporary directory


def convert(
    source: str,
    destination: str,
    averages: bool = False,
    swapped: bool = False,
    average_name: str = AVERAGE,
) -> None:
    """Write a checkpoint in the other format.

    Args:
        source: A checkpoint of TF1 or Orbax, or a run.
        destination: Where the new one goes. Nothing is overwritten.
        averages: Whether to write the averages only, under the names of the variables.
        swapped: Whether the checkpoint of TF1 is of the form that its `swapping_saver` writes.
        average_name: As in `emaopt.tf1.load`.
    """
    here, there = find(source), absolute(destination)
    if here.format == SAFETENSORS:
        raise ValueError(f"{here.path} is of .safetensors. Pass a checkpoint of TF1 or Orbax")
    form = Form(averages, swapped, average_name)
    check_new(there)
    load_tensorflow()
    if here.format == TF1:
        check_writable("DESTINATION", there)
        _to_orbax(here.path, there, form)
    else:
        check_prefix(str(there))
        _to_tf1(here.path, there, form)


def _to_orbax(source: Path, destination: Path, form: Form) -> None:
    checkpoint = Checkpoint(source)
    places = in_orbax(checkpoint.stored, form)
    if strings := [name for name in places if checkpoint.stored[name][1].kind == "O"]:
        raise ValueError(f"{source} holds strings, which Orbax cannot save: {', '.join(strings)}")
    abstract = {name: jax.ShapeDtypeStruct(*checkpoint.stored[name]) for name in places}
    for item, tree in nested({places[name]: x for name, x in abstract.items()}).items():
        checked(item, tree)
    parts_in = temporary(destination)
    found: dict[KeyPath, Any] = {}
    try:
        for part in _parts({name: bytes_of(*checkpoint.stored[name]) for name in places}):
            values = {name: checkpoint.value(name) for name in part}
            with _writing(destination):
                _save(parts_in, values, places)
            found |= {places[name]: digests([value])[0] for name, value in values.items()}
        with _writing(destination):
            _assemble(parts_in, found)
            (parts_in / WHOLE).rename(destination)
    finally:
        remove(parts_in)


@contextmanager
def _writing(destination: Path) -> Iterator[None]:
    """Turn every error of Orbax into one line that has its cause."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        # TensorStore tells where in its source, and all of its options
        text = re.split(r" \[(?:source locations|os_error_code|tensorstore_spec)=", str(cause))[0]
        raise OSError(f"{destination} cannot be written: {text}") from error


def _save(directory: Path, values: dict[str, Any], places: dict[str, KeyPath]) -> None:
    """Save some variables."""
    with _without_copies():
        for item, tree in nested({places[name]: x for name, x in values.items()}).items():
            ocp.partial.save(directory / item, tree)


def _without_copies() -> ocp.Context:
    """Return a context in which Orbax copies no array, and compresses none."""
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.use_compression = False
    return context


def _assemble(directory: Path, found: dict[KeyPath, Any]) -> None:
    """Make one checkpoint of several that hold one item each.

    Orbax saves an item in parts only if it is the only one.
    """
    items = {path[0] for path in found}
    for item in items:
        ocp.partial.finalize(directory / item)
    arrays = {item: directory / item / "state" for item in items}
    write_frame(directory / WHOLE, {item: {"": np.zeros(1)} for item in items}, arrays, found)


def _to_tf1(source: Path, destination: Path, form: Form) -> None:
    stored = Stored(locate(source, None))
    variables, steps = in_tf1(stored, form)
    if not variables:
        raise ValueError(f"{source} holds no arrays")
    _check_one_step(stored, steps)
    sizes = {
        name: bytes_of(np.shape(stored.leaf(variable.path)), variable.dtype)
        for name, variable in sorted(variables.items())
    }
    groups = ({name: variables[name] for name in part} for part in _parts(sizes))
    write(destination, (_read(stored, group) for group in groups))


def _check_one_step(stored: Stored, steps: list[KeyPath]) -> None:
    """Raise if the steps differ: TF1 has one global step."""
    read = _read(stored, {"/".join(path): Origin(path, np.dtype(np.int64)) for path in steps})
    if len(set(map(int, read.values()))) > 1:
        found = ", ".join(f"{name} is {value}" for name, value in read.items())
        raise ValueError(f"TF1 has one global step: {found}. Pass --averages")


def _read(stored: Stored, variables: dict[str, Origin]) -> dict[str, np.ndarray]:
    """Read the values of some variables, and verify them."""
    origins = variables.values()
    loaded = stored.read(at for o in origins for at in (o.path, o.residue) if at is not None)
    values = {}
    for name, (path, dtype, residue) in variables.items():
        value = np.asarray(loaded.pop(path))
        if residue is not None:
            value = with_residue(value, np.asarray(loaded.pop(residue)))
        exact = cast(value, dtype)
        values[name] = value if exact is None else exact
    return values


def _parts(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Yield the names in groups that fit into memory. A terminal is told how far the work is."""
    return watched(parts(sizes, BYTES_AT_ONCE), sizes, "converted")
