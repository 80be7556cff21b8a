"""Record what is known of an average without looking at a single parameter.

The weights that an average gives to past values follow from its rates alone. So do the moments of
these weights, one update at a time. The ledger keeps three of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .rounding import add


class Ledger(NamedTuple):
    """Record moments of the weights w(0), ..., w(t) of an average after t updates: float32 [].

    `initial`: w(0), the weight of the initial values. `age`: the mean age of the values, the sum of
    w(s) * (t - s), in updates or in what `advance` counts. `square`: the sum of w(s)**2; 1 / square
    is the effective window, in updates. `lost_initial`, `lost_age`, `lost_square`: what rounding
    took from these three. `stalled` is not used any more. It stays so that checkpoints of 0.1.0 can
    be resumed.
    """

    initial: jax.Array
    age: jax.Array
    square: jax.Array
    stalled: jax.Array
    lost_initial: jax.Array
    lost_age: jax.Array
    lost_square: jax.Array


def start() -> Ledger:
    """Return the ledger of a new average, which consists of its initial values alone."""
    return Ledger(*(jnp.full((), x, jnp.float32) for x in (1, 0, 1, 0, 0, 0, 0)))


def record(ledger: Ledger, rate: jax.Array, advance: Any) -> Ledger:
    """Return the ledger after an update with this rate, which moves t by `advance`.

    Each moment is a compensated sum: over a million updates of a long average, plain float32 would
    lose three digits. At a rate of 1 the average is the new value alone, and each moment is set to
    that of a single weight.
    """
    rate = jnp.asarray(rate).astype(jnp.float32)
    initial = ledger.initial + ledger.lost_initial
    age = ledger.age + ledger.lost_age
    square = ledger.square + ledger.lost_square
    copied = rate >= 1
    units = jnp.asarray(advance).astype(jnp.float32)

    def after(x: jax.Array, lost: jax.Array, increment: jax.Array, of_a_copy: int) -> list:
        new, lost = add(x, lost, increment)
        return [jnp.where(copied, of_a_copy, new), jnp.where(copied, 0, lost)]

    new_initial, lost_initial = after(ledger.initial, ledger.lost_initial, -initial * rate, 0)
    new_age, lost_age = after(ledger.age, ledger.lost_age, units - (age + units) * rate, 0)
    new_square, lost_square = after(
        ledger.square, ledger.lost_square, (square * (rate - 2) + rate) * rate, 1
    )
    return ledger._replace(
        initial=new_initial,
        age=new_age,
        square=new_square,
        lost_initial=lost_initial,
        lost_age=lost_age,
        lost_square=lost_square,
    )
