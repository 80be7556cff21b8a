"""Averages in a state: who owns the arrays, two networks, starting again, abstract parameters."""

import functools
import os
import subprocess
import sys
import typing

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import equal
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import emaopt
from emaopt._average.match import AmbiguousError


def sgd():
    return emaopt.gradient_descent(0.5)


# who owns the arrays


def loss(params):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def trained(params, average=None):
    tx = optax.chain(sgd(), average or emaopt.ema(0.5))
    step = emaopt.minimize(loss, tx)
    params, opt_state, _ = step(jax.tree.map(jnp.copy, params), tx.init(params))
    return step, params, opt_state


TREE = {"kernel": jnp.arange(8.0), "bias": jnp.ones(3)}
KINDS = {
    "float32": emaopt.ema(0.5),
    "masked": optax.masked(emaopt.ema(0.5), {"kernel": True, "bias": False}),
    "compensated": emaopt.ema(0.5, accumulator_dtype=emaopt.compensated()),
    "bfloat16": emaopt.ema(0.5, accumulator_dtype=jnp.bfloat16),
}


@pytest.mark.many(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_no_later_step_deletes_the_averages(kind, how):
    step, params, opt_state = trained(TREE, KINDS[kind])
    averaged = how(emaopt.average)(params, opt_state)
    several = how(emaopt.stacked)(params, opt_state)
    kept = jax.tree.map(np.array, (averaged, several))
    step(params, opt_state)  # donates both
    assert jax.tree.leaves(opt_state)[0].is_deleted()
    equal((averaged, several), kept)


def test_training_goes_on_from_the_averages():
    step, params, opt_state = trained(TREE)
    params = emaopt.average(params, opt_state)
    wanted = jax.tree.map(np.array, params)
    params, opt_state, _ = step(params, opt_state)  # no array is donated twice
    equal(params, jax.tree.map(lambda x: jnp.asarray(x - np.float32(0.5) * 2 * x), wanted))


def test_no_later_step_deletes_the_averages_of_sharded_parameters():
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    specs = {"kernel": P("x"), "bias": P()}
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    step, params, opt_state = trained(jax.tree.map(put, TREE, specs))
    averaged = emaopt.average(params, opt_state)
    kept = jax.tree.map(np.array, averaged)
    assert all(averaged[k].sharding == params[k].sharding for k in TREE)
    step(params, opt_state)
    equal(averaged, kept)


@pytest.mark.slow
def test_no_later_step_deletes_a_model_of_the_averages():
    model = nnx.Sequential(
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.0, rngs=nnx.Rngs(params=0, dropout=1))
    )
    optimizer = nnx.Optimizer(model, optax.chain(sgd(), emaopt.ema(0.5)), wrt=nnx.Param)
    x = jnp.ones((1, 2))

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model))

    step(model, optimizer)
    whole = emaopt.average(model, optimizer)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    merged = nnx.merge(graphdef, emaopt.average(params, optimizer.opt_state), nnx.clone(rest))
    kept = np.array(whole(x))
    step(model, optimizer)
    np.testing.assert_array_equal(whole(x), kept)
    np.testing.assert_array_equal(merged(x), kept)
    assert jax.random.key_data(whole.layers[1].rngs.key[...]).size  # also what has no average


@pytest.mark.slow
def test_an_equinox_model_of_the_averages_keeps_what_is_no_array():
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    state = emaopt.ema(0.5).init(eqx.filter(model, eqx.is_inexact_array))
    averaged = emaopt.average(model, state)
    assert averaged.activation is model.activation
    assert averaged.layers[0].weight is not state.shadow.layers[0].weight
    equal(eqx.filter(averaged, eqx.is_array), eqx.filter(model, eqx.is_array))


@pytest.mark.parametrize("f", [emaopt.average, emaopt.swap])
def test_under_jit_nothing_is_copied(f):
    _, params, opt_state = trained(TREE)
    assert jax.make_jaxpr(f)(params, opt_state).eqns == []


def test_swap_hands_over_the_arrays_themselves():
    _, params, opt_state = trained(TREE)
    averaged, swapped = emaopt.swap(params, opt_state)
    assert averaged["kernel"] is opt_state[1].shadow["kernel"]
    assert swapped[1].shadow["kernel"] is params["kernel"]


def test_a_step_of_overwrite_shares_no_array_with_the_average():
    tx = emaopt.overwrite(1, optax.chain(sgd(), emaopt.ema(0.5)))
    step = emaopt.minimize(loss, tx)
    params, opt_state, _ = step(jax.tree.map(jnp.copy, TREE), tx.init(TREE))
    averaged = emaopt.average(params, opt_state)
    equal(averaged, jax.tree.map(np.array, params))
    step(params, opt_state)
    equal(averaged, jax.tree.map(lambda x: 0.5 * x, TREE))


# two networks in one state


class Pair(typing.NamedTuple):
    actor: typing.Any
    critic: typing.Any


def layer(x):
    return {"dense": {"kernel": jnp.full(2, x)}}


PAIRS = {
    "dict": lambda actor, critic: {"actor": actor, "critic": critic},
    "fields": Pair,
    "tuple": lambda actor, critic: (actor, critic),
    "below": lambda actor, critic: {"nets": {"actor": actor, "critic": critic}},
}
ONE_NETWORK = {
    "trees": layer,
    "arrays": lambda x: jnp.full(2, x),  # the same name, "", in both
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("network", ONE_NETWORK.values(), ids=ONE_NETWORK)
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"opt": s}], ids=["bare", "wrapped"])
def test_two_networks_are_told_apart_by_where_they_stand(pair, network, wrap):
    if pair is PAIRS["tuple"]:
        wrap = lambda s: s  # a chain has positions, too: they tell only at the start
    params = pair(network(1.0), network(6.0))
    tx = optax.chain(sgd(), emaopt.ema(0.5))
    both = wrap(pair(tx.init(network(2.0)), tx.init(network(7.0))))
    equal(emaopt.average(params, both), pair(network(2.0), network(7.0)))
    averaged, swapped = emaopt.swap(params, both)
    equal(averaged, pair(network(2.0), network(7.0)))
    equal(emaopt.swap(averaged, swapped), (params, both))
    again = emaopt.reset(params, both)
    equal(emaopt.average(params, again), params)
    # only one of them has an average
    one = wrap(pair(sgd().init(network(1.0)), tx.init(network(7.0))))
    equal(emaopt.average(params, one), pair(network(1.0), network(7.0)))


@pytest.mark.parametrize("network", ONE_NETWORK.values(), ids=ONE_NETWORK)
def test_a_place_in_a_chain_is_not_taken_for_a_place_in_a_list_of_networks(network):
    nets = [network(1.0), network(6.0), network(8.0)]
    of_the_first = optax.chain(sgd(), emaopt.ema(0.5)).init(nets[0])
    for look in (emaopt.average, emaopt.swap, emaopt.reset, emaopt.stacked):
        with pytest.raises(ValueError, match="Pass"):
            look(nets, of_the_first)
    each = [emaopt.ema(0.5).init(net) for net in nets]
    equal(emaopt.average(nets, each), nets)
    # the others have other shapes, so there is no doubt
    nets[1] = jax.tree.map(lambda x: jnp.ones(3), nets[1])
    equal(emaopt.average(nets[:2], (optax.EmptyState(), emaopt.ema(0.5).init(nets[1]))), nets[:2])


def test_two_networks_with_several_averages_each_are_chosen_by_name():
    tx = optax.named_chain(("sgd", sgd()), ("fast", emaopt.ema(0.5)), ("slow", emaopt.ema(0.9)))
    params = {"gen": layer(1.0), "disc": layer(6.0)}
    both = {name: tx.init(x) for name, x in params.items()}
    both["gen"]["fast"] = both["gen"]["fast"]._replace(shadow=layer(3.0))
    assert list(emaopt.averages(both)) == ["disc/fast", "disc/slow", "gen/fast", "gen/slow"]
    with pytest.raises(AmbiguousError, match=r"leaf 'disc/dense/kernel' has several.*'gen/slow'"):
        emaopt.average(params, both)
    wanted = {"gen": layer(3.0), "disc": layer(6.0)}
    equal(emaopt.average(params, both, "fast"), wanted)
    equal(emaopt.average(params, both, "gen/fast"), wanted)
    equal(emaopt.average(params, both, "slow"), params)
    for name in ("gem", "fast/gen", "gen/slow/fast"):
        with pytest.raises(ValueError, match=rf"name='{name}' is not an average"):
            emaopt.average(params, both, name)


def test_a_part_of_a_part_of_the_parameters():
    inner = {"w": jnp.zeros(2), "actor": {"w": jnp.ones(2)}}
    params = {"actor": inner, "w": jnp.full(2, 7.0)}
    state = emaopt.ema(0.5).init(jax.tree.map(lambda x: x + 1, inner))
    got = emaopt.average(params, {"actor": state})
    equal(got, {"actor": jax.tree.map(lambda x: x + 1, inner), "w": params["w"]})
    # the masked average of the whole stays one of the whole, whatever its link is called
    mask = {"actor": {"w": False, "actor": {"w": False}}, "w": True}
    tx = optax.named_chain(("actor", optax.masked(emaopt.ema(0.5), mask)))
    changed = {"actor": inner, "w": jnp.full(2, 8.0)}
    equal(emaopt.average(params, tx.init(changed)), changed)


WRONG = """
import jax.numpy as jnp, emaopt
layer = lambda x: {"dense": {"kernel": jnp.full(2, x)}}
params = {"gen": layer(1.0), "disc": layer(6.0)}
for state in ({"g": emaopt.ema(0.5).init(layer(1.0))}, emaopt.ema(0.5).init({"b": {"w": 1.0}})):
    try:
        emaopt.average(params, state)
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_an_average_that_belongs_to_no_network_says_the_same_in_every_process():
    said = []
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", WRONG],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(run.stdout)
    assert said[0] == said[1]
    assert "below each of 'disc', 'gen', and the average at 'g' does not tell" in said[0]
    assert "{'disc': ..., 'gen': ...}" in said[0]
    assert "no leaf 'b/w', which opt_state averages; it has 'disc/dense/kernel', 'gen/" in said[0]


def test_an_average_of_one_array_belongs_to_no_tree():
    params = {"w": jnp.ones(2), "b": jnp.ones(1)}
    tx = optax.flatten(optax.chain(sgd(), emaopt.ema(0.5)))
    with pytest.raises(ValueError, match=r"leaves 'b', 'w', .* one array of shape \(3,\)\. Pass"):
        emaopt.average(params, tx.init(params))


def test_a_leaf_that_the_mask_left_out_has_nothing_to_average():
    params = {"w": jnp.ones(2), "b": jnp.ones(1)}
    state = optax.masked(emaopt.ema(0.5), {"w": True, "b": False}).init(params)
    with pytest.raises(ValueError, match=r"state.shadow has nothing at leaf 'b' where values"):
        optax.masked(emaopt.ema(0.5), {"w": True, "b": True}).update(params, state, params)


def test_averages_of_one_name_are_refused():
    state = emaopt.ema(0.5).init(jnp.zeros(1))
    with pytest.raises(ValueError, match=r"two averages named 'a/b'\. Rename one"):
        emaopt.averages({"a": {"b": state}, "a/b": state})


def test_an_absent_leaf_has_no_average_in_any_part():
    def label(path, _):
        return "x" if path[0].key == "x" else "y"

    params = {"x": jnp.zeros(2), "w": jnp.ones(2), "none": None}
    labels = lambda p: jax.tree_util.tree_map_with_path(label, p)
    tx = optax.partition({"x": emaopt.ema(0.5), "y": emaopt.ema(0.9)}, labels)
    state = tx.init(params)
    equal(emaopt.average(params, state), params)
    averaged, swapped = emaopt.swap(params, state)
    equal(emaopt.swap(averaged, swapped), (params, state))


# starting again

PARAMS = {"kernel": jnp.arange(8.0), "steps": jnp.int32(3), "absent": None}
PACKED = {"kernel": jnp.arange(8.0), "bias": jnp.ones(3)}
RESTARTED = {
    "alone": (emaopt.ema(0.5), None),
    "compensated": (emaopt.ema(0.5, accumulator_dtype=emaopt.compensated(jnp.bfloat16)), None),
    "stochastic": (emaopt.ema(0.5, accumulator_dtype=emaopt.stochastic()), None),
    "ledger": (emaopt.ema(0.5, ledger=True), None),
    "named": (optax.named_chain(("a", emaopt.ema(0.5)), ("b", emaopt.ema(0.9))), "b"),
    "masked": (optax.masked(emaopt.ema(0.5), emaopt.matching("kernel")), None),
    "steps": (optax.MultiSteps(emaopt.ema(0.5), 1).gradient_transformation(), None),
    "finite": (optax.apply_if_finite(emaopt.ema(0.5), 2), None),
    "heal": (emaopt.heal(emaopt.ema(0.5)), None),
}


@pytest.mark.many(1)
@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps mixes dtypes
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", RESTARTED)
def test_an_average_starts_again_through_any_wrapper(kind, jit):
    tx, name = RESTARTED[kind]
    params = PARAMS
    updates = jax.tree.map(jnp.ones_like, params)
    state = tx.update(updates, tx.init(params), params)[1]
    moved = optax.apply_updates(params, updates)
    reset = functools.partial(emaopt.reset, name=name)
    again = (jax.jit(reset) if jit else reset)(moved, state)
    found = emaopt.averages(again)
    chosen = next(iter(found)) if name is None else name
    equal(found[chosen], emaopt.averages(tx.init(moved))[chosen])
    for other in found.keys() - {chosen}:
        equal(found[other], emaopt.averages(state)[other])
    # it stays a state of that transformation
    tx.update(updates, again, moved)
    assert found[chosen].shadow["kernel"] is not moved["kernel"]


def test_an_average_of_packed_parameters_starts_again():
    tx = optax.chain(sgd(), emaopt.ema(0.5))
    packed = emaopt.pack(PACKED)
    _, state = tx.update(packed, tx.init(packed), packed)
    again = emaopt.reset(packed, state)
    equal(emaopt.averages(again)["1"], emaopt.averages(tx.init(packed))["1"])
    equal(again[0], state[0])


def test_what_cannot_start_again_is_refused():
    params = {"w": jnp.zeros(2)}
    state = emaopt.ema(0.5).init(params)
    with pytest.raises(ValueError, match="opt_state is swapped"):
        emaopt.reset(*emaopt.swap(params, state))
    with pytest.raises(ValueError, match="name is missing: leaf 'w' has several"):
        emaopt.reset(params, (state, state))
    with pytest.raises(ValueError, match="params has no leaf 'w'"):
        emaopt.reset({"v": jnp.zeros(2)}, state)
    nothing = optax.masked(emaopt.ema(0.5), {"w": False}).init(params)
    with pytest.raises(ValueError, match=r"averages no leaf of params: the mask of 'ema' leaves"):
        emaopt.reset(params, nothing)


# abstract parameters


@pytest.mark.parametrize(
    "tx",
    [
        emaopt.ema(0.5),
        emaopt.ema(0.5, accumulator_dtype=emaopt.compensated(jnp.bfloat16), ledger=True),
        optax.chain(emaopt.heal(emaopt.ema(0.5)), optax.masked(emaopt.ema(0.9), {"w": True})),
    ],
)
def test_the_average_of_abstract_parameters_is_abstract(tx):
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    abstract = jax.eval_shape(lambda: params)
    state = tx.init(abstract)
    assert_shapes(state, tx.init(params))
    for average in emaopt.averages(state).values():
        assert isinstance(average.shadow["w"], jax.ShapeDtypeStruct)
        assert average.step == 0
    # Optax's own way to go through a state
    optax.tree.map_params(tx, lambda x: x, tx.init(params))


@pytest.mark.parametrize(
    "tx",
    [
        emaopt.primal(optax.sgd(0.1), emaopt.ema(0.5)),
        emaopt.primal(optax.sgd(0.1), emaopt.ema(0.5, accumulator_dtype=emaopt.stochastic())),
        emaopt.overwrite(2, emaopt.ema(1.0), outer=optax.sgd(0.7, 0.9)),
    ],
    ids=["primal", "stochastic", "outer"],
)
def test_what_is_fed_back_begins_with_abstract_parameters_too(tx):
    """So that a run in bfloat16 is resumed from an abstract template."""
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    abstract = jax.eval_shape(lambda: params)
    state = tx.init(abstract)
    assert_shapes(state, tx.init(params))
    assert_shapes(emaopt.average(abstract, state), params)
    assert_shapes(emaopt.reset(abstract, state), state)


def assert_shapes(a, b):
    shape = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(shape, a) == jax.tree.map(shape, b)


def test_an_abstract_average_is_sharded_as_its_parameters():
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    sharding = NamedSharding(mesh, P("x"))
    state = emaopt.ema(0.5).init({"w": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=sharding)})
    assert state.shadow["w"].sharding == sharding
    assert state.shadow["w"].dtype == jnp.float32
    assert state.step.sharding.device_set == set(mesh.devices.flat)


def test_an_abstract_nnx_model_has_an_average():
    model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    state = emaopt.ema(0.5).init(nnx.state(model, nnx.Param))
    real = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert_shapes(state, emaopt.ema(0.5).init(real))
    averaged, _ = emaopt.swap(nnx.state(model, nnx.Param), state)
    assert_shapes(averaged, real)


def test_a_leaf_that_is_no_array_is_refused_by_name():
    with pytest.raises(ValueError, match=r"params has a str at leaf 'name', which is not an array"):
        emaopt.ema(0.5).init({"name": "net", "w": jnp.zeros(2)})


@pytest.mark.parametrize("read", [emaopt.average, emaopt.stacked])
def test_an_average_that_a_step_deleted_says_so(read):
    tx = emaopt.ema()
    params = {"a": {"w": jnp.ones(2)}}
    state = tx.init(params)
    jax.block_until_ready(jax.jit(lambda x: x, donate_argnums=0)(state))
    with pytest.raises(RuntimeError, match=r"average of 'a/w': a step that donates.*uninterrupted"):
        read(params, state)


@pytest.mark.parametrize("read", [emaopt.average, emaopt.stacked])
def test_a_parameter_without_an_average_that_a_step_deleted_says_so(read):
    params = {"w": jnp.ones(2), "frozen": jnp.ones(2)}
    state = optax.masked(emaopt.ema(), {"w": True, "frozen": False}).init(params)
    params["frozen"].delete()
    with pytest.raises(RuntimeError, match=r"params has a deleted array at leaf 'frozen': a step"):
        read(params, state)


def test_averages_of_numpy_arrays_do_not_change_with_them():
    params = {"w": np.ones(2, np.float32), "frozen": np.ones(2, np.float32)}
    state = optax.masked(emaopt.ema(), {"w": True, "frozen": False}).init(params)
    state = jax.device_get(state)
    averaged = emaopt.average(params, state)
    params["frozen"][:] = 7
    assert not np.shares_memory(averaged["w"], state.inner_state.shadow["w"])
    equal(averaged, {"w": np.ones(2, np.float32), "frozen": np.ones(2, np.float32)})


@pytest.mark.parametrize("name", [["ema"], 3, {"ema"}])
def test_a_name_that_is_no_text_is_refused(name):
    with pytest.raises(ValueError, match=r"name=.* is not an average.*Pass one of: 'ema'"):
        emaopt.average(TREE, emaopt.ema().init(TREE), name)
