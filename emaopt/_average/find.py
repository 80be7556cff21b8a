"""The averages in a state, whatever optax wrapped around them.

`averages` finds them by name, `average` is what to evaluate with, `stacked` several of them;
`swap` exchanges them with the parameters, `ledgers` says how long they are. Leaves are matched by
key path.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from emaopt._tree.checks import check_array, check_shape, did_you_mean
from emaopt._tree.devices import in_memory
from emaopt._tree.leaves import by_path, from_paths
from emaopt._tree.paths import KeyPath, Params, State, Tree, called, key_name, shared_paths

from .ema import EmaState, SwappedEmaState
from .rounding import Stored


class _AmbiguousError(ValueError):
    """A leaf has several averages, and no name says which one is meant."""


def average(params: Params, opt_state: Tree, name: str | None = None) -> Params:
    """The averaged parameters, to evaluate with: like `params`, in the dtypes of `params`.

    A leaf that has no average is that of `params`: one that `optax.masked` left out, or what else
    is in a whole NNX or Equinox model (docs/frameworks.md). With several averages in the state,
    `name` is one of the keys of `averages(opt_state)`. TF1's `ema.average`.

    >>> import emaopt
    >>> state = emaopt.ema(0.5).init({"w": jnp.array([1.0])})
    >>> average({"w": jnp.array([3.0])}, state)
    {'w': Array([1.], dtype=float32)}
    """
    if any(isinstance(state, SwappedEmaState) for state in _choose(opt_state, name).values()):
        raise ValueError(
            "opt_state is swapped: the averages are in params. Evaluate params, or call "
            "params, opt_state = emaopt.swap(params, opt_state) first."
        )
    stored = _stored_of_each_leaf(params, opt_state, name)
    leaves = by_path(params)
    return from_paths(params, {path: _value(p, *stored[path]) for path, p in leaves.items()})


def _value(p, shadow, residue):
    if shadow is None:
        return p
    value = jax.tree.map(in_memory, Stored(shadow, residue)).value()
    dtype = jnp.result_type(p)
    return value if value.dtype == dtype else value.astype(dtype)  # a key has no astype


def swap(params: Params, opt_state: State, name: str | None = None) -> tuple[Params, State]:
    """The parameters and their average exchanged: `(averages, opt_state with the parameters)`.

    Nothing is computed or rounded: arrays (also abstract ones) change places, so swapping twice
    gives back the same arrays. Leaves without an average stay. The swapped average is marked, so
    that it cannot be trained on by accident (`SwappedEmaState`). To save the averages under the
    original names, save what `swap` returns; to go on training, load it and swap again. TF1's
    `MovingAverageOptimizer.swapping_saver`.

    >>> import emaopt
    >>> state = emaopt.ema(0.5).init(jnp.array([1.0]))
    >>> averages_, swapped = swap(jnp.array([3.0]), state)
    >>> averages_, swapped.shadow
    (Array([1.], dtype=float32), Array([3.], dtype=float32))
    """
    stored = _stored_of_each_leaf(params, opt_state, name)
    leaves = by_path(params)
    shadows = {path: shadow for path, (shadow, _) in stored.items() if shadow is not None}
    exchanged = from_paths(params, leaves | shadows)
    chosen = _choose(opt_state, name)

    def exchange(state: EmaState | SwappedEmaState) -> EmaState | SwappedEmaState:
        own = by_path(state.shadow)
        shadow = from_paths(
            state.shadow, {path: s if s is None else leaves[path] for path, s in own.items()}
        )
        fields = state.step, shadow, state.residue, state.ledger
        return EmaState(*fields) if isinstance(state, SwappedEmaState) else SwappedEmaState(*fields)

    return exchanged, jax.tree.map(
        lambda node: exchange(node) if any(node is state for state in chosen.values()) else node,
        opt_state,
        is_leaf=_is_ema,
    )


def averages(opt_state: Tree) -> dict[str, EmaState]:
    """Every average in the state, by name.

    The name is the one given in `optax.named_chain` or `optax.partition`, or the position in the
    chain: dict keys and positions on the way, joined with a slash; the wrappers' own fields are
    left out. An average that stands alone is named "ema".

    >>> import emaopt, optax
    >>> tx = optax.named_chain(("fast", emaopt.ema(0.9)), ("slow", emaopt.ema(0.99)))
    >>> list(averages(tx.init(jnp.zeros(2))))
    ['fast', 'slow']
    """
    found = [
        (keys, node)
        for keys, node in jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_is_ema)[0]
        if _is_ema(node)
    ]
    named = [
        "/".join(key_name(k) for k in keys if not isinstance(k, jax.tree_util.GetAttrKey)) or "ema"
        for keys, _ in found
    ]
    return {
        short if named.count(short) == 1 else "/".join(map(key_name, keys)): state
        for short, (keys, state) in zip(named, found, strict=True)
    }


def average_paths(opt_state: Tree) -> list[KeyPath]:
    """Return the whole key path of every average in the state, in the order of `averages`."""
    nodes = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_is_ema)[0]
    return [tuple(map(key_name, keys)) for keys, node in nodes if _is_ema(node)]


def stacked(params: Params, opt_state: Tree, names: Iterable[str] | None = None) -> Params:
    """Several averages in one tree, each leaf with a leading axis: one average after the other.

    In the order of `names`, by default of `averages(opt_state)`, and in the dtypes of `params`: to
    evaluate all at once with `jax.vmap(evaluate)`. A leaf without an average is repeated.

    >>> import emaopt, optax
    >>> tx = optax.named_chain(("fast", emaopt.ema(0.5)), ("slow", emaopt.ema(0.75)))
    >>> params = jnp.array([0.0])
    >>> _, opt_state = tx.update(jnp.array([8.0]), tx.init(params), params)
    >>> print(stacked(params, opt_state))
    [[4.]
     [2.]]
    """
    if isinstance(names, str):
        raise ValueError(f"names={names!r} is one string. Pass a list of names.")
    names = list(_choose(opt_state, None) if names is None else names)
    if not names:
        raise ValueError("names is empty. Pass keys of emaopt.averages(opt_state), or None.")
    each = [average(params, opt_state, name) for name in names]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def ledgers(opt_state: Tree) -> dict[str, dict[str, jax.Array]]:
    """What is known of every average that keeps a ledger, by name: numbers, float32 [].

    `initial_weight`: what the initial parameters still count, of 1. `mean_age`: how many updates
    old the average is in the mean. `effective_window`: 1 / (the sum of the squares of the weights);
    the plain mean of n values has n. `stalled`: the share of elements that the newest value should
    have moved, and rounding held where they were.

    For metrics inside a step, or of what a checkpoint holds; exact for any decay and any
    `num_updates`. For all weights of a decay, see `profile`.

    >>> import emaopt
    >>> mean = emaopt.moving_average(0.5, ledger=True)
    >>> state = mean.update(jnp.array([8.0]), mean.init(jnp.array([0.0])))
    >>> {name: float(x) for name, x in ledgers(state)["ema"].items()}
    {'initial_weight': 0.5, 'mean_age': 0.5, 'effective_window': 2.0, 'stalled': 0.0}
    """
    found = {name: s.ledger for name, s in averages(opt_state).items() if s.ledger is not None}
    if not found:
        raise ValueError(
            "opt_state holds no ledger. Make the average with emaopt.ema(decay, ledger=True)."
        )
    return {
        name: {
            "initial_weight": ledger.initial,
            "mean_age": ledger.age,
            "effective_window": 1 / ledger.square,
            "stalled": ledger.stalled,
        }
        for name, ledger in found.items()
    }


def _is_ema(node) -> bool:
    return isinstance(node, (EmaState, SwappedEmaState))


def _choose(opt_state: Tree, name: str | None) -> dict[str, EmaState]:
    """The averages that a name means: the one of that name; without a name, all of them."""
    found = averages(opt_state)
    if not found:
        raise ValueError(
            "opt_state holds no average. Put emaopt.ema(decay) last in the optax.chain, and pass "
            "the state that belongs to that chain, after params (of an nnx.Optimizer: "
            "optimizer.opt_state)."
        )
    if name is None:
        return found
    if name in found:
        return {name: found[name]}
    paths = dict(zip(average_paths(opt_state), found, strict=True))
    meant = [paths[path] for path in called(name, paths)] if isinstance(name, str) else []
    if not meant:
        raise ValueError(
            f"name={name!r} is not an average.{did_you_mean(str(name), found)} "
            f"Pass one of: {_listed(found)}."
        )
    return {key: found[key] for key in meant}


def _stored_of_each_leaf(params: Tree, opt_state: Tree, name: str | None) -> dict[KeyPath, tuple]:
    """Shadow and residue of every leaf of `params`, `None` where it has none; by key path.

    Averages of different leaves (`optax.partition`) make up one; two of one leaf need a name.
    """
    chosen = _choose(opt_state, name)
    stored: dict[KeyPath, tuple] = {}
    for state in chosen.values():
        residues = by_path(state.residue)
        for path, shadow in by_path(state.shadow).items():
            if path in stored:
                raise _AmbiguousError(
                    f"name is missing: leaf {'/'.join(path)!r} has several averages. "
                    f"Pass name=, one of: {_listed(chosen)}."
                )
            stored[path] = shadow, residues.get(path)
    leaves = by_path(params)
    paths = list(leaves)
    if paths == [()] and params is not None:
        check_array("", params, "params")  # an NNX module may be no pytree
    _check_there(set(stored), paths)
    for places in shared_paths(params):
        if len({path in stored for path in places}) == 2:
            raise ValueError(
                f"params has one Variable in several places, {_quoted(places)}, and opt_state "
                "averages it in one of them. Pass nnx.state(model); a model of the averages is "
                "nnx.merge(nnx.graphdef(model), averages)."
            )
    found = {path: stored.get(path, (None, None)) for path in paths}
    if jax.tree.leaves(params) and all(shadow is None for shadow, _ in found.values()):
        raise ValueError(
            f"opt_state averages no leaf of params: the mask of {_listed(chosen)} leaves out "
            f"{_quoted(paths)}. Pass a mask that is true somewhere."
        )
    for path, (shadow, _) in found.items():
        if shadow is not None:
            check_shape("/".join(path), **{"the average": shadow, "params": leaves[path]})
    return found


def _check_there(averaged: set[KeyPath], paths: list[KeyPath]) -> None:
    there = set(paths)
    if averaged <= there:
        return
    first = min(averaged)
    above = {path[: -len(first)] for path in there if first and path[-len(first) :] == first}
    for node in sorted(above, key=len):
        if {(*node, *path) for path in averaged} <= there:
            raise ValueError(
                f"params has the leaves that opt_state averages below {'/'.join(node)!r}. Pass "
                "that part of it, which tx.init was given, and not the whole."
            )
    raise ValueError(
        f"params has no leaf {_quoted(sorted(averaged - there))}, which opt_state averages; it has "
        f"{_quoted(paths)}. Pass the parameters that tx.init was given."
    )


def _quoted(paths: Iterable[KeyPath]) -> str:
    return ", ".join(repr("/".join(path)) for path in paths)


def _listed(found: dict[str, EmaState]) -> str:
    return ", ".join(map(repr, found))
