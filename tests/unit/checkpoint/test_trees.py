"""What `save` returned True for is read back: every kind of tree that the documentation names."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import bitwise
from flax import linen, nnx
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


TX = optax.chain(emaopt.adam(0.1), emaopt.ema(0.5))


def sequence():
    def first(seed):
        return nnx.Linear(4, 8, rngs=nnx.Rngs(seed))

    return nnx.Sequential(first(0), nnx.relu, nnx.Linear(8, 1, rngs=nnx.Rngs(1)))


class Blocks(nnx.Module):
    """As a transformer has them: a list of blocks, and dropout with its keys."""

    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.LayerNorm(2, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


class Dense(linen.Module):
    box: str

    @linen.compact
    def __call__(self, x):
        init = linen.initializers.ones
        if self.box == "logical":
            init = linen.with_logical_partitioning(init, ("in", "out"))
        else:
            init = linen.with_partitioning(init, ("in", "out"))
        return x @ self.param("kernel", init, (2, 2))


def haiku():
    network = hk.transform(lambda x: hk.nets.MLP([3, 1])(x))
    return network.init(jax.random.key(0), jnp.ones((1, 2)))


def equinox():
    model = eqx.nn.MLP(2, 1, 3, 2, key=jax.random.key(0))
    return eqx.filter(model, eqx.is_inexact_array)


KINDS = {
    "NNX state of a list": lambda: nnx.state(sequence(), nnx.Param),
    "NNX state of blocks": lambda: nnx.state(Blocks(nnx.Rngs(0)), nnx.Param),
    "Linen with partitions": lambda: Dense("mesh").init(jax.random.key(0), jnp.ones((1, 2)))[
        "params"
    ],
    "Linen with logical ones": lambda: Dense("logical").init(jax.random.key(0), jnp.ones((1, 2))),
    "Haiku": haiku,
    "Equinox": equinox,
    "an array": lambda: jnp.arange(3.0),
    "a list": lambda: [jnp.arange(3.0), None, (jnp.ones(()), {})],
}


@pytest.mark.many(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_is_resumed_and_its_averages_are_restored(kind, tmp_path):
    params = KINDS[kind]()
    grads = jax.tree.map(lambda p: jnp.ones_like(p) / 3, params)
    updates, opt_state = TX.update(grads, TX.init(params), params)
    params = optax.apply_updates(params, updates)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        assert checkpoint.save(checkpointer, 1, params, opt_state)
        fresh = KINDS[kind]()
        got = checkpoint.resume(checkpointer, fresh, TX.init(fresh))
    bitwise(got, (params, opt_state, {}))
    averaged = emaopt.average(params, opt_state)
    bitwise(checkpoint.restore_averages(tmp_path / "run", like=fresh), averaged)
    checkpoint.export_averages(tmp_path / "run", tmp_path / "served")
    bitwise(checkpoint.restore_averages(tmp_path / "served", like=fresh), averaged)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")  # plain Orbax's
@pytest.mark.parametrize("create", [sequence, lambda: Blocks(nnx.Rngs(0))])
def test_an_nnx_module_is_saved_as_its_state(create, tmp_path):
    model = create()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        assert checkpoint.save(checkpointer, 1, model, optimizer)
        fresh = create()
        got = checkpoint.resume(checkpointer, fresh, nnx.Optimizer(fresh, TX, wrt=nnx.Param))
    bitwise(nnx.state(got[0]), nnx.state(model))
    bitwise(nnx.state(got[1]), nnx.state(optimizer))
    averaged = nnx.state(emaopt.average(model, optimizer))
    bitwise(nnx.state(checkpoint.restore_averages(tmp_path / "run", like=create())), averaged)
    plain = ocp.load(tmp_path / "run" / "1", checkpointable_name="params")
    assert list(plain) == list(averaged)
    checkpoint.export_averages(tmp_path / "run", tmp_path / "a.safetensors")


def test_a_module_may_be_anywhere_in_the_rest(tmp_path):
    params, target = {"w": jnp.ones(2)}, {"networks": [sequence(), None]}
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpoint.save(checkpointer, 1, params, TX.init(params), target=target)
        fresh = {"networks": [sequence(), None]}
        nnx.update(
            fresh["networks"][0], jax.tree.map(jnp.zeros_like, nnx.state(fresh["networks"][0]))
        )
        *_, rest = checkpoint.resume(checkpointer, params, TX.init(params), target=fresh)
    bitwise(nnx.state(rest["target"]["networks"][0]), nnx.state(target["networks"][0]))


def test_model_and_optimizer_stay_one(tmp_path):
    def create():
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        return model, nnx.ModelAndOptimizer(model, TX)

    model, optimizer = create()
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(grads)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpoint.save(checkpointer, 1, model, optimizer)
        assert not (tmp_path / "1" / "opt_state" / "model").exists()
        other, resumed, _ = checkpoint.resume(checkpointer, *create())
        with pytest.raises(ValueError, match=r"params is not its model. Pass optimizer.model"):
            checkpoint.save(checkpointer, 2, create()[0], optimizer)
    assert resumed.model is other
    resumed.update(grads)
    optimizer.update(grads)
    bitwise(nnx.state(other), nnx.state(model))
    bitwise(nnx.state(resumed), nnx.state(optimizer))


@pytest.mark.slow
def test_many_sharded_leaves_on_eight_devices(tmp_path):
    """More collectives than the CPU's few threads bear at once, if nothing waited for them."""
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    params = {f"w{i}": jax.device_put(jnp.full((8, 4), float(i)), sharding) for i in range(120)}
    opt_state = jax.jit(TX.init)(params)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpoint.save(checkpointer, 1, params, opt_state)
        blank = jax.device_put(jax.tree.map(jnp.zeros_like, params), sharding)
        got = checkpoint.resume(checkpointer, blank, jax.jit(TX.init)(blank))
    bitwise(got, (params, opt_state, {}))
    assert got[0]["w7"].sharding == sharding


@pytest.mark.many(1)
@pytest.mark.parametrize(
    "tx",
    [
        optax.MultiSteps(TX, 2),
        optax.apply_if_finite(TX, 3),
        optax.chain(optax.adamw(0.1), emaopt.ema(0.5)),
    ],
)
def test_an_uncommitted_template_gives_an_uncommitted_value(tx, tmp_path):
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec("x")
    )
    params = {"w": jax.device_put(jnp.arange(8.0), sharding)}
    tx = optax.with_extra_args_support(
        tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx
    )

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = tx.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    with jax.numpy_dtype_promotion("standard"), ocp.training.Checkpointer(tmp_path) as checkpointer:
        state = step(params, tx.init(params))
        checkpoint.save(checkpointer, 1, *state)
        *resumed, _ = checkpoint.resume(checkpointer, params, tx.init(params))
        bitwise(step(*resumed), step(*state))  # failed with arrays on other devices


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_compensated_average_is_read_with_its_residue(dtype, tmp_path):
    average = emaopt.ema(0.9, accumulator_dtype=emaopt.compensated(dtype))
    tx = optax.chain(optax.sgd(0.1), average)
    params = {"w": jnp.linspace(1, 2, 7)}
    opt_state = tx.init(params)
    for _ in range(20):
        params, opt_state = emaopt.apply_gradients(tx, params, params, opt_state)
    want = emaopt.average(params, opt_state)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpoint.save(checkpointer, 1, params, opt_state)
    bitwise(checkpoint.restore_averages(tmp_path / "run", like=params), want)
    ((_, watched),) = checkpoint.watch(tmp_path / "run", like=params, timeout=0)
    bitwise(watched, want)
    checkpoint.export_averages(tmp_path / "run", tmp_path / "served")
    bitwise(checkpoint.restore_averages(tmp_path / "served", like=params), want)


def test_two_networks_in_one_state(tmp_path):
    params = {name: {"w": jnp.full(2, x)} for name, x in (("gen", 1.0), ("disc", 6.0))}
    opt_state = {name: TX.init(params[name]) for name in params}
    params = jax.tree.map(lambda p: p + 1, params)
    want = emaopt.average(params, opt_state)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, params, opt_state)
        bitwise(checkpoint.resume(checkpointer, params, opt_state), (params, opt_state, {}))
        checkpoint.save(checkpointer, 2, params, opt_state | {"disc": TX.init(params["disc"])[0]})
    bitwise(checkpoint.restore_averages(tmp_path, like=params, step=1), want)
    bitwise(checkpoint.restore_averages(tmp_path, like=params), want | {"disc": params["disc"]})


@pytest.mark.many(1)
@pytest.mark.parametrize("name", [None, "slow"])
@pytest.mark.parametrize("dtype", [None, emaopt.compensated()])
def test_rows_that_have_rested_are_brought_up_to_date(name, dtype, tmp_path):
    def ema(decay):
        return emaopt.ema(decay, rows={"table": True, "w": False}, accumulator_dtype=dtype)

    tx = optax.named_chain(("sgd", optax.sgd(0.1)), ("fast", ema(0.5)), ("slow", ema(0.9)))
    params = {"table": jnp.arange(8.0).reshape(4, 2), "w": jnp.ones(2)}
    opt_state = tx.init(params)
    for ids in ([0, 1], [1, 2], [1]):
        tables = {"table": emaopt.rows(jnp.array(ids))}
        small, state = emaopt.take((params, opt_state), tables)
        updates, state = tx.update(jax.tree.map(jnp.ones_like, small), state, small)
        whole = (optax.apply_updates(small, updates), state)
        params, opt_state = emaopt.put((params, opt_state), whole, tables)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpoint.save(checkpointer, 1, params, opt_state, name="fast")
        got = checkpoint.resume(checkpointer, params, tx.init(params))
    bitwise(got[0], params)
    want = emaopt.average(params, opt_state, name or "fast")
    bitwise(checkpoint.restore_averages(tmp_path / "run", like=params, name=name), want)
    host = jax.tree.map(np.asarray, params)
    bitwise(checkpoint.restore_averages(tmp_path / "run", like=host, name=name), want)
