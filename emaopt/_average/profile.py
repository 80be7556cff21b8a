"""Compute the profile of an average: the weights that it gives to each past value."""

import jax
import numpy as np

from emaopt._tree.checks import check_scalar, whole

from .decay import DecayLike, as_decay


def profile(decay: DecayLike, t: int) -> np.ndarray:
    """Return the weights that an average gives to each past value after t updates.

    The weight of value s is `rate(s) * decay(s + 1) * ... * decay(t)`: the share that update s took
    of it, times the share that each later update kept. The rates are those that the average itself
    computes with. The profile is computed on the host; t = 10**6 takes less than a second.

    Draw it with `matplotlib.pyplot.plot(emaopt.profile(decay, 1000))`.

    Args:
        decay: A number from 0 to 1, or a function of t.
        t: The number of updates, a whole number from 0 on.

    Returns:
        float64 [t + 1], with the sum 1. Index 0 is the initial value, index s the value of
        update s.

    Example:
        >>> profile(0.5, 3).tolist()
        [0.125, 0.125, 0.25, 0.5]
    """
    check_scalar("t", t, *whole(0))
    return shares(rates(decay, int(t)))


def rates(decay: DecayLike, t: int) -> np.ndarray:
    """Return the rate of each of the updates 1, ..., t: float64 [t]."""
    # a power of 2, so that most lengths find what was compiled for another length
    length = 2 ** max(t - 1, 0).bit_length()
    updates = np.arange(1, length + 1, dtype=np.int32)
    found = jax.vmap(as_decay(decay).rate)(updates)
    return np.clip(np.asarray(found, np.float64)[:t], 0, 1)


def shares(rates: np.ndarray) -> np.ndarray:
    """Return the weights of the initial value and of each update, after updates with these rates.

    Args:
        rates: float64 [updates].

    Returns:
        float64 [updates + 1], with the sum 1.
    """
    kept_by_each = np.append(1 - rates, 1)
    kept_by_later_ones = np.cumprod(kept_by_each[::-1])[::-1]
    taken = np.append(1, rates)
    return taken * kept_by_later_ones
