"""Histograms, counted where the arrays are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


BINS = 50


class Histogram(NamedTuple):
    """Of the finite elements of an array. `limits`: the upper end of each bin, float32 [BINS]."""

    least: jax.Array
    most: jax.Array
    number: jax.Array
    total: jax.Array
    squares: jax.Array
    limits: jax.Array
    counts: jax.Array


@jax.jit
def histogram(x: jax.Array) -> Histogram:
    """Of a floating-point array that has elements; bins of one width, the last with its end."""
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
