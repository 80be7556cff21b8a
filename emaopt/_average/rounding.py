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
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """How the leaves of an average are stored. `dtype` None: as wide as the values, or float32."""

    dtype: Any = None
    rounding: str = "nearest"


def compensated(dtype: DTypeLike = jnp.float32) -> Accumulator:
    """An `accumulator_dtype` that loses nothing: what rounding took is kept and added next time.

    The state has a `residue` beside the shadow, of the same dtype: float32 takes 8 bytes per
    parameter and is as exact as float64 would be to some 1e-8; bfloat16 takes 4 and has 16 bits.
    Kahan 1965, Neumaier 1974.

    >>> compensated()
    Accumulator(dtype=dtype('float32'), rounding='compensated')
    """
    return Accumulator(_floating("compensated", dtype), "compensated")


def stochastic(dtype: DTypeLike = jnp.bfloat16) -> Accumulator:
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


def as_accumulator(accumulator_dtype: DTypeLike | Accumulator | None) -> Accumulator:
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

    By chance twice, since it is rounded twice. The increment, to units in the last place of x as
    float32, with a random part of a unit between -1/2 and 1/2 added before: the sum is exact then.
    The sum, to bfloat16, by cutting it off, with a random part between 0 and 1 added before.
    """
    random = _random(x.shape, step, leaf)
    first, second = random & jnp.uint32(0xFFFF0000), random & jnp.uint32(0xFFFF)
    exponent = jnp.clip(
        _bits(x) & jnp.uint32(0x7F800000), jnp.uint32(24 << 23), jnp.uint32(254 << 23)
    )
    unit = _number(exponent - jnp.uint32(23 << 23))
    part = _number((first >> 9) | jnp.uint32(0x3F800000)) - jnp.float32(1.5 - 2**-17)
    whole = _number(exponent | jnp.uint32(1 << 22))  # what is added to it is rounded to units
    total = x + (((increment + part * unit) + whole) - whole)
    bits = _bits(total)
    bits = jnp.where(jnp.isnan(total), bits, bits + second)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _number(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _random(shape: tuple[int, ...], step: jax.Array, leaf: int) -> jax.Array:
    """32 bits for each element: a hash of the step, the leaf and the place in it."""
    seed = _hash(_hash(step.astype(jnp.uint32)) + jnp.uint32((leaf + 1) * 0x9E3779B9 % 2**32))
    return _hash(_place(shape) ^ seed)


def _place(shape: tuple[int, ...]) -> jax.Array:
    """The number of each element, uint32, row by row."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def _hash(x: jax.Array) -> jax.Array:
    """A mixing of 32 bits in which every bit of x moves every bit of the result.

    The multipliers: Chris Wellons' lowbias32.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
