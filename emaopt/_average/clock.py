"""Move the clock of an average: by how much t grows at an update.

t counts updates by default. With `update(..., advance=n)` it counts what n counts: samples, images,
tokens. The rate of an update is then the rate of its n units taken together, `Decay.over(t, n)`. So
an average has the same length in tokens for every size of a batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from emaopt._tree.checks import LAST_STEP, NOT_NEGATIVE, check_scalar, describe, whole

from .decay import Decay


def as_advance(advance: Any) -> Any:
    """Return the argument `advance` as an int or as an int32 array, or raise.

    The value of a JAX array is not checked, because an update would wait for the device.
    """
    if not isinstance(advance, jax.Array):
        check_scalar("advance", advance, *whole(0))
        return int(advance)
    if advance.shape != () or not jnp.issubdtype(advance.dtype, jnp.integer):
        raise ValueError(
            f"advance is {advance.dtype}[{','.join(map(str, advance.shape))}], and t counts in "
            "whole numbers. Pass one integer: tokens.astype(jnp.int32)."
        )
    return jnp.maximum(advance, 0).astype(jnp.int32)


def as_count(num_updates: Any) -> Any:
    """Return the argument `num_updates`, or raise. The value of a JAX array is not checked."""
    if not isinstance(num_updates, jax.Array):
        check_scalar("num_updates", num_updates, *NOT_NEGATIVE)
    elif num_updates.shape != () or jnp.issubdtype(num_updates.dtype, jnp.complexfloating):
        raise ValueError(
            f"num_updates is {describe(num_updates)}, and t is one number. Pass a scalar."
        )
    return num_updates


def advanced(step: jax.Array, advance: Any) -> jax.Array:
    """Return the step after an update. It stops at 2**31 - 1, as int32 holds no more."""
    if isinstance(advance, int) and advance == 1:
        return jnp.asarray(optax.safe_increment(step))
    n = jnp.asarray(advance, step.dtype)
    return jnp.minimum(step, LAST_STEP - n) + n


def rate_of_update(decay: Decay, t: Any, advance: Any) -> Any:
    """Return the rate of an update that moves t forward by `advance`, to t.

    With an advance of 0 the rate is 0. With the number 1 it is `decay.rate(t)`, bit for bit.
    """
    if isinstance(advance, int) and advance == 1:
        return decay.rate(t)
    t = jnp.asarray(t)
    n = jnp.maximum(advance, 1).astype(t.dtype)
    return jnp.where(advance > 0, decay.over(jnp.maximum(t, n), n), 0)
