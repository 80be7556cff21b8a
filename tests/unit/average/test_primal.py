"""Gradients near the average: schedule-free training and its kin, against plain references."""

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import near
from optax import contrib
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


RANDOM = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RANDOM.normal(size=5), jnp.float32), "b": jnp.ones(3)}
NOISE = [
    {k: jnp.asarray(0.1 * RANDOM.normal(size=x.shape), jnp.float32) for k, x in PARAMS.items()}
    for _ in range(200)
]


def gradient(params, noise):
    """Of a quadratic with the curvatures 1, 2, ..., plus noise; for JAX and for NumPy."""
    curvature = {k: np.arange(1, 1 + x.size).astype(x.dtype) for k, x in params.items()}
    return {k: 0.2 * (x * curvature[k] - 1) + noise[k].astype(x.dtype) for k, x in params.items()}


def train(tx, params=PARAMS, noise=NOISE, opt_state=None, promotion="standard"):
    """Parameters and state after training. Optax's own transformations mix dtypes."""
    opt_state = tx.init(params) if opt_state is None else opt_state

    @jax.jit
    @jax.numpy_dtype_promotion(promotion)
    def step(params, opt_state, noise):
        updates, opt_state = tx.update(gradient(params, noise), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for each in noise:
        params, opt_state = step(params, opt_state, each)
    return params, opt_state


def reference(step, decay, interpolation, noise=NOISE, pull=lambda t, v: 0.0):
    """y and x after training, in float64, written out; `step(g, y, z, slots, t) -> move`."""
    found = {}
    for k, start in PARAMS.items():
        y = x = z = np.asarray(start, np.float64)
        slots = {}
        for t, each in enumerate(noise, 1):
            g = gradient({k: y}, {k: np.asarray(each[k], np.float64)})[k]
            move = step(g, y, z, slots, t)
            z = z + move + pull(t, slots.get("v")) * (x - y)
            x = decay(t) * x + (1 - decay(t)) * z
            y = interpolation * x + (1 - interpolation) * z
        found[k] = y, x
    return {k: y for k, (y, _) in found.items()}, {k: x for k, (_, x) in found.items()}


def sgd(rate):
    return lambda g, y, z, slots, t: -rate * g


@pytest.mark.many(2)
@pytest.mark.parametrize(
    ("average", "decay"),
    [
        (emaopt.power(0), lambda t: 1 - 1 / t),
        (emaopt.power(7), lambda t: ((t - 1) / t) ** 8),
        (0.9, lambda t: 0.9),
    ],
    ids=["schedule-free", "power", "GPA"],
)
@pytest.mark.parametrize("interpolation", [0.0, 0.5, 0.9, 0.98])
def test_the_three_points_are_those_of_the_formula(average, decay, interpolation):
    tx = emaopt.primal(optax.sgd(0.2), emaopt.ema(average), interpolation)
    params, opt_state = train(tx)
    y, x = reference(sgd(0.2), decay, interpolation)
    near(params, y, 2e-6 / (1 - interpolation))
    near(emaopt.average(params, opt_state), x, 2e-6 / (1 - interpolation))


@pytest.mark.slow
@pytest.mark.parametrize("weight_decay", [None, 0.05])
def test_optax_trains_the_same_schedule_free_sgd(weight_decay):
    base = optax.sgd(0.3)
    if weight_decay:
        base = optax.chain(optax.add_decayed_weights(weight_decay), base)
    params, opt_state = train(emaopt.primal(base, emaopt.ema(emaopt.power(0))))
    theirs, state = train(contrib.schedule_free_sgd(0.3, weight_decay=weight_decay))
    near(params, theirs, 1e-5)
    wanted = contrib.schedule_free_eval_params(state, theirs)
    near(emaopt.average(params, opt_state), wanted, 1e-5)


def test_optax_trains_the_same_schedule_free_adamw():
    base = optax.adamw(0.01, b1=0.0, weight_decay=0.1)
    params, opt_state = train(emaopt.primal(base, emaopt.ema(emaopt.power(0)), 0.95))
    theirs, state = train(contrib.schedule_free_adamw(0.01, b1=0.95, weight_decay=0.1))
    near(params, theirs, 1e-5)
    wanted = contrib.schedule_free_eval_params(state, theirs)
    near(emaopt.average(params, opt_state), wanted, 1e-5)


# schedulefree 1.4.1 on PyTorch 2.13.0, 30 steps: y, and x after `opt.eval()`
# SGDScheduleFree(lr=0.3, momentum=0.9)
# AdamWScheduleFree(lr=0.01, weight_decay=0.1, betas=(0.95, 0.999))
SCHEDULEFREE = {
    "SGD": (
        optax.sgd(0.3),
        0.9,
        [0.8467798, 0.49679, 0.2004933],
        [0.8224642, 0.4425051, 0.2269506],
    ),
    "AdamW": (
        optax.adamw(0.01, b1=0.0, weight_decay=0.1),
        0.95,
        [0.6350882, -0.826842, 1.811179],
        [0.6298971, -0.8344319, 1.8194836],
    ),
}


@pytest.mark.parametrize("name", SCHEDULEFREE)
def test_schedulefree_trains_to_the_same_points(name):
    base, interpolation, y, x = SCHEDULEFREE[name]
    noise = [
        {"w": jnp.asarray(0.1 * np.array([np.sin(t), np.cos(t), np.sin(2 * t)]), jnp.float32)}
        for t in range(1, 31)
    ]
    tx = emaopt.primal(base, emaopt.ema(emaopt.power(0)), interpolation)
    params, opt_state = train(tx, {"w": jnp.array([0.5, -1.0, 2.0])}, noise)
    np.testing.assert_allclose(params["w"], y, atol=5e-6)
    np.testing.assert_allclose(emaopt.average(params, opt_state)["w"], x, atol=5e-6)


def test_without_interpolation_it_is_the_chain():
    tx = emaopt.primal(emaopt.adam(0.01), emaopt.ema(0.9), 0.0)
    got, plain = train(tx), train(optax.chain(emaopt.adam(0.01), emaopt.ema(0.9)))
    near(got[0], plain[0], 1e-6)
    near(emaopt.average(*got), emaopt.average(*plain), 1e-6)


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_the_state_has_one_array_per_parameter_more_than_the_optimizer():
    tx = emaopt.primal(optax.adam(0.01, b1=0.0), emaopt.ema(emaopt.power(0)))
    more = nbytes(tx.init(PARAMS)) - nbytes(optax.adam(0.01).init(PARAMS))
    assert nbytes(PARAMS) <= more <= nbytes(PARAMS) + 8


def test_the_gradient_is_taken_where_the_parameters_are_and_weight_decays_at_either_point():
    decayed = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.2))
    at_y = reference(lambda g, y, z, slots, t: -0.2 * (g + 0.5 * y), lambda t: 0.9, 0.8)
    at_z = reference(lambda g, y, z, slots, t: -0.2 * (g + 0.5 * z), lambda t: 0.9, 0.8)
    for at, wanted in (("y", at_y), ("z", at_z)):
        params, opt_state = train(emaopt.primal(decayed, emaopt.ema(0.9), 0.8, at=at))
        near((params, emaopt.average(params, opt_state)), wanted, 1e-5)
    assert np.abs(at_y[1]["w"] - at_z[1]["w"]).max() > 1e-3


def test_ftrl_computes_its_parameter_from_its_own_point():
    rate, l1, start = 0.5, 0.01, 0.1

    def ftrl(g, y, z, slots, t):
        n, linear = slots.get("n", np.full_like(z, start)), slots.get("linear", np.zeros_like(z))
        linear = linear + g - (np.sqrt(n + g * g) - np.sqrt(n)) / rate * z
        n = n + g * g
        slots.update(n=n, linear=linear)
        new = (l1 * np.sign(linear) - linear) / (np.sqrt(n) / rate)
        return np.where(np.abs(linear) > l1, new, 0) - z

    tx = emaopt.primal(
        emaopt.ftrl(rate, l1_regularization_strength=l1), emaopt.ema(0.9), 0.9, at="z"
    )
    params, opt_state = train(tx, noise=NOISE[:50])
    wanted = reference(ftrl, lambda t: 0.9, 0.9, NOISE[:50])
    near((params, emaopt.average(params, opt_state)), wanted, 1e-4)


def test_pace_pulls_towards_the_average_by_coordinate():
    rate, strength, b1, b2, eps, kappa = 0.01, 0.5, 0.9, 0.99, 1e-8, 0.2

    def adam(g, y, z, slots, t):
        m = slots["m"] = b1 * slots.get("m", 0) + (1 - b1) * g
        nu = slots["nu"] = b2 * slots.get("nu", 0) + (1 - b2) * g * g
        slots["v"] = nu / (1 - b2**t)
        return -rate * m / (1 - b1**t) / (np.sqrt(slots["v"]) + eps)

    def pull(t, v):
        return np.minimum(rate * strength * (1 + t) ** -kappa / (np.sqrt(v) + eps), 1)

    def pull_of(state):
        t = state[0].count.astype(jnp.float32)
        most = rate * strength * (1 + t) ** -kappa
        corrected = jax.tree.map(lambda nu: nu / (1 - b2**t), state[0].nu)
        return jax.tree.map(lambda v: jnp.minimum(most / (jnp.sqrt(v) + eps), 1), corrected)

    average = emaopt.ema(lambda t: 1 - (1 + t.astype(jnp.float32)) ** -kappa)
    tx = emaopt.primal(optax.adam(rate, b1, b2, eps), average, 0.0, pull=pull_of)
    params, opt_state = train(tx)
    wanted = reference(adam, lambda t: 1 - (1.0 + t) ** -kappa, 0.0, pull=pull)
    near((params, emaopt.average(params, opt_state)), wanted, 5e-6)


def test_a_pull_leaves_what_has_no_average():
    average = optax.masked(emaopt.ema(0.9), {"w": True, "b": False})
    params, _ = train(emaopt.primal(optax.sgd(0.2), average, 0.0, pull=0.3))
    plain, _ = train(optax.sgd(0.2))
    np.testing.assert_array_equal(params["b"], plain["b"])
    assert not np.array_equal(params["w"], plain["w"])


def test_a_pull_may_be_a_number():
    tx = emaopt.primal(optax.sgd(0.2), emaopt.ema(0.9), 0.5, pull=0.3)
    params, opt_state = train(tx)
    wanted = reference(sgd(0.2), lambda t: 0.9, 0.5, pull=lambda t, v: 0.3)
    near((params, emaopt.average(params, opt_state)), wanted, 1e-5)


@pytest.mark.slow
def test_the_points_of_bfloat16_parameters_are_not_rounded_to_bfloat16():
    tx = emaopt.primal(optax.sgd(2e-4), emaopt.ema(emaopt.power(0)), 0.9)
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    got = train(tx, narrow, promotion="strict")
    wide = train(tx, jax.tree.map(lambda p: p.astype(jnp.float32), narrow), promotion="strict")
    assert {x.dtype.name for x in jax.tree.leaves(got[0])} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(got[1].z)} == {"float32"}
    exact = lambda p, s: emaopt.average(jax.tree.map(lambda x: x.astype(jnp.float32), p), s)
    moved = jax.tree.map(lambda a, p: a - p.astype(jnp.float32), exact(*wide), narrow)
    distance = jax.tree.map(lambda a, b: a - b, exact(*got), exact(*wide))
    assert optax.tree.norm(distance) < 0.05 * optax.tree.norm(moved)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_accumulated_and_skipped_steps_do_not_count(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    tx = emaopt.primal(optax.sgd(0.2), emaopt.ema(emaopt.power(0)))
    twice = [each for each in NOISE[:20] for _ in range(2)]
    plain, accumulated = (
        train(tx, params, NOISE[:20]),
        train(optax.MultiSteps(tx, 2), params, twice),
    )
    near(accumulated[0], plain[0], 1e-6 if dtype == jnp.float32 else 1e-2)
    bad = jax.tree.map(lambda x: x * np.nan, NOISE[0])
    skipping = optax.apply_if_finite(tx, 10)
    skipped = train(skipping, params, [NOISE[0], bad, *NOISE[1:20]])
    for a, b in zip(jax.tree.leaves(skipped[0]), jax.tree.leaves(plain[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    averaged = emaopt.average(*skipped)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(averaged))


def test_optax_divides_its_weights_wrongly_in_bfloat16_where_primal_does_not():
    """Optax keeps the sum of the weights in bfloat16, where 256 + 1 is 256."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    noise = [{"w": jnp.zeros(3)}] * 2000
    _, state = train(contrib.schedule_free_sgd(1.0), params, noise)
    assert state.weight_sum == 256
    _, opt_state = train(emaopt.primal(optax.sgd(1.0), emaopt.ema(emaopt.power(0))), params, noise)
    (average,) = emaopt.averages(opt_state).values()
    assert average.step == 2000


def test_a_leaf_without_an_average_takes_the_plain_step():
    mask = {"w": True, "b": False}
    average = optax.masked(emaopt.ema(emaopt.power(0)), mask)
    params, opt_state = train(emaopt.primal(optax.sgd(0.2), average))
    plain, _ = train(optax.sgd(0.2))
    both, state = train(emaopt.primal(optax.sgd(0.2), emaopt.ema(emaopt.power(0))))
    np.testing.assert_array_equal(params["b"], plain["b"])
    np.testing.assert_array_equal(params["w"], both["w"])
    np.testing.assert_array_equal(
        emaopt.average(params, opt_state)["w"], emaopt.average(both, state)["w"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_run_is_resumed_bit_for_bit_with_its_averages_under_the_original_names(dtype, tmp_path):
    tx = emaopt.primal(emaopt.adam(0.01, beta1=0.0), emaopt.ema(emaopt.power(0)))
    start = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    params, opt_state = train(tx, start, NOISE[:10])
    averaged = emaopt.average(params, opt_state)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 10, params, opt_state)
        back = checkpoint.resume(checkpointer, start, tx.init(start))
    restored = checkpoint.restore_averages(tmp_path, start)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(averaged), strict=True):
        np.testing.assert_array_equal(a, b)
    one, other = (
        train(tx, params, NOISE[10:20], opt_state),
        train(tx, back[0], NOISE[10:20], back[1]),
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_reset_average_and_its_optimizer_start_from_the_parameters(dtype):
    """In bfloat16 z is stored, and would lead the parameters back to where it stood."""
    tx = optax.apply_if_finite(emaopt.primal(optax.sgd(0.2), emaopt.ema(emaopt.power(0))), 3)
    start = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    params, opt_state = train(tx, start, NOISE[:10])
    again = train(tx, params, NOISE[10:15], emaopt.reset(params, opt_state))
    fresh = train(tx, params, NOISE[10:15])
    for a, b in zip(jax.tree.leaves(again[0]), jax.tree.leaves(fresh[0]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_it_scans_with_donation_and_compiles_once():
    tx = emaopt.primal(optax.sgd(0.2), emaopt.ema(emaopt.power(0)))

    def step(carry, noise):
        params, opt_state = carry
        updates, opt_state = tx.update(gradient(params, noise), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    scan = compiling.jit(lambda carry, noise: jax.lax.scan(step, carry, noise), donate_argnums=0)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *NOISE[:20])
    start = jax.tree.map(jnp.copy, PARAMS)
    carry, _ = scan((start, tx.init(start)), stacked)
    near(carry[0], train(tx, noise=NOISE[:20])[0], 1e-6)
    scan(carry, stacked)
    assert compiling.compilations(scan) == 1


def test_the_state_is_shown_without_its_numbers():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.zeros(3)}
    tx = emaopt.primal(optax.sgd(0.1, 0.9), emaopt.ema(0.5))
    told = repr(tx.init(params))
    assert told.startswith("PrimalState(base={0/trace/b: float32[3], 0/trace/w: bfloat16[2,3]}, ")
    assert told.endswith("z={b: None, w: float32[2,3]})")


SGD, EMA = optax.sgd(1.0), emaopt.ema(0.9)
WRONG = {
    "interpolation=1.0 is out of": lambda: emaopt.primal(SGD, EMA, 1.0),
    "pull=2 is out of range": lambda: emaopt.primal(SGD, EMA, pull=2),
    "at='x' is not a point": lambda: emaopt.primal(SGD, EMA, at="x"),
    "tx=0.1 is not a transformation": lambda: emaopt.primal(0.1, EMA),
    "average=0.9 is not a transformation": lambda: emaopt.primal(SGD, 0.9),
    "average holds no average": lambda: emaopt.primal(SGD, SGD).init(PARAMS),
    "tx holds an average": lambda: emaopt.primal(optax.chain(SGD, EMA), EMA).init(PARAMS),
    "params is missing": lambda: emaopt.primal(SGD, EMA).update(
        PARAMS, emaopt.primal(SGD, EMA).init(PARAMS)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_told_with_the_fix(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


def test_the_state_of_another_transformation_is_refused():
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="state is a EmaState, not that of primal"):
        emaopt.primal(optax.sgd(0.1), emaopt.ema()).update(
            params, emaopt.ema().init(params), params
        )
