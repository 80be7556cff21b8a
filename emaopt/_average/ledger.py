"""What is known of an average without looking at a single parameter.

The weights that an average gives to past values follow from its rates alone, and so do their
moments, one update at a time: the ledger keeps three, and the share of the elements that rounding
held still.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .rounding import add


class Ledger(NamedTuple):
    """The record of an average, of its weights w(0), ..., w(t) after t updates; float32 [].

    `initial`: w(0), what the initial values still count. `age`: the mean age in updates, the sum of
    w(s) (t - s). `square`: the sum of w(s)**2; 1 / square is the effective window. `stalled`: see
    `describe`. `lost_...`: what rounding took from the first three.
    """

    initial: jax.Array
    age: jax.Array
    square: jax.Array
    stalled: jax.Array
    lost_initial: jax.Array
    lost_age: jax.Array
    lost_square: jax.Array


def start() -> Ledger:
    """Of an average that is its initial values."""
    return Ledger(*(jnp.full((), x, jnp.float32) for x in (1, 0, 1, 0, 0, 0, 0)))


def advance(ledger: Ledger, rate: jax.Array, stalled: jax.Array) -> Ledger:
    """After an update with this rate; one with rate 0 takes nothing, so nothing could stall."""
    rate = jnp.asarray(rate).astype(jnp.float32)
    old, low = ledger[:3], ledger[4:]
    initial, age, square = map(jnp.add, old, low)
    increments = -initial * rate, 1 - (age + 1) * rate, (square * (rate - 2) + rate) * rate
    new, lost = zip(*map(add, old, low, increments), strict=True)
    copied = rate >= 1
    new = (jnp.where(copied, x, y) for x, y in zip((0, 0, 1), new, strict=True))
    lost = (jnp.where(copied, 0, x) for x in lost)
    return Ledger._make((*new, jnp.where(rate > 0, stalled, ledger.stalled), *lost))
