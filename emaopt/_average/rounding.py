"""Store and round one leaf of an average.

A small increment is added to the same number again and again. Rounded to nearest, an increment
below half a unit in the last place is lost each time: a float32 average of decay 0.9999 never
closes a gap of 1e-3, and a bfloat16 average does not move at all. `Compensated` keeps what was lost
and adds it at the next update (twice the memory). `Stochastic` rounds up or down by chance, which
is right on average (half the memory of float32).
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from emaopt._tree.numbers import wide


class Stored(NamedTuple):
    """Hold one leaf of an average: the shadow, and the residue that rounding took from it."""

    shadow: Any  # None if the leaf is absent
    residue: Any = None

    def value(self) -> jax.Array:
        """Return the stored number: the shadow plus its residue, if it has one."""
        if self.residue is None:
            return self.shadow
        dtype = wide(self.shadow.dtype)
        return self.shadow.astype(dtype) + self.residue.astype(dtype)

    def minus(self, x: jax.Array) -> jax.Array:
        """Return the stored number minus another. The dtype of that one is the arithmetic's.

        The residue is added last. Added to the shadow first, it would be rounded away.
        """
        difference = self.shadow.astype(x.dtype) - x
        if self.residue is None:
            return difference
        return difference + self.residue.astype(x.dtype)


class Draw(NamedTuple):
    """Name the source of the random bits of a leaf: the number of the update and of the leaf."""

    step: jax.Array
    leaf: int


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Choose how an average is stored: `compensated()` and `stochastic()` return one of these.

    Pass it as `accumulator_dtype`. A plain dtype there means rounding to nearest. `dtype` is the
    dtype of the shadow; None means the dtype of the values or float32, whichever is wider.

    >>> isinstance(compensated(), Rounding)
    True
    """

    dtype: Any = None
    has_residue: ClassVar[bool] = False

    def start(self, x: jax.Array) -> Stored:
        """Return a value as an average that starts with it stores it."""
        return Stored(jnp.array(x, self._dtype(x), copy=True))

    def add(self, before: Stored, increment: jax.Array, draw: Draw) -> Stored:
        """Return the leaf after an increment, rounded."""
        raise NotImplementedError

    def move(self, before: Stored, value: jax.Array, rate: Any, draw: Draw) -> Stored:
        """Return the leaf after `shadow -= (shadow - value) * rate`.

        At rate 1 it is the value exactly, and at rate 0 it keeps every bit, whatever the value is.
        """
        share = jnp.asarray(rate).astype(value.dtype)
        new = self.add(before, -before.minus(value) * share, draw)
        if _is_between(rate):
            return new
        copy = self.start(value)
        return jax.tree.map(lambda *x: _taken(rate, *x), new, before, copy)

    def approach(self, before: Stored, value: jax.Array, share: jax.Array, draw: Draw) -> Stored:
        """Return the leaf after many updates with one value: `value + (shadow - value) * share`.

        At share 0 it is the value exactly, whatever the leaf was.
        """
        distance = jnp.where(share == 0, 0, before.minus(value) * share)
        return self.add(Stored(jnp.zeros_like(before.shadow)), value + distance, draw)

    def _dtype(self, x: jax.Array) -> Any:
        return self.dtype or wide(x.dtype)


@dataclasses.dataclass(frozen=True)
class Nearest(Rounding):
    """Round each update to the nearest number of the dtype."""

    def add(self, before: Stored, increment: jax.Array, draw: Draw) -> Stored:
        """Return the leaf after an increment, rounded to nearest."""
        del draw
        total = before.shadow.astype(increment.dtype) + increment
        return Stored(total.astype(before.shadow.dtype))


@dataclasses.dataclass(frozen=True)
class Compensated(Rounding):
    """Keep what rounding takes in a residue, and add it at the next update."""

    has_residue: ClassVar[bool] = True

    def start(self, x: jax.Array) -> Stored:
        """Return a value rounded, and what rounding took from it."""
        shadow = jnp.array(x, self._dtype(x), copy=True)
        return Stored(shadow, (x - shadow.astype(x.dtype)).astype(shadow.dtype))

    def approach(self, before: Stored, value: jax.Array, share: jax.Array, draw: Draw) -> Stored:
        """Return the leaf after many updates with one value: `value + (shadow - value) * share`."""
        distance = jnp.where(share == 0, 0, before.minus(value) * share)
        return self.add(self.start(value), distance, draw)

    def add(self, before: Stored, increment: jax.Array, draw: Draw) -> Stored:
        """Return the leaf after an increment, and what rounding takes from the sum."""
        del draw
        shadow, residue = (x.astype(increment.dtype) for x in before)
        total, lost = add(shadow, residue, increment)
        # two roundings: `lost` is what the sum lost, `total - new` what the narrower dtype loses
        dtype = before.shadow.dtype
        left = (total - total.astype(dtype).astype(total.dtype)) + lost
        # Nothing is above infinity, but XLA does not know it. So the shadow seems to depend on the
        # residue, and XLA on CPU writes the residue first. Otherwise it copies the whole shadow to
        # compute the residue from it. The sum is written down anew: as the same one as in `total`
        # it would be kept in an array between the two.
        total = jnp.where(left > jnp.inf, left, shadow) + (residue + increment)
        return Stored(total.astype(dtype), left.astype(dtype))


@dataclasses.dataclass(frozen=True)
class Stochastic(Rounding):
    """Round each update up or down by chance, which is right on average."""

    def add(self, before: Stored, increment: jax.Array, draw: Draw) -> Stored:
        """Return the leaf after an increment, rounded up or down by chance."""
        shadow = before.shadow.astype(increment.dtype)
        return Stored(add_stochastically(shadow, increment, draw.step, draw.leaf))

    def move(self, before: Stored, value: jax.Array, rate: Any, draw: Draw) -> Stored:
        """Return the leaf after `shadow -= (shadow - value) * rate`.

        The value, too, is rounded by chance at rate 1: it is added to 0. So what goes into the sum
        is chosen, and not what comes out: one sum is rounded in place of two.
        """
        share = jnp.asarray(rate).astype(value.dtype)
        increment = _taken(rate, -before.minus(value) * share, 0, value)
        shadow = before.shadow.astype(value.dtype)
        shadow = _taken(rate, shadow, shadow, 0)
        return self.add(Stored(shadow), increment, draw)


def compensated(dtype: DTypeLike = jnp.float32) -> Compensated:
    """Return an `accumulator_dtype` that loses nothing to rounding.

    What rounding took is kept as `residue` beside the shadow, in the same dtype, and added at the
    next update. In float32 it takes 8 bytes per parameter and is as exact as a float64 average, to
    about 1e-8. In bfloat16 it takes 4 bytes and has about 16 bits of precision.
    Kahan 1965, Neumaier 1974.

    >>> compensated()
    Compensated(dtype=dtype('float32'))
    """
    return Compensated(_floating("compensated", dtype))


def stochastic(dtype: DTypeLike = jnp.bfloat16) -> Stochastic:
    """Return an `accumulator_dtype` of 2 bytes per parameter that is right on average.

    Each update rounds to one of the two neighbours of the exact value, by chance: a value that lies
    a quarter of the way up is rounded up in a quarter of all cases. So increments of any size get
    through. The price is noise with standard deviation sqrt(u * d / 2): u is the spacing of
    bfloat16 at the element, 2**-8 to 2**-7 of it, and d is its distance to the values that are
    averaged. The noise does not depend on the decay. The random bits are a hash of the step, the
    leaf and the position of the element in it, so they are the same in every run and on every mesh.
    `dtype` is bfloat16.

    >>> stochastic()
    Stochastic(dtype=dtype(bfloat16))
    """
    dtype = _floating("stochastic", dtype)
    if dtype != jnp.bfloat16:
        raise ValueError(
            f"dtype={dtype} is not rounded stochastically. Pass bfloat16, or use compensated."
        )
    return Stochastic(dtype)


def as_rounding(accumulator_dtype: DTypeLike | Rounding | None) -> Rounding:
    """Return what the argument `accumulator_dtype` means; a dtype is rounded to nearest."""
    if isinstance(accumulator_dtype, Rounding):
        return accumulator_dtype
    if accumulator_dtype is None:
        return Nearest()
    return Nearest(_floating("accumulator_dtype", accumulator_dtype))


def _floating(name: str, dtype: Any) -> np.dtype:
    try:
        known = None if dtype is None else jnp.dtype(dtype)  # of None, NumPy makes float64
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.inexact):
        raise ValueError(f"{name}={dtype} cannot hold an average. Pass a floating dtype.")
    return known


def _is_between(rate: Any) -> bool:
    """Return whether a rate is known to be above 0 and below 1 when the update is traced.

    Then nothing has to be chosen. A constant decay compiles to the bare formula.
    """
    return isinstance(rate, np.floating) and bool(0 < rate < 1)


def _taken(rate: Any, new: jax.Array, old: Any, value: Any) -> jax.Array:
    """Return the new number; the value itself at rate 1, the old number at rate 0.

    Without this choice a copy would not be exact: `x - (x - value) * 1` is rounded twice. And a
    value of NaN that is not taken would poison the average: `nan * 0` is NaN.
    """
    if _is_between(rate):
        return new
    return jnp.where(rate >= 1, value, jnp.where(rate <= 0, old, new))


def widen(x: jax.Array, dtype: Any) -> jax.Array:
    """Return a value in the dtype of the arithmetic, after it was rounded to its own dtype.

    XLA skips the rounding to bfloat16 where a bfloat16 sum, as that of parameter and update, is
    used in float32 right after. The average would be of parameters that never were.
    `reduce_precision` is a rounding that XLA keeps.
    """
    if x.dtype == jnp.bfloat16:
        x = jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def add(x: jax.Array, low: jax.Array, increment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `x + low + increment`, and what rounding took from that sum. All of one dtype.

    Exact for any magnitudes but for the rounding of `low + increment` (Knuth's two-sum).
    """
    increment = low + increment
    total = x + increment
    part = total - x
    return total, (x - (total - part)) + (increment - part)


def add_stochastically(x: jax.Array, increment: jax.Array, step: jax.Array, leaf: int) -> jax.Array:
    """Return `x + increment` as bfloat16, rounded up or down by chance. Both are float32.

    `x` is a number of bfloat16. The sum is rounded twice, so there is chance twice. First the
    increment is rounded to whole units in the last place of `x` as float32; then the sum is exact.
    Then the sum is rounded to bfloat16. Without the first, an increment below half a unit of
    float32 would be lost before chance could save it.
    """
    random = _random(x.shape, step, leaf)
    first, second = random & jnp.uint32(0xFFFF0000), random & jnp.uint32(0xFFFF)  # 16 bits each
    # the power of 2 below |x|: its exponent bits alone. Not below 2**-103, where a unit would be
    # denormal, which XLA flushes to 0 on CPU; and not infinity.
    exponent = jnp.clip(
        _bits(x) & jnp.uint32(0x7F800000), jnp.uint32(24 << 23), jnp.uint32(254 << 23)
    )
    unit = _number(exponent - jnp.uint32(23 << 23))  # 23 bits of mantissa below the leading one
    # 16 random bits as the mantissa of a number in [1, 2), moved to the middle of [-1/2, 1/2]
    part = _number((first >> 9) | jnp.uint32(0x3F800000)) - jnp.float32(1.5 - 2**-17)
    # 1.5 times that power of 2: a number near it has no bits below a unit, so adding and
    # subtracting it rounds to whole units. 1.5, so that a negative summand stays above the power.
    whole = _number(exponent | jnp.uint32(1 << 22))
    total = x + (((increment + part * unit) + whole) - whole)
    # the upper 16 bits of a float32 are a bfloat16. A random number added to the lower 16 carries
    # into the upper as often as the lower are large. NaN would carry into another number.
    bits = _bits(total)
    bits = jnp.where(jnp.isnan(total), bits, bits + second)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _number(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _random(shape: tuple[int, ...], step: jax.Array, leaf: int) -> jax.Array:
    """Return 32 bits for each element: a hash of the step, the leaf and the place in it."""
    seed = _hash(_hash(step.astype(jnp.uint32)) + jnp.uint32((leaf + 1) * 0x9E3779B9 % 2**32))
    return _hash(_place(shape) ^ seed)


def _place(shape: tuple[int, ...]) -> jax.Array:
    """Return the number of each element, uint32, row by row."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def _hash(x: jax.Array) -> jax.Array:
    """Mix 32 bits so that every bit of x moves every bit of the result.

    The multipliers are those of lowbias32, by Chris Wellons.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
