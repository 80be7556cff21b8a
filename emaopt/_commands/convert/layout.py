"""Which leaf of Orbax is which variable of TF1: names and dtypes, no values."""

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._average.ema import EmaState, SwappedEmaState
from emaopt._names import AVERAGE, STEP as GLOBAL_STEP, names, origin, role, variable_of
from emaopt._optimizers.builder import OptimizerState
from emaopt._tree.numbers import dtype_of
from emaopt._tree.paths import KeyPath, Tree
from emaopt.checkpoint._contents import DIGESTS, SHADOW, STEP, SWAPPED
from emaopt.checkpoint._leaf import shape
from emaopt.checkpoint._stored import Stored
from emaopt.tf1._rename import name_of_average


TF1, OTHER = "tf1", "other"  # the item, and the dict in it, of what Orbax has no place for


class Form(NamedTuple):
    """What TF1's side is like, and whether the averages are all that is wanted."""

    averages: bool
    swapped: bool
    average_name: str


class Origin(NamedTuple):
    """The leaf that a variable of TF1 is written from, and its dtype if that loses no bit."""

    path: KeyPath
    dtype: np.dtype


def in_orbax(stored: Collection[str], form: Form) -> dict[str, KeyPath]:
    """Where each variable of TF1 goes."""
    averages = _averages(stored, form)
    holder = {name: name for name in stored}
    if form.swapped:
        _exchange(holder, averages)
    named = set(stored) - set(averages.values())
    variables = {name for name in named if role(name, stored)[0] == "variable"}
    items: dict[KeyPath, dict[str, str]] = {("params",): {n: holder[n] for n in variables}}
    if form.averages:
        items["params",] |= {of: holder[average] for of, average in averages.items()}
    elif GLOBAL_STEP in stored:  # without one, a shadow is no average
        items[TF1, SHADOW] = {of: holder[average] for of, average in averages.items()}
    paths: dict[str, KeyPath] = {}
    for root, found in items.items():
        for target, name in found.items():
            keys = tuple(target.split("/"))
            below_another = any("/".join(keys[:i]) in found for i in range(1, len(keys)))
            if all(keys) and not below_another:
                paths[name] = (*root, *keys)
    others = items["params",] if form.averages else holder
    for name, at in others.items():
        path = (TF1, STEP) if name == GLOBAL_STEP else (TF1, OTHER, name)
        paths.setdefault(at, path)
    return dict(sorted(paths.items()))


def in_tf1(stored: Stored, form: Form) -> tuple[dict[str, Origin], list[KeyPath]]:
    """From where each variable of TF1 comes; and all leaves that are TF1's one global step."""
    if form.averages:
        places = stored.contents.places(list(stored.contents.stored_params), None)
        return {
            "/".join(name): Origin(place.path, dtype_of(stored.leaf(place.param)))
            for name, place in places.items()
        }, []
    found, shadows, steps = (_converted if TF1 in stored.items else _trained)(stored)
    named = name_of_average(form.average_name)
    renamed = {named(of) + number: shadow for (of, number), shadow in shadows.items()}
    if taken := sorted(renamed.keys() & found.keys()):
        raise ValueError(f"--average-name {form.average_name}: {', '.join(taken)} is there already")
    found |= renamed
    if steps:
        found[GLOBAL_STEP] = Origin(steps[0], np.dtype(np.int64))
    averages = _averages(found, form)
    if form.swapped:
        _exchange(found, averages)
    return found, steps


def _averages(stored: Collection[str], form: Form) -> dict[str, str]:
    """The names of the averages by those of their variables."""
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


def _exchange(found: dict[str, Any], averages: dict[str, str]) -> None:
    """Variables and averages trade places, as TF1's swapping_saver does it."""
    for of, average in averages.items():
        if f"{average}_1" in found:
            raise ValueError(f"{of} has several averages. Leave out --swapped")
        if of in found:
            found[of], found[average] = found[average], found[of]


Shadows = dict[tuple[str, str], Origin]  # by variable, and TF1's number of a second average


def _converted(stored: Stored) -> tuple[dict[str, Origin], Shadows, list[KeyPath]]:
    """The leaves of a checkpoint that was converted from TF1, as they were."""
    found: dict[str, Origin] = {}
    shadows: Shadows = {}
    for path in stored.paths():
        item, *keys = path
        variable = Origin(path, dtype_of(stored.leaf(path)))
        if path == (TF1, STEP):
            found[GLOBAL_STEP] = variable
        elif path[:2] == (TF1, SHADOW):
            shadows["/".join(keys[1:]), ""] = variable
        elif item == TF1:
            found[keys[-1]] = variable
        elif item != DIGESTS:
            found["/".join(keys)] = variable
    return found, shadows, []


def _trained(stored: Stored) -> tuple[dict[str, Origin], Shadows, list[KeyPath]]:
    """The leaves by their names in TF1; averages and parameters where they were before a swap."""
    contents = stored.contents
    params = {"/".join(name): path for name, path in contents.params.items()}
    averaged = {}
    for average in contents.averages.values():
        for name, path in average.leaves.items():
            in_shadow = contents.params[name] if average.swapped else path
            averaged[in_shadow] = "/".join(name), path
    found, shadows, steps = dict(params), {}, []
    in_params = set(contents.stored_params.values())
    for name, path in _names_of_states(stored, in_params):
        _, kind, number = origin(name)
        if name == GLOBAL_STEP:
            steps.append(path)
        elif kind == AVERAGE and path in averaged:
            of, at = averaged[path]
            if jnp.issubdtype(dtype_of(stored.leaf(at)), jnp.inexact):  # as TF1 does
                shadows[of, number if (of, "") in shadows else ""] = at
        elif path[-1] != SWAPPED:
            found[name] = path

    def variable(of: str, path: KeyPath) -> Origin:
        return Origin(path, dtype_of(stored.leaf(found[of] if of in params else path)))

    return (
        {name: variable(origin(name)[0], path) for name, path in found.items()},
        {key: variable(key[0], path) for key, path in shadows.items()},
        steps,
    )


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
            tokens.append(jax.ShapeDtypeStruct(shape(leaf), dtype_of(leaf)))
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
        if set(state._fields) - set(state._field_defaults) <= set(node) <= set(state._fields):
            return state(**node)
    return node
