"""The seven optimizers: signatures, state, absent gradients, hyper-parameters, and their rules.

TensorFlow's own numbers are in `properties/test_golden.py`; here each rule has a slow sibling in
float64.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import bitwise, close
from jax.sharding import NamedSharding, PartitionSpec
from train import train

import emaopt
from emaopt import OptimizerState


NO_DEFAULT = inspect.Parameter.empty
# TF1's arguments and defaults, without use_locking, name and Ftrl's slot names
SIGNATURES = {
    "gradient_descent": {"learning_rate": NO_DEFAULT},
    "momentum": {"learning_rate": NO_DEFAULT, "momentum": NO_DEFAULT, "use_nesterov": False},
    "adagrad": {"learning_rate": NO_DEFAULT, "initial_accumulator_value": 0.1},
    "adadelta": {"learning_rate": 0.001, "rho": 0.95, "epsilon": 1e-8},
    "adam": {"learning_rate": 0.001, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8},
    "ftrl": {
        "learning_rate": NO_DEFAULT,
        "learning_rate_power": -0.5,
        "initial_accumulator_value": 0.1,
        "l1_regularization_strength": 0.0,
        "l2_regularization_strength": 0.0,
        "l2_shrinkage_regularization_strength": 0.0,
    },
    "rmsprop": {
        "learning_rate": NO_DEFAULT,
        "decay": 0.9,
        "momentum": 0.0,
        "epsilon": 1e-10,
        "centered": False,
    },
}


def slow_gradient_descent(g, p, *, learning_rate):
    return (p - learning_rate * g,)


def slow_momentum(g, p, a, *, learning_rate, momentum, use_nesterov=False):
    a = momentum * a + g
    step = g + momentum * a if use_nesterov else a
    return p - learning_rate * step, a


def slow_adagrad(g, p, a, *, learning_rate, initial_accumulator_value):
    a = a + g**2
    return p - learning_rate * g / np.sqrt(a), a


def slow_adadelta(g, p, a, d, *, learning_rate, rho, epsilon):
    a = rho * a + (1 - rho) * g**2
    u = np.sqrt((d + epsilon) / (a + epsilon)) * g
    return p - learning_rate * u, a, rho * d + (1 - rho) * u**2


def slow_adam(g, p, m, v, *, t, learning_rate, beta1, beta2, epsilon):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    alpha = learning_rate * np.sqrt(1 - beta2**t) / (1 - beta1**t)
    return p - alpha * m / (np.sqrt(v) + epsilon), m, v


def slow_ftrl(g, p, n, z, *, learning_rate, learning_rate_power, **strength):
    l1, l2, shrinkage = (
        strength[f"{s}_regularization_strength"] for s in ("l1", "l2", "l2_shrinkage")
    )
    root = lambda n: n**-learning_rate_power / learning_rate
    z = z + g + 2 * shrinkage * p - (root(n + g**2) - root(n)) * p
    n = n + g**2
    p = np.where(np.abs(z) <= l1, 0, -(z - np.sign(z) * l1) / (root(n) + 2 * l2))
    return p, n, z


def slow_rmsprop(g, p, rms, *rest, learning_rate, decay, momentum, epsilon, centered=False):
    *mg, mom = rest
    rms = decay * rms + (1 - decay) * g**2
    mg = [decay * mean + (1 - decay) * g for mean in mg]
    variance = rms - mg[0] ** 2 if centered else rms
    mom = momentum * mom + learning_rate * g / np.sqrt(variance + epsilon)
    return p - mom, rms, *mg, mom


# factory, hyper-parameters, the slots with their start values, the sibling
OPTIMIZERS = {
    "gradient_descent": (
        emaopt.gradient_descent,
        {"learning_rate": 0.3},
        {},
        slow_gradient_descent,
    ),
    "momentum": (
        emaopt.momentum,
        {"learning_rate": 0.3, "momentum": 0.8},
        {"momentum": 0.0},
        slow_momentum,
    ),
    "nesterov": (
        emaopt.momentum,
        {"learning_rate": 0.3, "momentum": 0.8, "use_nesterov": True},
        {"momentum": 0.0},
        slow_momentum,
    ),
    "adagrad": (
        emaopt.adagrad,
        {"learning_rate": 0.3, "initial_accumulator_value": 0.25},
        {"accumulator": 0.25},
        slow_adagrad,
    ),
    "adadelta": (
        emaopt.adadelta,
        {"learning_rate": 0.3, "rho": 0.7, "epsilon": 0.01},
        {"accum": 0.0, "accum_update": 0.0},
        slow_adadelta,
    ),
    "adam": (
        emaopt.adam,
        {"learning_rate": 0.3, "beta1": 0.6, "beta2": 0.8, "epsilon": 0.05},
        {"m": 0.0, "v": 0.0},
        slow_adam,
    ),
    "ftrl": (
        emaopt.ftrl,
        {
            "learning_rate": 0.3,
            "learning_rate_power": -0.7,
            "initial_accumulator_value": 0.25,
            "l1_regularization_strength": 0.2,
            "l2_regularization_strength": 0.4,
            "l2_shrinkage_regularization_strength": 0.1,
        },
        {"accum": 0.25, "linear": 0.0},
        slow_ftrl,
    ),
    "rmsprop": (
        emaopt.rmsprop,
        {"learning_rate": 0.3, "decay": 0.7, "momentum": 0.5, "epsilon": 0.05},
        {"rms": 1.0, "momentum": 0.0},
        slow_rmsprop,
    ),
    "rmsprop_centered": (
        emaopt.rmsprop,
        {"learning_rate": 0.3, "decay": 0.7, "momentum": 0.5, "epsilon": 0.05, "centered": True},
        {"rms": 1.0, "mg": 0.0, "momentum": 0.0},
        slow_rmsprop,
    ),
}
PARAMS = {"b": jnp.float32(0.5), "w": jnp.array([[1.0, -2.0, 0.0]])}
GRADS = [
    {"b": jnp.float32(b), "w": jnp.array([w], jnp.float32)}
    for b, w in ((1.0, (2.0, -0.5, 0.0)), (-3.0, (0.1, 4.0, 0.0)), (0.5, (-1.0, 0.0, 0.2)))
]

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name, **hyper):
    factory, defaults, _, _ = OPTIMIZERS[name]
    return factory(**(defaults | hyper))


def dtypes(tree):
    return {x.dtype.name for x in jax.tree.leaves(tree)}


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_and_defaults_are_tf1s(name):
    parameters = inspect.signature(getattr(emaopt, name)).parameters
    assert {k: p.default for k, p in parameters.items()} == SIGNATURES[name]
    assert list(parameters) == list(SIGNATURES[name])


@pytest.mark.many(4)
@each_optimizer
def test_the_update_is_that_of_the_slow_sibling(name):
    _, hyper, slots, slow = OPTIMIZERS[name]
    params, state = train(make(name), PARAMS, GRADS)
    for leaf in PARAMS:
        p = np.asarray(PARAMS[leaf], np.float64)
        rows = [np.full_like(p, start) for start in slots.values()]
        for t, g in enumerate(GRADS, start=1):
            clock = {"t": t} if name == "adam" else {}
            p, *rows = slow(np.asarray(g[leaf], np.float64), p, *rows, **clock, **hyper)
        np.testing.assert_allclose(params[leaf], p, rtol=1e-5, atol=1e-6)
        for slot, row in zip(slots, rows, strict=True):
            np.testing.assert_allclose(state.slots[slot][leaf], row, rtol=1e-5, atol=1e-6)


@each_optimizer
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_slots_start_as_in_tf1_in_float32_or_wider(name, dtype, x64):
    _, _, slots, _ = OPTIMIZERS[name]
    params = cast(PARAMS, dtype)
    state = make(name).init(params)
    wide = "float64" if dtype == jnp.float64 else "float32"
    assert list(state.slots) == list(slots)
    for slot, start in slots.items():
        expected = jax.tree.map(lambda p, start=start: np.full(p.shape, start, wide), params)
        bitwise(state.slots[slot], expected)
        assert dtypes(state.slots[slot]) == {wide}
    assert (state.step, state.step.dtype, state.step.shape) == (0, jnp.int32, ())
    assert list(state.powers) == (["beta1_power", "beta2_power"] if name == "adam" else [])
    assert dtypes(state.powers) <= {"float32"}


@each_optimizer
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    tx = make(name)
    params, grads = cast(PARAMS, dtype), cast(GRADS[0], dtype)
    updates, state = tx.update(grads, tx.init(params), params)
    wide = cast(params, jnp.float32)
    expected, expected_state = tx.update(cast(grads, jnp.float32), tx.init(wide), wide)
    bitwise(state, expected_state)
    bitwise(updates, cast(expected, dtype))
    assert dtypes(updates) == {jnp.dtype(dtype).name}


@each_optimizer
def test_the_update_has_the_dtype_of_the_gradient(name):
    tx = make(name)
    updates, state = tx.update(cast(GRADS[0], jnp.bfloat16), tx.init(PARAMS), PARAMS)
    assert dtypes(updates) == {"bfloat16"}
    assert dtypes(state.slots) <= {"float32"}


@pytest.mark.many(1)
@each_optimizer
def test_float64_stays_float64(name, x64):
    tx = make(name)
    params, grads = cast(PARAMS, jnp.float64), cast(GRADS[0], jnp.float64)
    updates, state = tx.update(grads, tx.init(params), params)
    assert dtypes((updates, state.slots)) == {"float64"}


@pytest.mark.many(1)
@each_optimizer
def test_an_absent_gradient_leaves_its_slots(name):
    tx = make(name)
    _, state = train(tx, PARAMS, GRADS)
    update = jax.jit(tx.update)
    updates, after = update({"b": None, "w": GRADS[0]["w"]}, state, PARAMS)
    expected, expected_after = update(GRADS[0], state, PARAMS)
    assert updates["b"] is None
    np.testing.assert_array_equal(updates["w"], expected["w"])
    assert after.step == state.step + 1
    bitwise(after.powers, expected_after.powers)
    for slot in state.slots:
        np.testing.assert_array_equal(after.slots[slot]["b"], state.slots[slot]["b"])
        np.testing.assert_array_equal(after.slots[slot]["w"], expected_after.slots[slot]["w"])


@each_optimizer
def test_an_absent_parameter_has_no_slots(name):
    tx = make(name)
    params = PARAMS | {"frozen": None, "masked": optax.MaskedNode()}
    state = tx.init(params)
    assert all(slot["frozen"] is None for slot in state.slots.values())
    grads = GRADS[0] | {"frozen": None, "masked": optax.MaskedNode()}
    updates, after = tx.update(grads, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    expected, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    bitwise({k: updates[k] for k in PARAMS}, expected)


@each_optimizer
def test_an_empty_tree_only_counts(name):
    tx = make(name)
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert state.step == 1


@each_optimizer
def test_parameters_are_needed_by_ftrl_only(name):
    tx = make(name)
    if name == "ftrl":
        with pytest.raises(ValueError, match="params is missing: Ftrl"):
            tx.update(GRADS[0], tx.init(PARAMS))
    else:
        got = tx.update(GRADS[0], tx.init(PARAMS))
        bitwise(got, tx.update(GRADS[0], tx.init(PARAMS), PARAMS, value=1.0))


@pytest.mark.many(5)
@each_optimizer
def test_a_schedule_is_the_number_at_the_updates_before_this_one(name):
    rates = [0.3, 0.1, 0.2]
    scheduled = make(name, learning_rate=lambda step: jnp.asarray(rates)[step])
    params, state = PARAMS, scheduled.init(PARAMS)
    for rate, g in zip(rates, GRADS, strict=True):
        updates, expected_state = make(name, learning_rate=rate).update(g, state, params)
        got, state = scheduled.update(g, state, params)
        bitwise((got, state), (updates, expected_state))
        params = optax.apply_updates(params, updates)


@pytest.mark.slow
@each_optimizer
def test_every_hyperparameter_can_be_changed_in_the_state_without_compiling_again(name):
    factory, hyper, _, _ = OPTIMIZERS[name]
    tx = optax.inject_hyperparams(factory)(**hyper)
    traces = []

    @jax.jit
    def update(*arguments):
        traces.append(arguments)
        return tx.update(*arguments)

    _, state = train(tx, PARAMS, GRADS)
    bitwise(state.inner_state, train(factory(**hyper), PARAMS, GRADS)[1])
    numbers = {k for k, v in hyper.items() if not isinstance(v, bool)}
    assert set(state.hyperparams) == numbers
    for number in numbers:
        other = state.hyperparams | {number: state.hyperparams[number] * 0.75}
        got, after = update(GRADS[0], state._replace(hyperparams=other), PARAMS)
        plain = factory(**(hyper | {number: float(other[number])}))
        expected = jax.jit(plain.update)(GRADS[0], state.inner_state, PARAMS)
        close((got, after.inner_state), expected, rtol=2e-6)
    assert len(traces) == 1


@pytest.mark.many(4)
@each_optimizer
def test_the_step_counts_and_does_not_overflow(name):
    tx = make(name)
    _, state = train(tx, PARAMS, GRADS)
    assert state.step == len(GRADS)
    last = np.iinfo(np.int32).max
    _, state = tx.update(GRADS[0], state._replace(step=jnp.int32(last)), PARAMS)
    assert state.step == last


def test_the_powers_are_running_products_in_float32():
    tx = emaopt.adam(beta1=0.9, beta2=0.999)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    power1, power2 = np.float32(0.9), np.float32(0.999)
    for _ in range(20):
        assert (state.powers["beta1_power"], state.powers["beta2_power"]) == (power1, power2)
        _, state = update(GRADS[0], state, PARAMS)
        power1, power2 = power1 * np.float32(0.9), power2 * np.float32(0.999)


@pytest.mark.many(2)
@pytest.mark.parametrize("power", [-0.5, -0.7, -1.0, 0.0])
def test_a_traced_learning_rate_power_is_the_same_rule(power):
    def update(power):
        tx = emaopt.ftrl(0.3, power, 0.25)
        return tx.update(GRADS[0], tx.init(PARAMS), PARAMS)

    traced, concrete = jax.jit(update)(power), jax.jit(lambda: update(power))()
    close(traced, concrete, rtol=2e-6)


def ftrl_step(grad, start, **hyper):
    tx = emaopt.ftrl(1.0, **hyper)
    p = jnp.float32(start)
    updates, state = tx.update(jnp.float32(grad), tx.init(p), p)
    return optax.apply_updates(p, updates), state


def test_ftrl_forgets_where_it_started():
    for start in (5.0, -0.25):
        assert ftrl_step(0.0, start)[0] == 0


def test_ftrl_of_a_zero_accumulator_and_a_zero_gradient_is_zero():
    p, state = ftrl_step(0.0, 5.0, initial_accumulator_value=0.0)
    assert (p, state.slots["accum"], state.slots["linear"]) == (0, 0, 0)


def test_l1_makes_exact_zeros():
    assert ftrl_step(4.0, 0.0, l1_regularization_strength=4.0)[0] == 0
    assert ftrl_step(-4.0, 0.0, l1_regularization_strength=3.0, initial_accumulator_value=9.0)[
        0
    ] == pytest.approx(1 / 5)  # (4 - 3) / sqrt(9 + 16)


def test_l2_counts_twice_and_shrinkage_does_not_reach_the_accumulator():
    hyper = {"initial_accumulator_value": 9.0}
    assert ftrl_step(4.0, 0.0, l2_regularization_strength=1.5, **hyper)[0] == -0.5  # -4 / (5 + 3)
    _, state = ftrl_step(4.0, 2.0, l2_shrinkage_regularization_strength=0.25, **hyper)
    assert state.slots["accum"] == 25
    assert state.slots["linear"] == 4 + 2 * 0.25 * 2 - (5 - 3) * 2


def test_the_learning_rate_is_outside_of_momentum_and_inside_of_rmsprops():
    rate = lambda step: jnp.where(step == 0, 8.0, 0.0)
    for tx, expected in (
        (emaopt.momentum(rate, 0.5), 0.0),
        (emaopt.rmsprop(rate, momentum=0.5, decay=0.0, epsilon=0.0), -4.0),
    ):
        _, state = tx.update(jnp.float32(1), tx.init(jnp.float32(0)))
        assert tx.update(jnp.float32(1), state)[0] == expected


def test_the_state_is_of_one_public_type():
    assert all(isinstance(make(name).init(PARAMS), OptimizerState) for name in OPTIMIZERS)


LINEAR = ["gradient_descent", "momentum", "nesterov"]


@pytest.mark.many(1)
@pytest.mark.parametrize("name", LINEAR)
def test_complex_numbers_are_trained_as_real_and_imaginary_part(name):
    rng = np.random.default_rng(0)
    p, *grads = rng.normal(size=(4, 3, 2)).astype(np.float32)
    whole = lambda x: jax.lax.complex(*jnp.asarray(x).T)
    params, state = train(make(name), whole(p), [whole(g) for g in grads])
    wanted, wanted_state = train(make(name), jnp.asarray(p), [jnp.asarray(g) for g in grads])
    np.testing.assert_allclose(params, whole(wanted), rtol=1e-6)
    for slot in state.slots:
        assert state.slots[slot].dtype == jnp.complex64
        np.testing.assert_allclose(state.slots[slot], whole(wanted_state.slots[slot]), rtol=1e-6)
    infinite = jax.lax.complex(jnp.float32(np.inf), jnp.float32(1))
    update, _ = make(name).update(infinite, make(name).init(infinite))
    assert np.isfinite(update.imag)


def test_a_complex_gradient_is_applied_as_optax_applies_it():
    grad, p = jnp.array([1 + 2j]), jnp.array([3 - 1j])
    ours, theirs = emaopt.gradient_descent(0.5), optax.sgd(0.5)
    with jax.numpy_dtype_promotion("standard"):
        wanted, _ = theirs.update(grad, theirs.init(p))
    np.testing.assert_array_equal(ours.update(grad, ours.init(p))[0], wanted)


@pytest.mark.many(1)
@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(LINEAR)))
def test_the_others_say_no_to_complex_numbers_and_what_to_wrap_them_in(name):
    p = jnp.array([3 - 1j])
    with pytest.raises(ValueError, match=r"complex64 at leaf .*split_real_and_imaginary"):
        make(name).init(p)
    wrapped = optax.contrib.split_real_and_imaginary(make(name))
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies by 1j
        updates, _ = wrapped.update(p, wrapped.init(p), p)
    assert updates.dtype == jnp.complex64


def test_a_complex_gradient_of_a_real_parameter_is_refused():
    tx, p = emaopt.momentum(0.1, 0.9), jnp.ones(1)
    with pytest.raises(ValueError, match=r"updates has dtype complex64.*the state has float32"):
        tx.update(jax.lax.complex(p, p), tx.init(p), p)


@each_optimizer
def test_init_takes_abstract_parameters_and_makes_real_slots(name):
    abstract = jax.eval_shape(lambda: cast(PARAMS, jnp.bfloat16))
    bitwise(make(name).init(abstract), make(name).init(cast(PARAMS, jnp.bfloat16)))


def test_abstract_parameters_keep_their_sharding():
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec("x"))
    abstract = jax.ShapeDtypeStruct((16, 2), jnp.float32, sharding=sharding)
    state = emaopt.adam().init(abstract)
    assert state.slots["m"].sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("beta", ["beta1", "beta2"])
@pytest.mark.parametrize("value", [1, 1.0, 1 - 1e-9, 1.5, -0.1, jnp.float32(1), np.float64(1)])
def test_a_beta_of_one_is_refused_because_adam_divides_by_what_is_left(beta, value):
    with pytest.raises(ValueError, match=f"{beta}=.* is out of range.*below 1"):
        emaopt.adam(**{beta: value})


@pytest.mark.slow
@pytest.mark.parametrize("make_with", [emaopt.adadelta, lambda **k: emaopt.rmsprop(0.1, **k)])
def test_a_share_that_rounds_to_one_is_refused_where_it_is_used(make_with, x64):
    share = "rho" if make_with is emaopt.adadelta else "decay"
    tx = make_with(**{share: 1 - 1e-9})
    wide, narrow = jnp.ones(2, jnp.float64), jnp.ones(2, jnp.float32)
    tx.update(wide, tx.init(wide), wide)
    with pytest.raises(ValueError, match=f"{share}=0.999999999 is 1 in float32"):
        tx.update(narrow, tx.init(narrow), narrow)
    exactly = make_with(**{share: 1.0})
    exactly.update(narrow, exactly.init(narrow), narrow)


@pytest.mark.parametrize("name", ["adam", "adadelta", "rmsprop"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_shares_of_16_bits_are_refused_and_the_fix_works(name, dtype):
    factory, hyper, _, _ = OPTIMIZERS[name]
    params, grads = cast(PARAMS, dtype), cast(GRADS[0], dtype)
    share = {"adam": "beta1", "adadelta": "rho", "rmsprop": "decay"}[name]
    for start in (lambda tx: tx.init(params), lambda tx: jax.jit(tx.init)(params)):
        with pytest.raises(ValueError, match=f"{share} has dtype {jnp.dtype(dtype).name}.*float32"):
            start(optax.inject_hyperparams(factory)(**hyper))
    with pytest.raises(ValueError, match=f"{share} has dtype"):
        factory(**(hyper | {share: dtype(0.5)}))
    tx = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)(**hyper)
    updates, _ = tx.update(grads, tx.init(params), params)
    bitwise(updates, factory(**hyper).update(grads, factory(**hyper).init(params), params)[0])


@pytest.mark.parametrize("make_it", [emaopt.adagrad, emaopt.ftrl])
def test_an_accumulator_starts_from_one_number(make_it):
    with pytest.raises(ValueError, match=r"initial_accumulator_value=array\(\[0\.5, 0\.6\]\) is"):
        make_it(0.1, initial_accumulator_value=np.array([0.5, 0.6]))


@each_optimizer
@pytest.mark.parametrize("returned", [None, "0.1", jnp.ones(1), [0.1], float("nan"), np.inf])
def test_a_schedule_must_return_a_number(name, returned):
    tx = make(name, learning_rate=lambda step: returned)
    with pytest.raises(ValueError, match="learning_rate is a schedule that returned"):
        jax.eval_shape(tx.update, GRADS[0], tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: emaopt.momentum(0.1, np.ones(2)), r"momentum=array\(\[1., 1.\]\) is out of range"),
        (lambda: emaopt.momentum(1e39, 0.9), r"learning_rate=1e\+39 is out of range"),
        (lambda: emaopt.adagrad(0.1, 1e-50), "initial_accumulator_value=1e-50 is out of range"),
        (lambda: emaopt.adadelta(epsilon=0.0), "epsilon=0.0 is out of range"),
        (lambda: emaopt.ftrl(1e-50), "learning_rate=1e-50 is out of range"),
    ],
)
def test_numbers_that_make_nothing_or_nan_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.many(1)
@each_optimizer
@pytest.mark.parametrize("start", [{}, {"initial_accumulator_value": 0.0}], ids=["usual", "zero"])
def test_derivatives_of_an_update_are_finite_at_zero(name, start):
    if start and name != "ftrl":
        start = {}
    tx = make(name, **start)

    def after_two_steps(p, g):
        updates, state = tx.update(g, tx.init(p), p)
        updates, _ = tx.update(g, state, optax.apply_updates(p, updates))
        return updates

    zero = jnp.zeros(2)
    for derivative in (jax.jacrev, jax.jacfwd):
        for argument in (0, 1):
            assert np.isfinite(derivative(after_two_steps, argument)(zero, zero)).all()
