"""Find which leaf of Orbax is which variable of TF1: names and dtypes, no values."""

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._average.ema import EmaState, SwappedEmaState
from emaopt._names import AVERAGE, GLOBAL_STEP, names, origin, role, variable_of
from emaopt._optimizers.builder import OptimizerState
from emaopt._tree.checks import DEEPEST
from emaopt._tree.numbers import dtype_of, wide
from emaopt._tree.paths import KeyPath, Tree
from emaopt.checkpoint._place import SHADOW, STEP
from emaopt.checkpoint._stored import Stored
from emaopt.tf1._rename import name_of_average


ITEM, OTHER = "tf1", "other"  # the item, and the dict in it, of what Orbax has no place for


class Form(NamedTuple):
    """Describe the form of the checkpoint of TF1, and what to convert.

    `averages`: only the averages. `swapped`: TF1's `swapping_saver` wrote it, or reads it.
    `average_name`: as in `emaopt.tf1.load`.
    """

    averages: bool
    swapped: bool
    average_name: str


class Origin(NamedTuple):
    """Hold the leaf that a variable of TF1 is written from, and its dtype if that loses no bit.

    `residue`: a leaf that is added to it, what `compensated` keeps beside an average.
    """

    path: KeyPath
    dtype: np.dtype
    residue: KeyPath | None = None


def in_orbax(stored: Collection[str], form: Form) -> dict[str, KeyPath]:
    """Find the place in Orbax of each variable of TF1.

    Args:
        stored: The names of all variables.
        form: What they are, and which are wanted.

    Returns:
        From each variable to the key path of its leaf.
    """
    averages = _averages(stored, form)
    # from the name that a value belongs to, to the name that it is stored under
    held = {name: name for name in stored}
    if form.swapped:
        swap_names(held, averages)
    variables = {name: held[name] for name in _variables(stored, averages)}
    averaged = {of: held[average] for of, average in averages.items()}
    if form.averages:
        paths = _nested(("params",), variables | averaged)
        rest = variables | averaged
    else:
        paths = _nested(("params",), variables)
        if GLOBAL_STEP in stored:  # without a step, emaopt takes no shadow for an average
            paths |= _nested((ITEM, SHADOW), averaged)
        rest = held
    return dict(sorted({**_flat(rest), **paths}.items()))


def _variables(stored: Collection[str], averages: dict[str, str]) -> set[str]:
    """Return the names of the variables: no average, slot, power or step."""
    named = set(stored) - set(averages.values())
    return {name for name in named if role(name, stored)[0] == "variable"}


def _nested(root: KeyPath, held: dict[str, str]) -> dict[str, KeyPath]:
    """Return the paths of what can be nested: `conv/kernel` below `conv`.

    A name cannot if a part of it is empty, if another name ends where it goes on, or if it has more
    levels than Orbax can read.
    """
    paths: dict[str, KeyPath] = {}
    for target, name in held.items():
        keys = tuple(target.split("/"))
        fits = all(keys) and len(root) + len(keys) <= DEEPEST
        if fits and not any("/".join(keys[:i]) in held for i in range(1, len(keys))):
            paths[name] = (*root, *keys)
    return paths


def _flat(held: dict[str, str]) -> dict[str, KeyPath]:
    """Return the paths of what is kept under its own name: slots, powers, the step."""
    return {
        name: (ITEM, STEP) if target == GLOBAL_STEP else (ITEM, OTHER, target)
        for target, name in held.items()
    }


def in_tf1(stored: Stored, form: Form) -> tuple[dict[str, Origin], list[KeyPath]]:
    """Find the leaf of Orbax that each variable of TF1 is written from.

    Args:
        stored: The checkpoint of Orbax.
        form: What is wanted.

    Returns:
        The origin of each variable, and the leaves that are all TF1's one global step.
    """
    if form.averages:
        places = stored.contents.places(list(stored.contents.stored_params), None)
        return {
            "/".join(name): Origin(place.path, dtype_of(stored.leaf(place.param)), place.residue)
            for name, place in places.items()
        }, []
    if ITEM in stored.items:
        found, shadows, steps = _converted(stored)
    else:
        found, shadows, steps = _trained(stored)
    named = name_of_average(form.average_name)
    renamed = {named(of) + number: shadow for (of, number), shadow in shadows.items()}
    if taken := sorted(renamed.keys() & found.keys()):
        raise ValueError(f"--average-name {form.average_name}: {', '.join(taken)} is there already")
    found |= renamed
    if steps:
        found[GLOBAL_STEP] = Origin(steps[0], np.dtype(np.int64))
    averages = _averages(found, form)
    if form.swapped:
        swap_names(found, averages)
    return found, steps


def with_residue(value: np.ndarray, residue: np.ndarray) -> np.ndarray:
    """Return an average of `compensated`, as `emaopt.average` returns it."""
    dtype = wide(value.dtype)
    return value.astype(dtype) + residue.astype(dtype)


def _averages(stored: Collection[str], form: Form) -> dict[str, str]:
    """Return the name of each average, by the name of its variable."""
    pattern = re.escape(name_of_average(form.average_name)("\0")).replace(re.escape("\0"), "(.+)")
    found = {name: re.fullmatch(pattern, name, re.DOTALL) for name in sorted(stored)}
    averages = {of[1]: name for name, of in found.items() if of}
    asked = form.averages or form.swapped
    for of, name in list(averages.items()):
        variable = variable_of(of, stored)
        if variable not in (None, of):
            if asked:
                raise ValueError(
                    f"{name} is the average of {variable}. Pass "
                    f"--average-name '{name.replace(variable, '{}')}'"
                )
            del averages[of]
    if not averages and (asked or form.average_name != AVERAGE):
        raise ValueError(
            f"SOURCE has no averages named {form.average_name}. Pass another --average-name, or "
            "leave out --averages and --swapped"
        )
    return averages


def swap_names(found: dict[str, Any], averages: dict[str, str]) -> None:
    """Exchange variables and their averages in a dict, as TF1's `swapping_saver` does."""
    for of, average in averages.items():
        if f"{average}_1" in found:
            raise ValueError(f"{of} has several averages. Leave out --swapped")
        if of in found:
            found[of], found[average] = found[average], found[of]


Shadows = dict[tuple[str, str], Origin]  # by variable, and TF1's number of a second average


def _converted(stored: Stored) -> tuple[dict[str, Origin], Shadows, list[KeyPath]]:
    """Return the leaves of a checkpoint that was converted from TF1, by their names there."""
    found: dict[str, Origin] = {}
    shadows: Shadows = {}
    for path in stored.saved():
        item, *keys = path
        variable = Origin(path, dtype_of(stored.leaf(path)))
        if path == (ITEM, STEP):
            found[GLOBAL_STEP] = variable
        elif path[:2] == (ITEM, SHADOW):
            shadows["/".join(keys[1:]), ""] = variable
        elif item == ITEM:
            found[keys[-1]] = variable
        else:
            found["/".join(keys)] = variable
    return found, shadows, []


def _trained(stored: Stored) -> tuple[dict[str, Origin], Shadows, list[KeyPath]]:
    """Return the leaves by their names in TF1. A swapped checkpoint is read as if it were not."""
    contents = stored.contents
    params = {"/".join(name): path for name, path in contents.params.items()}
    averaged = {}
    for average in contents.averages.values():
        for name, path in average.leaves.items():
            in_shadow = contents.params[name] if average.swapped else path
            averaged[in_shadow] = "/".join(name), path
    found, shadows, steps = dict(params), {}, []
    in_params = set(contents.stored_params.values())
    for name, path in _names_of(stored, set(stored.saved()) - in_params):
        _, kind, number = origin(name)
        if name == GLOBAL_STEP:
            steps.append(path)
        elif kind == AVERAGE and path in averaged:
            of, at = averaged[path]
            if jnp.issubdtype(dtype_of(stored.leaf(at)), jnp.inexact):  # as TF1 does
                shadows[of, number if (of, "") in shadows else ""] = at
        elif path not in contents.marks:
            found[name] = path

    def variable(of: str, path: KeyPath) -> Origin:
        return Origin(path, dtype_of(stored.leaf(found[of] if of in params else path)))

    return (
        {name: variable(origin(name)[0], path) for name, path in found.items()},
        {key: variable(key[0], path) for key, path in shadows.items()},
        steps,
    )


def _names_of(stored: Stored, leaves: set[KeyPath]) -> Iterator[tuple[str, KeyPath]]:
    """Return the name in TF1 and the path of some leaves, without strings."""
    paths: dict[int, KeyPath] = {}
    trees = {}
    for name, item in stored.items.items():
        tokens: list[Any] = []
        for path in ((name, *keys) for keys in item):
            leaf = stored.leaf(path)
            if path not in leaves or isinstance(leaf, str):
                tokens.append(None)
                continue
            tokens.append(jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)))
            paths[id(tokens[-1])] = path
        trees[name] = _states(jax.tree.unflatten(jax.tree.structure(item.tree), tokens))
    named = zip(jax.tree.leaves(names(trees)), jax.tree.leaves(trees), strict=True)
    return ((name, paths[id(token)]) for name, token in named)


def _states(node: Tree) -> Tree:
    """Make states of the dicts that were states, and leave out the `value` that NNX adds."""
    if isinstance(node, (list, tuple)):
        return [_states(each) for each in node]
    if not isinstance(node, dict):
        return node
    if set(node) == {"value"} and isinstance(node["value"], jax.ShapeDtypeStruct):
        return node["value"]
    node = {key: _states(each) for key, each in node.items()}
    for state in (EmaState, SwappedEmaState, OptimizerState):
        if set(state._fields) - set(state._field_defaults) <= set(node) <= set(state._fields):
            return state(**node)
    return node
