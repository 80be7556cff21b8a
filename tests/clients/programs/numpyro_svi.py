"""Variational inference in numpyro with an Optax chain; averages are of unconstrained values."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from harness import run
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import emaopt


X = jax.random.normal(jax.random.key(1), (40, 3))
Y = X @ jnp.array([1.0, -2.0, 0.5]) + 0.1


def model(x, y=None):
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([3]).to_event(1))
    scale = numpyro.sample("scale", dist.LogNormal(0, 1))
    numpyro.sample("y", dist.Normal(x @ weights, scale), obs=y)


GUIDE = AutoNormal(model)
TX = optax.chain(optax.adam(0.05), emaopt.ema(emaopt.after(1, 0.5)))
SVI_ = SVI(model, GUIDE, numpyro.optim.optax_to_numpyro(TX), Trace_ELBO())
STATE = SVI_.init(jax.random.key(0), X, Y)


def start():
    return STATE.optim_state[1]


@jax.jit
def update(params, opt_state, t):
    key = jax.random.fold_in(jax.random.key(2), t)
    state = STATE._replace(optim_state=(jnp.asarray(t), (params, opt_state)), rng_key=key)
    state, _ = SVI_.update(state, X, Y)
    return state.optim_state[1]


def evaluate(params):
    constrained = SVI_.constrain_fn(params)  # first average, then constrain
    medians = GUIDE.median(constrained)
    return jnp.sum(medians["weights"]) + medians["scale"]


if __name__ == "__main__":
    run(start, update, lambda: STATE.optim_state[1][0], evaluate)
