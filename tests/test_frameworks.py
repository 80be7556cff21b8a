"""Flax Linen, NNX, Equinox and plain dicts: what `docs/frameworks.md` shows, asserted."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import emaopt


TX = optax.chain(optax.sgd(0.1), emaopt.ema(0.5))


class Tied(nnx.Module):
    """A Variable in two places."""

    def __init__(self):
        self.encode = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.decode = nnx.Linear(3, 3, rngs=nnx.Rngs(1))
        self.decode.kernel = self.encode.kernel


def optimized(model, wrt=nnx.Param):
    """An optimizer that has made a step."""
    optimizer = nnx.Optimizer(model, TX, wrt=wrt)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, wrt)))
    return model, optimizer


# what one would try, and what helps


VARIABLES = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.zeros(2)}}
STATE = TrainState.create(apply_fn=None, params=VARIABLES["params"], tx=TX)
EQUINOX, STATISTICS = eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, "batch", mode="batch")
BELOW = r"params has the leaves that opt_state averages below '{}'. Pass that part"
MISTAKES = {
    "train state": (
        lambda: emaopt.average(STATE, STATE.opt_state),
        BELOW.format("params"),
    ),
    "variables": (lambda: emaopt.average(VARIABLES, STATE.opt_state), BELOW.format("params")),
    "model and state": (
        lambda: emaopt.average(
            (EQUINOX, STATISTICS), TX.init(eqx.filter(EQUINOX, eqx.is_inexact_array))
        ),
        BELOW.format("0"),
    ),
    "transformation": (
        lambda: emaopt.average(STATE.params, STATE.tx),
        "opt_state holds no average.*pass the state",
    ),
    "nnx.state of the optimizer": (
        lambda: emaopt.average(*map(nnx.state, optimized(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))),
        "opt_state holds no average.*optimizer.opt_state",
    ),
    "tied weights": (
        lambda: emaopt.average(*optimized(Tied())),
        r"params has one Variable in several places, 'decode/kernel', 'encode/kernel',.*"
        r"nnx.state\(model\).*nnx.merge\(nnx.graphdef\(model\), averages\)",
    ),
    "tied weights, swapped": (
        lambda: emaopt.swap(*optimized(Tied())),
        "params has one Variable in several places",
    ),
    "a whole Equinox module": (
        lambda: emaopt.ema(0.5).init(EQUINOX),
        r"params has 'batch' at leaf 'axis_name', which is no array.*eqx.filter\(model",
    ),
    "a whole Equinox module, optimized": (
        lambda: emaopt.momentum(0.1, 0.9).init(EQUINOX),
        r"params has 'batch' at leaf 'axis_name', which is no array.*eqx.filter\(model",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_one_would_try_says_what_to_write(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"(?s)^{message}"):
        call()
