"""Train some parameters by gradients that are given."""

import functools

import jax
import optax


def step_of(tx):
    """Return a step of `tx` as a function: `(params, opt_state), grads -> (params, opt_state)`."""

    def step(carry, grads):
        params, opt_state = carry
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


@functools.partial(jax.jit, static_argnums=0)
@jax.numpy_dtype_promotion("standard")  # Optax mixes dtypes
def step(tx, params, opt_state, grads):
    """Take one step, jitted once for each transformation."""
    return step_of(tx)((params, opt_state), grads)


def history(tx, params, grads, opt_state=None):
    """Return the parameters and the state after each step, one for each of `grads`."""
    opt_state = tx.init(params) if opt_state is None else opt_state
    found = []
    for g in grads:
        params, opt_state = step(tx, params, opt_state, g)
        found.append((params, opt_state))
    return found


def train(tx, params, grads, opt_state=None):
    """Return the parameters and the state after one step for each of `grads`."""
    opt_state = tx.init(params) if opt_state is None else opt_state
    for g in grads:
        params, opt_state = step(tx, params, opt_state, g)
    return params, opt_state
