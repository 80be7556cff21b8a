"""Several averages in one pass: each with its own decay, over leaves by pattern, side by side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import bitwise
from flax.linen import Partitioned
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


def params_of(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"embedding": (6, 4), "kernel": (4, 3), "bias": (3,)}
    return {
        name: jax.random.normal(key, shape).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }


DECAYS = {"fast": 0.5, "slow": 0.9, "mean": emaopt.power(0)}
# one of each kind: all leaves, leaves by pattern, other decays for other leaves
SEVERAL = optax.named_chain(
    ("sgd", optax.sgd(0.1, 0.9)),
    ("fast", emaopt.ema(DECAYS["fast"])),
    ("slow", optax.masked(emaopt.ema(DECAYS["slow"]), emaopt.matching("kernel|embedding"))),
    ("mean", optax.masked(emaopt.ema(DECAYS["mean"]), emaopt.matching("^bias$"))),
)
OF = {"fast": ["bias", "embedding", "kernel"], "slow": ["embedding", "kernel"], "mean": ["bias"]}


@functools.partial(jax.jit, static_argnums=0)
def step(tx, params, opt_state):
    grads = jax.tree.map(jnp.sin, params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def run(tx, params, steps=6):
    opt_state = tx.init(params)
    for _ in range(steps):
        params, opt_state = step(tx, params, opt_state)
    return params, opt_state


@functools.cache
def trained(dtype="float32"):
    return run(SEVERAL, params_of(dtype))


@pytest.mark.many(1)
@pytest.mark.parametrize("name", DECAYS)
def test_each_average_is_the_one_that_it_is_alone(name):
    params, opt_state = trained()
    alone = optax.chain(optax.sgd(0.1, 0.9), emaopt.ema(DECAYS[name]))
    wanted, alone_state = run(alone, params_of())
    bitwise(params, wanted)
    average, whole = emaopt.average(params, opt_state, name), alone_state[-1].shadow
    for leaf in params:
        bitwise(average[leaf], whole[leaf] if leaf in OF[name] else params[leaf])


def test_leaves_that_an_average_does_not_have_cost_no_memory():
    _, opt_state = trained()
    numbers = {
        name: sum(x.size for x in jax.tree.leaves(state.shadow))
        for name, state in emaopt.averages(opt_state).items()
    }
    assert numbers == {"fast": 24 + 12 + 3, "slow": 24 + 12, "mean": 3}


def test_decays_by_pattern_make_up_one_average():
    labels = {"embedding": "slow", "kernel": "fast", "bias": "none"}
    decays = {"slow": emaopt.ema(0.9), "fast": emaopt.ema(0.5), "none": optax.identity()}
    tx = optax.chain(optax.sgd(0.1, 0.9), optax.partition(decays, labels))
    params, opt_state = run(tx, params_of())
    average = emaopt.average(params, opt_state)
    each = {name: emaopt.average(*trained(), name) for name in ("fast", "slow")}
    bitwise(average["embedding"], each["slow"]["embedding"])
    bitwise(average["kernel"], each["fast"]["kernel"])
    bitwise(average["bias"], params["bias"])


@pytest.mark.many(1)
@pytest.mark.parametrize("names", [None, ["mean", "fast"], ("slow", "slow")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacked_puts_one_average_after_the_other(names, dtype):
    params, opt_state = trained(dtype)
    got = emaopt.stacked(params, opt_state, names)
    for i, name in enumerate(names or DECAYS):
        bitwise(jax.tree.map(lambda x, i=i: x[i], got), emaopt.average(*trained(dtype), name))
    assert {x.shape[0] for x in jax.tree.leaves(got)} == {len(names or DECAYS)}


def test_all_averages_are_evaluated_at_once():
    x = jnp.eye(6)

    def evaluate(params):
        return jnp.sum(jnp.tanh(x @ params["embedding"] @ params["kernel"]) + params["bias"][None])

    params, opt_state = trained()
    together = jax.jit(lambda p, s: jax.vmap(evaluate)(emaopt.stacked(p, s)))(params, opt_state)
    alone = [evaluate(emaopt.average(params, opt_state, name)) for name in DECAYS]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_what_is_not_a_float_is_stacked_too():
    params = {"w": jnp.ones(2), "int": jnp.int32(3), "key": jax.random.key(7), "none": None}
    state = emaopt.ema(0.5).init(params)
    got = emaopt.stacked(params, (state, state))
    assert jax.tree.map(lambda x: x.shape[0], got) == {"w": 2, "int": 2, "key": 2, "none": None}
    assert jnp.all(got["key"] == params["key"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_stacking_sends_nothing_between_devices(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    params = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("x")))
    tx = optax.named_chain(("fast", emaopt.ema(0.5)), ("slow", emaopt.ema(0.9)))
    opt_state = tx.init(params)
    compiled = jax.jit(emaopt.stacked).lower(params, opt_state).compile()
    assert not any(word in compiled.as_text() for word in ("all-", "collective"))
    got = compiled(params, opt_state)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "x")), 2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("fast", "names='fast' is one string"),
        ([], "names is empty"),
        (["fast", "slwo"], "name='slwo' is not an average. Did you mean 'slow'"),
    ],
)
def test_names_that_cannot_be_stacked_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        emaopt.stacked(*trained(), names)


def test_without_an_average_there_is_nothing_to_stack():
    with pytest.raises(ValueError, match="opt_state holds no average"):
        emaopt.stacked(params_of(), optax.sgd(0.1).init(params_of()))


# two networks, with a state each


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "fast", "gen/slow"])
def test_two_networks_in_one_checkpoint(tmp_path, name):
    def network(x):
        # of the same names in both, and boxed as Linen's
        return {"dense": {"kernel": Partitioned(jnp.full(2, x), ("a",)), "bias": jnp.full(2, -x)}}

    params = {"gen": network(1.0), "disc": network(6.0)}
    chain = [("sgd", optax.sgd(0.1)), ("fast", emaopt.ema(0.5)), ("slow", emaopt.ema(0.9))]
    tx = optax.named_chain(*chain[: 2 if name is None else 3])
    opt_state = {}
    for key in params:
        _, opt_state[key] = tx.update(params[key], tx.init(params[key]), params[key])
    averaged = emaopt.average(params, opt_state, name)
    gen, disc = (-0.99, -6.0) if name == "gen/slow" else (-0.95, -5.7)
    np.testing.assert_allclose(averaged["gen"]["dense"]["bias"], gen, 1e-6)
    np.testing.assert_allclose(averaged["disc"]["dense"]["bias"], disc, 1e-6)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpoint.save(checkpointer, 1, params, opt_state, name=name)
        like = {key: tx.init(network(0.0)) for key in params}
        resumed = checkpoint.resume(checkpointer, jax.tree.map(jnp.zeros_like, params), like)
    bitwise(resumed[:2], (params, opt_state))
    bitwise(checkpoint.restore_averages(tmp_path, params, name=name), averaged)
    of_gen = {None: "gen", "fast": "gen/fast"}.get(name, name)
    part = checkpoint.restore_averages(tmp_path, params["gen"], name=of_gen)
    bitwise(part, averaged["gen"])
