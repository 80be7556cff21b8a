"""Take roots with a finite derivative at zero, fix an order of reading, and compare shapes."""

from typing import Any

import jax
import jax.numpy as jnp

from emaopt._tree.numbers import is_concrete


@jax.custom_jvp
def sqrt(x):
    """Return the square root, with a derivative of zero at zero.

    The true derivative there is infinite. Times the zero derivative of a square it is NaN: for
    `sqrt(x * x)`, for a norm, and for Adam's `sqrt(v)` at the start.
    """
    return jnp.sqrt(x)


@sqrt.defjvp
def _sqrt_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    root, zero = sqrt(x), x == 0
    slope = jnp.where(zero, 0, 0.5 / jnp.where(zero, 1, root))
    return root, slope * tangent


def after(first: jax.Array, x: jax.Array) -> jax.Array:
    """Return `x` unchanged, but let XLA read it only once `first` is known.

    Nothing is above infinity, but XLA cannot prove that. An optimization barrier would say the
    same, but XLA drops it before it decides what to copy. Without this order a step of Ftrl or
    Adadelta copies a slot, and takes 1.2 to 3 times as long on a CPU.
    """
    return jnp.where(first > jnp.inf, first, x)


def root(n: jax.Array, q: Any) -> jax.Array:
    """Return `n**q`. TF1's kernel takes the square root for its default power.

    The derivative at zero is zero, as for `sqrt`.
    """
    if is_concrete(q) and q == 0.5:
        return sqrt(n)
    zero = n == 0
    of_zero = jnp.where(q == 0, 1.0, 0.0).astype(n.dtype)
    power = jnp.where(zero, of_zero, jnp.power(jnp.where(zero, 1, n), q))
    return power if is_concrete(q) else jnp.where(q == 0.5, sqrt(n), power)


def fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Return whether an array of a shape broadcasts to the shape that is wanted."""
    tail = wanted[len(wanted) - len(shape) :]
    return len(shape) <= len(wanted) and all(n in (1, m) for n, m in zip(shape, tail, strict=True))
