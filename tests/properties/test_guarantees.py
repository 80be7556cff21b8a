"""What an average guarantees, and what went wrong with averages elsewhere."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compare import bitwise
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as ocp
from train import step, train
from trees import nbytes

import emaopt


def params_of(dtype=jnp.float32):
    return {"w": jnp.asarray([0.1, -3.0, 2.7], dtype), "b": jnp.asarray([0.7], dtype)}


def grads_of(params, steps, seed=0):
    return [
        jax.tree.map(lambda p, k=key: jax.random.normal(k, p.shape, p.dtype), params)
        for key in jax.random.split(jax.random.key(seed), steps)
    ]


def the_average(opt_state):
    (state,) = emaopt.averages(opt_state).values()
    return state


DECAYS = {
    "constant": 0.9,
    "zero": 0.0,
    "one": 1.0,
    "warmup": emaopt.warmup(0.999),
    "debiased": emaopt.debiased(0.99),
    "power": emaopt.power(6.94),
    "inverse_gamma": emaopt.inverse_gamma(),
    "half_life": emaopt.half_life(3.0),
    "every": emaopt.every(3, 0.99),
    "swa": emaopt.after(4, emaopt.every(2, emaopt.power(0))),
}


# The average is of the weights after the update, rounded exactly as apply_updates rounds them


@pytest.mark.many(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_average_is_of_the_parameters_that_the_update_leads_to(dtype):
    params = params_of(dtype)
    copies = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(emaopt.after(100, 0.9)))
    opt_state = copies.init(params)
    for grads in grads_of(params, 5):
        params, opt_state = step(copies, params, opt_state, grads)
        shadow = the_average(opt_state).shadow
        bitwise(shadow, jax.tree.map(lambda p: p.astype(jnp.float32), params))


# The average ticks if and only if the weights stepped


@pytest.mark.many(2)
@pytest.mark.parametrize(
    ("wrap", "bad", "ticks"),
    [
        (lambda tx: tx, 1.0, 6),
        (lambda tx: optax.MultiSteps(tx, 3).gradient_transformation(), 1.0, 2),
        (lambda tx: optax.apply_if_finite(tx, 10), jnp.nan, 4),
        (
            lambda tx: optax.MultiSteps(
                tx, 2, should_skip_update_fn=optax.skip_not_finite
            ).gradient_transformation(),
            jnp.nan,
            2,
        ),
    ],
    ids=["plain", "accumulated", "finite", "accumulated_and_finite"],
)
def test_the_average_ticks_if_and_only_if_the_weights_stepped(wrap, bad, ticks):
    tx = wrap(optax.chain(emaopt.gradient_descent(0.1), emaopt.ema(emaopt.power(0))))
    params, stepped = {"w": jnp.ones(2)}, []
    opt_state = tx.init(params)
    for gradient in (1.0, bad, 1.0, 1.0, bad, 1.0):
        grads = {"w": jnp.full(2, gradient)}
        new, opt_state = step(tx, params, opt_state, grads)
        if not np.array_equal(new["w"], params["w"]):
            stepped.append(new["w"])
        params = new
    assert the_average(opt_state).step == ticks == len(stepped)
    np.testing.assert_allclose(
        the_average(opt_state).shadow["w"], np.mean(stepped, axis=0), rtol=1e-6
    )


# The average of a constant is that constant, bit for bit; its dtype never changes; it can be
# scanned and donated


@pytest.mark.many(2)
@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_of_a_constant_is_bitwise_that_constant(name, dtype):
    mean = emaopt.moving_average(DECAYS[name], accumulator_dtype=dtype)
    values = jax.random.normal(jax.random.key(1), (100,), dtype)
    many = jax.jit(
        lambda state: jax.lax.fori_loop(0, 50, lambda _, s: mean.update(values, s), state)
    )
    bitwise(many(mean.init(values)).shadow, values)


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_dtype_of_the_state_changes_after_init(name, dtype):
    tx = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(DECAYS[name]))
    params = params_of(dtype)
    carry = params, tx.init(params)
    after = jax.eval_shape(functools.partial(step, tx), *carry, params)
    form = lambda x: (x.shape, x.dtype, x.weak_type)
    assert jax.tree.map(form, after) == jax.tree.map(form, jax.eval_shape(lambda: carry))


def test_parameters_and_state_can_be_donated_together():
    tx = optax.chain(emaopt.gradient_descent(0.1), emaopt.ema(0.9))
    donated = jax.jit(functools.partial(step.__wrapped__, tx), donate_argnums=(0, 1))
    params = params_of()
    expected = train(tx, params_of(), [params_of()])
    bitwise(donated(params, tx.init(params), params_of()), expected)
    assert params["w"].is_deleted()


def test_init_copies_every_leaf():
    values = params_of() | {"int": jnp.int32(3), "key": jax.random.key(0)}
    state = emaopt.moving_average(0.9).init(values)
    # donating a buffer twice is an error
    jax.jit(lambda *both: both, donate_argnums=(0, 1))(values, state)
    assert all(x.is_deleted() for x in jax.tree.leaves((values, state.shadow)))


# Float32 for halves; integers, booleans and keys are carried; absent leaves pass


def test_each_leaf_is_kept_in_the_form_that_suits_it():
    params = {
        "bf16": jnp.ones(2, jnp.bfloat16),
        "f16": jnp.ones(2, jnp.float16),
        "f32": jnp.ones(2),
        "int": jnp.int32(3),
        "bool": jnp.bool_(True),
        "key": jax.random.key(0),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    tx = emaopt.ema(0.5)
    float0 = np.zeros((), jax.dtypes.float0)
    still = jax.tree.map(jnp.zeros_like, params) | dict.fromkeys(("int", "bool", "key"), float0)
    newer = params | {"int": jnp.int32(10), "bool": jnp.bool_(False), "key": jax.random.key(7)}
    shadow = tx.update(still, tx.init(params), newer)[1].shadow
    for name in ("bf16", "f16", "f32"):
        bitwise(shadow[name], jnp.ones(2, jnp.float32))
    bitwise((shadow["int"], shadow["bool"]), (newer["int"], newer["bool"]))
    assert shadow["key"] == newer["key"]
    assert shadow["none"] is None
    assert shadow["masked"] == optax.MaskedNode()


# The shadow is sharded as the parameters are, and the update sends nothing


@pytest.mark.many(4)
@pytest.mark.parametrize("name", DECAYS)
def test_averaging_is_local_to_every_device(name):
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), P("x"))
    params = jax.device_put(jnp.arange(16.0), sharding)
    tx = emaopt.ema(DECAYS[name])
    opt_state = tx.init(params)
    compiled = step.lower(tx, params, opt_state, params).compile()
    assert not re.search("all-|collective|reduce-scatter", compiled.as_text())
    _, opt_state = compiled(params, opt_state, params)
    assert opt_state.shadow.sharding.is_equivalent_to(sharding, 1)


# Save, restore, continue is bitwise the run that was not interrupted


def save(path, params, opt_state):
    averages, swapped = emaopt.swap(params, opt_state)
    ocp.save_checkpointables(path, {"params": averages, "opt_state": swapped})


def restore(path, params, opt_state):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (params, opt_state)
    )
    like = dict(zip(("params", "opt_state"), emaopt.swap(*abstract), strict=True))
    return emaopt.swap(**ocp.load_checkpointables(path, like))


@pytest.mark.many(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stop", [0, 2, 7], ids=["fresh", "before_the_start", "after_the_start"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(dtype, stop, masked, tmp_path):
    mean = emaopt.ema(emaopt.after(4, emaopt.warmup(0.99)))
    mean = optax.masked(mean, emaopt.matching("w")) if masked else mean
    tx = optax.chain(emaopt.clip_by_global_norm(1.0), emaopt.adam(0.1), mean)
    params = params_of(dtype)
    grads = grads_of(params, 10)
    uninterrupted = train(tx, params, grads)

    stopped = train(tx, params, grads[:stop])
    save(tmp_path / "checkpoint", *stopped)
    fresh = params_of(dtype)
    resumed = restore(tmp_path / "checkpoint", fresh, tx.init(fresh))
    bitwise(resumed, stopped)
    bitwise(train(tx, resumed[0], grads[stop:], resumed[1]), uninterrupted)


def test_under_the_original_names_stand_the_averages(tmp_path):
    tx = optax.chain(emaopt.gradient_descent(0.1), emaopt.ema(0.9))
    params, opt_state = train(tx, params_of(), grads_of(params_of(), 3))
    save(tmp_path / "checkpoint", params, opt_state)
    plain = ocp.load(tmp_path / "checkpoint", params, checkpointable_name="params")
    bitwise(plain, emaopt.average(params, opt_state))


@pytest.mark.filterwarnings("ignore:.*never awaited:pytest.PytestUnraisableExceptionWarning")
def test_a_missing_shadow_is_an_error(tmp_path):
    params = params_of()
    without = optax.chain(emaopt.gradient_descent(0.1), optax.identity())
    tx = optax.chain(emaopt.gradient_descent(0.1), emaopt.ema(0.9))
    ocp.save_checkpointables(
        tmp_path / "checkpoint", {"params": params, "opt_state": without.init(params)}
    )
    _, swapped = emaopt.swap(params, tx.init(params))
    with pytest.raises(ValueError, match="do not match"):
        ocp.load(tmp_path / "checkpoint", swapped, checkpointable_name="opt_state")
    for call in (emaopt.average, emaopt.swap):
        with pytest.raises(ValueError, match="opt_state holds no average"):
            call(params, without.init(params))


def test_a_swapped_checkpoint_is_not_taken_for_a_plain_one(tmp_path):
    tx = optax.chain(emaopt.gradient_descent(0.1), emaopt.ema(0.9))
    params = params_of()
    save(tmp_path / "checkpoint", params, tx.init(params))
    with pytest.raises(ValueError, match="emaopt_swapped"):
        ocp.load(tmp_path / "checkpoint", tx.init(params), checkpointable_name="opt_state")


# A step that is not finite leaves the average finite


@pytest.mark.many(1)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
def test_a_step_that_is_not_finite_leaves_no_trace(bad, clip):
    links = [emaopt.momentum(0.1, 0.9), emaopt.ema(emaopt.warmup(0.99))]
    tx = optax.apply_if_finite(
        optax.chain(*([emaopt.clip_by_global_norm(1.0)] if clip else []), *links), 3
    )
    params = params_of()
    good = grads_of(params, 4)
    poison = good[0] | {"b": jnp.full(1, bad)}
    params_, opt_state = train(tx, params, [*good[:2], poison, *good[2:]])
    expected, expected_state = train(tx, params, good)
    bitwise(params_, expected)
    bitwise(the_average(opt_state), the_average(expected_state))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(the_average(opt_state).shadow))


# An average that updates every k steps, or that starts late, has the length that was asked for


def kept(decay, first, last):
    """The share of the average at `first` that is still in it at `last`."""
    mean = emaopt.moving_average(decay)
    state = emaopt.EmaState(jnp.int32(first), jnp.float32(1.0))
    steps = last - first
    return jax.jit(
        lambda s: jax.lax.fori_loop(0, steps, lambda _, s: mean.update(jnp.float32(0.0), s), s)
    )(state).shadow


@pytest.mark.many(3)
@pytest.mark.parametrize("k", [1, 2, 5, 10])
@pytest.mark.parametrize("start", [0, 20])
def test_the_length_does_not_depend_on_the_interval_or_the_start(k, start):
    half = emaopt.after(start, emaopt.every(k, emaopt.half_life(100)))
    np.testing.assert_allclose(kept(half, start, start + 100), 0.5, rtol=1e-5)
    constant = emaopt.after(start, emaopt.every(k, 0.99))
    np.testing.assert_allclose(kept(constant, start, start + 100), 0.99**100, rtol=1e-5)
    # of the average at t, (t / T)**(gamma + 1) is left at T
    power = emaopt.after(start, emaopt.every(k, emaopt.power(6.94)))
    np.testing.assert_allclose(kept(power, start + 50, start + 100), 0.5**7.94, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 5])
def test_every_k_with_power_is_the_power_average_of_every_kth_value(k):
    mean = emaopt.moving_average(emaopt.every(k, emaopt.power(2.0)))
    values = jax.random.normal(jax.random.key(2), (41,))
    state, _ = jax.lax.scan(
        lambda state, value: (mean.update(value, state), None), mean.init(values[0]), values[1:]
    )
    expected = reference.theta_bar(reference.power(2.0), values[::k])[-1]
    np.testing.assert_allclose(state.shadow, expected, rtol=1e-5)


# An average that is off costs nothing


def test_an_average_that_is_off_costs_no_bytes():
    params = {"w": jnp.ones((64, 64))}
    none = jax.tree.map(lambda _: False, params)
    off = optax.partition({"off": emaopt.ema(0.9), "on": optax.identity()}, {"w": "on"})
    counter = 4
    assert nbytes(off.init(params)) == counter
    assert nbytes(optax.masked(emaopt.ema(0.9), none).init(params)) == counter
    assert nbytes(optax.chain(emaopt.gradient_descent(0.1)).init(params)) == counter
    on = optax.masked(emaopt.ema(0.9), {"w": True})
    assert nbytes(on.init(params)) == nbytes(params) + counter


# The swap is functional and loses nothing; an exception needs no undoing


def test_an_evaluation_that_fails_changes_nothing():
    tx = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(0.9))
    grads = grads_of(params_of(), 6)
    expected = train(tx, params_of(), grads)

    params, opt_state = train(tx, params_of(), grads[:3])
    before = jax.tree.map(np.array, (params, opt_state))

    def evaluate(params, opt_state):
        averages, _ = emaopt.swap(params, opt_state)
        averages["w"] = averages["w"] * jnp.nan
        raise FloatingPointError("evaluation failed")

    with pytest.raises(FloatingPointError):
        evaluate(params, opt_state)
    bitwise((params, opt_state), before)
    bitwise(train(tx, params, grads[3:], opt_state), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_swapping_twice_gives_the_same_bits(dtype):
    tx = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(0.9))
    state = train(tx, params_of(dtype), grads_of(params_of(dtype), 5))
    bitwise(emaopt.swap(*emaopt.swap(*state)), state)


# What went wrong elsewhere


def test_accumulated_gradients_do_not_count_twice():
    params = {"w": jnp.zeros(1)}
    chain = optax.chain(emaopt.gradient_descent(1.0), emaopt.ema(0.9))
    ones = [{"w": jnp.full(1, -1.0)}] * 16
    inside = optax.MultiSteps(chain, 4).gradient_transformation()
    _, opt_state = train(inside, params, ones)
    shadow = the_average(opt_state).shadow["w"]
    np.testing.assert_allclose(
        shadow, reference.theta_bar(reference.constant(0.9), [0.0, 1.0, 2.0, 3.0, 4.0])[-1], 1e-6
    )
    # outside, the average ticks on steps that were not made: the nesting that ema warns of
    outside = optax.chain(
        optax.MultiSteps(emaopt.gradient_descent(1.0), 4).gradient_transformation(), emaopt.ema(0.9)
    )
    _, opt_state = train(outside, params, ones)
    assert the_average(opt_state).step == 16
    assert the_average(opt_state).shadow["w"] > 1.5 * shadow


def test_outside_apply_if_finite_the_average_ticks_on_a_skipped_step():
    links = emaopt.gradient_descent(0.1), emaopt.ema(0.9)
    inside = optax.apply_if_finite(optax.chain(*links), 3)
    outside = optax.chain(optax.apply_if_finite(links[0], 3), links[1])
    nan = [{"w": jnp.full(1, jnp.nan)}]
    ticks = [
        int(the_average(train(tx, {"w": jnp.ones(1)}, nan)[1]).step) for tx in (inside, outside)
    ]
    assert ticks == [0, 1]


def test_the_average_of_bfloat16_parameters_moves_at_decay_999():
    tx = emaopt.ema(0.999)
    params = jnp.full(4, 1.0, jnp.bfloat16)
    state = tx.init(jnp.full(4, 2.0, jnp.bfloat16))
    zero = jnp.zeros_like(params)
    state = jax.jit(
        lambda state: jax.lax.fori_loop(0, 3000, lambda _, s: tx.update(zero, s, params)[1], state)
    )(state)
    np.testing.assert_allclose(state.shadow, 1 + 0.999**3000, rtol=1e-4)


def test_a_run_resumed_without_averages_does_not_start_them_at_zero():
    trained, _ = train(emaopt.gradient_descent(0.1), params_of(), grads_of(params_of(), 3))
    bitwise(emaopt.average(trained, emaopt.ema(0.99).init(trained)), trained)


def test_a_state_made_under_jit_is_the_eager_one():
    tx = optax.chain(emaopt.adam(0.1), emaopt.ema(0.9))
    bitwise(jax.jit(tx.init)(params_of()), tx.init(params_of()))


def test_before_the_chain_ema_averages_the_wrong_point():
    params = {"w": jnp.ones(1)}
    gradients = [{"w": jnp.full(1, 1.0)}]
    last = optax.chain(emaopt.gradient_descent(0.1), emaopt.ema(0.5))
    first = optax.chain(emaopt.ema(0.5), emaopt.gradient_descent(0.1))
    averages = [
        float(the_average(train(tx, params, gradients)[1]).shadow["w"][0]) for tx in (last, first)
    ]
    np.testing.assert_allclose(averages, [0.95, 1.5], rtol=1e-6)


def test_a_decay_that_branches_in_python_is_refused_at_once():
    with pytest.raises(ValueError, match=r"decay is a function.*jnp\.where"):
        emaopt.ema(lambda t: 0.0 if t < 10 else 0.999)
