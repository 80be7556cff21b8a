"""Count histograms on the device that holds the array."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


BINS = 50


class Histogram(NamedTuple):
    """Hold a histogram of the finite elements of an array.

    `least`, `most`: the range, float32 []. `number`: how many elements are finite, int32 [].
    `total`, `squares`: their sum and the sum of their squares, float32 []. `limits`: the upper end
    of each bin, float32 [BINS]. `counts`: the elements in each bin, int32 [BINS].
    """

    least: jax.Array
    most: jax.Array
    number: jax.Array
    total: jax.Array
    squares: jax.Array
    limits: jax.Array
    counts: jax.Array


@jax.jit
def histogram(x: jax.Array) -> Histogram:
    """Count a non-empty floating-point array into bins of equal width.

    The last bin includes its upper end. NaN and infinity are left out.
    """
    x = jnp.asarray(x, jnp.float32).ravel()
    finite = jnp.isfinite(x)
    some = jnp.any(finite)
    least = jnp.where(some, jnp.min(x, where=finite, initial=jnp.inf), 0)
    most = jnp.where(some, jnp.max(x, where=finite, initial=-jnp.inf), 0)
    width = jnp.maximum((most - least) / BINS, jnp.finfo(jnp.float32).tiny)
    place = jnp.clip(jnp.where(finite, (x - least) / width, 0), 0, BINS - 1).astype(jnp.int32)
    counts = jnp.zeros(BINS, jnp.int32).at[place].add(finite.astype(jnp.int32))
    limits = (least + width * jnp.arange(1, BINS + 1, dtype=jnp.float32)).at[-1].set(most)
    x = jnp.where(finite, x, 0)
    return Histogram(least, most, jnp.sum(finite), jnp.sum(x), jnp.sum(x * x), limits, counts)
