"""Match the leaves of parameters and state with the variables of TF1."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._average.ema import SwappedEmaState
from emaopt._average.find import averages
from emaopt._names import GLOBAL_STEP, names, origin
from emaopt._tree.numbers import dtype_of, is_inexact
from emaopt._tree.paths import Tree, is_none

from ._rename import Naming, Shape


PARAMETER = "parameter"


class Leaf(NamedTuple):
    """Describe a leaf here, and its variable in TF1.

    `own`: its name here. `value`: its array or number. `kind`: `PARAMETER`, the name of an
    optimizer of TF1 for a slot, `AVERAGE`, or an empty string. `of`: TF1's name of the parameter
    that it is, or that it belongs to. `name`, `shape`, `dtype`: those of its variable.
    """

    own: str
    value: Any
    kind: str
    of: str
    name: str
    shape: Shape
    dtype: np.dtype


def leaves_in_tf1(
    params: Tree, opt_state: Tree, naming: Naming, swapped: bool, name: str | None
) -> tuple[list[Leaf], list[str]]:
    """Find the variable of every leaf.

    Args:
        params: The parameters.
        opt_state: The state of the optimizer and the averages.
        naming: The names in TF1.
        swapped: Whether the averages have the names of the parameters, as in TF1's
            `swapping_saver`.
        name: The average that is swapped, if there are several.

    Returns:
        The leaves in flattening order, and everything that is wrong with them.
    """
    if any(isinstance(state, SwappedEmaState) for state in averages(opt_state).values()):
        raise ValueError(
            "opt_state is swapped already. Pass the state that training goes on with, and "
            "swapped=True."
        )
    leaves, dtypes = [], {}
    for own, value in _named(params):
        variable = naming.parameter(own)
        dtypes[variable] = dtype_of(value)
        leaves.append(_leaf(naming, own, value, PARAMETER, own, variable, dtype_of(value)))
    for own, value in _named(opt_state):
        owner, kind, _ = origin(own)
        variable = naming.of_state(own, value)
        of = naming.parameter(owner) if kind else variable
        dtype = dtypes.get(of, dtype_of(value))  # a slot or an average has that of its variable
        leaves.append(_leaf(naming, own, value, kind, owner, variable, dtype))
    if swapped:
        leaves = _swap_names(leaves, names(opt_state), name)
    return leaves, [*naming.unknown([leaf.own for leaf in leaves]), *_problems(leaves)]


def _is_step(own: str, value: Any) -> bool:
    """Return whether a leaf is TF1's global step."""
    return own == GLOBAL_STEP and dtype_of(value).kind == "i"


def _named(tree: Tree) -> Iterable[tuple[str, Any]]:
    """Return the name and the value of every leaf, in flattening order."""
    return zip(jax.tree.leaves(names(tree)), jax.tree.leaves(tree), strict=True)


def _leaf(
    naming: Naming, own: str, value: Any, kind: str, owner: str, variable: str, dtype: np.dtype
) -> Leaf:
    """Make a leaf. `owner`: the name here of the parameter that it belongs to."""
    if _is_step(own, value):
        dtype = np.dtype(np.int64)
    if not kind:
        return Leaf(own, value, kind, variable, variable, np.shape(value), dtype)
    shape = naming.shape(owner, np.shape(value))
    return Leaf(own, value, kind, naming.parameter(owner), variable, shape, dtype)


def _problems(leaves: Iterable[Leaf]) -> list[str]:
    """Return what is wrong with the leaves: shapes, names in common, values that TF1 has not."""
    problems: list[str] = []
    taken: dict[str, Leaf] = {}
    for leaf in leaves:
        shape = np.shape(leaf.value)
        if math.prod(leaf.shape) != math.prod(shape):
            problems.append(f"{leaf.own} has shape {shape}; its rule in rename makes {leaf.shape}")
        first = taken.setdefault(leaf.name, leaf)
        if first is not leaf and not _share(first, leaf):
            problems.append(f"{first.own} and {leaf.own} would both be {leaf.name}")
        if jnp.issubdtype(dtype_of(leaf.value), jax.dtypes.prng_key):
            problems.append(f"{leaf.own} is a random key, which TF1 has no variable for")
    return problems


def _share(first: Leaf, leaf: Leaf) -> bool:
    """Return whether two leaves are one variable in TF1.

    All steps are the one global step. The average of an integer is the integer itself.
    """
    if is_inexact(leaf.value):
        return False
    if _is_step(leaf.own, leaf.value):
        return first.own == GLOBAL_STEP
    return bool(leaf.kind) and first.kind == PARAMETER and first.own == origin(leaf.own)[0]


def _swap_names(leaves: list[Leaf], own_names: Tree, name: str | None) -> list[Leaf]:
    """Exchange the names of the variables and of their averages, as TF1's `swapping_saver` does."""
    known = averages(own_names)
    if not known or name not in {None, *known}:
        raise ValueError(
            f"name={name!r} is not an average of opt_state, which has {list(known)}. Pass the "
            "state of a chain with emaopt.ema in it, or swapped=False."
        )
    of_state = {leaf.own: leaf for leaf in leaves if leaf.kind != PARAMETER}
    pairs: dict[str, str] = {}
    for average in known if name is None else [name]:
        for own in jax.tree.leaves(known[average].shadow):
            leaf = of_state[own]
            if leaf.of in pairs:
                raise ValueError(
                    f"name is missing: {leaf.of!r} has several averages. Pass name=, one of: "
                    f"{', '.join(map(repr, known))}."
                )
            pairs[leaf.of] = leaf.name
    exchanged = pairs | {average: variable for variable, average in pairs.items()}
    return [leaf._replace(name=exchanged.get(leaf.name, leaf.name)) for leaf in leaves]


def residues(own_names: Tree) -> dict[str, str]:
    """Return the names of the averages' residues, each with the name of its average.

    Args:
        own_names: The names of the leaves of a state, as a tree like it.
    """
    found: dict[str, str] = {}
    for state in averages(own_names).values():
        shadows = jax.tree.leaves(state.shadow, is_leaf=is_none)
        for i, residue in enumerate(jax.tree.leaves(state.residue, is_leaf=is_none)):
            if residue is not None:
                found[residue] = shadows[i]
    return found
