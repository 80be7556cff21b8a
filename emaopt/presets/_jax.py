"""Average as Optax and Flax do."""

from emaopt._average.decay import Decay
from emaopt._average.decays import after

from ._common import check_shares, named


def optax(step_size: float) -> Decay:
    """Average as Optax's `incremental_update(params, average, step_size)`: `1 - step_size`.

    Optax 0.2.8.

    Example:
        >>> float(optax(0.25)(1))
        0.75
    """
    check_shares(step_size=step_size)
    # inside of `after`, the rate of a number is computed in float64
    return named(after(0, 1 - step_size), "optax", step_size)


def nnx(decay: float) -> Decay:
    """Average as Flax' `nnx.EMA`: decay, from the first update. Flax 0.12.8.

    Example:
        >>> float(nnx(0.75)(1))
        0.75
    """
    check_shares(decay=decay)
    return named(after(0, decay), "nnx", decay)
