"""Measure an average: how long it is, and whether rounding holds it still."""

import jax
import jax.numpy as jnp

from emaopt._tree.devices import in_memory
from emaopt._tree.numbers import is_inexact, wide
from emaopt._tree.paths import Tree

from .match import find, match


def ledgers(opt_state: Tree) -> dict[str, dict[str, jax.Array]]:
    """Return the weight of the start, the mean age and the window of every average, by name.

    Use it for metrics inside a step, or on the state of a checkpoint. The numbers are exact for any
    decay and any `num_updates`. For all weights of a decay, see `profile`.

    Args:
        opt_state: a state with averages made by `ema(decay, ledger=True)` somewhere in it.

    Returns:
        For each average with a ledger, a dict of three numbers, float32 []. `initial_weight`: the
        weight that the initial parameters still have; all weights add up to 1. `mean_age`: the mean
        age of the averaged values, in updates or in what `advance` counts. `effective_window`:
        1 / (the sum of the squares of the weights), which is n for the plain mean of n values.

    Raises:
        ValueError: no average has a ledger.

    Example:
        >>> import emaopt
        >>> mean = emaopt.moving_average(0.5, ledger=True)
        >>> state = mean.update(jnp.array([8.0]), mean.init(jnp.array([0.0])))
        >>> {name: float(x) for name, x in ledgers(state)["ema"].items()}
        {'initial_weight': 0.5, 'mean_age': 0.5, 'effective_window': 2.0}
    """
    kept = {name: average.state.ledger for name, average in find(opt_state).items()}
    kept = {name: ledger for name, ledger in kept.items() if ledger is not None}
    if not kept:
        raise ValueError(
            "opt_state holds no ledger. Make the average with emaopt.ema(decay, ledger=True)."
        )
    return {
        name: {
            "initial_weight": ledger.initial,
            "mean_age": ledger.age,
            "effective_window": 1 / ledger.square,
        }
        for name, ledger in kept.items()
    }


def stalled(params: Tree, before: Tree, after: Tree, name: str | None = None) -> jax.Array:
    """Return the share of elements that rounding holds still: float32 [], from 0 to 1.

    An element counts as held if the average is bit for bit the same in both states, though it
    differs from the parameter. Rounded to nearest, such an element does not move until its
    parameter goes farther away. The remedies are `compensated()` and `stochastic()`.

    It reads both averages once, so call it once in a while, in the step or outside of it. The
    states may be many updates apart: `every(n, decay)` needs n updates before it moves. With
    `stochastic()` an element stays by chance, so the share means nothing there. A step that donates
    its state deletes `before`, so keep a copy: `jax.tree.map(jnp.copy, state)`.

    Args:
        params: the parameters that the average should move to, as after the last update.
        before: an earlier state, with the average in it.
        after: a later state of the same optimizer.
        name: which average, where a leaf has several; a key of `averages(opt_state)`.

    Returns:
        The share of the elements that are averaged; 0 where nothing is.

    Raises:
        ValueError: a state holds no average of `params`, or several and no name is given.

    Example:
        >>> import emaopt
        >>> mean = emaopt.moving_average(0.9999)
        >>> params = jnp.array([1.0001, 1.1, 1.0, 2.0])
        >>> before = mean.init(jnp.ones(4))
        >>> stalled(params, before, mean.update(params, before))
        Array(0.25, dtype=float32)
    """
    old, new = match(params, before, name), match(params, after, name)
    number, held = 0.0, jnp.zeros((), jnp.float32)  # a float: an integer would need 32 bits
    for path, p in new.leaves.items():
        if new.stored[path].shadow is None or not is_inexact(p):
            continue
        first, last = (jax.tree.map(in_memory, x.stored[path]) for x in (old, new))
        same = first.shadow == last.shadow
        if last.residue is not None:
            same &= first.residue == last.residue
        away = last.minus(jnp.asarray(p).astype(wide(last.shadow.dtype))) != 0
        held += jnp.sum(same & away, dtype=jnp.float32)
        number += last.shadow.size
    return held / max(number, 1.0)
