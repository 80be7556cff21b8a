"""Choose the averaging length after training: new averages from snapshots of others.

An average is a sum of all past parameters. Its decay alone decides the weights of that sum, its
*profile* (`emaopt.profile`). A sum of snapshots of averages therefore has a known profile too, and
least squares makes that the profile of an average that was never computed. `weights` returns the
factors and `residual` how well they fit, before a single parameter is read; `synthesize` adds up.
Karras et al., arXiv:2312.02696, for power averages; here for any decay and any target.

    weights = posthoc.weights(steps, gammas, at=steps[-1], target=posthoc.gamma(0.15))
    params = posthoc.synthesize(snapshots, weights)

From the checkpoints of a run in one go: `emaopt merge`, or `emaopt.merge.Run`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from emaopt._average.decays import gamma as gamma, sigma_rel as sigma_rel
from emaopt._tree.checks import check_scalar
from emaopt._tree.paths import Params

from ._falls import falls_of
from ._fit import Source as Source, fit, snapshots_of
from ._sum import Sum


THRESHOLD = 0.15


def anneal(
    factors: ArrayLike | Callable[[np.ndarray], ArrayLike],
    at: int,
    every: int = 1,
    on: ArrayLike | None = None,
) -> np.ndarray:
    """Return the target that stands for a learning rate that is brought down.

    An update whose step was multiplied by f is in a share f of the parameters that are averaged. So
    a fall of the factor from one update to the next is the weight of the parameters between them.
    Tian et al., WSM, arXiv:2507.17634.

    Plain checkpoints are averages of decay 0. With `on`, the falls stand on their steps, so their
    sum is exact. With n checkpoints, their weights are those of the range mode of Megatron-LM's
    `weighted_merge.py`, `f(i / n) - f((i + 1) / n)`: `lambda x: 1 - x` gives the plain mean, and
    `lambda x: 1 - np.sqrt(x)` its `minus-sqrt`. As there, the spacing of the checkpoints does not
    matter.

    Args:
        factors: [k], by what the learning rate would have been multiplied at the update that
            follows step `at - k * every`, and `every` updates later, and so on; linear between
            them and 0 in the end. From 1 or less, never rising. With `on`, the factor of each
            stretch between two checkpoints, [n - 1]; or a function of the share of the decay that
            is over, from f(0) = 1 to f(1) = 0.
        at: The update at which the learning rate is 0.
        every: The number of updates from one factor to the next. Not with `on`.
        on: The steps of n checkpoints, rising, at most `at`.

    Returns:
        The weights of the initial parameters and of each update, float64 [at + 1].

    Example:
        >>> anneal([0.75, 0.25], at=3).tolist()
        [0.0, 0.25, 0.5, 0.25]
        >>> anneal([0.75, 0.25], at=6, on=[2, 4, 6]).tolist()
        [0.0, 0.0, 0.25, 0.0, 0.5, 0.0, 0.25]
        >>> anneal(lambda x: 1 - x**2, at=6, on=[3, 6]).tolist()
        [0.0, 0.0, 0.0, 0.25, 0.0, 0.0, 0.75]
    """
    if on is not None:
        return _on_steps(factors, at, every, on)
    if callable(factors):
        raise ValueError(
            "factors is a function, and on is missing. Pass the steps of the checkpoints as on=, "
            "or numbers in place of the function."
        )
    falls = falls_of(factors)
    of_each_update = np.repeat(falls[1:] / every, _count("every", every, at))
    length = len(of_each_update)
    fits = lambda t: (t >= length) & (t % 1 == 0)
    check_scalar("at", at, fits, f"a whole number of updates, {length} or more")
    return np.concatenate([np.zeros(int(at) - length), falls[:1], of_each_update])


def _on_steps(factors: Any, at: int, every: int, on: ArrayLike) -> np.ndarray:
    """Return the falls of the factors on the steps of checkpoints."""
    steps = np.ravel(on)
    whole = len(steps) > 0 and all(step % 1 == 0 for step in steps)
    if not whole or steps[0] < 0 or steps[-1] > at or (np.diff(steps) <= 0).any():
        raise ValueError(
            f"on={on} does not fit. Pass whole numbers of updates that rise, from 0 to at={at}."
        )
    if every != 1:
        raise ValueError(f"every={every} has no meaning with on. Leave it out.")
    weights = np.zeros(int(at) + 1)
    weights[steps.astype(int)] = falls_of(factors, len(steps))
    return weights


def window(n: int, at: int) -> np.ndarray:
    """Return the target that is the mean of the last n updates, as SWA's.

    It is also a learning rate that falls linearly over them, `anneal(1 - arange(n) / n, at)`. From
    cumulative means (gamma 0) at `at` and at `at - n` it comes out exact.

    Args:
        n: The number of updates, from 1 to `at`.
        at: The last update.

    Example:
        >>> window(2, at=3).tolist()
        [0.0, 0.0, 0.5, 0.5]
    """
    return anneal([1.0], at, _count("n", n, at))


def one_minus_sqrt(n: int, at: int, every: int = 1) -> np.ndarray:
    """Return the target that is a 1-sqrt cooldown over the last n updates.

    `anneal(1 - sqrt(arange(0, n, every) / n), at, every)`. The first update alone has the weight
    `sqrt(1 / n)`, which no average of long memory has; with the spacing of the snapshots for
    `every`, it is within reach. Hägele et al., arXiv:2405.18392.

    Args:
        n: The number of updates, from 1 to `at`.
        at: The last update.
        every: The number of updates from one factor to the next, a divisor of n.

    Returns:
        The weights of the initial parameters and of each update, float64 [at + 1].

    Example:
        >>> one_minus_sqrt(4, at=4).round(4).tolist()
        [0.0, 0.5, 0.2071, 0.1589, 0.134]
        >>> one_minus_sqrt(4, at=4, every=2).round(4).tolist()
        [0.0, 0.3536, 0.3536, 0.1464, 0.1464]
    """
    divides = lambda e: (e >= 1) & (_count("n", n, at) % e == 0)
    check_scalar("every", every, divides, f"a divisor of n={n}")
    return anneal(1 - np.sqrt(np.arange(0, n, every) / n), at, every)


def weights(
    steps: ArrayLike,
    gammas: Source | Sequence[Source],
    *,
    at: int,
    target: Source | np.ndarray,
    normalize: bool = True,
    threshold: float = THRESHOLD,
) -> np.ndarray:
    """Find the factors with which snapshots add up to another average.

    By least squares between profiles. Where all are gammas, these are the functions
    `(gamma + 1) * t**gamma / at**(gamma + 1)`, otherwise the exact weights of each update. In
    float64 by QR, which keeps the digits that a Gram matrix loses. Exact weights take
    (averages + 1) * 8 bytes per update, however many snapshots there are: for 10**6 updates a
    second.

    A `residual` above `threshold` is an error. If the parameters were noise, independent from
    update to update, the sum would be off by `residual` times the target's own standard deviation:
    at 0.15, hardly an error. From averages of sigma_rel 0.05 and 0.10, four snapshots are enough
    for 0.033 to 0.167, and 64 for 0.008 to the plain mean.

    Args:
        steps: The updates after which snapshots were taken.
        gammas: The averages that each snapshot holds, as gammas of power averages or as decays
            `t -> decay` (`emaopt.half_life(1000)`). If steps or gammas has repeats, both are of one
            length, a step and an average for each snapshot.
        at: The update after which the target is.
        target: A gamma, a decay, or the weights of the initial parameters and of each update,
            [at + 1] (`window`, `one_minus_sqrt`, `anneal`).
        normalize: Whether the factors are divided by their sum.
        threshold: The largest residual.

    Returns:
        float64 [snapshots], in the order of the steps, and for each step in the order of `gammas`.

    Raises:
        ValueError: The residual is above `threshold`, or an argument does not fit.

    Example:
        >>> exact = weights([2, 4], [0.0], at=4, target=window(2, at=4))  # (4 * m_4 - 2 * m_2) / 2
        >>> exact.round(12).tolist()
        [-1.0, 2.0]
    """
    return fit(snapshots_of(steps, gammas), at, target, normalize, threshold)[0]


def residual(
    steps: ArrayLike,
    gammas: Source | Sequence[Source],
    *,
    at: int,
    target: Source | np.ndarray,
    normalize: bool = True,
) -> float:
    """Return how far the profile of the sum is from the target's: the L2 norm, relative to it.

    0 is exact. No parameter is looked at.

    Args:
        steps: As for `weights`, like the other arguments.
        gammas: The averages that each snapshot holds.
        at: The update after which the target is.
        target: A gamma, a decay, or weights.
        normalize: Whether the factors are divided by their sum.

    Returns:
        A number from 0 on.

    Example:
        >>> last = window(1, at=4)  # the mean of four has a quarter of it, and three more
        >>> round(residual([4], [0.0], at=4, target=last) ** 2, 12)
        0.75
    """
    return fit(snapshots_of(steps, gammas), at, target, normalize)[1]


def synthesize(snapshots: Iterable[Params], weights: ArrayLike) -> Params:
    """Add up snapshots times weights.

    The sum is in float64 on the host, twice the bytes of float32 parameters. Of a sharded array
    each process adds up its own shards, and nothing is gathered.

    Args:
        snapshots: Any iterable of trees, read once and in order. The next is asked for when the
            last is let go, so a generator that loads from disk needs memory for one.
        weights: One number per snapshot, as `weights` returns them.

    Returns:
        A tree like the first snapshot, in its dtypes and shardings. Leaves that are not averaged
        (integers, booleans, keys) are those of the last snapshot with a weight other than 0.

    Example:
        >>> synthesize([{"w": np.float32([1.0])}, {"w": np.float32([4.0])}], [-1.0, 2.0])
        {'w': array([7.], dtype=float32)}
    """
    factors = np.asarray(weights, np.float64)
    if factors.ndim != 1 or not np.isfinite(factors).all() or not factors.any():
        raise ValueError(
            f"weights={factors} is not a list of finite numbers, or all are 0. Pass what "
            "posthoc.weights returns."
        )
    iterator, end, total = iter(snapshots), object(), None
    for i, factor in enumerate(factors.tolist()):
        snapshot = next(iterator, end)
        if snapshot is end:
            raise ValueError(_unequal(f"ends after {i} trees", factors))
        total = total or Sum(snapshot)
        total.add(f"snapshots[{i}]", snapshot, factor)
        del snapshot  # before the next one is made
    if total is None or next(iterator, end) is not end:
        raise ValueError(_unequal("goes on", factors))
    return total.tree()


def _count(name: str, n: int, at: int) -> int:
    fits = lambda n: (n >= 1) & (n <= at) & (n % 1 == 0)
    check_scalar(name, n, fits, f"a whole number of updates, from 1 to at={at}")
    return int(n)


def _unequal(what: str, factors: np.ndarray) -> str:
    return (
        f"snapshots {what}, and weights has {len(factors)} factors. Pass one tree per factor: for "
        "each step all of its averages, in the order of gammas."
    )
