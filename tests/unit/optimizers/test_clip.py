"""Clipping: 3-4-5 triangles, absent leaves, what is not finite, and derivatives at zero."""

import functools

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import equal
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import NamedSharding, PartitionSpec as P
from jax.test_util import check_grads

from emaopt import (
    clip_by_average_norm,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    global_norm,
)


CLIPS = {
    "value": clip_by_value(-5.0, 5.0),
    "norm": clip_by_norm(5.0),
    "norm_axes": clip_by_norm(5.0, axes=-1),
    "average_norm": clip_by_average_norm(5.0),
    "global_norm": clip_by_global_norm(5.0),
}


def clipped(tx, updates, **extra):
    new, state = tx.update(updates, tx.init(updates), **extra)
    assert state == optax.EmptyState()
    return new


@pytest.mark.many(6)
@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (clip_by_value(-1.0, 3.5), [3.0, -1.0]),
        (clip_by_norm(2.5), [1.5, -2.0]),
        (clip_by_norm(2.5, axes=0), [1.5, -2.0]),
        (clip_by_average_norm(1.25), [1.5, -2.0]),
        (clip_by_global_norm(2.5), [1.5, -2.0]),
        (clip_by_norm(5.0), [3.0, -4.0]),
        (clip_by_average_norm(2.5), [3.0, -4.0]),
        (clip_by_global_norm(5.0), [3.0, -4.0]),
        (clip_by_norm(10.0), [3.0, -4.0]),
        (clip_by_average_norm(10.0), [3.0, -4.0]),
        (clip_by_global_norm(10.0), [3.0, -4.0]),
    ],
)
def test_a_345_triangle(tx, expected):
    np.testing.assert_array_equal(clipped(tx, jnp.array([3.0, -4.0])), expected)


def test_only_the_global_norm_is_of_all_leaves():
    updates = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    assert global_norm(updates) == 5
    equal(
        clipped(clip_by_global_norm(2.5), updates),
        {"a": np.array([1.5, 0.0]), "b": np.array([[2.0]])},
    )
    equal(clipped(clip_by_norm(2.0), updates), {"a": np.array([2.0, 0.0]), "b": np.array([[2.0]])})
    equal(
        clipped(clip_by_average_norm(1.0), updates),
        {"a": np.array([2.0, 0.0]), "b": np.array([[1.0]])},
    )


@pytest.mark.many(1)
@pytest.mark.parametrize("axes", [0, 1, -1, -2, (0,), (0, 1), [0, -1], np.int64(1), ()])
def test_axes_clip_every_slice_by_itself(axes):
    x = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    over = tuple(axes) if isinstance(axes, list) else axes
    norm = np.sqrt(np.sum(x.astype(np.float64) ** 2, axis=over, keepdims=True))
    got = clipped(clip_by_norm(0.9, axes), x)
    np.testing.assert_allclose(got, x * 0.9 / np.maximum(norm, 0.9), rtol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-1.0, 2.0, ([-1.0, 2.0], [[2.0]])),
        (-1, 2, ([-1.0, 2.0], [[2.0]])),
        (jnp.float32(-1), np.float64(2), ([-1.0, 2.0], [[2.0]])),
        ({"a": -2.0, "b": -1.0}, {"a": 3.0, "b": 6.0}, ([-2.0, 3.0], [[6.0]])),
        (-1.0, {"a": 3.0, "b": 6.0}, ([-1.0, 3.0], [[6.0]])),
        ({"a": -2.0, "b": 8.0}, 9.0, ([-2.0, 5.0], [[8.0]])),
        (
            {"a": np.array([-1.0, 6.0]), "b": -1.0},
            {"a": jnp.array([0.0, 7.0]), "b": np.ones((1, 1))},
            ([-1.0, 6.0], [[1.0]]),
        ),
        ({"a": None, "b": -1.0}, {"a": 3.0, "b": None}, ([-3.0, 3.0], [[7.0]])),
        (None, 2.0, ([-3.0, 2.0], [[2.0]])),
        (-1.0, None, ([-1.0, 5.0], [[7.0]])),
    ],
)
def test_bounds_are_scalars_or_trees_or_not_set(low, high, expected):
    updates = {"a": jnp.array([-3.0, 5.0]), "b": jnp.array([[7.0]])}
    got = clipped(clip_by_value(low, high), updates)
    equal(got, {"a": np.array(expected[0]), "b": np.array(expected[1])})


def test_bounds_of_lower_rank_broadcast_to_the_leaf():
    x = jnp.array([[-3.0, 5.0], [1.0, 2.0]])
    got = clipped(clip_by_value(-1.0, np.array([[0.0, 3.0]])), x)
    np.testing.assert_array_equal(got, [[-1.0, 3.0], [0.0, 2.0]])
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_array_equal(clipped(clip_by_value(-1.0, np.array([0.0, 3.0])), x), got)


def test_clip_by_value_keeps_nan_and_the_sign_of_zero():
    got = np.asarray(clipped(clip_by_value(-1.0, 1.0), jnp.array([np.nan, -0.0, np.inf])))
    np.testing.assert_array_equal(got, [np.nan, 0.0, 1.0])
    assert np.signbit(got[1])


@pytest.mark.parametrize("name", CLIPS)
def test_absent_leaves_stay_absent(name):
    updates = {"a": jnp.array([30.0, 40.0]), "b": None, "c": optax.MaskedNode()}
    got = clipped(CLIPS[name], updates)
    assert got["b"] is None
    assert got["c"] == optax.MaskedNode()
    np.testing.assert_array_equal(got["a"], clipped(CLIPS[name], updates["a"]))


@pytest.mark.parametrize("name", CLIPS)
def test_a_masked_leaf_is_not_clipped_and_does_not_count(name):
    updates = {"a": jnp.array([30.0, 40.0]), "b": jnp.array([[1e6]])}
    tx = optax.masked(CLIPS[name], {"a": True, "b": False})
    got, _ = tx.update(updates, tx.init(updates))
    np.testing.assert_array_equal(got["b"], updates["b"])
    np.testing.assert_array_equal(got["a"], clipped(CLIPS[name], updates["a"]))


@pytest.mark.parametrize("name", CLIPS)
def test_an_empty_tree_stays_empty(name):
    assert clipped(CLIPS[name], {}) == {}
    assert clipped(CLIPS[name], {"a": None}) == {"a": None}


@pytest.mark.parametrize("tree", [{}, None, {"a": None}, {"a": optax.MaskedNode()}])
def test_the_global_norm_of_nothing_is_zero(tree):
    norm = global_norm(tree)
    assert norm == 0
    assert (norm.shape, norm.dtype) == ((), jnp.float32)


@pytest.mark.parametrize("norm", [np.nan, np.inf, -np.inf])
def test_a_global_norm_that_is_not_finite_makes_everything_nan(norm):
    updates = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([[norm]]), "c": None}
    got = clipped(clip_by_global_norm(1e9), updates)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(got))
    assert got["c"] is None
    given = clipped(clip_by_global_norm(1.0), {"a": updates["a"]}, use_norm=norm)
    assert np.isnan(given["a"]).all()


def test_squares_that_overflow_make_the_global_norm_infinite():
    assert global_norm(jnp.array([1e20, 0.0])) == np.inf
    assert np.isnan(clipped(clip_by_global_norm(1.0), jnp.array([1e20, 0.0]))).all()


@pytest.mark.parametrize(
    ("use_norm", "expected"),
    [(0.0, [3.0, 4.0]), (2.5, [3.0, 4.0]), (5, [1.5, 2.0]), (10.0, [0.75, 1.0])],
)
def test_use_norm_is_believed(use_norm, expected):
    tx = clip_by_global_norm(2.5)
    np.testing.assert_array_equal(clipped(tx, jnp.array([3.0, 4.0]), use_norm=use_norm), expected)


@pytest.mark.parametrize("norm", [-1, -0.5, "2", True, 1j, 10**400, lambda: 1.0])
def test_use_norm_is_a_norm(norm):
    with pytest.raises(ValueError, match=r"use_norm=.* is out of range\. Pass 0 or above"):
        clipped(clip_by_global_norm(2.5), jnp.array([3.0, 4.0]), use_norm=norm)


@pytest.mark.parametrize("bound", ["1", True, 1j, abs, {"a": "1"}, jnp.array([1j])])
@pytest.mark.parametrize("name", ["clip_value_min", "clip_value_max"])
def test_a_bound_is_a_number(name, bound):
    bounds = {"clip_value_min": None, "clip_value_max": None} | {name: bound}
    with pytest.raises(ValueError, match=rf"{name}=.* is out of range\. Pass a number"):
        clip_by_value(**bounds)


def test_use_norm_reaches_through_a_chain():
    tx = optax.chain(clip_by_global_norm(2.5), optax.scale(2.0))
    updates = jnp.array([3.0, 4.0])
    got, _ = tx.update(updates, tx.init(updates), use_norm=jnp.float32(10))
    np.testing.assert_array_equal(got, [1.5, 2.0])


@pytest.mark.many(1)
@pytest.mark.parametrize("name", CLIPS)
def test_zero_stays_zero_and_the_derivative_there_is_the_identity(name):
    zero = jnp.zeros((2, 2))
    tx = CLIPS[name]
    np.testing.assert_array_equal(clipped(tx, zero), zero)
    identity = np.eye(4).reshape(2, 2, 2, 2)
    np.testing.assert_array_equal(jax.jacrev(lambda x: clipped(tx, x))(zero), identity)
    np.testing.assert_array_equal(jax.jacfwd(lambda x: clipped(tx, x))(zero), identity)


@pytest.mark.slow
def test_the_derivative_of_the_global_norm_at_zero_is_zero():
    np.testing.assert_array_equal(jax.grad(global_norm)(jnp.zeros(2)), [0.0, 0.0])
    np.testing.assert_allclose(jax.grad(global_norm)(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_derivatives_are_those_of_finite_differences(name, x64):
    x = jnp.array([[3.0, -7.0], [6.0, 0.5]])
    check_grads(lambda x: clipped(CLIPS[name], x), (x,), order=1, modes=["fwd", "rev"])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "make", [clip_by_norm, clip_by_global_norm, lambda c: clip_by_average_norm(c / 2)]
)
def test_half_precision_is_computed_in_float32_and_given_back_in_its_dtype(make, dtype):
    # the squares of 300 and 400 overflow float16, and those of 3e-4 and 4e-4 underflow
    for scale in (100, 1e-4):
        x = jnp.array([3 * scale, 4 * scale]).astype(dtype)
        got = clipped(make(2.5 * scale), x)
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(jnp.float32) * 2, x.astype(jnp.float32), rtol=1e-2)


@pytest.mark.slow
def test_the_global_norm_has_the_widest_dtype_of_its_leaves(x64):
    half, wide = jnp.full((), 3, jnp.float16), jnp.full((), 4, jnp.float64)
    assert global_norm({"a": half}).dtype == jnp.float32
    assert global_norm({"a": half, "b": wide}).dtype == jnp.float64
    assert global_norm({"a": half, "b": wide}) == 5
    got = clipped(clip_by_global_norm(2.5), {"a": half, "b": wide})
    assert (got["a"].dtype, got["b"].dtype) == (jnp.float16, jnp.float64)
    assert (got["a"], got["b"]) == (1.5, 2.0)


@pytest.mark.many(2)
@pytest.mark.parametrize(
    ("make", "hyper", "other"),
    [
        (clip_by_value, {"clip_value_min": -2.0, "clip_value_max": 2.0}, {"clip_value_max": 3.5}),
        (clip_by_norm, {"clip_norm": 2.5, "axes": (0,)}, {"clip_norm": 1.25}),
        (clip_by_norm, {"clip_norm": 2.5}, {"clip_norm": 1.25}),
        (clip_by_average_norm, {"clip_norm": 1.25}, {"clip_norm": 0.5}),
        (clip_by_global_norm, {"clip_norm": 2.5}, {"clip_norm": 1.25}),
    ],
)
def test_bounds_are_changed_in_the_state_without_compiling_again(make, hyper, other):
    x = jnp.array([3.0, -4.0])
    tx = optax.inject_hyperparams(make)(**hyper)
    update = compiling.jit(tx.update)
    got, state = update(x, tx.init(x), x)
    np.testing.assert_array_equal(got, clipped(make(**hyper), x))
    state.hyperparams.update({name: jnp.float32(value) for name, value in other.items()})
    got, _ = update(x, state, x)
    np.testing.assert_array_equal(got, clipped(make(**(hyper | other)), x))
    assert compiling.compilations(update) == 1


NUMBERS = functools.partial(st.floats, width=32, allow_subnormal=False)  # XLA may flush them
VALUES = arrays(np.float32, (2, 3), elements=NUMBERS(-1e6, 1e6))


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=60)
@given(VALUES, st.floats(1e-3, 1e3))
def test_clipping_by_a_norm_keeps_the_direction_and_the_bound(x, bound):
    for tx, norm in (
        (clip_by_norm(bound), np.linalg.norm(x.astype(np.float64))),
        (clip_by_global_norm(bound), np.linalg.norm(x.astype(np.float64))),
        (clip_by_average_norm(bound), np.linalg.norm(x.astype(np.float64)) / x.size),
    ):
        expected = x * min(1, bound / norm) if norm else x
        np.testing.assert_allclose(clipped(tx, x), expected, rtol=1e-5, atol=1e-30)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(VALUES, NUMBERS(-1e3, 0), NUMBERS(0, 1e3))
def test_clipping_by_value_is_numpys(x, low, high):
    np.testing.assert_array_equal(clipped(clip_by_value(low, high), x), np.clip(x, low, high))


NORMS = {
    "norm": clip_by_norm,
    "average_norm": clip_by_average_norm,
    "global_norm": clip_by_global_norm,
}


@pytest.mark.many(4)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("bound", [np.inf, 1e39, 1e38, 2e19, float("inf"), jnp.float32(np.inf)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_norm_that_nothing_reaches_is_no_clipping(name, bound, dtype):
    x = jnp.array([3e18, -4e18, 0.0]).astype(dtype)
    np.testing.assert_array_equal(clipped(NORMS[name](bound), x), x)
    inject = optax.inject_hyperparams(NORMS[name], hyperparam_dtype=jnp.float32)
    injected = inject(clip_norm=jnp.float32(min(bound, 3e38) if bound < np.inf else bound))
    got, _ = jax.jit(injected.update)(x, injected.init(x), x)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("name", NORMS)
def test_the_greatest_norm_that_clips_is_the_root_of_the_greatest_number(name):
    x = jnp.array([3e18, -4e18])
    expected = {"norm": 2.5e18, "average_norm": 1.25e18, "global_norm": 2.5e18}[name]
    np.testing.assert_allclose(clipped(NORMS[name](expected), x), x / 2, rtol=1e-6)
    np.testing.assert_allclose(clipped(NORMS[name](1.8e19), x), x, rtol=1e-6)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("bound", [0.0, 1e-46, -1.0, np.nan, [1.0, 2.0], "1"])
def test_a_norm_that_is_no_positive_number_is_refused(name, bound):
    with pytest.raises(ValueError, match=r"clip_norm=.* is out of range"):
        NORMS[name](bound)


def test_norms_of_complex_numbers_are_of_their_absolute_values():
    x = {"z": jnp.array([3 + 4j, 0]), "w": jnp.array([12.0])}
    assert global_norm({"z": x["z"]}) == 5
    assert global_norm(x) == 13
    assert global_norm(x).dtype == jnp.float32
    halves = clipped(clip_by_global_norm(6.5), x)
    np.testing.assert_array_equal(halves["z"], [1.5 + 2j, 0])
    np.testing.assert_array_equal(halves["w"], [6.0])
    np.testing.assert_array_equal(clipped(clip_by_norm(2.5), x["z"]), [1.5 + 2j, 0])
    np.testing.assert_array_equal(clipped(clip_by_average_norm(1.25), x["z"]), [1.5 + 2j, 0])
    assert halves["z"].dtype == jnp.complex64
    np.testing.assert_array_equal(jax.grad(lambda z: global_norm(z))(0 * x["z"]), [0, 0])


def test_parts_of_complex_numbers_are_clipped_by_value_each_by_itself():
    got = clipped(clip_by_value(-1.0, 2.0), jnp.array([3 + 4j, -5 + 1j]))
    np.testing.assert_array_equal(got, [2 + 2j, -1 + 1j])


@pytest.mark.parametrize("name", CLIPS)
def test_what_jax_gives_integers_for_a_gradient_passes(name):
    float0 = np.zeros((), jax.dtypes.float0)
    tx = optax.masked(CLIPS[name], {"w": True, "n": name != "norm_axes"})
    got = clipped(CLIPS[name], {"w": jnp.array([3.0, 4.0])})
    with_integer, _ = tx.update({"w": jnp.array([3.0, 4.0]), "n": float0}, tx.init(got | {"n": 1}))
    assert with_integer["n"] is float0
    np.testing.assert_array_equal(with_integer["w"], got["w"])


def test_whole_numbers_beyond_the_dtype_bound_nothing():
    got = clipped(clip_by_value(-(2**40), 2**40), jnp.array([-7, 2**31 - 1]))
    np.testing.assert_array_equal(got, [-7, 2**31 - 1])
    big = jnp.array([3e38])
    np.testing.assert_array_equal(clipped(clip_by_value(-1e39, 1e39), big), big)
    got = clipped(clip_by_global_norm(1.0), jnp.array([2.0**40]), use_norm=2**40)
    np.testing.assert_array_equal(got, [1.0])


@pytest.mark.slow
def test_inside_shard_map_the_norm_is_that_of_a_shard_unless_it_is_passed():
    mesh = jax.make_mesh((8,), ("data",))
    x = jnp.arange(1.0, 17.0)
    tx = clip_by_global_norm(2.0)

    def shard_by_shard(shard):
        return tx.update(shard, optax.EmptyState())[0]

    def whole(shard):
        norm = jnp.sqrt(jax.lax.psum(global_norm(shard) ** 2, "data"))
        return tx.update(shard, optax.EmptyState(), use_norm=norm)[0]

    in_shards = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    put = jax.device_put(x, NamedSharding(mesh, P("data")))
    rows = x.reshape(8, 2)
    each = rows * 2 / jnp.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(in_shards(shard_by_shard)(put), each.reshape(-1), rtol=1e-6)
    np.testing.assert_allclose(in_shards(whole)(put), x * 2 / jnp.linalg.norm(x), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(shard_by_shard)(put), x * 2 / jnp.linalg.norm(x), rtol=1e-6)
