"""The weights that an average gives to each past value: its profile."""

import jax
import numpy as np

from emaopt._tree.checks import check_scalar, whole

from .decays import DecayLike, as_decay


def profile(decay: DecayLike, t: int) -> np.ndarray:
    """The weights of an average after t updates: float64 [t + 1], which sum to 1.

    Index 0 is the initial value, index s the value of update s: what it took, and what each later
    update kept of that, `rate(s) * decay(s + 1) * ... * decay(t)`, from the rates that the average
    computes with. On the host; t = 10**6 takes less than a second.

    >>> profile(0.5, 3).tolist()
    [0.125, 0.125, 0.25, 0.5]
    """
    check_scalar("t", t, *whole(0))
    return shares(rates(decay, int(t)))


def rates(decay: DecayLike, t: int) -> np.ndarray:
    """What each of the updates 1, ..., t takes from its value: float64 [t]."""
    # of a power of 2, so that most lengths find what was compiled for another
    updates = np.arange(1, 2 ** max(t - 1, 0).bit_length() + 1, dtype=np.int32)
    return np.clip(np.asarray(jax.vmap(as_decay(decay).rate)(updates), np.float64)[:t], 0, 1)


def shares(taken: np.ndarray) -> np.ndarray:
    """After updates that took so much, the weights: of what was before, and of each update."""
    left = np.cumprod(np.append(1 - taken, 1)[::-1])[::-1]  # by the updates from s + 1 on
    return np.append(1, taken) * left
