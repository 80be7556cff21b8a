"""Find the averages in a state, whatever optax wrapped around them.

`averages` finds them by name. `average` returns what to evaluate with. `stacked` returns several
averages in one tree. `swap` exchanges an average with the parameters. `reset` starts it again.

`average` and `stacked` return copies. No later step can delete them, even if it donates parameters
and state. Inside `jit` nothing is copied. `swap` copies nothing: the arrays change places.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._tree.checks import shown
from emaopt._tree.devices import beside, in_memory, refuse_deleted, stay
from emaopt._tree.leaves import by_path, from_paths
from emaopt._tree.numbers import is_concrete
from emaopt._tree.paths import KeyPath, Params, State, Tree, key_name

from .ema import EmaState, SwappedEmaState, start_leaf
from .ledger import start as start_ledger
from .match import Match, choose, find, match, replace
from .rounding import Compensated, Nearest, Stored


class PrimalState(NamedTuple):
    """Hold the state of `primal`. `base`: of the optimizer. `average`: of the average, which is x.

    `z`: where the optimizer stands, float32, at leaves whose parameters are narrower than float32;
    `None` at other leaves, where z follows from the parameters and the average.
    """

    base: Tree
    average: Tree
    z: Tree

    def __repr__(self) -> str:
        return shown(self)


def averages(opt_state: Tree) -> dict[str, EmaState]:
    """Return every average in the state, by name.

    The name is the one given in `optax.named_chain` or `optax.partition`, or the position in the
    chain: dict keys and positions on the way, joined with a slash. The fields of wrappers
    (`inner_state`) are left out, unless two names would be the same. An average that stands alone
    is named "ema".

    The arrays are those of the state itself: a later step that donates the state deletes them. To
    keep averages, use `average`.

    >>> import emaopt, optax
    >>> tx = optax.named_chain(("fast", emaopt.ema(0.9)), ("slow", emaopt.ema(0.99)))
    >>> list(averages(tx.init(jnp.zeros(2))))
    ['fast', 'slow']
    """
    return {name: found.state for name, found in find(opt_state).items()}


def average_paths(opt_state: Tree) -> list[KeyPath]:
    """Return the whole key path of every average in the state, in the order of `averages`."""
    return [found.path for found in find(opt_state).values()]


def average(params: Params, opt_state: Tree, name: str | None = None) -> Params:
    """Return the averaged parameters, to evaluate with and to keep. TF1's `ema.average`.

    Leaves without an average (masked out, or the non-parameters of a whole NNX or Equinox model)
    are returned unchanged from `params`.

    The arrays are copies, so a later step that donates `params` or `opt_state` does not delete
    them. Keep the best averages, build a model of them, or train on from them. Inside `jit` nothing
    is copied.

    Args:
        params: the parameters that `tx.init` was given, or a model that contains them. For several
            networks with a state each: a tree of their parameters.
        opt_state: the state that holds the average, whatever optax wrapped around it. For several
            networks: a tree of their states, with the keys of `params`.
        name: which average, if a leaf has several: a key of `averages(opt_state)`, or some of its
            steps in a row.

    Returns:
        A tree like `params`, in the dtypes of `params`.

    Raises:
        ValueError: there is no average, or several and no name, or `params` does not belong to it,
            or `opt_state` is swapped.
        RuntimeError: a step that donates its arguments deleted the average.

    Example:
        >>> import emaopt
        >>> state = emaopt.ema(0.5).init({"w": jnp.array([1.0])})
        >>> average({"w": jnp.array([3.0])}, state)
        {'w': Array([1.], dtype=float32)}
    """
    matched = _match_unswapped(params, opt_state, name)
    values = {path: _owned(p, matched.stored[path]) for path, p in matched.leaves.items()}
    return from_paths(params, values)


def stacked(params: Params, opt_state: Tree, names: Iterable[str] | None = None) -> Params:
    """Return several averages in one tree, each leaf with a leading axis, one row per average.

    Evaluate all of them at once with `jax.vmap(evaluate)`. The arrays are copies, as those of
    `average`. A leaf without an average is repeated.

    Args:
        params: the parameters, as for `average`.
        opt_state: the state that holds the averages, as for `average`.
        names: which averages, in this order; by default all of `averages(opt_state)`.

    Returns:
        A tree like `params`, in the dtypes of `params`, each leaf of shape `[averages, ...]`.

    Raises:
        ValueError: `names` is one string or empty; or as `average`.

    Example:
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
    names = list(choose(opt_state, None) if names is None else names)
    if not names:
        raise ValueError("names is empty. Pass keys of emaopt.averages(opt_state), or None.")
    each = [_match_unswapped(params, opt_state, name) for name in names]
    values = {
        path: jnp.stack([_value(p, matched.stored[path]) for matched in each])
        for path, p in each[0].leaves.items()
        if p is not None
    }
    return from_paths(params, dict.fromkeys(each[0].leaves) | values)


def swap(params: Params, opt_state: State, name: str | None = None) -> tuple[Params, State]:
    """Exchange the parameters and their average: `(averages, opt_state with the parameters)`.

    Nothing is computed, rounded or copied: arrays (also abstract ones) change places. So swapping
    twice gives back the same arrays. Only the rows of `ema(decay, rows=mask)` are brought up to
    date first. Leaves without an average stay. To save the averages under the original names, save
    what `swap` returns. To go on training, load it and swap again. This is TF1's
    `MovingAverageOptimizer.swapping_saver`.

    It returns the same arrays that were passed, so a step that donates what was passed deletes what
    was returned. To keep averages, use `average`.

    The swapped average is marked (`SwappedEmaState`), so that training on it is an error.

    Args:
        params: the parameters, as for `average`.
        opt_state: the state that holds the average, as for `average`.
        name: which average, if a leaf has several, as for `average`.

    Returns:
        A tree like `params` with the averages, and the state with the parameters in their place.

    Raises:
        ValueError: there is no average, or several and no name, or `params` does not belong to it.

    Example:
        >>> import emaopt
        >>> state = emaopt.ema(0.5).init(jnp.array([1.0]))
        >>> averages_, swapped = swap(jnp.array([3.0]), state)
        >>> averages_, swapped.shadow
        (Array([1.], dtype=float32), Array([3.], dtype=float32))
    """
    matched = match(params, opt_state, name)
    shadows = {path: x.shadow for path, x in matched.stored.items() if x.shadow is not None}
    new = {}
    for found, part in zip(matched.averages, matched.parts, strict=True):
        raw = {
            path: None if x is None else matched.leaves[(*part, *path)]
            for path, x in by_path(found.state.shadow).items()
        }
        fields = {field: getattr(found.state, field) for field in EmaState._fields}
        fields["shadow"] = from_paths(found.state.shadow, raw)
        kind = EmaState if isinstance(found.state, SwappedEmaState) else SwappedEmaState
        new[found.path] = kind(**fields)
    return from_paths(params, matched.leaves | shadows), replace(matched.opt_state, new)


def reset(params: Tree, opt_state: State, name: str | None = None) -> State:
    """Start an average again from the parameters, as `init` does: a copy of `params` at step 0.

    Use it for a new phase of training: after a warm-up, or when the data or the learning rate
    change. It works through any wrapper (`optax.MultiSteps`, `masked`, `named_chain`,
    `apply_if_finite`, `heal`, packed parameters) and inside `jit`. The rest of the state stays. In
    `primal` the optimizer goes on from `params` too, for parameters of any dtype.

    Args:
        params: the parameters, as for `average`.
        opt_state: the state that holds the average, as for `average`.
        name: which average, if a leaf has several, as for `average`.

    Returns:
        The state with the average started again, in the dtypes and the memory of the old one.

    Raises:
        ValueError: as `average`.

    Example:
        >>> import emaopt
        >>> state = emaopt.ema(0.5).init(jnp.array([1.0]))
        >>> average(jnp.array([3.0]), reset(jnp.array([3.0]), state))
        Array([3.], dtype=float32)
    """
    matched = _match_unswapped(params, opt_state, name)
    new = {}
    for found, part in zip(matched.averages, matched.parts, strict=True):
        shadow = by_path(found.state.shadow)
        values = {path: matched.leaves.get((*part, *path)) for path in shadow}
        new[found.path] = _restarted(found.state, values)
        opt_state = _with_z(opt_state, found.path, values)
    return replace(opt_state, new)


def _with_z(opt_state: State, path: KeyPath, values: dict[KeyPath, Any]) -> State:
    """Move the z of the `primal` around an average to these values, where it is stored."""

    def moved(keys: Any, node: Any) -> Any:
        place = tuple(map(key_name, keys))
        if not isinstance(node, PrimalState) or path[: len(place)] != place:
            return node
        z = by_path(node.z)
        for leaf, old in z.items():
            if old is not None:
                new = start_leaf("/".join(leaf), values[leaf], Nearest(old.dtype)).shadow
                z[leaf] = stay(old, new)
        return node._replace(z=from_paths(node.z, z))

    is_primal = lambda node: isinstance(node, PrimalState)
    return jax.tree_util.tree_map_with_path(moved, opt_state, is_leaf=is_primal)


def _restarted(state: EmaState, values: dict[KeyPath, Any]) -> EmaState:
    """Return an average that starts again from these values, in the dtypes of the old one."""
    ledger = None if state.ledger is None else start_ledger()
    step, ledger = jax.tree.map(
        lambda x: beside(state.shadow, x), (jnp.zeros_like(state.step), ledger)
    )
    rows = jax.tree.map(jnp.zeros_like, state.rows)
    new = with_values(state, values)._replace(step=step, ledger=ledger, rows=rows)
    return jax.tree.map(stay, state, new)


def with_values(state: EmaState, values: dict[KeyPath, Any]) -> EmaState:
    """Return the average with other values, in its dtypes. A leaf without a value stays."""
    rounding = Nearest if state.residue is None else Compensated
    shadow = by_path(state.shadow)
    residue = by_path(state.residue)
    for path, old in shadow.items():
        if old is not None and values.get(path) is not None:
            leaf = start_leaf("/".join(path), values[path], rounding(old.dtype))
            shadow[path], residue[path] = leaf
    state = state._replace(shadow=from_paths(state.shadow, shadow))
    if state.residue is None:
        return state
    return state._replace(residue=from_paths(state.residue, residue))


def _match_unswapped(params: Tree, opt_state: Tree, name: str | None) -> Match:
    chosen = choose(opt_state, name).values()
    if any(isinstance(found.state, SwappedEmaState) for found in chosen):
        raise ValueError(
            "opt_state is swapped: the averages are in params. Evaluate params, or call "
            "params, opt_state = emaopt.swap(params, opt_state) first."
        )
    matched = match(params, opt_state, name)
    for path, stored in matched.stored.items():
        name = "/".join(path)
        refuse_deleted(f"opt_state has a deleted array in the average of {name!r}", stored.shadow)
        if stored.shadow is None:
            refuse_deleted(f"params has a deleted array at leaf {name!r}", matched.leaves[path])
    return matched


def _owned(p: Any, stored: Stored) -> Any:
    """Return one leaf of the averages: a copy of an array that is in params or in the state.

    A step may donate it, and a NumPy array may be changed in place.
    """
    x = _value(p, stored)
    if x is not p and x is not stored.shadow:
        return x
    if isinstance(x, np.ndarray):
        return x.copy()
    return jnp.copy(x) if isinstance(x, jax.Array) and is_concrete(x) else x


def _value(p: Any, stored: Stored) -> Any:
    """Return one leaf of the averages, in the dtype of the parameter."""
    if stored.shadow is None:
        return p
    dtype = jnp.result_type(p)
    if isinstance(stored.shadow, jax.ShapeDtypeStruct):
        return stored.shadow.update(dtype=dtype)
    value = jax.tree.map(in_memory, stored).value()
    return value if value.dtype == dtype else value.astype(dtype)  # a key has no astype
