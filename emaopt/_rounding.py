"""How a number is stored to which a little is added again and again.

Rounded to nearest, an increment below half a unit in the last place is lost, every time: a float32
average of decay 0.9999 never closes a gap of 1e-3, a bfloat16 one does not move at all. Two ways
out: `compensated` keeps what was lost and adds it next time (twice the memory), `stochastic` rounds
up or down by chance, right on average (half the memory of float32).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """How the leaves of an average are stored. `dtype` None: as wide as the values, or float32."""

    dtype: Any = None
    rounding: str = "nearest"


def compensated(dtype: Any = jnp.float32) -> Accumulator:
    """An `accumulator_dtype` that loses nothing: what rounding took is kept and added next time.

    The state has a `residue` beside the shadow, of the same dtype: float32 takes 8 bytes per
    parameter and is as exact as float64 would be to some 1e-8; bfloat16 takes 4 and has 16 bits.
    Kahan 1965, Neumaier 1974.

    >>> compensated()
    Accumulator(dtype=dtype('float32'), rounding='compensated')
    """
    return Accumulator(_floating("compensated", dtype), "compensated")


def stochastic(dtype: Any = jnp.bfloat16) -> Accumulator:
    """An `accumulator_dtype` of 2 bytes per parameter whose rounding is right on average.

    Up with the probability with which the value lies there between its two neighbours, so that
    increments of any size get through. The price is noise: sqrt(u d / 2), with u one unit in the
    last place (2**-8 to 2**-7 of the element) and d the distance to the values averaged, whatever
    the decay. The bits are a hash of the step, the leaf and the place of the element in it: the
    same in every run, on every mesh. bfloat16 only.

    >>> stochastic()
    Accumulator(dtype=dtype(bfloat16), rounding='stochastic')
    """
    dtype = _floating("stochastic", dtype)
    if dtype != jnp.bfloat16:
        raise ValueError(
            f"dtype={dtype} is not rounded stochastically. Pass bfloat16, or use compensated."
        )
    return Accumulator(dtype, "stochastic")


def as_accumulator(accumulator_dtype: Any) -> Accumulator:
    """What the argument `accumulator_dtype` means: a dtype is rounded to nearest."""
    if accumulator_dtype is None or isinstance(accumulator_dtype, Accumulator):
        return accumulator_dtype or Accumulator()
    return Accumulator(_floating("accumulator_dtype", accumulator_dtype))


def _floating(name: str, dtype: Any) -> np.dtype:
    try:
        known = None if dtype is None else jnp.dtype(dtype)  # of None, NumPy makes float64
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.inexact):
        raise ValueError(f"{name}={dtype} cannot hold an average. Pass a floating dtype.")
    return known


def add(x: jax.Array, low: jax.Array, increment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x + low + increment`, and what rounding took from it; of one dtype.

    Exact for any magnitudes but for the rounding of `low + increment` (Knuth's sum).
    """
    increment = low + increment
    total = x + increment
    part = total - x
    return total, (x - (total - part)) + (increment - part)


def add_stochastically(x: jax.Array, increment: jax.Array, step: jax.Array, leaf: int) -> jax.Array:
    """`x + increment` as bfloat16, up or down by chance; both float32, x a number of bfloat16.

    In units in the last place of bfloat16, where x is whole and the increment keeps all its bits:
    added to x first, it would be rounded to float32, and that rounding is not by chance.
    """
    top = jnp.maximum(jnp.abs(x), jnp.abs(x + increment))
    exponent = jax.lax.bitcast_convert_type(top, jnp.uint32) & jnp.uint32(0x7F800000)
    exponent = jnp.maximum(exponent, jnp.uint32(8 << 23))  # a unit is never below normal numbers
    unit = jax.lax.bitcast_convert_type(exponent - jnp.uint32(7 << 23), jnp.float32)
    per_unit = jax.lax.bitcast_convert_type(jnp.uint32((254 + 7) << 23) - exponent, jnp.float32)
    whole = jnp.floor(x * per_unit)
    part = (x * per_unit - whole) + increment * per_unit
    size = jnp.abs(part)  # away from zero by chance: the numbers are finest near 0
    moved = jnp.floor(size)
    moved += (_uniform(x.shape, step, leaf) < size - moved).astype(jnp.float32)
    rounded = (whole + jnp.sign(part) * moved) * unit
    rounded = jnp.where((increment == 0) | ~jnp.isfinite(top), x + increment, rounded)
    return rounded.astype(jnp.bfloat16)


def _uniform(shape: tuple[int, ...], step: jax.Array, leaf: int) -> jax.Array:
    """Numbers from 0 to 1, float32: a hash of the step, the leaf and the place in it.

    In steps of 2**-31, half a step away from 0: below p with the probability p, to half a step.
    """
    seed = _hash(_hash(step.astype(jnp.uint32)) + jnp.uint32((leaf + 1) * 0x9E3779B9 % 2**32))
    bits = (_hash(_place(shape) ^ seed) >> 1).astype(jnp.int32)
    return (bits.astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2**-31)


def _place(shape: tuple[int, ...]) -> jax.Array:
    """The number of each element, uint32, row by row."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def _hash(x: jax.Array) -> jax.Array:
    """A mixing of 32 bits in which every bit of x moves every bit of the result.

    The multipliers: Chris Wellons' lowbias32.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
