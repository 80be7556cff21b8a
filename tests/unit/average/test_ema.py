"""The average of the parameters: the core, its lift into a chain, and where it is found."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compare import bitwise
from flax import nnx

import emaopt


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps mixes dtypes
def train(tx, params, steps=3, gradient=1.0):
    """Some steps with gradients of alternating size."""
    opt_state = tx.init(params)
    for t in range(steps):
        grads = jax.tree.map(lambda p, t=t: jnp.full_like(p, gradient * (1 + t % 2)), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


# the core


@pytest.mark.parametrize("number", [int, np.int64, np.float32, jnp.int32, jnp.float32])
@pytest.mark.parametrize("jit", [False, True])
def test_the_worked_example_of_tf1s_documentation(number, jit):
    mean = emaopt.moving_average(emaopt.warmup(0.99))
    update = jax.jit(mean.update) if jit else mean.update
    state = mean.init(0.0)
    averages = []
    for value, step in ((5.0, 0), (10.0, 10000), (10.0, 10000)):
        state = update(jnp.float32(value), state, number(step))
        averages.append(float(state.shadow))
    np.testing.assert_allclose(averages, [4.5, 4.555, 4.60945], rtol=1e-6)


class Pair(NamedTuple):
    left: object
    right: object


def test_any_pytree_is_averaged_leaf_by_leaf():
    tree = lambda x: Pair([x, {"a": jnp.full((2, 1), 2 * x)}], (None, jnp.float32(3 * x)))
    mean = emaopt.moving_average(0.5)
    state = mean.init(tree(1.0))
    for x in (5.0, 7.0):
        state = mean.update(tree(x), state)
    expected = reference.theta_bar(reference.constant(0.5), [1.0, 5.0, 7.0])[-1]
    bitwise(
        state.shadow, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree(float(expected)))
    )
    assert state.step == 2


def test_an_absent_value_leaves_its_average():
    mean = emaopt.moving_average(0.5)
    state = mean.update(
        {"a": None, "b": jnp.ones(2)}, mean.init({"a": jnp.ones(2), "b": jnp.zeros(2)})
    )
    bitwise(state.shadow, {"a": jnp.ones(2), "b": jnp.full(2, 0.5)})


@pytest.mark.many(4)
@pytest.mark.parametrize(
    ("dtype", "shadow"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float8_e4m3fn", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
        ("complex64", "complex64"),
        ("int8", "int8"),
        ("bool", "bool"),
    ],
)
def test_the_shadow_is_of_the_values_dtype_or_float32_whichever_is_wider(dtype, shadow, x64):
    mean = emaopt.moving_average(0.9)
    values = jnp.ones(3, dtype)
    state = mean.init(values)
    assert state.shadow.dtype == shadow
    assert mean.update(values, state).shadow.dtype == shadow


@pytest.mark.many(4)
@pytest.mark.parametrize("accumulator", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("values", ["bfloat16", "float32", "float64"])
def test_accumulator_dtype_decides_the_dtype_but_not_the_arithmetic(accumulator, values, x64):
    mean = emaopt.moving_average(0.9, accumulator_dtype=accumulator)
    start, value = jnp.asarray([0.1, 3.0], values), jnp.asarray([0.7, -5.0], values)
    state = mean.update(value, mean.init(start))
    arithmetic = np.float64 if accumulator == "float64" else np.float32
    s, x = (np.asarray(v.astype(accumulator)).astype(arithmetic) for v in (start, value))
    x = np.asarray(value).astype(arithmetic)
    rate = (np.float32(1) - np.float32(0.9)).astype(arithmetic)
    assert state.shadow.dtype == accumulator
    bitwise(state.shadow, (s - (s - x) * rate).astype(state.shadow.dtype))


def test_integers_booleans_and_keys_are_the_newest_value():
    values = lambda seed: {
        "count": jnp.int32(seed),
        "on": jnp.bool_(seed % 2),
        "key": jax.random.key(seed),
        "raw": jax.random.PRNGKey(seed),
        "w": jnp.float32(seed),
    }
    mean = emaopt.moving_average(0.5)
    shadow = jax.jit(mean.update)(values(3), mean.init(values(8))).shadow
    assert shadow["w"] == 5.5
    key, carried = values(3)["key"], shadow.pop("key")
    assert carried.dtype == key.dtype
    bitwise(jax.random.key_data(carried), jax.random.key_data(key))
    for name in ("count", "on", "raw"):
        bitwise(shadow[name], values(3)[name])


@pytest.mark.parametrize("decay", [emaopt.every(2, 0.5), lambda t: jnp.where(t % 2 == 0, 0.5, 1.0)])
def test_a_value_that_is_not_taken_cannot_poison_the_average(decay):
    mean = emaopt.moving_average(decay)
    state = mean.update(jnp.float32(jnp.nan), mean.init(jnp.float32(1.0)))
    assert state.shadow == 1.0
    assert mean.update(jnp.float32(3.0), state).shadow > 1.0


def test_a_decay_of_one_takes_nothing():
    mean = emaopt.moving_average(1.0)
    assert mean.update(jnp.float32(jnp.nan), mean.init(jnp.float32(2.0))).shadow == 2.0


@pytest.mark.parametrize("decay", [0.0, emaopt.after(1, 0.9)])
def test_a_decay_of_zero_forgets_what_was_not_a_number(decay):
    mean = emaopt.moving_average(decay)
    assert mean.update(jnp.float32(3.0), mean.init(jnp.float32(jnp.nan))).shadow == 3.0


# the lift into a chain, against the definition

DECAYS = {
    "constant": (0.9, reference.constant(0.9)),
    "function": (lambda t: t / (t + 1), lambda t: t / (t + 1)),
    "warmup": (emaopt.warmup(0.9), reference.warmup(0.9)),
    "debiased": (emaopt.debiased(0.9), reference.debiased(0.9)),
    "debiased_half_life": (
        emaopt.debiased(emaopt.half_life(7)),
        reference.debiased(0.5 ** (1 / 7)),
    ),
    "power_0": (emaopt.power(0), reference.power(0)),
    "power_6.94": (emaopt.power(6.94), reference.power(6.94)),
    "inverse_gamma": (
        emaopt.inverse_gamma(2.0, 0.75, maximum=0.8),
        reference.inverse_gamma(2.0, 0.75, 0.8),
    ),
    "half_life": (emaopt.half_life(7), reference.constant(0.5 ** (1 / 7))),
    "every": (emaopt.every(3, 0.9), reference.every(3, reference.constant(0.9**3))),
    "every_power": (emaopt.every(3, emaopt.power(2)), reference.every(3, reference.power(2, n=3))),
    "every_warmup": (
        emaopt.every(3, emaopt.warmup(0.9)),
        reference.every(3, lambda t: reference.warmup(0.9)(t) ** 3),
    ),
    "after": (emaopt.after(5, 0.9), reference.after(5, reference.constant(0.9))),
    "swa": (emaopt.after(5, emaopt.power(0)), reference.after(5, reference.power(0))),
    "swa_every": (
        emaopt.after(6, emaopt.every(3, emaopt.power(0))),
        reference.after(6, reference.every(3, reference.power(0, n=3))),
    ),
}


def trajectory(tx, steps=30):
    """The parameters, updates and shadows of a jitted run, the start first."""

    def step(carry, grads):
        params, opt_state = carry
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (params, opt_state[-1].shadow)

    start = jnp.asarray([1.0, -2.0, 0.5])
    grads = jax.random.normal(jax.random.key(0), (steps, 3))
    _, (params, shadow) = jax.jit(lambda *args: jax.lax.scan(step, *args))(
        (start, tx.init(start)), grads
    )
    return np.concatenate([start[None], params]), np.concatenate([start[None], shadow])


@pytest.mark.many(2)
@pytest.mark.parametrize("name", DECAYS)
def test_in_a_chain_the_average_is_that_of_the_definition(name):
    decay, beta = DECAYS[name]
    theta, shadow = trajectory(optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(decay)))
    np.testing.assert_allclose(shadow, reference.theta_bar(beta, theta), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["constant", "warmup", "power_0", "after"])
def test_without_sequential_update_values_and_t_are_from_before_the_update(name):
    decay, beta = DECAYS[name]
    tx = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(decay, sequential_update=False))
    theta, shadow = trajectory(tx)
    # update t + 1 sees theta_t and decay(t); t = 0 averages theta_0 with itself
    np.testing.assert_allclose(
        shadow[1:], reference.theta_bar(beta, theta[:-1]), rtol=2e-6, atol=1e-6
    )


@pytest.mark.slow
def test_debiased_is_the_average_from_zero_divided_by_the_weight_so_far():
    from_zero = emaopt.moving_average(0.9)
    debiased = emaopt.moving_average(emaopt.debiased(0.9))
    values = jax.random.normal(jax.random.key(1), (20, 4))
    a, b = from_zero.init(jnp.zeros(4)), debiased.init(jnp.full(4, 1e6))
    for t, value in enumerate(values, start=1):
        a, b = from_zero.update(value, a), debiased.update(value, b)
        np.testing.assert_allclose(b.shadow, a.shadow / (1 - 0.9**t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sequential_update", [True, False])
def test_num_updates_replaces_t_in_a_chain(sequential_update):
    tx = optax.chain(
        optax.sgd(1.0), emaopt.ema(emaopt.warmup(0.9), sequential_update=sequential_update)
    )
    update = jax.jit(tx.update)
    params = jnp.zeros(1)
    state = (optax.EmptyState(), emaopt.EmaState(jnp.int32(0), jnp.ones(1)))
    _, (_, ema) = update(jnp.array([-4.0]), tx.init(params)[:1] + state[1:], params, num_updates=5)
    value = 4.0 if sequential_update else 0.0
    np.testing.assert_allclose(ema.shadow, 6 / 15 + value * 9 / 15, rtol=1e-6)
    assert ema.step == 1


def test_updates_pass_unchanged_and_other_arguments_are_ignored():
    tx = emaopt.ema(0.9)
    updates = {"w": jnp.ones(2)}
    passed, _ = tx.update(updates, tx.init(updates), updates, value=1.0)
    assert passed is updates


@pytest.mark.parametrize("absent", [None, np.zeros(2, jax.dtypes.float0)], ids=["none", "float0"])
def test_a_parameter_without_an_update_is_averaged_as_it_is(absent):
    tx = emaopt.ema(0.5)
    state = tx.init({"w": jnp.zeros(2)})
    _, state = tx.update({"w": absent}, state, {"w": jnp.full(2, 4.0)})
    bitwise(state.shadow, {"w": jnp.full(2, 2.0)})


def test_integers_and_keys_of_the_parameters_are_carried_through_a_chain():
    tx = emaopt.ema(0.5)
    params = {"key": jax.random.key(0), "n": jnp.int32(3), "w": jnp.float32(0.0)}
    state = tx.init(params)
    params = params | {"n": jnp.int32(7)}
    zeros = {"key": np.zeros((), jax.dtypes.float0), "n": jnp.int32(1), "w": jnp.float32(2.0)}
    shadow = tx.update(zeros, state, params)[1].shadow
    assert (shadow["n"], shadow["w"]) == (8, 1.0)
    assert shadow["key"] == params["key"]


def test_masked_leaves_cost_no_memory():
    params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4), "scale": jnp.ones(4)}
    kernels = optax.masked(emaopt.ema(0.9), emaopt.matching("kernel"))
    nothing = optax.masked(emaopt.ema(0.9), jax.tree.map(lambda _: False, params))
    step = 4
    assert nbytes(kernels.init(params)) == params["kernel"].nbytes + step
    assert nbytes(nothing.init(params)) == step
    assert nbytes(emaopt.ema(0.9).init(params)) == nbytes(params) + step


# average, swap and averages in every wrapper

KERNEL = emaopt.matching("kernel")
sgd = lambda: emaopt.gradient_descent(0.5)
labels = lambda params: jax.tree.map(lambda k: "kernel" if k else "bias", KERNEL(params))

# the transformation, and the names of its averages
WRAPPED = {
    "alone": (emaopt.ema(0.5), ["ema"]),
    "chain": (optax.chain(sgd(), emaopt.ema(0.5)), ["1"]),
    "named_chain": (optax.named_chain(("sgd", sgd()), ("mean", emaopt.ema(0.5))), ["mean"]),
    "chain_in_chain": (optax.chain(optax.chain(sgd(), emaopt.ema(0.5))), ["0/1"]),
    "masked": (optax.chain(sgd(), optax.masked(emaopt.ema(0.5), KERNEL)), ["1"]),
    "partition": (
        optax.partition(
            {
                "kernel": optax.chain(sgd(), emaopt.ema(0.5)),
                "bias": optax.chain(sgd(), emaopt.ema(0.25)),
            },
            labels,
        ),
        ["bias/1", "kernel/1"],
    ),
    "multi_steps": (
        optax.MultiSteps(optax.chain(sgd(), emaopt.ema(0.5)), 2).gradient_transformation(),
        ["1"],
    ),
    "apply_if_finite": (optax.apply_if_finite(optax.chain(sgd(), emaopt.ema(0.5)), 2), ["1"]),
    "inject_hyperparams": (
        optax.chain(sgd(), optax.inject_hyperparams(emaopt.ema)(decay=0.5)),
        ["1"],
    ),
}


def params_of(dtype=jnp.float32):
    return {"dense": {"kernel": jnp.full((2, 3), 0.1, dtype), "bias": jnp.full(3, 0.7, dtype)}}


def shadow_by_hand(opt_state):
    """The leaves of all shadows, found by their types alone."""
    kinds = (emaopt.EmaState, emaopt.SwappedEmaState)
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kinds))
    found = {}
    for node in nodes:
        if isinstance(node, kinds):
            found |= {
                jax.tree_util.keystr(path): x
                for path, x in jax.tree_util.tree_flatten_with_path(node.shadow)[0]
            }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_average_finds_the_shadow_and_gives_it_in_the_dtypes_of_params(name, dtype):
    tx, _ = WRAPPED[name]
    params, opt_state = train(tx, params_of(dtype))
    found = shadow_by_hand(opt_state)
    assert len(found) == (1 if name == "masked" else 2)
    for (path, p), a in zip(
        jax.tree_util.tree_flatten_with_path(params)[0],
        jax.tree.leaves(emaopt.average(params, opt_state)),
        strict=True,
    ):
        shadow = found.get(jax.tree_util.keystr(path), p)
        assert a.dtype == dtype
        bitwise(a, shadow.astype(dtype))
    with pytest.raises(AssertionError, match="differ"):
        bitwise(emaopt.average(params, opt_state), params)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "abstract"])
def test_swap_exchanges_and_is_its_own_inverse(name, dtype, abstract):
    tx, _ = WRAPPED[name]
    params, opt_state = train(tx, params_of(dtype), steps=1)
    if abstract:
        params = jax.eval_shape(lambda: params_of(dtype))
        opt_state = jax.eval_shape(tx.init, params)
    swapped = emaopt.swap(params, opt_state)
    by_path = {
        jax.tree_util.keystr(path): (p, a)
        for (path, p), a in zip(
            jax.tree_util.tree_flatten_with_path(params)[0],
            jax.tree.leaves(swapped[0]),
            strict=True,
        )
    }
    shadow, raw = shadow_by_hand(opt_state), shadow_by_hand(swapped[1])
    for path, (p, a) in by_path.items():
        assert a is shadow.get(path, p)
        assert raw.get(path, p) is p
    again = emaopt.swap(*swapped)
    assert jax.tree.structure(again) == jax.tree.structure((params, opt_state))
    assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (again, (params, opt_state)))))


@pytest.mark.slow
def test_swap_is_bitwise_its_own_inverse_under_jit():
    params, opt_state = train(WRAPPED["chain"][0], params_of("bfloat16"))
    twice = jax.jit(lambda p, s: emaopt.swap(*emaopt.swap(p, s)))
    bitwise(twice(params, opt_state), (params, opt_state))
    once = jax.jit(emaopt.swap)(params, opt_state)
    bitwise(emaopt.swap(*once), (params, opt_state))


def test_swap_loses_nothing_where_sums_would():
    params, state = jnp.float32(1e-6), emaopt.ema(0.5).init(jnp.float32(100.0))
    averages, swapped = emaopt.swap(params, state)
    assert (averages, swapped.shadow) == (np.float32(100.0), np.float32(1e-6))


def test_a_swapped_state_cannot_be_trained_on_or_averaged_from():
    tx = WRAPPED["chain"][0]
    params, opt_state = train(tx, params_of())
    averages, swapped = emaopt.swap(params, opt_state)
    with pytest.raises(ValueError, match=r"opt_state is swapped.*emaopt.swap\(params, opt_state\)"):
        tx.update(params, swapped, averages)
    with pytest.raises(ValueError, match=r"opt_state is swapped.*Evaluate params"):
        emaopt.average(averages, swapped)


@pytest.mark.parametrize("name", WRAPPED)
def test_averages_are_named_by_the_chain_or_by_their_place(name):
    tx, names = WRAPPED[name]
    found = emaopt.averages(tx.init(params_of()))
    assert list(found) == names
    assert all(isinstance(state, emaopt.EmaState) for state in found.values())


def test_fields_tell_averages_apart_that_have_no_other_name():
    class Both(NamedTuple):
        fast: emaopt.EmaState
        slow: emaopt.EmaState

    both = Both(emaopt.ema(0.9).init(jnp.zeros(1)), emaopt.ema(0.99).init(jnp.ones(1)))
    assert list(emaopt.averages({"opt": both})) == ["opt/fast", "opt/slow"]
    assert emaopt.average(jnp.zeros(1), {"opt": both}, name="opt/slow") == 1.0


TWO = {
    "by_name": (
        optax.named_chain(("sgd", sgd()), ("fast", emaopt.ema(0.5)), ("slow", emaopt.ema(0.75))),
        "fast",
        "slow",
    ),
    "by_path": (optax.chain(sgd(), emaopt.ema(0.5), emaopt.ema(0.75)), "1", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", TWO)
def test_of_several_averages_the_name_chooses_one(how):
    tx, fast, slow = TWO[how]
    params, opt_state = train(tx, jnp.zeros(2), steps=1, gradient=-8.0)
    bitwise(emaopt.average(params, opt_state, fast), jnp.full(2, 2.0))
    bitwise(emaopt.average(params, opt_state, name=slow), jnp.full(2, 1.0))

    averages, swapped = emaopt.swap(params, opt_state, slow)
    bitwise(averages, jnp.full(2, 1.0))
    bitwise(emaopt.averages(swapped)[slow].shadow, params)
    assert emaopt.averages(swapped)[fast] is emaopt.averages(opt_state)[fast]
    bitwise(emaopt.swap(averages, swapped, slow), (params, opt_state))


@pytest.mark.parametrize("call", [emaopt.average, emaopt.swap])
def test_of_several_averages_one_must_be_named(call):
    params, opt_state = train(TWO["by_name"][0], {"w": jnp.zeros(2)}, steps=1)
    with pytest.raises(ValueError, match=r"name is missing: leaf 'w'.*'fast', 'slow'"):
        call(params, opt_state)
    with pytest.raises(ValueError, match=r"name='slwo'.*mean 'slow'.*'fast', 'slow'"):
        call(params, opt_state, "slwo")


def test_averages_of_different_leaves_make_up_one():
    tx, _ = WRAPPED["partition"]
    params, opt_state = train(tx, params_of(), steps=1, gradient=-8.0)
    average = emaopt.average(params, opt_state)
    np.testing.assert_allclose(average["dense"]["kernel"], np.full((2, 3), 0.1 + 0.5 * 4), 1e-6)
    np.testing.assert_allclose(average["dense"]["bias"], np.full(3, 0.7 + 0.75 * 4), 1e-6)
    one = emaopt.average(params, opt_state, "bias/1")
    np.testing.assert_array_equal(one["dense"]["kernel"], params["dense"]["kernel"])
    bitwise(one["dense"]["bias"], average["dense"]["bias"])


@pytest.mark.parametrize("jit", [False, True])
def test_average_of_scalars_and_under_jit(jit):
    state = emaopt.ema(0.5).init({"w": 1.0})
    average = jax.jit(emaopt.average) if jit else emaopt.average
    bitwise(average({"w": 3.0}, state), {"w": jnp.float32(1.0)})


def test_average_and_swap_of_nnx_state():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))])

    model = Model()
    optimizer = nnx.Optimizer(
        model, optax.chain(sgd(), optax.masked(emaopt.ema(0.5), KERNEL)), wrt=nnx.Param
    )
    start = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    optimizer.update(model, jax.tree.map(jnp.ones_like, start))
    params = nnx.state(model, nnx.Param)
    for opt_state in (optimizer.opt_state, nnx.as_pure(optimizer.opt_state)):
        average = emaopt.average(params, opt_state)
        assert jax.tree.structure(average) == jax.tree.structure(params)
        linear, old, new = average["layers"][0], start["layers"][0], params["layers"][0]
        np.testing.assert_allclose(
            linear["kernel"][...], (old["kernel"][...] + new["kernel"][...]) / 2, rtol=1e-6
        )
        bitwise(linear["bias"], new["bias"])

        swapped = emaopt.swap(params, opt_state)
        bitwise(swapped[0], average)
        bitwise(emaopt.swap(*swapped), (params, opt_state))
    nnx.update(model, average)
    bitwise(nnx.state(model, nnx.Param), average)


@pytest.mark.parametrize("call", [emaopt.average, emaopt.swap])
def test_params_that_do_not_belong_to_the_state_are_refused(call):
    opt_state = WRAPPED["chain"][0].init({"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"params has no leaf 'w'.*it has 'kernel'"):
        call({"kernel": jnp.zeros(2)}, opt_state)
    with pytest.raises(
        ValueError, match=r"params has shape \(3,\) at leaf 'w'.*average has \(2,\)"
    ):
        call({"w": jnp.zeros(3)}, opt_state)
    with pytest.raises(ValueError, match=r"opt_state holds no average.*emaopt.ema"):
        call({"w": jnp.zeros(2)}, optax.adam(0.1).init({"w": jnp.zeros(2)}))


@pytest.mark.slow
def test_without_an_argument_an_average_is_scale_free():
    params = jnp.eye(401)
    tx = emaopt.ema()
    state = tx.init(params[0])
    update = jax.jit(lambda state, value: tx.update(jnp.zeros(401), state, value)[1])
    for value in params[1:]:
        state = update(state, value)
    np.testing.assert_allclose(
        state.shadow, emaopt.profile(emaopt.power(emaopt.posthoc.gamma(0.1)), 400), atol=1e-6
    )
    for t in (100, 10_000):
        weights, age = (
            emaopt.profile(emaopt.power(emaopt.posthoc.gamma(0.1)), t),
            np.arange(t, -1, -1),
        )
        assert weights @ age / t == pytest.approx(0.11, abs=0.005)


def test_an_average_is_shown_as_it_was_made():
    shown = {
        "ema(0.999)": emaopt.ema(0.999),
        "ema(warmup(0.999))": emaopt.ema(emaopt.warmup(0.999)),
        "ema(every(10, half_life(1000)), ledger=True)": emaopt.ema(
            emaopt.every(10, emaopt.half_life(1000)), ledger=True
        ),
        "ema(0.9, sequential_update=False)": emaopt.ema(0.9, sequential_update=False),
        "ema(0.9, rows={...})": emaopt.ema(0.9, rows={"table": True}),
        "moving_average(power(0), accumulator_dtype='float32')": emaopt.moving_average(
            emaopt.power(0), accumulator_dtype="float32"
        ),
    }
    assert [repr(made) for made in shown.values()] == list(shown)
    assert repr(emaopt.ema()) == f"ema(power({emaopt.posthoc.gamma(0.1)}))"
    assert isinstance(emaopt.ema(), optax.GradientTransformationExtraArgs)
