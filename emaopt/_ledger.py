"""What is known of an average without looking at a single parameter.

The weights that an average gives to past values follow from its rates alone, and so do their
moments, one update at a time: the ledger keeps three, and the share of the elements that rounding
held still.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._rounding import add


class Ledger(NamedTuple):
    """The record of an average, of its weights w(0), ..., w(t) after t updates; float32 [].

    `initial`: w(0), what the initial values still count. `age`: the mean age in updates, the sum of
    w(s) (t - s). `square`: the sum of w(s)**2; 1 / square is the effective window. `stalled`: see
    `describe`. `residue`, float32 [3]: what rounding took from the first three.
    """

    initial: jax.Array
    age: jax.Array
    square: jax.Array
    stalled: jax.Array
    residue: jax.Array


def start() -> Ledger:
    """Of an average that is its initial values."""
    number = lambda x: jnp.full((), x, jnp.float32)
    return Ledger(number(1), number(0), number(1), number(0), jnp.zeros(3, jnp.float32))


def advance(ledger: Ledger, rate: jax.Array, stalled: jax.Array) -> Ledger:
    """After an update with this rate; one with rate 0 takes nothing, so nothing could stall."""
    rate = jnp.asarray(rate).astype(jnp.float32)
    old = jnp.stack(ledger[:3])
    initial, age, square = old + ledger.residue
    increment = jnp.stack(
        [-initial * rate, 1 - (age + 1) * rate, (square * (rate - 2) + rate) * rate]
    )
    new, residue = add(old, ledger.residue, increment)
    copied = rate >= 1
    initial, age, square = jnp.where(copied, jnp.array([0, 0, 1], jnp.float32), new)
    residue = jnp.where(copied, 0, residue)
    stalled = jnp.where(rate > 0, stalled, ledger.stalled)
    return Ledger(initial, age, square, stalled, residue)
