"""Packed trees: lossless both ways, the same numbers in every place, and errors for the rest."""

import functools

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import bitwise, close
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint, on_leaves, pack, unpack


MIXED = {
    "a": jnp.arange(6.0).reshape(2, 3),
    "halves": [None, jnp.asarray([1, 2, 3], jnp.bfloat16), jnp.zeros((0, 2))],
    "integer": jnp.int32(7),
    "flag": jnp.array([True, False]),
    "key": jax.random.key(3),
    "number": 2.5,
}
TREE = {
    "w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3),
    "b": jnp.array([0.5, -0.25]),
    "scale": jnp.float32(1.5),
}
GRADS = jax.tree.map(lambda x: jnp.cos(3 * x), TREE)
LIKE_TREES = {
    "gradient_descent": emaopt.gradient_descent(0.1),
    "momentum": emaopt.momentum(0.1, 0.9),
    "adagrad": emaopt.adagrad(0.1),
    "adadelta": emaopt.adadelta(0.1, epsilon=1e-3),
    "adam": emaopt.adam(0.1, epsilon=1e-3),
    "ftrl": emaopt.ftrl(0.1),
    "rmsprop": emaopt.rmsprop(0.1, epsilon=1e-3),
    "ema": emaopt.ema(0.9),
    "ema_compensated": emaopt.ema(0.9, accumulator_dtype=emaopt.compensated(), ledger=True),
    "heal": emaopt.heal(emaopt.ema(0.9)),
    "overwrite": emaopt.overwrite(2, emaopt.ema(0.9)),
    "clip_by_value": emaopt.clip_by_value(-0.5, 0.5),
    "clip_by_global_norm": emaopt.clip_by_global_norm(0.5),
    "clip_by_norm": on_leaves(emaopt.clip_by_norm(0.5)),
    "clip_by_average_norm": on_leaves(emaopt.clip_by_average_norm(0.2)),
    "decay by name": on_leaves(optax.masked(optax.add_decayed_weights(0.1), emaopt.matching("w$"))),
    "optax adam": optax.adam(0.1, eps=1e-3),
}
CHAIN = optax.chain(
    emaopt.clip_by_global_norm(1.0), emaopt.momentum(0.1, 0.9), emaopt.ema(emaopt.warmup(0.9))
)


def steps(tx, params, grads, number=3):
    step = compiling.jit(lambda p, s, g: emaopt.apply_gradients(tx, g, p, s), donate_argnums=(0, 1))
    carry = params, tx.init(params)
    for _ in range(number):
        carry = step(*carry, grads)
    assert compiling.compilations(step) == 1
    return carry


@functools.cache
def trained():
    return steps(CHAIN, pack(TREE), pack(GRADS))


@pytest.mark.many(3)
@pytest.mark.parametrize("tree", [MIXED, TREE, {}, None, jnp.ones(2), {"a": jnp.zeros((2, 0))}])
@pytest.mark.parametrize("max_size", [0, 2, 2**16])
def test_unpack_gives_back_what_was_packed_bit_for_bit(tree, max_size):
    arrays = jax.tree.map(jnp.asarray, tree)
    bitwise(unpack(pack(tree, max_size=max_size)), arrays)
    bitwise(jax.jit(lambda tree: unpack(pack(tree, max_size=max_size)))(tree), arrays)


def test_there_is_one_array_per_dtype_and_big_leaves_and_keys_stay_apart():
    packed = pack(MIXED, max_size=5)
    sizes = {(x.dtype.name, x.shape) for x in jax.tree.leaves(packed)}
    assert sizes == {
        ("float32", (2, 3)),
        ("float32", (1,)),
        ("bfloat16", (3,)),
        ("int32", (1,)),
        ("bool", (2,)),
        ("key<fry>", ()),
    }
    assert any(x is MIXED["a"] for x in jax.tree.leaves(packed))


def test_packing_inside_jit_is_the_same_node():
    assert jax.tree.structure(jax.jit(pack)(TREE)) == jax.tree.structure(pack(TREE))
    assert len({pack(TREE)._layout, jax.jit(pack)(TREE)._layout}) == 1
    assert jax.tree.structure(pack(TREE)) != jax.tree.structure(pack(TREE | {"b": jnp.zeros(3)}))
    assert "3 leaves" in repr(pack(TREE))


@pytest.fixture
def lenient():
    """Optax promotes integers to floating-point numbers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.many(1)
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", LIKE_TREES)
def test_training_is_that_of_the_tree(name):
    tx = LIKE_TREES[name]
    got, want = (steps(tx, *trees) for trees in ((pack(TREE), pack(GRADS)), (copied(TREE), GRADS)))
    close(unpack(got), want)


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.slow
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(
    "wrap", [lambda tx: optax.MultiSteps(tx, 2), lambda tx: optax.apply_if_finite(tx, 3)]
)
def test_a_packed_chain_inside_multi_steps_or_apply_if_finite_gives_the_same_numbers(wrap):
    tx = wrap(CHAIN)
    got, want = (
        steps(tx, *trees, 4) for trees in ((pack(TREE), pack(GRADS)), (copied(TREE), GRADS))
    )
    close(unpack(got), want)


def test_integers_are_left_out_by_a_mask_of_dtypes():
    params, grads = TREE | {"count": jnp.int32(3)}, GRADS | {"count": jnp.int32(0)}
    floating = lambda tree: jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), tree)
    tx = optax.chain(optax.masked(emaopt.momentum(0.1, 0.9), floating), emaopt.ema(0.5))
    want = emaopt.apply_gradients(tx, grads, params, tx.init(params))
    got = emaopt.apply_gradients(tx, pack(grads), pack(params), tx.init(pack(params)))
    close(unpack(got), want)
    bitwise(pack(unpack(got), like=got), got)


def loss(params):
    return jnp.sum(jnp.tanh(params["w"]) * params["scale"]) + jnp.prod(params["b"])


@pytest.mark.slow
def test_derivatives_of_every_order_and_mode_are_those_of_the_tree():
    opened = lambda packed: loss(unpack(packed))
    packed, direction = pack(TREE), pack(GRADS)
    close(unpack(jax.grad(opened)(packed)), jax.grad(loss)(TREE))
    close(jax.jvp(opened, (packed,), (direction,)), jax.jvp(loss, (TREE,), (GRADS,)))
    along = lambda f, x, v: jax.jvp(jax.grad(f), (x,), (v,))[1]
    close(unpack(along(opened, packed, direction)), along(loss, TREE, GRADS))


def test_the_gradient_is_one_concatenation():
    many = {f"w{i:02}": jnp.ones(5) for i in range(40)}
    grad = jax.jit(jax.grad(lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(unpack(p)))))
    hlo = grad.lower(pack(many)).compile()
    assert hlo.as_text().count(" concatenate(") == 1
    assert " pad(" not in hlo.as_text()
    assert hlo.cost_analysis()["bytes accessed"] < 6 * 200 * 4 + 40 * 200


def test_leaves_of_one_shape_share_one_kernel():
    many = {f"w{i:02}": jnp.ones(5) for i in range(40)}
    squares = jax.jit(lambda p: [x**2 for x in jax.tree.leaves(unpack(p))])
    hlo = squares.lower(pack(many)).compile().as_text()
    assert " dynamic-slice(" in hlo
    assert " slice(" not in hlo.split("ENTRY")[1]


@pytest.mark.slow
def test_vmap_over_the_whole_and_a_leading_axis():
    packed = pack(TREE)
    three = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), packed)
    want = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), TREE)
    bitwise(unpack(three), want)
    bitwise(jax.vmap(unpack)(three), want)
    bitwise(pack(want, like=three), three)
    got = jax.vmap(lambda p: loss(unpack(p)))(three)
    np.testing.assert_allclose(got, jax.vmap(loss)(want), rtol=1e-6)


def test_under_scan_and_donated():
    def step(carry, _):
        return emaopt.apply_gradients(CHAIN, pack(GRADS), *carry), None

    packed = pack(TREE)
    carry, _ = jax.lax.scan(step, (packed, CHAIN.init(packed)), length=3)
    close(carry, trained())
    compiled = jax.jit(lambda c: step(c, None)[0], donate_argnums=0).lower(carry).compile()
    sizes = compiled.memory_analysis()
    assert sizes.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(carry))


def test_average_and_swap_work_on_either_form():
    params, opt_state = trained()
    tree, state = unpack(trained())
    bitwise(unpack(emaopt.average(params, opt_state)), emaopt.average(tree, state))
    bitwise(unpack(emaopt.swap(params, opt_state)), emaopt.swap(tree, state))
    bitwise(emaopt.swap(*emaopt.swap(params, opt_state)), trained())
    bitwise(unpack(emaopt.stacked(params, opt_state)), emaopt.stacked(tree, state))


def test_a_state_goes_both_ways():
    bitwise(pack(unpack(trained()), like=trained()), trained())
    mixed = pack(MIXED)
    bitwise(pack(MIXED, like=mixed), mixed)
    fresh = emaopt.heal(emaopt.ema(0.9)).init(pack(TREE))
    bitwise(pack(unpack(fresh), like=fresh), fresh)


def test_names_are_those_of_the_unpacked_state():
    names = emaopt.names(unpack(trained()[1]))
    assert names[-1].shadow["w"] == "w/ExponentialMovingAverage"
    with pytest.raises(ValueError, match="tree is packed"):
        emaopt.names(trained()[1])
    with pytest.raises(ValueError, match=r"tree is packed.*emaopt\.on_leaves"):
        emaopt.matching("w")(pack(TREE))


@pytest.mark.slow
def test_a_checkpoint_holds_the_original_names_and_training_goes_on(tmp_path):
    tree, state = unpack(trained())
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpoint.save(checkpointer, 0, tree, state)
        checkpoint.save(checkpointer, 1, *trained())
        *got, _ = checkpoint.resume(checkpointer, tree, state, step=0)
        bitwise(pack(tuple(got), like=trained()), trained())
        *got, _ = checkpoint.resume(checkpointer, *trained(), step=1)
        bitwise(tuple(got), trained())
        other = pack({"w": TREE["w"].T, "b": TREE["b"], "scale": TREE["scale"]})
        with pytest.raises(ValueError, match="float32_"):
            checkpoint.resume(checkpointer, other, CHAIN.init(other), step=1)
    got = checkpoint.restore_averages(tmp_path / "run", like=tree, step=0)
    bitwise(got, emaopt.average(tree, state))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_replicated_leaves_are_joined_and_sharded_ones_stay(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    specs = {"rows": P("x"), "bias": P(), "scale": P()}
    tree = {"rows": jnp.ones((8, 2)), "bias": jnp.ones(3), "scale": jnp.ones(())}
    tree = jax.device_put(tree, {k: NamedSharding(mesh, spec) for k, spec in specs.items()})
    packed = pack(tree)
    sharded = {x.shape: any(x.sharding.spec) for x in jax.tree.leaves(packed)}
    assert sharded == {(8, 2): True, (4,): False}
    bitwise(unpack(packed), tree)
    carry = steps(CHAIN, copied(packed), packed)
    for x in jax.tree.leaves(carry):
        assert len(x.sharding.device_set) == 8
        assert x.sharding.is_fully_replicated == (x.shape != (8, 2))
    if kind == AxisType.Explicit:
        with jax.set_mesh(mesh):
            inside = jax.jit(pack)(tree)
        assert jax.tree.structure(inside) == jax.tree.structure(packed)


def test_leaves_on_different_devices_are_joined_apart():
    first, second = jax.devices()[:2]
    tree = {"a": jax.device_put(jnp.ones(2), first), "b": jax.device_put(jnp.ones(3), second)}
    assert [x.shape for x in jax.tree.leaves(pack(tree))] == [(2,), (3,)]
    bitwise(unpack(pack(tree)), tree)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(pack(TREE)), "tree is packed"),
        (lambda: pack(TREE, max_size=-1), "max_size=-1 is out of range"),
        (lambda: pack(TREE, like=TREE), "like holds nothing packed"),
        (lambda: pack(TREE["w"], like=pack(TREE)), r"structure of unpack\(like\)"),
        (lambda: pack((TREE, 1), like=(pack(TREE), 1, 2)), r"structure of unpack\(like\)"),
        (lambda: pack(TREE | {"b": jnp.ones(3)}, like=pack(TREE)), r"leaf 'b' is float32\[3\]"),
        (
            lambda: pack(TREE | {"b": jnp.ones(2, int)}, like=pack(TREE)),
            r"'scale' is float32\[\].*beside int32",
        ),
        (lambda: pack(TREE | {"b": None}, like=pack(TREE)), "leaf 'b' is None"),
        (lambda: pack({"a/b": 1.0, "a": {"b": 2.0}}), "two leaves are named 'a/b'"),
        (
            lambda: unpack(jax.tree.map(lambda x: x[:5], pack(TREE))),
            r"tree has shape \(5,\) in the packed array 'float32_",
        ),
        (
            lambda: steps(emaopt.clip_by_norm(1.0), pack(TREE), pack(GRADS)),
            "on_leaves.clip_by_norm",
        ),
        (
            lambda: steps(emaopt.clip_by_average_norm(1.0), pack(TREE), pack(GRADS)),
            "on_leaves.clip_by_average_norm",
        ),
        (
            lambda: steps(emaopt.clip_by_value(TREE, TREE), pack(TREE), pack(GRADS)),
            "does not have the tree structure of updates",
        ),
    ],
)
def test_what_cannot_be_done_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_on_leaves_wraps_a_transformation():
    with pytest.raises(ValueError, match=r"tx=3 is not a transformation\. Pass one"):
        on_leaves(3)
