"""Find where an average lies on disk, and compute its value from the stored parts."""

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from emaopt._average.ema import EmaState
from emaopt._average.lazy import Rested, settled
from emaopt._tree.numbers import wide
from emaopt._tree.paths import KeyPath


DIGESTS = "digests"  # the item with one number per leaf
STAMP = "stamp"  # a leaf of it: which save, of which step
UNTOLD = 2**64 - 1  # the step in it, if it is not known
REST = "rest"  # the item with what else was saved
EXPORTED = {"params", DIGESTS}  # the items of a checkpoint that holds averages alone
SHADOW, STEP, RESIDUE, LEDGER, SWAPPED = "shadow", "step", "residue", "ledger", "emaopt_swapped"
ROWS, NOW, THEN = "rows", "now", "then"
# the fields of an average; "other" stands beside one that `emaopt convert` wrote
FIELDS = {SHADOW, STEP, RESIDUE, LEDGER, ROWS, SWAPPED, "other"}


class Average(NamedTuple):
    """Hold where an average is on disk: its node, its values, and whether it is swapped.

    `leaves`: by the name of the parameter, the averaged value (in `params`, if it is swapped).
    `residues`: by the same name, what `compensated` keeps beside the value, to be added.
    `rested`: by the name of a table, of `ema(rows=mask)` that is not swapped, when its rows were
    last touched. `scalars`: `step`, the numbers of a ledger, `ledger/age`, and `rows/now`.
    """

    at: KeyPath
    swapped: bool
    leaves: dict[KeyPath, KeyPath]
    residues: dict[KeyPath, KeyPath]
    scalars: dict[str, KeyPath]
    rested: dict[KeyPath, KeyPath]


class Place(NamedTuple):
    """Hold where the average of a leaf is on disk, what is added to it, and its parameter.

    `now` and `then`: of a table whose rows are averaged lazily, the times that say how far the
    average of each row has come to the parameter since.
    """

    path: KeyPath
    residue: KeyPath | None
    param: KeyPath
    now: KeyPath | None = None
    then: KeyPath | None = None


def leaves_of(average: Average, names: Collection[KeyPath]) -> dict[KeyPath, KeyPath]:
    """Find which names of parameters are leaves of an average, if no parameters are stored.

    The average of one of several networks, at `opt_state/gen/1`, holds the names below `gen`. A box
    around one array, such as a haliax array, is no level of a name.

    Args:
        average: the average.
        names: names of parameters.

    Returns:
        By the name of a parameter, what the average calls it.
    """
    alone = Counter(own[:-1] for own in average.leaves)
    known = {own[:-1]: own for own in average.leaves if alone[own[:-1]] == 1}
    known |= {own: own for own in average.leaves}
    best: dict[KeyPath, KeyPath] = {}
    for i in range(len(average.at)):
        network = average.at[1 : 1 + i]
        below = [name for name in names if name[:i] == network]
        found = {name: known[name[i:]] for name in below if name[i:] in known}
        best = found if len(found) > len(best) else best
    return best


def evaluated(place: Place, values: dict[KeyPath, Any]) -> Any:
    """Return an average as `emaopt.average` evaluates it: its residue added, its rows up to date.

    Args:
        place: where its parts are.
        values: these parts, by path.
    """
    value = values[place.path]
    residue = None if place.residue is None else values[place.residue]
    if place.now is not None and place.then is not None:
        own = {} if residue is None else {"": residue}
        rested = Rested(values[place.now], {"": values[place.then]})
        state = EmaState(jnp.int32(0), {"": value}, own or None, None, rested)
        state = settled({("",): values[place.param]}, state)
        value = np.asarray(state.shadow[""])
        residue = None if residue is None else np.asarray(state.residue[""])
    if residue is None:
        return value
    dtype = wide(value.dtype)
    return value.astype(dtype) + residue.astype(dtype)


def is_in(path: KeyPath, node: KeyPath) -> bool:
    """Tell whether a leaf is in a node."""
    return path[: len(node)] == node


def shared_start(paths: Iterable[KeyPath]) -> KeyPath:
    """Return the keys that all paths start with."""
    keys = []
    for column in zip(*paths, strict=False):
        if len(set(column)) > 1:
            break
        keys.append(column[0])
    return tuple(keys)


def by_item(paths: Iterable[KeyPath]) -> dict[str, list[KeyPath]]:
    """Return the paths inside each item."""
    found: dict[str, list[KeyPath]] = {}
    for path in paths:
        found.setdefault(path[0], []).append(path[1:])
    return found
