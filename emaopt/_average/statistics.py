"""Measure batch statistics for averaged parameters.

A batch normalization gathers its statistics with the raw parameters. For averaged parameters there
are three policies. *Copy* the newest statistics: nothing to do. *Average* them too:
`moving_average(decay)` of the tree of statistics. *Recalibrate*: measure them again with the
averaged parameters.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from emaopt._tree.checks import check_shape
from emaopt._tree.numbers import is_concrete, is_inexact, wide
from emaopt._tree.paths import State, Tree, is_none, leaf_names

from .decays import power
from .ema import moving_average


_mean = moving_average(power(0))
_update = jax.jit(_mean.update)
_NOTHING = object()
# An old statistic so large that the batch's own vanishes beside it in float32. The new statistic is
# then momentum * _FAR, from which the momentum is known. A power of two, so that this product is
# exact: 1e12 would lose the last bits of a momentum near 1.
_FAR = 2.0**40


def recalibrate(
    forward: Callable[[State, Any], State], statistics: State, batches: Iterable[Any]
) -> State:
    """Measure batch statistics again for averaged parameters: the mean over the batches.

    You need not know the momentum of a layer. A layer computes `momentum * old + (1 - momentum) *
    own`. Three passes over the first batch, each with other old statistics, find the momentum.
    Every other batch is passed once. Frozen statistics are kept. Integers, booleans and keys are
    taken from the last pass. A leaf that `forward` changes in another way is an error. Equinox's
    layers divide their statistics by `1 - momentum**count`: set the count to 0, see
    docs/frameworks.md.

    The variance is the mean of the variances within the batches, as in PyTorch's `update_bn`.
    Izmailov et al., arXiv:1803.05407.

    Args:
        forward: `forward(statistics, batch) -> new statistics`, the forward pass in training mode
            with the averaged parameters. Put `jax.jit` around it. It may donate its statistics.
        statistics: the statistics as training left them, a pytree of float32 or wider. Only frozen
            layers depend on their values.
        batches: anything that `forward` takes, at least one. All count the same, so drop a smaller
            last one.

    Returns:
        The statistics, like `statistics`.

    Raises:
        ValueError: there is no batch, or `forward` does not update a leaf as a running average.

    Example:
        >>> forward = lambda old, x: {"mean": 0.5 * old["mean"] + 0.5 * jnp.mean(x)}
        >>> batches = [jnp.array([1.0, 3.0]), jnp.array([4.0, 8.0])]
        >>> recalibrate(forward, {"mean": jnp.array(7.0)}, batches)
        {'mean': Array(4., dtype=float32)}
    """
    leaves, treedef = jax.tree.flatten(statistics, is_leaf=is_none)
    leaves: list[Any] = [x if x is None else jnp.asarray(x) for x in leaves]
    names = leaf_names(statistics)
    floating = [i for i, x in enumerate(leaves) if x is not None and is_inexact(x)]
    _check_dtypes({names[i]: leaves[i] for i in floating})
    batches = iter(batches)
    first = next(batches, _NOTHING)
    if first is _NOTHING:
        raise ValueError("batches is empty. Pass the batches to measure the statistics on.")

    def run(batch: Any, moving: list[int], value: float) -> list:
        """Return the leaves of the new statistics, where each moving old one is `value`."""
        old = [x if x is None else jnp.copy(x) for x in leaves]  # forward may donate them
        for i in moving:
            old[i] = jnp.full_like(leaves[i], value)
        new = forward(treedef.unflatten(old), batch)
        return _leaves_like(new, names, leaves)

    moving, new, share = _probe(functools.partial(run, first), names, floating)
    state = _mean.init([new[i] for i in moving])
    state = _update([new[i] for i in moving], state)
    for batch in batches:
        new = run(batch, moving, 0.0)
        state = _update([new[i] for i in moving], state)

    result = [
        jnp.copy(x) if x is not None and is_inexact(x) else y
        for x, y in zip(leaves, new, strict=True)
    ]
    for i, mean in zip(moving, state.shadow, strict=True):
        _check_finite(names[i], mean)
        result[i] = mean / share[i]
    return treedef.unflatten(result)


def _probe(
    run: Callable[[list[int], float], list], names: list[str], floating: list[int]
) -> tuple[list[int], list, dict[int, jax.Array]]:
    """Find which statistics move on a batch, and by which share each takes the batch's own.

    Args:
        run: gets the numbers of the leaves that move, and the old value to give them. It returns
            the leaves of the new statistics.
        names: the name of each leaf.
        floating: the numbers of the leaves that may move.

    Returns:
        The numbers of the leaves that move, the new leaves from old ones of zero, and
        `1 - momentum` of each leaf that moves.
    """
    moving = floating
    while True:
        at_zero, at_far = run(moving, 0.0), run(moving, _FAR)
        moved = [i for i in moving if not _is_kept(at_zero[i], at_far[i])]
        if not moved:
            raise ValueError(
                "forward changes no floating-point leaf of statistics. Run the model in training "
                "mode (use_running_average=False) and return what it makes of its statistics."
            )
        if moved == moving:
            break
        moving = moved  # once more: what is frozen is used as it is

    at_one = run(moving, 1.0)
    share = {i: 1 - (at_far[i] - at_zero[i]) / _FAR for i in moving}
    for i in moving:
        _check_average(names[i], share[i], at_zero[i], at_one[i])
    return moving, at_zero, share


def _is_kept(at_zero, at_far) -> bool:
    return bool(jnp.all(at_zero == 0) & jnp.all(at_far == _FAR))


def _leaves_like(new: Tree, names: list[str], leaves: list) -> list:
    found = leaf_names(new)
    if found != names:
        raise ValueError(
            f"forward returns the leaves {', '.join(found) or 'of nothing'} where statistics has "
            f"{', '.join(names)}. Return the new statistics alone, in the structure of statistics."
        )
    new_leaves = jax.tree.leaves(new, is_leaf=is_none)
    for name, x, y in zip(names, leaves, new_leaves, strict=True):
        if x is not None:
            check_shape(name, statistics=x, **{"forward(statistics, batch)": y})
        if not is_concrete(y):
            raise ValueError(
                "forward returns traced values, and recalibrate has to look at them. Call it "
                "outside of jit, with a jitted forward."
            )
    return new_leaves


def _check_dtypes(leaves: dict[str, Any]) -> None:
    if not leaves:
        raise ValueError(
            "statistics has no floating-point leaf, so there is nothing to measure. Pass the "
            'statistics of the model: variables["batch_stats"], nnx.state(model, nnx.BatchStat).'
        )
    for name, x in leaves.items():
        if wide(x.dtype) != x.dtype:
            raise ValueError(
                f"statistics is {x.dtype} at leaf {name!r}, where a momentum near 1 cannot be told "
                "from 1. Keep running averages in float32."
            )


def _check_average(name: str, share, at_zero, at_one) -> None:
    """Raise unless new = (1 - share) * old + share * own, with a share above 0 and at most 1."""
    _check_finite(name, at_zero)
    eps = float(jnp.finfo(at_zero.dtype).eps)
    off = jnp.abs(at_one - at_zero - (1 - share))
    straight = off <= eps**0.5 * jnp.max(jnp.abs(at_zero), initial=0.0) + 8 * eps
    if not jnp.all((jnp.real(share) > 0) & (jnp.real(share) <= 1) & straight):
        raise ValueError(
            f"statistics is not a running average at leaf {name!r}: forward does not make momentum "
            "* old + (1 - momentum) * own of it, the same for each old value. Leave counters, sums "
            "and what the forward pass itself depends on out of statistics."
        )


def _check_finite(name: str, x) -> None:
    if not jnp.all(jnp.isfinite(x)):
        raise ValueError(
            f"forward makes statistics that are not finite at leaf {name!r}. Look for NaN and "
            "infinity in batches and in the averaged parameters."
        )
