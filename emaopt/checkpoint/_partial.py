"""Match what is stored with what training goes on with, where the two are not the same.

Parameters are matched by name. An average is matched by its place in the state, by its name, or
because it is the only one; its leaves by name. Other leaves of the state are matched by their
place, or by the end of it: `slots/m/conv/kernel` is the same slot in any chain.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from emaopt._average.ema import SwappedEmaState
from emaopt._average.find import average_paths, averages
from emaopt._tree.checks import check_array, describe
from emaopt._tree.numbers import is_inexact, wide
from emaopt._tree.paths import KeyPath, Tree, few, logical

from ._contents import Contents
from ._errors import MismatchError, missing
from ._leaf import differs, same_kind, shape
from ._place import LEDGER, RESIDUE, ROWS, SHADOW, STEP, Average, Place
from ._stored import Stored
from ._trees import leaves_by_path, named_leaves


ABSENT = "is not in the checkpoint"


class Plan:
    """Hold what to read for each leaf that was passed, and why others stay as they are.

    `sources`: by the path of a leaf that was passed, where its value is on disk. `averaged`: by the
    path of a shadow, where its average is. `starts`: by the path of a shadow that is not stored,
    the name of the parameter that it starts as. `rested`: the times of lazily averaged rows, which
    start again. `skipped`: by the path of a leaf, the reason.
    """

    def __init__(self, stored: Stored):
        self.stored = stored
        self.sources: dict[KeyPath, KeyPath] = {}
        self.averaged: dict[KeyPath, Place] = {}
        self.starts: dict[KeyPath, KeyPath] = {}
        self.rested: list[KeyPath] = []
        self.skipped: dict[KeyPath, str] = {}

    def match(self, path: KeyPath, leaf: Any, at: KeyPath | None, exact: bool = True) -> bool:
        """Plan to read a leaf, if what is stored fits it; `exact`: in the same dtype."""
        if at is None:
            self.skipped[path] = ABSENT
            return False
        stored = self.stored.leaf(at)
        if shape(leaf) != shape(stored):
            self.skipped[path] = f"has shape {shape(stored)} in the checkpoint, {shape(leaf)} here"
            return False
        if exact and not same_kind(leaf, stored):
            self.skipped[path] = f"is {describe(stored)} in the checkpoint, {describe(leaf)} here"
            return False
        self.sources[path] = at
        return True


def restore_part(
    stored: Stored, params: Tree, opt_state: Tree, rest: dict[str, Any]
) -> tuple[Tree, Tree, dict[str, Any], dict[str, str]]:
    """Restore what fits, and say why other leaves stay as they were passed: `resume_partial`."""
    if any(isinstance(state, SwappedEmaState) for state in averages(opt_state).values()):
        raise ValueError(
            "opt_state is swapped. Pass the state that training goes on with, such as "
            "tx.init(params)."
        )
    refuse_snapshot(stored, "Pass the step or the run of a full checkpoint.")
    plan, named = Plan(stored), named_leaves(params)
    for name, leaf in named.items():
        plan.match(("params", *name), leaf, stored.contents.params.get(name))
    if named and not plan.sources:
        raise MismatchError(
            f"checkpoint {stored.path} holds no leaf of params: it has "
            f"{few(map('/'.join, stored.contents.params))}; params has "
            f"{few(map('/'.join, named))}. Pass the parameters of the model that was saved, with "
            "what is new in it."
        )
    state = {("opt_state", *path): leaf for path, leaf in leaves_by_path(opt_state).items()}
    nodes = _averages_in(plan, opt_state, state, set(named))
    _others(plan, {p: x for p, x in state.items() if not _node_of(p, nodes)}, set(named))
    extra = {("rest", *path): leaf for path, leaf in leaves_by_path(rest).items()}
    for path, leaf in extra.items():
        plan.match(path, leaf, path if path[1:] in stored.items.get("rest", ()) else None)
    everything = {("params", *name): leaf for name, leaf in named.items()} | state | extra
    _refuse_abstract(plan, everything)
    values = _values(plan, everything)
    _say_what_is_left(plan)

    def filled(tree: Tree, paths: Iterable[KeyPath]) -> Tree:
        leaves, treedef = jax.tree.flatten(tree)
        new = [values.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        return treedef.unflatten(new)

    return (
        filled(params, [("params", *name) for name in named]),
        filled(opt_state, state),
        filled(rest, extra),
        {"/".join(path): why for path, why in plan.skipped.items()},
    )


def refuse_snapshot(stored: Stored, fix: str) -> None:
    """Raise if a checkpoint holds averages and no parameters."""
    if stored.contents.is_snapshot:
        raise MismatchError(
            f"checkpoint {stored.path} holds averages alone, as checkpoint.snapshot saves them, "
            f"and no parameters. {fix}"
        )


def _averages_in(
    plan: Plan, opt_state: Tree, state: dict[KeyPath, Any], params: set[KeyPath]
) -> set[KeyPath]:
    """Plan the averages: each leaf from the stored average, or else from its parameter."""
    own = [("opt_state", *path) for path in average_paths(opt_state)]
    partners = _partners(own, plan.stored.contents)
    for node in own:
        average, size = partners.get(node), len(node)
        found = False
        for path, leaf in state.items():
            if path[:size] != node or path[size] != SHADOW:
                continue
            name = logical(path[size + 1 :])
            stored_as = average and _ending(name, average.leaves)
            if average and stored_as and plan.match(path, leaf, average.leaves[stored_as], False):
                del plan.sources[path]
                plan.averaged[path] = plan.stored.contents.place(average, stored_as)
                found = True
            elif parameter := _ending(name, params):
                plan.starts[path] = parameter
                plan.skipped.setdefault(path, ABSENT)
                plan.skipped[path] += f"; the average starts as params/{'/'.join(parameter)}"
        for path, leaf in state.items():
            field = path[size : size + 1]
            if path[:size] != node or field in ((SHADOW,), (RESIDUE,)):
                continue
            if field == (ROWS,):  # the averages are brought up to date, so no row has rested
                plan.rested.append(path)
                continue
            scalar = average.scalars.get("/".join(path[size:])) if average and found else None
            plan.match(path, leaf, scalar)
            if field == (LEDGER,) and scalar is None:
                plan.skipped[path] += "; the ledger counts from here"
            if field == (STEP,) and scalar is None:
                plan.skipped[path] += "; the average counts from here"
    return set(own)


def _partners(nodes: list[KeyPath], contents: Contents) -> dict[KeyPath, Average]:
    """Find the stored average of each average: in the same place, of the same name, or alone."""
    free = dict(contents.averages)
    partners = {node: free.pop(node) for node in nodes if node in free}
    for node in nodes:
        same = [at for at in free if at[-1] == node[-1] and not node[-1].isdecimal()]
        if node not in partners and len(same) == 1:
            partners[node] = free.pop(same[0])
    alone = [node for node in nodes if node not in partners]
    if len(alone) == 1 and len(free) == 1:
        partners[alone[0]] = free.popitem()[1]
    return partners


def _ending(name: KeyPath, known: Iterable[KeyPath]) -> KeyPath | None:
    """Find the one known name that is this name, or ends with it, as a name inside a network."""
    if name in set(known):
        return name
    ends = [other for other in known if other[-len(name) :] == name]
    return ends[0] if len(ends) == 1 else None


def _others(plan: Plan, state: dict[KeyPath, Any], params: set[KeyPath]) -> None:
    """Plan the leaves that belong to no average: slots, powers, counts, hyper-parameters."""
    contents = plan.stored.contents
    index = contents.index
    free = {
        path
        for path in index
        if path[0] == "opt_state" and not _node_of(path, contents.averages) and path not in state
    }
    by_end: dict[KeyPath, list[KeyPath]] = {}
    for path in free:
        by_end.setdefault(_end(path, params), []).append(path)
    for path, leaf in state.items():
        at = index.get(logical(path))
        same_end = by_end.get(_end(logical(path), params), [])
        if at is None and len(same_end) == 1:
            at = index[same_end[0]]
        plan.match(path, leaf, at)


def _end(path: KeyPath, params: set[KeyPath]) -> KeyPath:
    """Return the end of a path that says what a leaf is: a slot and its parameter, or a field."""
    for start in range(2, len(path)):
        if path[start:] in params:
            return path[start - 1 :]
    return path[-2:] if path[-2:-1] in (("powers",), ("hyperparams",)) else path[-1:]


def _node_of(path: KeyPath, nodes: Iterable[KeyPath]) -> KeyPath | None:
    """Return the average that a leaf belongs to."""
    return next((node for node in nodes if path[: len(node)] == node), None)


def _refuse_abstract(plan: Plan, leaves: dict[KeyPath, Any]) -> None:
    """Raise if a leaf would stay abstract."""
    stay = plan.skipped.keys() - plan.starts.keys()
    abstract = [p for p in stay if isinstance(leaves.get(p), jax.ShapeDtypeStruct)]
    if abstract:
        reasons = few(f"{'/'.join(path)} {plan.skipped[path]}" for path in sorted(abstract))
        raise MismatchError(
            f"checkpoint {plan.stored.path} does not hold all that is abstract: {reasons}. Pass "
            "arrays for these, such as those of tx.init(params)."
        )


def _values(plan: Plan, leaves: dict[KeyPath, Any]) -> dict[KeyPath, Any]:
    """Read what was planned, and make averages of it as the state stores them."""
    values = plan.stored.fetch({path: (at, leaves[path]) for path, at in plan.sources.items()})
    values |= {p: jnp.zeros(leaves[p].shape, leaves[p].dtype) for p in plan.rested}
    exact = plan.stored.averages(plan.averaged, leaves)
    for path, name in plan.starts.items():
        parameter = ("params", *name)
        exact[path] = values.get(parameter, leaves[parameter])
    for path, value in exact.items():
        shadow = leaves[path]
        if not is_inexact(shadow):
            values[path] = jnp.array(value, copy=True)
            continue
        exactly = jnp.asarray(value).astype(wide(jnp.result_type(value)))
        values[path] = jnp.array(exactly, shadow.dtype, copy=True)
        start = next(i for i in range(len(path) - 1, 0, -1) if path[i] == SHADOW)
        residue = (*path[:start], RESIDUE, *path[start + 1 :])
        if residue in leaves:
            left = exactly - values[path].astype(exactly.dtype)
            values[residue] = left.astype(leaves[residue].dtype)
    return values


def _say_what_is_left(plan: Plan) -> None:
    """Note what is stored and has no place in what was passed."""
    used = set(plan.sources.values())
    used |= {path for place in plan.averaged.values() for path in place if path is not None}
    contents = plan.stored.contents
    for average in contents.averages.values():
        if not used.intersection(average.leaves.values()):
            plan.skipped[average.at] = "is an average in the checkpoint, and opt_state has no such"
    for name, at in contents.params.items():
        if at not in used:
            plan.skipped.setdefault(("params", *name), "is in the checkpoint, and not in params")


def load_params(stored: Stored, like: Tree) -> Tree:
    """Load the raw parameters, a swap undone: `restore_params`."""
    refuse_snapshot(stored, "For the averages, call restore_averages.")
    named, raw = named_leaves(like), stored.contents.params
    for name, leaf in named.items():
        check_array("/".join(name), leaf, "like")
    there = {name: leaf for name, leaf in named.items() if name in raw}
    forms = stored.forms(raw[name] for name in there)
    lost = [name for name in named if name not in raw]
    stored.refuse(
        missing(lost, list(raw) if lost else []),
        [differs("/".join(raw[name]), leaf, forms[raw[name]]) for name, leaf in there.items()],
    )
    values = stored.fetch({name: (raw[name], leaf) for name, leaf in there.items()})
    return jax.tree.unflatten(jax.tree.structure(like), [values[name] for name in named])
