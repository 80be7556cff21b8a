"""Every transformation in every place that Optax allows: the same numbers, compiled once."""

import functools

import compare
import compiling
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from train import step_of

import emaopt


def recipe(learning_rate, decay):
    rate = emaopt.exponential_decay(learning_rate, 2, 0.5, staircase=True)
    return optax.chain(
        emaopt.clip_by_global_norm(1.0), emaopt.momentum(rate, 0.9), emaopt.ema(decay)
    )


TRANSFORMATIONS = {
    "gradient_descent": (emaopt.gradient_descent, {"learning_rate": 0.1}),
    "momentum": (emaopt.momentum, {"learning_rate": 0.1, "momentum": 0.9}),
    "nesterov": (emaopt.momentum, {"learning_rate": 0.1, "momentum": 0.9, "use_nesterov": True}),
    "adagrad": (emaopt.adagrad, {"learning_rate": 0.1, "initial_accumulator_value": 0.2}),
    "adadelta": (emaopt.adadelta, {"learning_rate": 0.1, "rho": 0.9, "epsilon": 1e-3}),
    "adam": (
        emaopt.adam,
        {"learning_rate": 0.1, "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-3},
    ),
    "ftrl": (
        emaopt.ftrl,
        {
            "learning_rate": 0.1,
            "learning_rate_power": -0.6,
            "initial_accumulator_value": 0.2,
            "l1_regularization_strength": 0.01,
            "l2_regularization_strength": 0.02,
            "l2_shrinkage_regularization_strength": 0.03,
        },
    ),
    "rmsprop": (
        emaopt.rmsprop,
        {"learning_rate": 0.1, "decay": 0.8, "momentum": 0.5, "epsilon": 1e-3},
    ),
    "rmsprop_centered": (
        emaopt.rmsprop,
        {"learning_rate": 0.1, "decay": 0.8, "momentum": 0.5, "epsilon": 1e-3, "centered": True},
    ),
    "clip_by_value": (emaopt.clip_by_value, {"clip_value_min": -0.5, "clip_value_max": 0.7}),
    "clip_by_norm": (emaopt.clip_by_norm, {"clip_norm": 0.8}),
    "clip_by_average_norm": (emaopt.clip_by_average_norm, {"clip_norm": 0.2}),
    "clip_by_global_norm": (emaopt.clip_by_global_norm, {"clip_norm": 0.8}),
    "ema": (emaopt.ema, {"decay": 0.9}),
    "ema_warmup": (emaopt.ema, {"decay": emaopt.warmup(0.9)}),
    "ema_power": (emaopt.ema, {"decay": emaopt.power(3.0)}),
    "ema_every": (emaopt.ema, {"decay": emaopt.every(2, 0.9)}),
    "recipe": (recipe, {"learning_rate": 0.1, "decay": emaopt.warmup(0.9)}),
}

NUMBERS = {
    name: {k: v for k, v in hyper.items() if not callable(v) and not isinstance(v, bool)}
    for name, (_, hyper) in TRANSFORMATIONS.items()
}

each_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)

close = functools.partial(compare.close, atol=0, of_largest=1e-7)
PARAMS = {
    "w": jnp.asarray([[0.3, -1.0, 2.0], [0.5, 0.1, -0.7]]),
    "b": jnp.asarray([1.0, -0.2, 0.4]),
}
GRADS = [
    jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), PARAMS)
    for key in jax.random.split(jax.random.key(0), 3)
]
NAN = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)


def make(name):
    factory, hyper = TRANSFORMATIONS[name]
    return factory(**hyper)


def own_state(opt_state):
    """The leaves of emaopt's own states, in whatever is around them."""
    is_own = lambda x: isinstance(x, (emaopt.OptimizerState, emaopt.EmaState))
    return jax.tree.leaves([x for x in jax.tree.leaves(opt_state, is_leaf=is_own) if is_own(x)])


@functools.cache
def plain(name):
    """The parameters and the state after all steps, jitted, with nothing around."""
    tx = make(name)
    step = jax.jit(step_of(tx))
    carry = PARAMS, tx.init(PARAMS)
    for grads in GRADS:
        carry = step(carry, grads)
    return carry


# A place is a function of the factory and its arguments. It returns the first carry, a step that
# is to be compiled once, the gradients to feed, and how to read params and state from the carry.


def wrapped(wrap, feed=lambda g: [g], extra=None):
    """An optax wrapper: `wrap(factory, hyper)`. `extra` leaves stand beside the parameters."""
    extra = extra or {}

    def place(factory, hyper):
        tx = wrap(factory, hyper)
        params = PARAMS | extra
        read = lambda carry: ({k: carry[0][k] for k in PARAMS}, carry[1])
        grads = [g | extra for grads in GRADS for g in feed(grads)]
        return (params, tx.init(params)), step_of(tx), grads, read

    return place


def linen(factory, hyper):
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=factory(**hyper))
    state = state.replace(step=jnp.int32(0))  # a Python integer there would be traced twice
    step = lambda state, grads: state.apply_gradients(grads=grads)
    return state, step, GRADS, lambda state: (state.params, state.opt_state)


class Model(nnx.Module):
    def __init__(self):
        self.w, self.b = nnx.Param(PARAMS["w"]), nnx.Param(PARAMS["b"])


def nnx_optimizer(factory, hyper):
    model = Model()
    carry = nnx.split((model, nnx.Optimizer(model, factory(**hyper), wrt=nnx.Param)))

    def step(carry, grads):
        model, optimizer = nnx.merge(*carry)
        optimizer.update(model, nnx.State(jax.tree.map(nnx.Param, grads)))
        return nnx.split((model, optimizer))

    def read(carry):
        model, optimizer = nnx.merge(*carry)
        return nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(optimizer.opt_state)

    return carry, step, GRADS, read


def injected(factory, hyper):
    static = [name for name, value in hyper.items() if callable(value)]
    return optax.inject_hyperparams(factory, static_args=static)(**hyper)


OTHER = {"other": jnp.asarray([5.0, 6.0])}
ours = {"w": True, "b": True, "other": False}

PLACES = {
    "chain": wrapped(lambda f, h: optax.chain(optax.identity(), f(**h))),
    "named_chain": wrapped(lambda f, h: optax.named_chain(("it", f(**h)))),
    "masked": wrapped(lambda f, h: optax.masked(f(**h), ours), extra=OTHER),
    "partition": wrapped(
        lambda f, h: optax.partition({True: f(**h), False: optax.set_to_zero()}, ours), extra=OTHER
    ),
    # two gradients that are the same have that one for their mean
    "multi_steps": wrapped(
        lambda f, h: optax.MultiSteps(f(**h), 2).gradient_transformation(), feed=lambda g: [g, g]
    ),
    "apply_if_finite": wrapped(
        lambda f, h: optax.apply_if_finite(f(**h), 5), feed=lambda g: [NAN, g]
    ),
    "inject_hyperparams": wrapped(injected),
    "linen_train_state": linen,
    "nnx_optimizer": nnx_optimizer,
}


@pytest.mark.many(1)
@each_transformation
@pytest.mark.parametrize("place", PLACES)
def test_in_every_place_the_numbers_are_the_plain_ones_compiled_once(name, place):
    carry, step, feed, read = PLACES[place](*TRANSFORMATIONS[name])
    step = compiling.jit(step)
    # optax.MultiSteps itself mixes dtypes
    with jax.numpy_dtype_promotion("standard" if place == "multi_steps" else "strict"):
        for grads in feed:
            carry = step(carry, grads)
    params, opt_state = read(carry)
    close(jax.tree.leaves(params), jax.tree.leaves(plain(name)[0]))
    close(own_state(opt_state), own_state(plain(name)[1]))
    assert compiling.compilations(step) == 1


@pytest.mark.many(2)
@each_transformation
def test_jitted_as_op_by_op(name):
    tx = make(name)
    carry = PARAMS, tx.init(PARAMS)
    with jax.disable_jit():
        for grads in GRADS:
            carry = step_of(tx)(carry, grads)
    close(plain(name), carry)


@pytest.mark.many(2)
@each_transformation
def test_a_scan_is_the_loop(name):
    tx = make(name)
    grads = jax.tree.map(lambda *g: jnp.stack(g), *GRADS)
    scan = jax.jit(lambda carry: jax.lax.scan(lambda c, g: (step_of(tx)(c, g), None), carry, grads))
    close(scan((PARAMS, tx.init(PARAMS)))[0], plain(name))


@pytest.mark.many(2)
@each_transformation
def test_an_ensemble_under_vmap_is_its_members(name):
    tx = make(name)
    scales = (1.0, -0.5, 3.0)
    member = lambda tree, scale: jax.tree.map(lambda x: x * scale, tree)
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)

    step = compiling.jit(jax.vmap(step_of(tx)))
    params = stack([member(PARAMS, s) for s in scales])
    ensemble = params, jax.vmap(tx.init)(params)
    one_step = jax.jit(step_of(tx))
    members = [(member(PARAMS, s), tx.init(member(PARAMS, s))) for s in scales]
    for grads in GRADS:
        ensemble = step(ensemble, stack([member(grads, s) for s in scales]))
        members = [one_step(m, member(grads, s)) for m, s in zip(members, scales, strict=True)]
    close(ensemble, stack(members))
    assert compiling.compilations(step) == 1


@pytest.mark.many(2)
@each_transformation
def test_a_donated_step_reuses_every_buffer(name):
    tx = make(name)
    step = jax.jit(step_of(tx), donate_argnums=0)
    params = jax.tree.map(jnp.copy, PARAMS)
    carry = params, tx.init(params)
    for grads in GRADS:
        old, carry = carry, step(carry, grads)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    close(carry, plain(name))


@pytest.mark.many(2)
@each_transformation
def test_hyper_parameters_may_be_traced(name):
    factory, hyper = TRANSFORMATIONS[name]

    def run(numbers):
        tx = factory(**hyper | numbers)
        carry = PARAMS, tx.init(PARAMS)
        for grads in GRADS:
            carry = step_of(tx)(carry, grads)
        return carry

    traced = compiling.jit(run)
    half = {k: v / 2 for k, v in NUMBERS[name].items()}
    close(traced(NUMBERS[name]), plain(name))
    close(traced(half), run(half))
    assert compiling.compilations(traced) == 1


@pytest.mark.many(2)
@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if NUMBERS[name]])
def test_an_injected_hyper_parameter_may_change_without_recompiling(name):
    factory, hyper = TRANSFORMATIONS[name]
    number = next(iter(NUMBERS[name]))
    tx, changed = injected(factory, hyper), factory(**hyper | {number: hyper[number] / 2})
    step = compiling.jit(step_of(tx))
    params, opt_state = step((PARAMS, tx.init(PARAMS)), GRADS[0])

    opt_state.hyperparams[number] = opt_state.hyperparams[number] / 2
    got = step((params, opt_state), GRADS[1])
    expected = step_of(changed)((params, opt_state.inner_state), GRADS[1])
    close((got[0], got[1].inner_state), expected)
    assert compiling.compilations(step) == 1


COPY = emaopt.ema(0)
SGD = emaopt.gradient_descent(0.1)
# the chain; whether the average is the parameters; whether it counts the steps that were made
WRONG_PLACES = {
    "last": (optax.chain(SGD, COPY), True, True),
    "before the optimizer": (optax.chain(COPY, SGD), False, True),
    "before the clipping": (optax.chain(SGD, COPY, optax.clip(0.01)), False, True),
    "inside MultiSteps": (optax.MultiSteps(optax.chain(SGD, COPY), 2), True, True),
    "outside MultiSteps": (optax.chain(optax.MultiSteps(SGD, 2), COPY), True, False),
}


@pytest.mark.many(2)
@pytest.mark.parametrize("place", WRONG_PLACES)
def test_a_wrong_place_shows_with_decay_0(place):
    tx, copies, counts = WRONG_PLACES[place]
    params, opt_state = PARAMS, tx.init(PARAMS)
    made = 0
    for _ in range(2):
        before = params
        with jax.numpy_dtype_promotion("standard"):  # MultiSteps mixes integers and floats
            params, opt_state = emaopt.apply_gradients(tx, GRADS[0], params, opt_state)
        made += not jax.tree.all(jax.tree.map(jnp.array_equal, before, params))
    (state,) = emaopt.averages(opt_state).values()
    averaged = emaopt.average(params, opt_state)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, averaged, params)) == copies
    assert (state.step == made) == counts
