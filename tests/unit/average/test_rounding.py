"""How a shadow is stored: what rounding takes from it, and two ways to give it back."""

import functools
from fractions import Fraction

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint
from emaopt._average import rounding
from emaopt._average.rounding import add, add_stochastically


add = jax.jit(add)
stochastically = jax.jit(add_stochastically, static_argnums=3)
KINDS = {
    "nearest": None,
    "bfloat16": jnp.bfloat16,
    "compensated": emaopt.compensated(),
    "compensated bfloat16": emaopt.compensated(jnp.bfloat16),
    "stochastic": emaopt.stochastic(),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
SIZE = 2**14


def start():
    """Numbers of bfloat16, of both signs."""
    x = jax.random.uniform(jax.random.key(0), (SIZE,), minval=1, maxval=4)
    return (x * jnp.where(jnp.arange(SIZE) % 2, 1.0, -1.0)).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def after(kind, decay, updates, first, value):
    mean = emaopt.moving_average(decay, accumulator_dtype=kind)
    update = lambda t, state: mean.update(value, state)
    return jax.lax.fori_loop(0, updates, update, mean.init(first))


def followed(kind, gap, decay=0.9999, updates=4000):
    """The part of its way that an average has gone, and the share held in the second half."""
    first = start().astype(jnp.float32)
    value = first * (1 + gap)
    state = after(kind, decay, updates, first, value)
    x = np.float64(first)
    way = (np.float64(value) - x) * (1 - float(np.float32(decay)) ** updates)
    moved = np.float64(state.shadow) - x
    if state.residue is not None:
        moved += np.float64(state.residue)
    held = emaopt.stalled(value, after(kind, decay, updates // 2, first, value), state)
    return moved @ way / (way @ way), float(held)


@pytest.mark.slow
def test_rounded_to_nearest_a_small_gap_is_never_closed():
    part, stalled = followed(None, 1e-4, updates=20_000)
    assert part < 0.1
    assert stalled == 1
    part, stalled = followed(jnp.bfloat16, 1e-2)
    assert part == 0
    assert stalled == 1


@pytest.mark.slow
def test_compensated_loses_nothing():
    part, stalled = followed(emaopt.compensated(), 1e-4, updates=20_000)
    assert abs(part - 1) < 1e-6
    assert stalled == 0


@pytest.mark.slow
def test_compensated_bfloat16_has_sixteen_bits():
    assert followed(jnp.bfloat16, 0.2) == (0, 1)
    part, _ = followed(emaopt.compensated(jnp.bfloat16), 0.2)
    assert abs(part - 1) < 0.02


# the standard error of 2**14 elements is 0.004 and 0.02
@pytest.mark.slow
@pytest.mark.parametrize(("gap", "tolerance"), [(1e-2, 0.02), (1e-3, 0.1)])
def test_stochastic_is_right_on_average(gap, tolerance):
    part, _ = followed(emaopt.stochastic(), gap)
    assert abs(part - 1) < tolerance


@pytest.mark.slow
def test_the_bits_of_stochastic_depend_on_step_leaf_and_place_alone():
    mean = emaopt.moving_average(0.99, accumulator_dtype=emaopt.stochastic())
    x = start().reshape(64, -1)
    value = (x, x * 1.1)[1].astype(jnp.float32)

    def run(first, value):
        state = mean.init({"a": first, "b": first})
        return mean.update({"a": value, "b": value}, state).shadow

    eager = run(x, value)
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    place = NamedSharding(mesh, PartitionSpec("y", "x"))
    sharded = jax.jit(run)(jax.device_put(x, place), jax.device_put(value, place))
    for shadow in (jax.jit(run)(x, value), sharded):
        jax.tree.map(np.testing.assert_array_equal, shadow, eager)
    assert sharded["a"].sharding.is_equivalent_to(place, 2)
    assert (eager["a"] != eager["b"]).mean() > 0.1
    assert (eager["a"] != x).mean() > 0.1
    by_row = eager["a"] != run(x[::-1], value[::-1])["a"][::-1]
    assert by_row.mean() > 0.1
    again = mean.update({"a": value, "b": value}, mean.init({"a": x, "b": x})._replace(step=1))
    assert (eager["a"] != again.shadow["a"]).mean() > 0.1


@pytest.mark.many(2)
@kinds
def test_a_constant_stays_what_it_is_bit_for_bit(kind):
    x = start()
    np.testing.assert_array_equal(after(kind, 0.999, 50, x, x).shadow, x.astype(jnp.float32))


@pytest.mark.many(5)
@kinds
@pytest.mark.parametrize("decay", [0.0, emaopt.power(0), emaopt.after(3, 0.9)])
def test_a_copy_is_the_value(kind, decay):
    x = jnp.array([1.1, -2e-30, 3e30, 0.0], jnp.float32)
    mean = emaopt.moving_average(decay, accumulator_dtype=kind)
    state = mean.update(x, mean.init(jnp.full(4, 1e8)))
    stored = x.astype(state.shadow.dtype)
    tolerance = 2**-7 if kind == emaopt.stochastic() else 0
    np.testing.assert_allclose(
        state.shadow.astype(jnp.float32), stored.astype(jnp.float32), rtol=tolerance
    )
    if state.residue is not None:
        np.testing.assert_array_equal(
            state.residue, (x - stored.astype(x.dtype)).astype(stored.dtype)
        )


@pytest.mark.many(2)
@kinds
def test_a_value_that_is_not_taken_leaves_every_bit(kind):
    mean = emaopt.moving_average(emaopt.every(3, 0.9), accumulator_dtype=kind)
    state = mean.update(jnp.full(2, jnp.nan), mean.init(jnp.array([1.1, 2.2])))
    expected = mean.init(jnp.array([1.1, 2.2]))
    jax.tree.map(np.testing.assert_array_equal, state._replace(step=0), expected._replace(step=0))


EDGES = [0.0, -0.0, 1.0, -1.0078125, 3.3895314e38, -3.3895314e38, 1.5 * 2.0**-126, 2e-37, np.inf]


@pytest.mark.parametrize("x", EDGES)
@pytest.mark.parametrize("step", [1, 2, 77])
def test_a_number_of_bfloat16_and_nothing_is_that_number(x, step):
    x = jnp.full(100, x, jnp.bfloat16)
    nothing = jnp.zeros(100)
    got = stochastically(x.astype(jnp.float32), nothing, jnp.int32(step), 0)
    np.testing.assert_array_equal(got, x)


def test_small_numbers_are_added_exactly_where_no_rounding_is_needed():
    x = jnp.full(9, 2.0**-120)
    got = stochastically(x, x / 16, jnp.int32(1), 0)
    np.testing.assert_array_equal(got, jnp.full(9, 17 * 2.0**-124, jnp.bfloat16))


def test_every_element_has_a_place_of_its_own():
    assert rounding._place((2, 3, 2)).ravel().tolist() == list(range(12))


def test_a_packed_model_may_have_more_than_four_billion_elements():
    mean = emaopt.moving_average(0.5, accumulator_dtype=emaopt.stochastic())
    packed = jax.ShapeDtypeStruct((2**32 + 1,), jnp.float32)
    state = jax.eval_shape(mean.init, packed)
    assert jax.eval_shape(mean.update, packed, state) == state


@pytest.mark.parametrize("x", [np.inf, -np.inf])
def test_infinity_stays_infinity(x):
    got = stochastically(jnp.full(9, x), jnp.ones(9), jnp.int32(1), 0)
    np.testing.assert_array_equal(got, jnp.full(9, x, jnp.bfloat16))


@pytest.mark.parametrize("x", [np.nan, 1.0])
def test_nan_stays_nan(x):
    got = stochastically(jnp.full(9, x), jnp.full(9, np.nan), jnp.int32(1), 0)
    assert jnp.isnan(got).all()


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "second"), [(1, 0xFFFF), (-1, 0)])
def test_the_chance_of_the_smallest_increments_is_right_up_and_down(monkeypatch, sign, second):
    """Below and above a power of 2 the units differ. 2**-37 is 4 in 2**16 of one of float32."""
    random = jnp.arange(2**16, dtype=jnp.uint32) << 16 | jnp.uint32(second)
    monkeypatch.setattr(rounding, "_random", lambda *_: random)
    one = jnp.ones(2**16)
    got = add_stochastically(one, one * sign * 1.1 * 2**-37, jnp.int32(1), 0)
    assert jnp.sum(got == 1) == 2**16 - 4
    assert jnp.sum(got == (1 + 2**-7 if sign > 0 else 1 - 2**-8)) == 4


@pytest.mark.parametrize("nan", [0x7FFFFFFF, 0x7FC00000, 0xFFFFFFFF])
def test_nan_stays_nan_whatever_its_bits(nan):
    x = jax.lax.bitcast_convert_type(jnp.full(100, nan, jnp.uint32), jnp.float32)
    assert jnp.all(jnp.isnan(stochastically(x, jnp.zeros(100), jnp.int32(1), 0)))


@pytest.mark.slow
@settings(deadline=None, derandomize=True)
@given(st.integers(-(2**20), 2**20), st.integers(-(2**40), 2**40), st.integers(0, 30))
def test_stochastic_gives_a_neighbour(x, increment, scale):
    x = np.float32(jnp.bfloat16(x))
    increment = np.float32(increment * 2.0**-scale)
    exact = Fraction(float(x)) + Fraction(float(increment))
    got = stochastically(jnp.full(64, x), jnp.full(64, increment), jnp.int32(1), 0)
    unit = Fraction(2) ** (int(np.floor(np.log2(max(abs(x), abs(float(exact)), 1)))) - 7)
    assert all(abs(Fraction(float(y)) - exact) < unit for y in got)


@settings(deadline=None, derandomize=True)
@given(*[st.floats(-(2.0**100), 2.0**100, width=32) for _ in range(2)])
def test_a_sum_and_what_rounding_took_from_it_are_exact(x, increment):
    if any(0 < abs(v) < 1e-25 for v in (x, increment)):
        return  # what is lost would be below the smallest float32
    total, lost = add(jnp.float32(x), jnp.float32(0), jnp.float32(increment))
    assert Fraction(float(total)) + Fraction(float(lost)) == Fraction(x) + Fraction(increment)


@pytest.mark.many(1)
@kinds
def test_dtypes_are_those_of_init_under_scan_donation_and_vmap(kind):
    mean = emaopt.moving_average(0.9, accumulator_dtype=kind, ledger=True)
    values = {"w": jnp.ones((3, 2), jnp.bfloat16), "n": jnp.arange(3), "none": None}
    step = compiling.jit(lambda state, x: (mean.update(x, state), None), donate_argnums=0)
    state, _ = step(mean.init(values), values)
    state, _ = step(state, values)
    assert compiling.compilations(step) == 1
    scanned, _ = jax.lax.scan(lambda s, _: step(s, values), mean.init(values), length=2)
    jax.tree.map(np.testing.assert_array_equal, scanned, state)
    dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert dtypes(state) == dtypes(mean.init(values))
    batched = jax.vmap(lambda x: mean.update(x, mean.init(x)).shadow["w"])(
        {"w": jnp.ones((5, 3, 2))}
    )
    assert batched.shape == (5, 3, 2)


def test_what_is_not_asked_for_takes_no_memory():
    values = {"w": jnp.ones(8), "n": jnp.arange(3)}
    size = lambda kind: sum(
        x.nbytes for x in jax.tree.leaves(emaopt.ema(0.9, accumulator_dtype=kind).init(values))
    )
    assert [size(kind) for kind in KINDS.values()] == [16 + n for n in (32, 16, 64, 32, 16)]


@kinds
def test_swapping_twice_gives_back_the_same_arrays(kind):
    params = {"w": jnp.array([1.1, 2.2]), "n": jnp.arange(2)}
    tx = emaopt.ema(0.9, accumulator_dtype=kind, ledger=True)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    twice = emaopt.swap(*emaopt.swap(params, state))
    assert jax.tree.structure(twice) == jax.tree.structure((params, state))
    both = zip(jax.tree.leaves(twice), jax.tree.leaves((params, state)), strict=True)
    assert all(a is b for a, b in both)


def test_what_to_evaluate_with_has_the_residue_in_it():
    params = {"w": jnp.array([1.1, 2.2])}
    state = emaopt.ema(0.9, accumulator_dtype=emaopt.compensated(jnp.bfloat16)).init(params)
    got = emaopt.average({"w": jnp.zeros(2)}, state)["w"]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, params["w"], rtol=2**-16)
    assert abs(state.shadow["w"].astype(jnp.float32) - params["w"]).max() > 1e-3


@pytest.mark.many(1)
@kinds
def test_resuming_goes_on_bit_for_bit(kind, tmp_path):
    tx = emaopt.ema(0.99, accumulator_dtype=kind, ledger=True)
    update = jax.jit(tx.update)
    params = {"w": start().astype(jnp.float32), "n": jnp.arange(2)}
    updates = {"w": jnp.full(SIZE, 0.01), "n": jnp.zeros(2, jnp.int32)}
    _, state = update(updates, tx.init(params), params)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, params, state)
        like = jax.eval_shape(lambda: (params, tx.init(params)))
        restored, again, _ = checkpoint.resume(checkpointer, *like)
    jax.tree.map(np.testing.assert_array_equal, (restored, again), (params, state))
    on = update(updates, state, params)
    jax.tree.map(np.testing.assert_array_equal, update(updates, again, restored), on)
    averages = checkpoint.restore_averages(tmp_path, like=params, cast=True)
    np.testing.assert_array_equal(averages["w"], emaopt.average(params, state)["w"])


def test_the_names_of_what_tf1_does_not_have_tell_whose_it_is():
    state = emaopt.ema(0.9, accumulator_dtype=emaopt.compensated(), ledger=True).init({"w": 1.0})
    assert jax.tree.leaves(emaopt.names(state)) == [
        "global_step",
        "w/ExponentialMovingAverage",
        "w/ExponentialMovingAverage/residue",
        *(f"ledger/{field}" for field in emaopt.Ledger._fields),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: emaopt.compensated(jnp.int32), "compensated=.*int32.*Pass a floating dtype"),
        (lambda: emaopt.compensated(None), "compensated=None.*Pass a floating dtype"),
        (lambda: emaopt.stochastic("no"), "stochastic=no cannot.*Pass a floating dtype"),
        (lambda: emaopt.stochastic(jnp.float16), "dtype=float16.*Pass bfloat16"),
        (
            lambda: emaopt.ema(0.9, accumulator_dtype=jnp.float32).init({"w": 1j}),
            "'w' is complex.*no imaginary part.*Pass a complex dtype",
        ),
    ],
)
def test_a_dtype_that_cannot_hold_an_average_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", [emaopt.compensated(), None], ids=["with", "without"])
def test_the_state_of_another_way_to_store_is_refused(kind):
    other = None if kind else emaopt.compensated()
    state = emaopt.moving_average(0.9, accumulator_dtype=other).init(1.0)
    with pytest.raises(ValueError, match=r"state has (no|a) residue.*its own init made"):
        emaopt.moving_average(0.9, accumulator_dtype=kind).update(1.0, state)
