"""What a transformation is shown as: the call that made it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt


def slow(step):
    return 0.1 / (1 + step)


class Schedule:
    def __call__(self, step):
        return 0.1


SHOWN = {
    "gradient_descent(slow)": emaopt.gradient_descent(slow),
    "gradient_descent(slow)  ": emaopt.gradient_descent(partial(slow)),
    "gradient_descent(Schedule)": emaopt.gradient_descent(Schedule()),
    "momentum(0.1, 0.9, use_nesterov=True)": emaopt.momentum(0.1, 0.9, True),
    "adam(0.001)": emaopt.adam(),
    "adam(0.5, beta2=0.99)": emaopt.adam(jnp.float32(0.5), beta1=0.9, beta2=0.99),
    "clip_by_value(-1.0, {...})": emaopt.clip_by_value(-1.0, {"w": 1.0}),
    "clip_by_value(float32[2], None)": emaopt.clip_by_value(np.zeros(2, np.float32), None),
    "clip_by_norm(2.5, axes=(0, 1))": emaopt.clip_by_norm(2.5, axes=(0, 1)),
    "clip_by_average_norm(2.5)": emaopt.clip_by_average_norm(2.5),
    "clip_by_global_norm(2.5)": emaopt.clip_by_global_norm(2.5),
    "on_leaves(clip_by_norm(2.5))": emaopt.on_leaves(emaopt.clip_by_norm(2.5)),
    "heal(ema(warmup(0.999)))": emaopt.heal(emaopt.ema(emaopt.warmup(0.999))),
    "overwrite(2, ema(1.0), outer=optax.chain(...))": emaopt.overwrite(
        2, emaopt.ema(1.0), outer=optax.sgd(0.5)
    ),
    "primal(ftrl(0.1), ema(power(0)), at='z')": emaopt.primal(
        emaopt.ftrl(0.1), emaopt.ema(emaopt.power(0)), at="z"
    ),
    "heal(optax.masked(...))": emaopt.heal(optax.masked(emaopt.ema(0.5), {"w": True})),
}


@pytest.mark.parametrize("text", SHOWN)
def test_a_transformation_is_shown_as_it_was_made(text):
    assert repr(SHOWN[text]) == text.strip()


def test_what_is_shown_is_what_optax_takes():
    assert type(optax.with_extra_args_support(emaopt.adam())) is type(emaopt.adam())
    assert not isinstance(emaopt.clip_by_norm(1.0), optax.GradientTransformationExtraArgs)
    injected = optax.inject_hyperparams(emaopt.adam)(0.5)
    state = injected.init(jnp.ones(2))
    assert set(state.hyperparams) == {"learning_rate", "beta1", "beta2", "epsilon"}


def test_a_number_that_is_not_known_yet_is_shown_as_traced():
    seen = []
    jax.jit(lambda rate: seen.append(repr(emaopt.adam(rate))))(0.1)
    assert seen == ["adam(<traced>)"]


def test_without_its_call_it_is_shown_without_arguments():
    replaced = emaopt.adam()._replace(update=optax.identity().update)
    assert repr(replaced) == "GradientTransformationExtraArgs(...)"
    own = emaopt.heal(optax.GradientTransformation(optax.init_empty_state, partial(slow)))
    assert repr(own) == "heal(GradientTransformation(...))"
