"""Bad input: every mistake raises where it is made, names the argument, and says what to do.

What can be seen at construction raises at construction, the rest while tracing. What new users do
wrong first is in `test_mistakes.py`, with the words of each fix, and not repeated here.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


def update(tx, updates=PARAMS, params=PARAMS, state=None, init=PARAMS, **extra):
    """Trace one update of a transformation on the state of `init`."""
    state = tx.init(init) if state is None else state
    return trace(lambda *args: tx.update(*args, **extra), updates, state, params)


def decay_function(f):
    return lambda: moving_average(f)


def gradients(loss=lambda p: jnp.sum(p["w"]), **options):
    return lambda: trace(lambda p: compute_gradients(loss, p, **options), PARAMS)


# what is done, and what the message says: the argument first, then what was found
DECAYS = {
    "negative": (lambda: ema(-0.1), "decay=-0.1"),
    "above one": (lambda: ema(1.1), "decay=1.1"),
    "nan": (lambda: moving_average(NAN), "decay=nan"),
    "text": (lambda: moving_average("0.9"), "decay='0.9'"),
    "none": (lambda: moving_average(None), "decay=None"),
    "array": (lambda: moving_average(np.array([0.9])), r"decay=array\(\[0.9\]\)"),
    "jax array": (lambda: moving_average(jnp.float32(2)), r"decay=Array\(2"),
    "under jit": (lambda: trace(lambda x: ema(1.5).init(x), W), "decay=1.5"),
    "inside warmup": (lambda: warmup(1.5), "decay=1.5"),
    "inside debiased": (lambda: debiased(-0.5), "decay=-0.5"),
    "inside every": (lambda: every(2, 1.5), "decay=1.5"),
    "inside after": (lambda: after(2, NAN), "decay=nan"),
    "function, nan": (decay_function(lambda t: NAN), r"decay\(t\) is nan at t=1"),
    "function, late": (decay_function(lambda t: t / 1000), r"decay\(t\) is 10.0 at t=10000"),
    "function, negative": (decay_function(lambda t: -0.5), r"decay\(t\) is -0.5 at t=1"),
    "function, not a scalar": (
        decay_function(lambda t: jnp.full(2, 0.9)),
        r"decay\(t\) is ShapeDtypeStruct\(shape=\(2,\).*not a scalar",
    ),
    "function, no number": (decay_function(lambda t: None), r"decay\(t\) is None, not a scalar"),
    "function, math": (decay_function(lambda t: math.exp(-t)), "decay is a function that looks"),
    "function, numpy": (decay_function(lambda t: np.exp(-t)), "decay is a function that looks"),
    "function, int": (decay_function(lambda t: 1 / int(t)), "decay is a function that looks"),
    "debiased one": (lambda: debiased(1.0), "decay=1.0"),
    "debiased function": (lambda: debiased(lambda t: 0.9), "decay is .*product of all decays"),
    "debiased ramp": (lambda: debiased(warmup(0.9)), "decay is .*product of all decays"),
    "debiased every ramp": (lambda: debiased(every(2, warmup(0.9))), "decay is .*product of all"),
    "gamma": (lambda: power(-1), "gamma=-1"),
    "gamma nan": (lambda: power(NAN), "gamma=nan"),
    "inv_gamma": (lambda: inverse_gamma(inv_gamma=0), "inv_gamma=0"),
    "power": (lambda: inverse_gamma(power=-1.0), "power=-1.0"),
    "minimum": (lambda: inverse_gamma(minimum=-0.1), "minimum=-0.1"),
    "maximum": (lambda: inverse_gamma(maximum=1.1), "maximum=1.1"),
    "minimum nan": (lambda: inverse_gamma(minimum=NAN), "minimum=nan"),
    "minimum above maximum": (
        lambda: inverse_gamma(minimum=0.9, maximum=0.8),
        "minimum=0.9 is above maximum=0.8",
    ),
    "half_life zero": (lambda: half_life(0), "updates=0"),
    "half_life negative": (lambda: half_life(-1.0), "updates=-1.0"),
    "half_life nan": (lambda: half_life(NAN), "updates=nan"),
    "every 0": (lambda: every(0, 0.9), "n=0"),
    "every negative": (lambda: every(-2, 0.9), "n=-2"),
    "every fractional": (lambda: every(1.5, 0.9), "n=1.5"),
    "every infinite": (lambda: every(math.inf, 0.9), "n=inf"),
    "every nan": (lambda: every(NAN, 0.9), "n=nan"),
    "every text": (lambda: every("2", 0.9), "n='2'"),
    "after negative": (lambda: after(-1, 0.9), "start=-1"),
    "after nan": (lambda: after(NAN, 0.9), "start=nan"),
}
SCHEDULES = {
    "decay_steps negative": (lambda: exponential_decay(0.1, -5, 0.9, True), "decay_steps=-5"),
    "decay_steps nan": (lambda: exponential_decay(0.1, NAN, 0.9), "decay_steps=nan"),
    "decay_rate": (lambda: exponential_decay(0.1, 10, -0.9), "decay_rate=-0.9"),
    "learning_rate": (lambda: exponential_decay(NAN, 10, 0.9), "learning_rate=nan"),
}
CLIPPING = {
    "clip_norm 0": (lambda: clip_by_norm(0.0), "clip_norm=0.0"),
    "clip_norm negative": (lambda: clip_by_average_norm(-1), "clip_norm=-1"),
    "clip_norm nan": (lambda: clip_by_global_norm(NAN), "clip_norm=nan"),
    "clip_norm none": (lambda: clip_by_norm(None), "clip_norm=None"),
    "bounds crossed": (
        lambda: clip_by_value(2.0, 1.0),
        "clip_value_min=2.0 is above clip_value_max=1.0",
    ),
    "bounds crossed in a leaf": (
        lambda: clip_by_value({"a": 0.0, "b": 2.0}, {"a": 1.0, "b": 1.0}),
        "clip_value_min=2.0 is above clip_value_max=1.0",
    ),
    "bounds crossed, low a tree": (
        lambda: clip_by_value({"a": 2.0, "b": None}, 1.0),
        "clip_value_min=2.0 is above clip_value_max=1.0",
    ),
    "bounds crossed, high a tree": (
        lambda: clip_by_value(2.0, {"a": 3.0, "b": 1.0}),
        "clip_value_min=2.0 is above clip_value_max=1.0",
    ),
    "bounds crossed in an element": (
        lambda: clip_by_value(np.array([0.0, 2.0]), 1.0),
        "clip_value_min=.*2.* is above clip_value_max=1.0",
    ),
    "bounds nan": (lambda: clip_by_value(NAN, 1.0), "clip_value_min=nan.*not a number"),
    "bounds of other leaves": (
        lambda: clip_by_value({"a": 1.0}, {"b": 2.0}),
        "clip_value_max does not have the tree structure of clip_value_min",
    ),
    "bounds of other leaves than the gradients": (
        lambda: update(clip_by_value(-1.0, {"b": 1.0})),
        "clip_value_max does not have the tree structure of updates",
    ),
    "bounds of another shape": (
        lambda: update(clip_by_value({"w": np.zeros(3)}, 1.0)),
        r"clip_value_min has shape \(3,\) at a leaf of shape \(2,\)",
    ),
    "bounds of a higher rank": (
        lambda: update(clip_by_value(-1.0, np.ones((2, 2)))),
        r"clip_value_max has shape \(2, 2\) at a leaf of shape \(2,\)",
    ),
    "axes above": (lambda: update(clip_by_norm(1.0, 1)), r"axes=\(1,\).*leaf 'w'.*1 axes"),
    "axes below": (lambda: update(clip_by_norm(1.0, (0, -2))), r"axes=\(0, -2\).*leaf 'w'"),
    "axes fractional": (lambda: clip_by_norm(1.0, 0.5), r"axes=\(0.5,\)"),
    "axes traced": (
        lambda: optax.inject_hyperparams(clip_by_norm)(1.0, axes=0).init(PARAMS),
        "axes=.*static_args",
    ),
    "use_norm": (
        lambda: update(clip_by_global_norm(1.0), use_norm=np.ones(2)),
        r"use_norm has shape \(2,\)",
    ),
}
HYPERPARAMETERS = {
    "learning_rate nan": (lambda: gradient_descent(NAN), "learning_rate=nan"),
    "learning_rate infinite": (lambda: adam(math.inf), "learning_rate=inf"),
    "learning_rate text": (lambda: momentum("0.1", 0.9), "learning_rate='0.1'"),
    "learning_rate none": (lambda: rmsprop(None), "learning_rate=None"),
    "momentum nan": (lambda: momentum(0.1, NAN), "momentum=nan"),
    "momentum a schedule": (lambda: momentum(0.1, lambda step: 0.9), "momentum=<function"),
    "rmsprop momentum": (lambda: rmsprop(0.1, momentum=math.inf), "momentum=inf"),
    "rmsprop decay": (lambda: rmsprop(0.1, decay=1.1), "decay=1.1"),
    "rmsprop epsilon": (lambda: rmsprop(0.1, epsilon=-1e-10, centered=True), "epsilon=-1e-10"),
    "adagrad start": (lambda: adagrad(0.1, 0.0), "initial_accumulator_value=0.0"),
    "adagrad start negative": (lambda: adagrad(0.1, -1.0), "initial_accumulator_value=-1.0"),
    "adadelta rho": (lambda: adadelta(rho=-0.1), "rho=-0.1"),
    "adadelta epsilon": (lambda: adadelta(epsilon=NAN), "epsilon=nan"),
    "adam beta1": (lambda: adam(beta1=1.5), "beta1=1.5"),
    "adam beta2": (lambda: adam(beta2=-0.5), "beta2=-0.5"),
    "adam epsilon": (lambda: adam(epsilon=-1e-8), "epsilon=-1e-08"),
    "ftrl learning_rate": (lambda: ftrl(0.0), "learning_rate=0.0"),
    "ftrl power": (lambda: ftrl(0.1, 0.5), "learning_rate_power=0.5"),
    "ftrl start": (lambda: ftrl(0.1, -0.5, -0.1), "initial_accumulator_value=-0.1"),
    "ftrl l1": (
        lambda: ftrl(0.1, l1_regularization_strength=-1.0),
        "l1_regularization_strength=-1.0",
    ),
    "ftrl l2": (
        lambda: ftrl(0.1, l2_regularization_strength=-1.0),
        "l2_regularization_strength=-1.0",
    ),
    "ftrl shrinkage": (
        lambda: ftrl(0.1, l2_shrinkage_regularization_strength=NAN),
        "l2_shrinkage_regularization_strength=nan",
    ),
    "injected": (
        lambda: optax.inject_hyperparams(adagrad)(0.1, -1.0).init(PARAMS),
        r"initial_accumulator_value=Array\(-1",
    ),
    "accumulator_dtype": (
        lambda: ema(0.9, accumulator_dtype=jnp.int32),
        "accumulator_dtype=.*int32",
    ),
}
TREES = {
    "params missing, ftrl": (lambda: update(ftrl(0.1), params=None), "params is missing: Ftrl"),
    "gradients of other leaves": (
        lambda: update(momentum(0.1, 0.9), MORE, MORE),
        r"state.slots\['momentum'\] does not have the tree structure of updates: .* updates: b",
    ),
    "gradients of other shapes": (
        lambda: update(adagrad(0.1), LONGER, LONGER),
        r"state.slots\['accumulator'\] has shape \(2,\) at leaf 'w' where updates has \(3,\)",
    ),
    "params of other leaves": (
        lambda: update(gradient_descent(0.1), params=MORE),
        "params does not have the tree structure of updates: only in params: b",
    ),
    "params of other shapes": (
        lambda: update(adam(), params=LONGER),
        r"params has shape \(3,\) at leaf 'w' where updates has \(2,\)",
    ),
    "params absent": (
        lambda: update(rmsprop(0.1), params={"w": None}),
        r"params has nothing at leaf 'w' where updates has \(2,\)",
    ),
    "slot absent": (
        lambda: update(adadelta(), init={"w": None}),
        r"state.slots\['accum'\] has nothing at leaf 'w' where updates has \(2,\)",
    ),
    "state of another optimizer": (
        lambda: update(momentum(0.1, 0.9), state=adam().init(PARAMS)),
        r"state .*\['m', 'v'\].*\['momentum'\]",
    ),
    "state of no optimizer": (
        lambda: update(gradient_descent(0.1), state=optax.EmptyState()),
        "state .*EmptyState",
    ),
    "state of no average": (
        lambda: update(ema(0.9), state=adam().init(PARAMS)),
        "state is a OptimizerState",
    ),
    "values of other leaves": (
        lambda: moving_average(0.9).update(MORE, moving_average(0.9).init(PARAMS)),
        "state.shadow does not have the tree structure of values: only in values: b",
    ),
    "values of other shapes": (
        lambda: update(ema(0.9), LONGER, LONGER),
        r"state.shadow has shape \(2,\) at leaf 'w' where values has \(3,\)",
    ),
    "shadow absent": (
        lambda: update(ema(0.9), init={"w": None}),
        r"state.shadow has nothing at leaf 'w' where values has \(2,\)",
    ),
    "updates of other leaves": (
        lambda: update(ema(0.9), MORE),
        "updates does not have the tree structure of params: only in updates: b",
    ),
    "applied gradients of other leaves": (
        lambda: apply_gradients(optax.sgd(0.1), MORE, PARAMS, optax.sgd(0.1).init(PARAMS)),
        "grads does not have the tree structure of params",
    ),
    "boolean params": (
        lambda: trace(gradient_descent(0.1).init, {"n": jnp.array(True)}),
        "params has dtype bool at leaf 'n'",
    ),
    "key params": (
        lambda: adagrad(0.1).init({"n": jax.random.key(0)}),
        "params has dtype key<fry> at leaf 'n'",
    ),
    "integer gradients": (
        lambda: update(momentum(0.1, 0.9), {"w": jnp.zeros(2, jnp.int32)}),
        "updates has dtype int32 at leaf 'w'",
    ),
}
AVERAGES = {
    "no average to swap": (lambda: swap(PARAMS, PARAMS), "opt_state holds no average"),
    "unknown name to swap": (
        lambda: swap(PARAMS, TWICE, "slwo"),
        "name='slwo'.*Did you mean 'slow'.*'fast', 'slow'",
    ),
    "other params": (
        lambda: average(MORE | {"w": None}, optax.masked(ema(0.9), {"u": True}).init({"u": W})),
        "params has no leaf 'u'.*it has 'b', 'w'",
    ),
    "params of another shape to swap": (
        lambda: swap(LONGER, ema(0.9).init(PARAMS)),
        r"params has shape \(3,\) at leaf 'w' where the average has \(2,\)",
    ),
}
TRAINING = {
    "var_list no mask": (gradients(var_list={"w": "w"}), "var_list holds 'w'; it is a mask"),
    "var_list arrays": (gradients(var_list={"w": W}), r"var_list holds float32\[2\]; it"),
    "var_list of other leaves": (
        gradients(var_list=["w"]),
        "var_list does not have the tree structure of params",
    ),
    "var_list empty": (gradients(var_list={"w": False}), "var_list leaves out every"),
    "minimize": (
        lambda: minimize(jnp.sum, adam(), var_list={"w": 1})(PARAMS, adam().init(PARAMS)),
        "var_list holds 1",
    ),
    "grad_loss": (gradients(grad_loss=W), r"grad_loss has shape \(2,\).*loss has \(\)"),
    "loss a number": (gradients(lambda p: 3.0), "loss returns 3.0"),
    "loss an integer": (
        gradients(lambda p: jnp.int32(3)),
        r"loss returns int32\[\], which has no gradient",
    ),
    "loss without aux": (gradients(has_aux=True), r"has_aux=True, but loss returns float32\[\]"),
    "no gradients": (
        lambda: apply_gradients(adam(), {"w": None}, PARAMS, adam().init(PARAMS)),
        "grads holds no gradient",
    ),
}
NAMES = {
    "collision": (
        lambda: names({"a": {"b": W}, "a/b": 1.0}),
        r"two leaves are named 'a/b': float32\[2\] and 1.0",
    ),
    "pattern": (lambda: matching("("), r"pattern='\(' is not a regular expression: missing \)"),
    "pattern none": (lambda: matching(None), "pattern=None is not a regular expression"),
    "slot": (
        lambda: slot(adagrad(0.1).init(PARAMS), "accum"),
        r"name='accum' is not a slot. Did you mean 'accumulator'\?.*\['accumulator'\]",
    ),
    "slot of two": (
        lambda: slot(optax.chain(adam(), adam()).init(PARAMS), "m"),
        "name='m' is a slot of 2 optimizers",
    ),
    "global_step": (lambda: global_step(optax.sgd(0.1).init(PARAMS)), "opt_state has no step"),
    "moving_average_variables": (
        lambda: variables_to_restore({"kernel": W}, None, ["kernal"]),
        r"moving_average_variables holds 'kernal'.*Did you mean 'kernel'\?",
    ),
    "moving_average_variables text": (
        lambda: variables_to_restore(PARAMS, None, "w"),
        "moving_average_variables='w' is one string",
    ),
}
MISTAKES = {
    f"{topic}: {name}": mistake
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
    for name, mistake in table.items()
}
FIX = re.compile(r"\b(Call|Clip|Evaluate|Leave|Pass|Put|Rename|Return|Swap|Use)\b")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_raises_and_the_message_names_argument_finding_and_fix(mistake):
    make, said = MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"(?s)^{said}") as error:
        make()
    message = str(error.value)
    assert FIX.search(message)
    assert message.endswith((".", ")"))


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
