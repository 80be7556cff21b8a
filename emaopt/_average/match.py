"""Match the averages in a state with the leaves of the parameters.

Leaves are matched by key path. An average is either of the whole tree that is passed, or of the
part of it whose keys stand in the average's own path: in `{"actor": ..., "critic": ...}`, a dict of
states beside a dict of parameters, the averages of the actor belong to `params["actor"]`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emaopt._tree.checks import check_array, check_shape, did_you_mean
from emaopt._tree.leaves import by_path
from emaopt._tree.paths import KeyPath, State, Tree, called, few, key_name, shared_paths

from .ema import EmaState, SwappedEmaState
from .lazy import settled
from .rounding import Stored


class AmbiguousError(ValueError):
    """Report a leaf with several averages where no name says which one is meant."""


class Found(NamedTuple):
    """Hold an average and its whole key path in the state."""

    path: KeyPath
    state: Any  # EmaState or SwappedEmaState


class Match(NamedTuple):
    """Hold the leaves of parameters, and what the averages store of each, by key path.

    `parts`: for each of `averages`, the key path of the part of the parameters that it averages;
    `()` is the whole. `opt_state`: the state, with the rows of `ema(decay, rows=mask)` brought up
    to date.
    """

    leaves: dict[KeyPath, Any]
    stored: dict[KeyPath, Stored]
    averages: list[Found]
    parts: list[KeyPath]
    opt_state: Any


def is_average(node: Any) -> bool:
    """Return whether a node of a state is an average, swapped or not."""
    return isinstance(node, (EmaState, SwappedEmaState))


def find(opt_state: Tree) -> dict[str, Found]:
    """Return every average in the state by its name, as `averages` describes it."""
    nodes = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_average)[0]
    found = [(keys, node) for keys, node in nodes if is_average(node)]
    whole = [tuple(map(key_name, keys)) for keys, _ in found]
    short = ["/".join(map(key_name, filter(_is_no_field, keys))) or "ema" for keys, _ in found]
    names = [
        name if short.count(name) == 1 else "/".join(path)
        for name, path in zip(short, whole, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"opt_state has two averages named {name!r}. Rename one: a '/' inside a dict key "
                "collides with nesting."
            )
    return {
        name: Found(path, node) for name, path, (_, node) in zip(names, whole, found, strict=True)
    }


def choose(opt_state: Tree, name: str | None) -> dict[str, Found]:
    """Return the averages that a name means (see `called`); without a name, all of them."""
    found = find(opt_state)
    if not found:
        raise ValueError(
            "opt_state holds no average. Put emaopt.ema(decay) last in the optax.chain, and pass "
            "the state that belongs to that chain, after params (of an nnx.Optimizer: "
            "optimizer.opt_state)."
        )
    if name is None:
        return found
    if isinstance(name, str) and name in found:
        return {name: found[name]}
    paths = [average.path for average in found.values()]
    meant = called(name, paths) if isinstance(name, str) else []
    if not meant:
        raise ValueError(
            f"name={name!r} is not an average.{did_you_mean(str(name), found)} "
            f"Pass one of: {_listed(found)}."
        )
    return {key: average for key, average in found.items() if average.path in meant}


def match(params: Tree, opt_state: Tree, name: str | None) -> Match:
    """Return what is stored of every leaf of `params` in the averages that a name means.

    Averages of different leaves (`optax.partition`, two networks) count as one. If a leaf has two,
    a name must choose.
    """
    leaves = by_path(params)
    if list(leaves) == [()] and params is not None:
        check_array("", params, "params")  # an NNX module may be no pytree
    nodes = _nodes(leaves)
    opt_state = _brought_up_to_date(leaves, nodes, opt_state)
    chosen = choose(opt_state, name)
    others = [average.path for average in find(opt_state).values()]
    stored: dict[KeyPath, Stored] = {}
    parts = []
    for average in chosen.values():
        part = _part_of(average, leaves, nodes)
        if part is None or _may_be_beside(part, average, leaves, nodes, others):
            raise ValueError(_no_part(average, nodes, leaves))
        residues = by_path(average.state.residue)
        for below, shadow in by_path(average.state.shadow).items():
            path = (*part, *below)
            if shadow is None:
                continue
            if path in stored:
                raise AmbiguousError(
                    f"name is missing: leaf {'/'.join(path)!r} has several averages. "
                    f"Pass name=, one of: {_listed(chosen)}."
                )
            stored[path] = Stored(shadow, residues.get(below))
        parts.append(part)
    for places in shared_paths(params):
        if len({path in stored for path in places}) == 2:
            raise ValueError(
                f"params has one Variable in several places, {_quoted(places)}, and opt_state "
                "averages it in one of them. Pass nnx.state(model); a model of the averages is "
                "nnx.merge(nnx.graphdef(model), averages)."
            )
    if jax.tree.leaves(params) and not stored:
        raise ValueError(
            f"opt_state averages no leaf of params: the mask of {_listed(chosen)} leaves out "
            f"{_quoted(leaves)}. Pass a mask that is true somewhere."
        )
    for path, leaf in stored.items():
        check_shape("/".join(path), **{"the average": leaf.shadow, "params": leaves[path]})
    every = {path: stored.get(path, Stored(None)) for path in leaves}
    return Match(leaves, every, list(chosen.values()), parts, opt_state)


def _brought_up_to_date(leaves: dict[KeyPath, Any], nodes: set[KeyPath], opt_state: State) -> State:
    """Return the state with every average of rows brought up to date, whatever its name.

    `swap` moves the parameters away, and rows that rested cannot be brought up to date without
    them.
    """
    new = {}
    for average in find(opt_state).values():
        if isinstance(average.state, EmaState) and average.state.rows is not None:
            part = _part_of(average, leaves, nodes)
            if part is not None:
                own = {
                    path[len(part) :]: x for path, x in leaves.items() if path[: len(part)] == part
                }
                new[average.path] = settled(own, average.state)
    return replace(opt_state, new) if new else opt_state


def replace(opt_state: State, new: dict[KeyPath, Any]) -> State:
    """Return the state with other nodes in the place of its averages, by their key path."""
    nodes, treedef = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_average)
    return treedef.unflatten(
        new.get(tuple(map(key_name, keys)), node) if is_average(node) else node
        for keys, node in nodes
    )


def settle(params: Tree, opt_state: State) -> State:
    """Return the state with every average of rows brought up to date."""
    leaves = by_path(params)
    return _brought_up_to_date(leaves, _nodes(leaves), opt_state)


def without_rows(opt_state: State) -> State:
    """Return the state as if its averages moved every row at every step. `settle` it first."""
    found = find(opt_state).values()
    return replace(opt_state, {each.path: each.state._replace(rows=None) for each in found})


def with_rows(opt_state: State, like: State) -> State:
    """Return the state with rows that have not rested, where `like` has averages of rows.

    For averages that were read from a checkpoint. `like` may be abstract; the times are arrays.
    """
    found = find(opt_state)
    new = {}
    for name, average in find(like).items():
        rows = jax.tree.map(_zeros_like, average.state.rows)
        new[average.path] = found[name].state._replace(rows=rows)
    return replace(opt_state, new)


def _zeros_like(x: Any) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype, device=getattr(x, "sharding", None))


def _nodes(leaves: dict[KeyPath, Any]) -> set[KeyPath]:
    """Return the key path of every node above the leaves, and of the leaves."""
    return {path[:i] for path in leaves for i in range(len(path) + 1)}


def _part_of(average: Found, leaves: dict[KeyPath, Any], nodes: set[KeyPath]) -> KeyPath | None:
    """Return the key path of the part of the parameters that an average belongs to, if any.

    The keys of the part stand in a row in the average's path, at its start if possible. A part
    whose keys are names is preferred to one whose keys are positions, because a chain has positions
    too. A part fits if it has all leaves of the average, and the nodes of those that are masked
    out. An average of the whole tree therefore never fits a part of it.
    """
    shadow = average.state.shadow
    averaged = {path for path, x in by_path(shadow).items() if x is not None}
    inside = averaged | _masked_out(shadow)

    def fits(part: KeyPath) -> bool:
        all_leaves = all((*part, *path) in leaves for path in averaged)
        return all_leaves and all((*part, *path) in nodes for path in inside)

    at = average.path
    runs = [at[i:j] for i in range(len(at)) for j in range(len(at), i, -1)]
    fitting = [part for part in runs if averaged and fits(part)]
    named = [part for part in fitting if not all(step.isdecimal() for step in part)]
    at_start = [part for part in fitting if part == at[: len(part)]]
    if named or at_start:
        return max(named or at_start, key=len)  # the first one of the longest
    if averaged <= leaves.keys():
        return ()
    return None


def _may_be_beside(
    part: KeyPath,
    average: Found,
    leaves: dict[KeyPath, Any],
    nodes: set[KeyPath],
    others: list[KeyPath],
) -> bool:
    """Return whether an average may be of another network in the list than the one found.

    The position by which the part was found may be that of the average in its chain. It is that of
    the network where every network of its shapes has an average. `others`: their paths.
    """
    if part != average.path or not part[-1:] or not part[-1].isdecimal():
        return False
    shapes = {
        path: np.shape(x) for path, x in by_path(average.state.shadow).items() if x is not None
    }
    beside = [node for node in nodes if node[:-1] == part[:-1] and len(node) == len(part)]
    alike = [
        node
        for node in beside
        if all(
            (*node, *path) in leaves and np.shape(leaves[*node, *path]) == shape
            for path, shape in shapes.items()
        )
    ]
    return not all(called("/".join(node), others) for node in alike)


def _masked_out(shadow: Tree) -> set[KeyPath]:
    """Return the key paths where an average has a masked or an absent node."""
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    absent = jax.tree.map(lambda x: None if is_masked(x) else x, shadow, is_leaf=is_masked)
    return {path for path, x in by_path(absent).items() if x is None}


def _no_part(average: Found, nodes: set[KeyPath], leaves: dict[KeyPath, Any]) -> str:
    """Return the error about an average that fits neither the parameters nor a part of them."""
    averaged = {path for path, x in by_path(average.state.shadow).items() if x is not None}
    if averaged == {()}:
        shape = np.shape(average.state.shadow)
        return (
            f"params is a tree, with the leaves {_quoted(leaves)}, and opt_state averages one "
            f"array of shape {shape}. Pass that array. If it comes from optax.flatten, chain the "
            "average after it: optax.chain(optax.flatten(tx), emaopt.ema(decay))."
        )
    above = [node for node in nodes if all((*node, *path) in leaves for path in averaged)]
    # the nearest ones: a whole TrainState has the same names again in the slots of its optimizer
    shortest = min(map(len, above), default=0)
    above = sorted(node for node in above if len(node) == shortest)
    if len(above) > 1:
        return (
            f"params has the leaves that opt_state averages below each of {_quoted(above)}, and "
            f"the average at {'/'.join(average.path)!r} does not tell which it belongs to. Pass "
            "one of them with its own state, or a state with the keys of params: "
            f"{{{above[0][-1]!r}: ..., {above[1][-1]!r}: ...}}."
        )
    if above:
        return (
            f"params has the leaves that opt_state averages below {'/'.join(above[0])!r}. Pass "
            "that part of it, which tx.init was given, and not the whole."
        )
    return (
        f"params has no leaf {_quoted(sorted(averaged - leaves.keys()))}, which opt_state "
        f"averages; it has {_quoted(leaves)}. Pass the parameters that tx.init was given."
    )


def _is_no_field(key: Any) -> bool:
    return not isinstance(key, jax.tree_util.GetAttrKey)


def _quoted(paths: Iterable[KeyPath]) -> str:
    return few(repr("/".join(path)) for path in paths)


def _listed(found: dict[str, Found]) -> str:
    return few(map(repr, found))
