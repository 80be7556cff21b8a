"""A Haiku network with batch normalization, accumulated gradients and skipped bad steps."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from harness import run

import emaopt


def network(x):
    x = hk.nets.MLP([16, 8], name="mlp")(x)
    return hk.Linear(1, name="head")(x)[:, 0]


MODEL = hk.without_apply_rng(hk.transform(network))
X = jax.random.normal(jax.random.key(1), (32, 4))
Y = jnp.sin(X.sum(axis=1))
TX = optax.apply_if_finite(
    optax.MultiSteps(
        optax.chain(
            emaopt.clip_by_global_norm(1.0),
            emaopt.rmsprop(0.01, momentum=0.9),
            optax.masked(emaopt.ema(emaopt.half_life(2)), emaopt.matching("w$")),
        ),
        every_k_schedule=2,
    ),
    max_consecutive_errors=3,
)


def loss(params):
    return jnp.mean((MODEL.apply(params, X) - Y) ** 2)


def start():
    params = MODEL.init(jax.random.key(0), X)
    return params, TX.init(params)


@jax.jit
def step(params, opt_state, t):
    grads = jax.tree.map(lambda g: jnp.where(t == 1, jnp.nan, g), jax.grad(loss)(params))
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


STEP = jax.jit(step, donate_argnums=(0, 1))


if __name__ == "__main__":
    abstract = lambda: jax.eval_shape(MODEL.init, jax.random.key(0), X)
    run(start, STEP, abstract, jax.jit(loss))
