"""Averages of a run by each way to batch its samples, for the tests and `benchmarks/units.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import emaopt


HALF_LIFE, SAMPLES = 64, 1024  # in samples
# samples of a batch, batches accumulated, updates between two values of the average
WAYS = [(1, 1, 1), (4, 1, 1), (16, 1, 1), (1, 4, 1), (4, 4, 1), (4, 1, 4), (1, 4, 4), (4, 2, 2)]


def decay_of(batch, accumulated, interval, samples=HALF_LIFE):
    return emaopt.every(interval, emaopt.half_life(samples / (batch * accumulated)))


@functools.cache
def averages(batch, accumulated, interval):
    """Two averages after each batch: of the number of samples seen, and of 1, 0, 0, ..."""
    mean = emaopt.ema(decay_of(batch, accumulated, interval))
    tx = optax.MultiSteps(optax.chain(optax.sgd(accumulated), mean), accumulated)
    params = {"samples": jnp.float32(0), "start": jnp.float32(1)}

    def step(carry, _):
        params, opt_state = carry
        start = jnp.where(params["start"] > 0, 1 / accumulated, 0.0)
        grads = {"samples": jnp.float32(-batch), "start": start}
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (params["samples"], emaopt.average(params, opt_state))

    length = SAMPLES // batch
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps mixes dtypes
        _, history = jax.jit(functools.partial(jax.lax.scan, step, length=length))(
            (params, tx.init(params)), None
        )
    return jax.tree.map(np.asarray, history)
