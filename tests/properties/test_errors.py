"""Every error names the argument, what was found, and the fix.

One table for each topic: what is done, how the message begins, and the fix that it names. What can
be seen at construction raises at construction, the rest while tracing. The rows with a sentence for
a name are what new users do wrong first.

Some mistakes cannot be seen, and nothing here pretends to:

* `ema` before the optimizer, or outside `MultiSteps` and `apply_if_finite`: a chain's state is a
  tuple, as is a pair of states that the user holds himself, and jit sorts the dict of a
  `named_chain`. The first sentence of `ema` says where; with decay 0 a wrong place shows
  (`docs/averaging.md`), as `test_places.py` has it.
* Raw parameters evaluated: they are a tree like any other. `docs/frameworks.md` keeps them out of
  the evaluation; checkpoints have the averages where parameters are looked for.
* 0.001 for 0.999, or a function that counts from 0: both are decays. `profile` shows of what.
* `optax.apply_updates` forgotten: the state cannot know. `apply_gradients` does not forget it.
* The state of another run of the same model, or numbers in the order of Optax's arguments.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import check
from flax import nnx
from flax.training.train_state import TrainState

import emaopt
from emaopt import (
    adadelta,
    adagrad,
    adam,
    after,
    apply_gradients,
    average,
    clip_by_average_norm,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    compute_gradients,
    debiased,
    ema,
    every,
    exponential_decay,
    ftrl,
    global_step,
    gradient_descent,
    half_life,
    inverse_gamma,
    matching,
    minimize,
    momentum,
    moving_average,
    names,
    power,
    rmsprop,
    slot,
    swap,
    variables_to_restore,
    warmup,
)


NAN = float("nan")
W = jnp.zeros(2)
PARAMS = {"w": W}
MORE = {"w": W, "b": W}
LONGER = {"w": jnp.zeros(3)}
TWICE = optax.named_chain(("fast", ema(0.9)), ("slow", ema(0.99))).init(PARAMS)
trace = jax.eval_shape

# a model, and what new users do with it
DENSE = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
DENSE_GRADS = jax.tree.map(jnp.ones_like, DENSE)
TX = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(0.99))
STATE = TX.init(DENSE)
TWO = optax.named_chain(("fast", emaopt.ema(0.9)), ("slow", emaopt.ema(0.999))).init(DENSE)
SWAPPED = emaopt.swap(DENSE, STATE)
LINEN = {"params": DENSE, "batch_stats": {"mean": jnp.zeros(3)}}
HALF = jax.tree.map(lambda x: x.astype(jnp.bfloat16), DENSE)


class Model(nnx.Module):
    def __init__(self):
        self.dense, self.drop = (
            nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
            nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
        )


def loss(params):
    return jnp.sum(params["kernel"])


def loss_and_logits(params):
    return loss(params), params["bias"]


def masked(pattern):
    return optax.masked(emaopt.ema(0.99), emaopt.matching(pattern)).init(DENSE)


def train_state():
    return TrainState.create(apply_fn=None, params=DENSE, tx=TX)


def update(tx, updates=PARAMS, params=PARAMS, state=None, init=PARAMS, **extra):
    """Trace one update of a transformation on the state of `init`."""
    state = tx.init(init) if state is None else state
    return trace(lambda *args: tx.update(*args, **extra), updates, state, params)


def decay_function(f):
    return lambda: moving_average(f)


def gradients(loss=lambda p: jnp.sum(p["w"]), **options):
    return lambda: trace(lambda p: compute_gradients(loss, p, **options), PARAMS)


# what is done, how the message begins (the argument, then what was found), and the fix
DECAYS = {
    "negative": (lambda: ema(-0.1), "decay=-0.1", "Pass a number from 0 to 1"),
    "above one": (lambda: ema(1.1), "decay=1.1", "Pass a number from 0 to 1"),
    "nan": (lambda: moving_average(NAN), "decay=nan", "Pass a number from 0 to 1"),
    "text": (lambda: moving_average("0.9"), "decay='0.9'", "Pass a number from 0 to 1"),
    "none": (lambda: moving_average(None), "decay=None", "Pass a number from 0 to 1"),
    "array": (
        lambda: moving_average(np.array([0.9])),
        r"decay=array\(\[0.9\]\)",
        "Pass a number from 0 to 1",
    ),
    "jax array": (
        lambda: moving_average(jnp.float32(2)),
        r"decay=Array\(2",
        "Pass a number from 0 to 1",
    ),
    "under jit": (
        lambda: trace(lambda x: ema(1.5).init(x), W),
        "decay=1.5",
        "Pass a number from 0 to 1",
    ),
    "inside warmup": (lambda: warmup(1.5), "decay=1.5", "Pass a number from 0 to 1"),
    "inside debiased": (lambda: debiased(-0.5), "decay=-0.5", "Pass a number from 0 to 1"),
    "inside every": (lambda: every(2, 1.5), "decay=1.5", "Pass a number from 0 to 1"),
    "inside after": (lambda: after(2, NAN), "decay=nan", "Pass a number from 0 to 1"),
    "function, nan": (
        decay_function(lambda t: NAN),
        r"decay\(t\) is nan at t=1",
        "Return a number from 0 to 1",
    ),
    "function, late": (
        decay_function(lambda t: t / 1000),
        r"decay\(t\) is 10.0 at t=10000",
        "Return a number from 0 to 1",
    ),
    "function, negative": (
        decay_function(lambda t: -0.5),
        r"decay\(t\) is -0.5 at t=1",
        "Return a number from 0 to 1",
    ),
    "function, not a scalar": (
        decay_function(lambda t: jnp.full(2, 0.9)),
        r"decay\(t\) is ShapeDtypeStruct\(shape=\(2,\).*not a scalar",
        "Return a number from 0 to 1",
    ),
    "function, no number": (
        decay_function(lambda t: None),
        r"decay\(t\) is None, not a scalar",
        "Return a number from 0 to 1",
    ),
    "function, math": (
        decay_function(lambda t: math.exp(-t)),
        "decay is a function that looks",
        r"Use jax\.numpy",
    ),
    "function, numpy": (
        decay_function(lambda t: np.exp(-t)),
        "decay is a function that looks",
        r"Use jax\.numpy",
    ),
    "function, int": (
        decay_function(lambda t: 1 / int(t)),
        "decay is a function that looks",
        r"Use jax\.numpy",
    ),
    "debiased one": (lambda: debiased(1.0), "decay=1.0", "Pass a number from 0 to below 1"),
    "debiased function": (
        lambda: debiased(lambda t: 0.9),
        "decay is .*product of all decays",
        "Pass a number",
    ),
    "debiased ramp": (
        lambda: debiased(warmup(0.9)),
        "decay is .*product of all decays",
        "Pass a number",
    ),
    "debiased every ramp": (
        lambda: debiased(every(2, warmup(0.9))),
        "decay is .*product of all",
        "Pass a number",
    ),
    "gamma": (lambda: power(-1), "gamma=-1", "Pass a number above -1"),
    "gamma nan": (lambda: power(NAN), "gamma=nan", "Pass a number above -1"),
    "inv_gamma": (lambda: inverse_gamma(inv_gamma=0), "inv_gamma=0", "Pass a number above 0"),
    "power": (lambda: inverse_gamma(power=-1.0), "power=-1.0", "Pass a number above 0"),
    "minimum": (lambda: inverse_gamma(minimum=-0.1), "minimum=-0.1", "Pass a number from 0 to 1"),
    "maximum": (lambda: inverse_gamma(maximum=1.1), "maximum=1.1", "Pass a number from 0 to 1"),
    "minimum nan": (lambda: inverse_gamma(minimum=NAN), "minimum=nan", "Pass a number from 0 to 1"),
    "minimum above maximum": (
        lambda: inverse_gamma(minimum=0.9, maximum=0.8),
        "minimum=0.9 is above maximum=0.8",
        "Swap them",
    ),
    "half_life zero": (lambda: half_life(0), "updates=0", r"Pass a number above 0, at most 5e\+37"),
    "half_life negative": (
        lambda: half_life(-1.0),
        "updates=-1.0",
        r"Pass a number above 0, at most 5e\+37",
    ),
    "half_life nan": (
        lambda: half_life(NAN),
        "updates=nan",
        r"Pass a number above 0, at most 5e\+37",
    ),
    "every 0": (lambda: every(0, 0.9), "n=0", r"Pass a whole number from 1 to 2\*\*31 - 1"),
    "every negative": (
        lambda: every(-2, 0.9),
        "n=-2",
        r"Pass a whole number from 1 to 2\*\*31 - 1",
    ),
    "every fractional": (
        lambda: every(1.5, 0.9),
        "n=1.5",
        r"Pass a whole number from 1 to 2\*\*31 - 1",
    ),
    "every infinite": (
        lambda: every(math.inf, 0.9),
        "n=inf",
        r"Pass a whole number from 1 to 2\*\*31 - 1",
    ),
    "every nan": (lambda: every(NAN, 0.9), "n=nan", r"Pass a whole number from 1 to 2\*\*31 - 1"),
    "every text": (lambda: every("2", 0.9), "n='2'", r"Pass a whole number from 1 to 2\*\*31 - 1"),
    "after negative": (
        lambda: after(-1, 0.9),
        "start=-1",
        r"Pass a whole number from 0 to 2\*\*31 - 1",
    ),
    "after nan": (
        lambda: after(NAN, 0.9),
        "start=nan",
        r"Pass a whole number from 0 to 2\*\*31 - 1",
    ),
    "a decay in percent": (lambda: emaopt.ema(99.9), r"decay=99\.9", "Pass a number from 0 to 1"),
    "a decay that was not called": (
        lambda: emaopt.ema(emaopt.warmup),
        "decay=warmup is a function that does not make a number of t",
        r"call .* first: warmup\(0\.999\)",
    ),
    "a decay rounded to bfloat16": (
        lambda: emaopt.ema(jnp.bfloat16(0.999)),
        r"decay=1\.0 has dtype bfloat16",
        "Pass a Python number",
    ),
    "a decay rounded by Optax": (
        lambda: optax.inject_hyperparams(emaopt.ema)(decay=0.999).init(HALF),
        r"decay=1\.0 has dtype bfloat16",
        r"hyperparam_dtype=jnp\.float32",
    ),
    "a decay taken for a schedule by Optax": (
        lambda: optax.inject_hyperparams(emaopt.ema)(decay=emaopt.warmup(0.999)).init(DENSE),
        "t=Array.0, dtype=int32. is out of range",
        'static_args="decay"',
    ),
    "a decay that is started later by hand": (
        lambda: emaopt.ema(lambda t: jnp.where(t < 100, 0.0, emaopt.power(7)(t - 99))),
        "t=Array.-98, dtype=int32. is out of range",
        r"To start later: emaopt\.after\(n, decay\)",
    ),
    "a decay that looks at t in Python": (
        lambda: emaopt.ema(lambda t: 0.9 if t < 100 else 0.999),
        "decay is a function that looks at the value of t",
        r"jnp\.where",
    ),
    "every with its arguments exchanged": (
        lambda: emaopt.every(0.999, 10),
        r"n=0\.999",
        "Pass a whole number",
    ),
}
SCHEDULES = {
    "decay_steps negative": (
        lambda: exponential_decay(0.1, -5, 0.9, True),
        "decay_steps=-5",
        "Pass a number above 0",
    ),
    "decay_steps nan": (
        lambda: exponential_decay(0.1, NAN, 0.9),
        "decay_steps=nan",
        "Pass a number above 0",
    ),
    "decay_rate": (
        lambda: exponential_decay(0.1, 10, -0.9),
        "decay_rate=-0.9",
        "Pass a number, 0 or above",
    ),
    "learning_rate": (
        lambda: exponential_decay(NAN, 10, 0.9),
        "learning_rate=nan",
        "Pass a finite number",
    ),
    "the warm-up of an average for the learning rate": (
        lambda: emaopt.adam(emaopt.warmup(0.001)),
        "learning_rate is the decay of an average",
        r"Pass a number or a schedule: .*warmup_constant_schedule",
    ),
    "exponential_decay with TF1's global_step": (
        lambda: emaopt.exponential_decay(0.1, 5, 1000, 0.96),
        r"staircase=0\.96",
        "no global_step here",
    ),
    "exponential_decay over no steps": (
        lambda: emaopt.exponential_decay(0.1, 0, 0.96),
        "decay_steps=0",
        "Pass a number above 0",
    ),
}
CLIPPING = {
    "clip_norm 0": (lambda: clip_by_norm(0.0), "clip_norm=0.0", "Pass a number above 0"),
    "clip_norm negative": (
        lambda: clip_by_average_norm(-1),
        "clip_norm=-1",
        "Pass a number above 0",
    ),
    "clip_norm nan": (lambda: clip_by_global_norm(NAN), "clip_norm=nan", "Pass a number above 0"),
    "clip_norm none": (lambda: clip_by_norm(None), "clip_norm=None", "Pass a number above 0"),
    "bounds crossed": (
        lambda: clip_by_value(2.0, 1.0),
        "clip_value_min=2.0 is above clip_value_max=1.0",
        "Pass two numbers, the smaller one",
    ),
    "bounds crossed in a leaf": (
        lambda: clip_by_value({"a": 0.0, "b": 2.0}, {"a": 1.0, "b": 1.0}),
        "clip_value_min=2.0 is above clip_value_max=1.0",
        "Pass two numbers, the smaller one",
    ),
    "bounds crossed, low a tree": (
        lambda: clip_by_value({"a": 2.0, "b": None}, 1.0),
        "clip_value_min=2.0 is above clip_value_max=1.0",
        "Pass two numbers, the smaller one",
    ),
    "bounds crossed, high a tree": (
        lambda: clip_by_value(2.0, {"a": 3.0, "b": 1.0}),
        "clip_value_min=2.0 is above clip_value_max=1.0",
        "Pass two numbers, the smaller one",
    ),
    "bounds crossed in an element": (
        lambda: clip_by_value(np.array([0.0, 2.0]), 1.0),
        "clip_value_min=.*2.* is above clip_value_max=1.0",
        "Pass two numbers, the smaller one",
    ),
    "bounds nan": (
        lambda: clip_by_value(NAN, 1.0),
        "clip_value_min=nan.*not a number",
        "Pass two numbers, the smaller one",
    ),
    "bounds of other leaves": (
        lambda: clip_by_value({"a": 1.0}, {"b": 2.0}),
        "clip_value_max does not have the tree structure of clip_value_min",
        "Pass clip_value_min and clip_value_max made",
    ),
    "bounds of other leaves than the gradients": (
        lambda: update(clip_by_value(-1.0, {"b": 1.0})),
        "clip_value_max does not have the tree structure of updates",
        "Pass updates and clip_value_max made from the",
    ),
    "bounds of another shape": (
        lambda: update(clip_by_value({"w": np.zeros(3)}, 1.0)),
        r"clip_value_min has shape \(3,\) at a leaf of shape \(2,\)",
        "Pass a scalar, or a tree with an array of the",
    ),
    "bounds of a higher rank": (
        lambda: update(clip_by_value(-1.0, np.ones((2, 2)))),
        r"clip_value_max has shape \(2, 2\) at a leaf of shape \(2,\)",
        "Pass a scalar, or a tree with an array of the",
    ),
    "axes above": (
        lambda: update(clip_by_norm(1.0, 1)),
        r"axes=\(1,\).*leaf 'w'.*1 axes",
        "Clip such leaves apart",
    ),
    "axes below": (
        lambda: update(clip_by_norm(1.0, (0, -2))),
        r"axes=\(0, -2\).*leaf 'w'",
        "Clip such leaves apart",
    ),
    "axes fractional": (
        lambda: clip_by_norm(1.0, 0.5),
        r"axes=\(0.5,\)",
        "Pass an int or a tuple of ints",
    ),
    "axes traced": (
        lambda: optax.inject_hyperparams(clip_by_norm)(1.0, axes=0).init(PARAMS),
        "axes=.*static_args",
        "Pass an int or a tuple of ints",
    ),
    "use_norm": (
        lambda: update(clip_by_global_norm(1.0), use_norm=np.ones(2)),
        r"use_norm has shape \(2,\)",
        "Pass a scalar",
    ),
}
HYPERPARAMETERS = {
    "learning_rate nan": (
        lambda: gradient_descent(NAN),
        "learning_rate=nan",
        "Pass a finite number",
    ),
    "learning_rate infinite": (lambda: adam(math.inf), "learning_rate=inf", "Pass a finite number"),
    "learning_rate text": (
        lambda: momentum("0.1", 0.9),
        "learning_rate='0.1'",
        "Pass a finite number",
    ),
    "learning_rate none": (lambda: rmsprop(None), "learning_rate=None", "Pass a finite number"),
    "momentum nan": (lambda: momentum(0.1, NAN), "momentum=nan", "Pass a finite number"),
    "momentum a schedule": (
        lambda: momentum(0.1, lambda step: 0.9),
        "momentum=<function",
        "Pass a finite number",
    ),
    "rmsprop momentum": (
        lambda: rmsprop(0.1, momentum=math.inf),
        "momentum=inf",
        "Pass a finite number",
    ),
    "rmsprop decay": (lambda: rmsprop(0.1, decay=1.1), "decay=1.1", "Pass a number from 0 to 1"),
    "rmsprop epsilon": (
        lambda: rmsprop(0.1, epsilon=-1e-10, centered=True),
        "epsilon=-1e-10",
        "Pass a number, 0 or above",
    ),
    "adagrad start": (
        lambda: adagrad(0.1, 0.0),
        "initial_accumulator_value=0.0",
        "Pass a number above 0",
    ),
    "adagrad start negative": (
        lambda: adagrad(0.1, -1.0),
        "initial_accumulator_value=-1.0",
        "Pass a number above 0",
    ),
    "adadelta rho": (lambda: adadelta(rho=-0.1), "rho=-0.1", "Pass a number from 0 to 1"),
    "adadelta epsilon": (lambda: adadelta(epsilon=NAN), "epsilon=nan", "Pass a number above 0"),
    "adam beta1": (lambda: adam(beta1=1.5), "beta1=1.5", "Pass a number from 0 to below 1"),
    "adam beta2": (lambda: adam(beta2=-0.5), "beta2=-0.5", "Pass a number from 0 to below 1"),
    "adam epsilon": (lambda: adam(epsilon=-1e-8), "epsilon=-1e-08", "Pass a number, 0 or above"),
    "ftrl learning_rate": (lambda: ftrl(0.0), "learning_rate=0.0", "Pass a number above 0"),
    "ftrl power": (lambda: ftrl(0.1, 0.5), "learning_rate_power=0.5", "Pass a number, 0 or below"),
    "ftrl start": (
        lambda: ftrl(0.1, -0.5, -0.1),
        "initial_accumulator_value=-0.1",
        "Pass a number, 0 or above",
    ),
    "ftrl l1": (
        lambda: ftrl(0.1, l1_regularization_strength=-1.0),
        "l1_regularization_strength=-1.0",
        "Pass a number, 0 or above",
    ),
    "ftrl l2": (
        lambda: ftrl(0.1, l2_regularization_strength=-1.0),
        "l2_regularization_strength=-1.0",
        "Pass a number, 0 or above",
    ),
    "ftrl shrinkage": (
        lambda: ftrl(0.1, l2_shrinkage_regularization_strength=NAN),
        "l2_shrinkage_regularization_strength=nan",
        "Pass a number, 0 or above",
    ),
    "injected": (
        lambda: optax.inject_hyperparams(adagrad)(0.1, -1.0).init(PARAMS),
        r"initial_accumulator_value=Array\(-1",
        "Pass a number above 0",
    ),
    "accumulator_dtype": (
        lambda: ema(0.9, accumulator_dtype=jnp.int32),
        "accumulator_dtype=.*int32",
        "Pass a floating dtype",
    ),
}
TREES = {
    "params missing, ftrl": (
        lambda: update(ftrl(0.1), params=None),
        "params is missing: Ftrl",
        r"Call tx\.update\(grads, state, params\)",
    ),
    "gradients of other leaves": (
        lambda: update(momentum(0.1, 0.9), MORE, MORE),
        r"state.slots\['momentum'\] does not have the tree structure of updates: .* updates: b",
        r"Pass updates and state\.slots\['momentum'\] made",
    ),
    "gradients of other shapes": (
        lambda: update(adagrad(0.1), LONGER, LONGER),
        r"state.slots\['accumulator'\] has shape \(2,\) at leaf 'w' where updates has \(3,\)",
        r"Pass updates and state\.slots\['accumulator'\]",
    ),
    "params of other leaves": (
        lambda: update(gradient_descent(0.1), params=MORE),
        "params does not have the tree structure of updates: only in params: b",
        "Pass updates and params made from the same",
    ),
    "params of other shapes": (
        lambda: update(adam(), params=LONGER),
        r"params has shape \(3,\) at leaf 'w' where updates has \(2,\)",
        "Pass updates and params made from the same",
    ),
    "params absent": (
        lambda: update(rmsprop(0.1), params={"w": None}),
        r"params has nothing at leaf 'w' where updates has \(2,\)",
        "Pass updates and params made from the same",
    ),
    "slot absent": (
        lambda: update(adadelta(), init={"w": None}),
        r"state.slots\['accum'\] has nothing at leaf 'w' where updates has \(2,\)",
        r"Pass updates and state\.slots\['accum'\] made",
    ),
    "state of another optimizer": (
        lambda: update(momentum(0.1, 0.9), state=adam().init(PARAMS)),
        r"state .*\['m', 'v'\].*\['momentum'\]",
        "Pass the state that its own init made",
    ),
    "state of no optimizer": (
        lambda: update(gradient_descent(0.1), state=optax.EmptyState()),
        "state .*EmptyState",
        "Pass the state that its own init made",
    ),
    "state of no average": (
        lambda: update(ema(0.9), state=adam().init(PARAMS)),
        "state is a OptimizerState",
        "Pass the EmaState that its own init made",
    ),
    "values of other leaves": (
        lambda: moving_average(0.9).update(MORE, moving_average(0.9).init(PARAMS)),
        "state.shadow does not have the tree structure of values: only in values: b",
        r"Pass values and state\.shadow made from the",
    ),
    "values of other shapes": (
        lambda: update(ema(0.9), LONGER, LONGER),
        r"state.shadow has shape \(2,\) at leaf 'w' where values has \(3,\)",
        r"Pass values and state\.shadow made from the",
    ),
    "shadow absent": (
        lambda: update(ema(0.9), init={"w": None}),
        r"state.shadow has nothing at leaf 'w' where values has \(2,\)",
        r"Pass values and state\.shadow made from the",
    ),
    "updates of other leaves": (
        lambda: update(ema(0.9), MORE),
        "updates does not have the tree structure of params: only in updates: b",
        "Pass params and updates made from the same",
    ),
    "applied gradients of other leaves": (
        lambda: apply_gradients(optax.sgd(0.1), MORE, PARAMS, optax.sgd(0.1).init(PARAMS)),
        "grads does not have the tree structure of params",
        "Pass params and grads made from the same",
    ),
    "boolean params": (
        lambda: trace(gradient_descent(0.1).init, {"n": jnp.array(True)}),
        "params has dtype bool at leaf 'n'",
        r"Pass parameters alone \(nnx\.state\(model,",
    ),
    "key params": (
        lambda: adagrad(0.1).init({"n": jax.random.key(0)}),
        "params has dtype key<fry> at leaf 'n'",
        r"Pass parameters alone \(nnx\.state\(model,",
    ),
    "integer gradients": (
        lambda: update(momentum(0.1, 0.9), {"w": jnp.zeros(2, jnp.int32)}),
        "updates has dtype int32 at leaf 'w'",
        r"Pass parameters alone \(nnx\.state\(model,",
    ),
    "params not passed to update": (
        lambda: TX.update(DENSE_GRADS, STATE),
        "params is missing: ema",
        r"Call tx\.update\(grads, state, params\)",
    ),
    "an NNX model for its parameters": (
        lambda: TX.init(Model()),
        "params has dtype uint32 at leaf 'drop/rngs/count'",
        r"nnx\.state\(model, nnx\.Param\)",
    ),
    "an NNX optimizer of everything": (
        lambda: nnx.Optimizer(Model(), TX, wrt=nnx.Variable),
        "params has dtype uint32",
        r"nnx\.Param",
    ),
    "integer parameters": (
        lambda: emaopt.adam().init(DENSE | {"bias": jnp.arange(3)}),
        "params has dtype int32 at leaf 'bias'",
        r"optax\.masked",
    ),
}
AVERAGES = {
    "no average to swap": (
        lambda: swap(PARAMS, PARAMS),
        "opt_state holds no average",
        r"Put emaopt\.ema\(decay\) last in the",
    ),
    "unknown name to swap": (
        lambda: swap(PARAMS, TWICE, "slwo"),
        "name='slwo'.*Did you mean 'slow'.*'fast', 'slow'",
        "Pass one of",
    ),
    "other params": (
        lambda: average(MORE | {"w": None}, optax.masked(ema(0.9), {"u": True}).init({"u": W})),
        "params has no leaf 'u'.*it has 'b', 'w'",
        r"Pass the parameters that tx\.init was given",
    ),
    "params of another shape to swap": (
        lambda: swap(LONGER, ema(0.9).init(PARAMS)),
        r"params has shape \(3,\) at leaf 'w' where the average has \(2,\)",
        "Pass the average and params made from the",
    ),
    "no ema in the chain": (
        lambda: emaopt.average(DENSE, emaopt.adam().init(DENSE)),
        "opt_state holds no average",
        r"Put emaopt\.ema\(decay\) last in the optax\.chain",
    ),
    "Optax's ema, which averages updates": (
        lambda: emaopt.average(DENSE, optax.chain(optax.sgd(0.1), optax.ema(0.9)).init(DENSE)),
        "opt_state holds no average",
        r"Put emaopt\.ema",
    ),
    "no average to move to the host": (
        lambda: emaopt.on_host(emaopt.adam().init(DENSE)),
        "opt_state holds no average",
        r"Put emaopt\.ema",
    ),
    "average with its arguments exchanged": (
        lambda: emaopt.average(STATE, DENSE),
        "opt_state holds no average",
        "pass the state .* after params",
    ),
    "the chain for its state": (
        lambda: emaopt.average(DENSE, TX),
        "opt_state holds no average",
        "pass the state that belongs to that chain",
    ),
    "a name misspelt": (
        lambda: emaopt.average(DENSE, TWO, "slwo"),
        "name='slwo'",
        "Did you mean 'slow'.*'fast', 'slow'",
    ),
    "a position for a name": (
        lambda: emaopt.average(DENSE, STATE, 1),
        "name=1 is not an average",
        "Did you mean '1'",
    ),
    "several averages and no name": (
        lambda: emaopt.average(DENSE, TWO),
        "name is missing",
        "Pass name=, one of: 'fast', 'slow'",
    ),
    "a mask that leaves out all": (
        lambda: emaopt.average(DENSE, masked("kernels")),
        "pattern='kernels' is found in no name of the tree",
        "Pass a pattern of names that are there: 'bias', 'kernel'",
    ),
    "the average of swapped parameters": (
        lambda: emaopt.average(*SWAPPED),
        "opt_state is swapped: the averages are in params",
        "Evaluate params, or call .*swap",
    ),
    "training on swapped parameters": (
        lambda: TX.update(DENSE_GRADS, SWAPPED[1], SWAPPED[0]),
        "opt_state is swapped: its shadow holds the parameters",
        r"Call params, opt_state = emaopt\.swap\(params, opt_state\)",
    ),
    "a TrainState for its parameters": (
        lambda: emaopt.average(train_state(), train_state().opt_state),
        "params has the leaves that opt_state averages below 'params'",
        "Pass that part",
    ),
    "Linen's variables for the parameters": (
        lambda: emaopt.average(LINEN, STATE),
        "params has the leaves that opt_state averages below 'params'",
        "Pass that part",
    ),
    "the state of another model": (
        lambda: emaopt.average({"kernel": DENSE["kernel"], "scale": DENSE["bias"]}, STATE),
        "params has no leaf 'bias'.* it has 'kernel', 'scale'",
        r"Pass the parameters that tx\.init was given",
    ),
    "the state of a model of another size": (
        lambda: emaopt.average(DENSE | {"bias": jnp.zeros(4)}, STATE),
        r"params has shape \(4,\) at leaf 'bias' where the average has \(3,\)",
        "made from the same parameters",
    ),
    "moving_average's arguments exchanged": (
        lambda: emaopt.moving_average(0.9).update(emaopt.moving_average(0.9).init(DENSE), DENSE),
        "state is a dict, not an average",
        "Pass the EmaState",
    ),
    "no ledger": (
        lambda: emaopt.ledgers(STATE),
        "opt_state holds no ledger",
        r"emaopt\.ema\(decay, ledger=True\)",
    ),
}
TRAINING = {
    "var_list no mask": (
        gradients(var_list={"w": "w"}),
        "var_list holds 'w'; it is a mask",
        "Pass a tree of booleans like params, or",
    ),
    "var_list arrays": (
        gradients(var_list={"w": W}),
        r"var_list holds float32\[2\]; it",
        "Pass a tree of booleans like params, or",
    ),
    "var_list of other leaves": (
        gradients(var_list=["w"]),
        "var_list does not have the tree structure of params",
        "Pass params and var_list made from the same",
    ),
    "var_list empty": (
        gradients(var_list={"w": False}),
        "var_list leaves out every",
        "Pass a mask that is true somewhere",
    ),
    "minimize": (
        lambda: minimize(jnp.sum, adam(), var_list={"w": 1})(PARAMS, adam().init(PARAMS)),
        "var_list holds 1",
        "Pass a tree of booleans like params, or",
    ),
    "grad_loss": (
        gradients(grad_loss=W),
        r"grad_loss has shape \(2,\).*loss has \(\)",
        "Pass an array like the loss",
    ),
    "loss a number": (
        gradients(lambda p: 3.0),
        "loss returns 3.0",
        "Return a floating-point array, or pass",
    ),
    "loss an integer": (
        gradients(lambda p: jnp.int32(3)),
        r"loss returns int32\[\], which has no gradient",
        "Return a floating-point array, or pass",
    ),
    "loss without aux": (
        gradients(has_aux=True),
        r"has_aux=True, but loss returns float32\[\]",
        r"Return \(value, aux\)",
    ),
    "no gradients": (
        lambda: apply_gradients(adam(), {"w": None}, PARAMS, adam().init(PARAMS)),
        "grads holds no gradient",
        "Pass the grads of compute_gradients",
    ),
    "an optimizer that was not called": (
        lambda: emaopt.minimize(loss, emaopt.adam),
        "tx is a function",
        r"Pass what a call made.* emaopt\.adam\(\)",
    ),
    "TF1's apply_gradients": (
        lambda: emaopt.apply_gradients(DENSE_GRADS, TX, DENSE, STATE),
        "tx is a dict, not a gradient transformation",
        "Pass what a call made",
    ),
    "all that compute_gradients returns for the gradients": (
        lambda: emaopt.apply_gradients(TX, emaopt.compute_gradients(loss, DENSE), DENSE, STATE),
        "grads does not have the tree structure of params: .*only in grads: 0, 1/bias, 1/kernel",
        "Pass params and grads",
    ),
    "a loss with more than a value": (
        lambda: emaopt.minimize(loss_and_logits, TX)(DENSE, STATE),
        r"loss returns \(",
        "pass has_aux=True",
    ),
}
NAMES = {
    "collision": (
        lambda: names({"a": {"b": W}, "a/b": 1.0}),
        r"two leaves are named 'a/b': float32\[2\] and 1.0",
        "Rename one",
    ),
    "pattern": (
        lambda: matching("("),
        r"pattern='\(' is not a regular expression: missing \)",
        r"Pass one, as for re\.search",
    ),
    "pattern none": (
        lambda: matching(None),
        "pattern=None is not a regular expression",
        r"Pass one, as for re\.search",
    ),
    "slot": (
        lambda: slot(adagrad(0.1).init(PARAMS), "accum"),
        r"name='accum' is not a slot. Did you mean 'accumulator'\?.*\['accumulator'\]",
        "Pass one of",
    ),
    "slot of two": (
        lambda: slot(optax.chain(adam(), adam()).init(PARAMS), "m"),
        "name='m' is a slot of 2 optimizers",
        "Pass the state of one of them",
    ),
    "global_step": (
        lambda: global_step(optax.sgd(0.1).init(PARAMS)),
        "opt_state has no step",
        "Pass the state of a chain with one",
    ),
    "moving_average_variables": (
        lambda: variables_to_restore({"kernel": W}, None, ["kernal"]),
        r"moving_average_variables holds 'kernal'.*Did you mean 'kernel'\?",
        "Pass names of leaves",
    ),
    "moving_average_variables text": (
        lambda: variables_to_restore(PARAMS, None, "w"),
        "moving_average_variables='w' is one string",
        "Pass a list of names",
    ),
}
ERRORS = {
    f"{topic}: {name}": row
    for topic, table in {
        "decay": DECAYS,
        "schedule": SCHEDULES,
        "clip": CLIPPING,
        "hyper-parameter": HYPERPARAMETERS,
        "tree": TREES,
        "average": AVERAGES,
        "training": TRAINING,
        "name": NAMES,
    }.items()
    for name, row in table.items()
}


@pytest.mark.many(103)
@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_the_argument_the_finding_and_the_fix(name):
    check(*ERRORS[name])


def test_parameters_given_to_a_step_are_used_up():
    step = emaopt.minimize(loss, TX)
    params, opt_state = jax.tree.map(jnp.copy, (DENSE, STATE))
    step(params, opt_state)
    with pytest.raises(RuntimeError, match="deleted"):  # JAX's own words
        jax.device_get(params)


def test_what_looks_like_a_mistake_and_is_none():
    model = Model()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    averages = emaopt.average(nnx.state(model, nnx.Param), optimizer)
    assert emaopt.names(averages) == emaopt.names(nnx.state(model, nnx.Param))
    assert emaopt.average(DENSE, train_state())["kernel"].shape == (2, 3)
    start = lambda decay: emaopt.moving_average(decay).init({"frozen": True, "phase": 1j}).step
    assert start(jnp.bfloat16(0.5)) == jax.jit(start)(jnp.bfloat16(0.5)) == 0
    whole = emaopt.gradient_descent(1)  # a whole number for the learning rate
    updates, _ = whole.update(DENSE_GRADS, whole.init(DENSE))
    assert updates["bias"].tolist() == [-1, -1, -1]
    assert emaopt.average({}, emaopt.ema(0.9).init({})) == {}


ACCEPTED = {
    "decay": lambda x: moving_average(2 + x).update(W, moving_average(0.5).init(W)),
    "warmup": lambda x: moving_average(warmup(2 + x)).update(W, moving_average(0.5).init(W)),
    "half_life": lambda x: half_life(x - 1)(3),
    "gamma": lambda x: power(x - 2)(3),
    "inverse_gamma": lambda x: inverse_gamma(x - 1, x - 1, 2 + x, x - 1)(3),
    "clip_norm": lambda x: clip_by_global_norm(x - 1).update(W, optax.EmptyState()),
    "bounds": lambda x: clip_by_value(x + 1, x).update(W, optax.EmptyState()),
    "decay_steps": lambda x: exponential_decay(0.1, x, x - 1)(3),
    "optimizer": lambda x: adagrad(x - 1, x - 1).init(W),
    "ftrl": lambda x: ftrl(x - 1, x + 1, x - 1, x - 1, x - 1, x - 1).init(W),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_traced_hyperparameters_are_not_checked_on_the_host(name):
    jax.jit(ACCEPTED[name])(0.0)


EDGES = {
    "decay 0": lambda: ema(0),
    "decay 1": lambda: ema(1.0),
    "n": lambda: every(np.int64(2), 0.9),
    "start 0": lambda: after(0, 0.9),
    "gamma": lambda: power(-0.999),
    "equal bounds": lambda: clip_by_value(1.0, 1.0),
    "infinite bounds": lambda: clip_by_value(-math.inf, math.inf),
    "infinite clip_norm": lambda: clip_by_norm(math.inf),
    "decay_rate": lambda: exponential_decay(0.1, 1e-3, 0),
    "negative learning_rate": lambda: gradient_descent(-0.1),
    "learning_rate 0": lambda: adam(0.0, 0.0, 0.0, 0.0),
    "negative momentum": lambda: momentum(0.1, -0.5),
    "momentum above 1": lambda: rmsprop(0.1, 1.0, 1.5, 0.0),
    "rho": lambda: adadelta(rho=1.0),
    "learning_rate_power 0": lambda: ftrl(0.1, 0.0, 0.0),
}


@pytest.mark.parametrize("name", EDGES)
def test_what_tf1_can_run_is_not_refused(name):
    EDGES[name]()
