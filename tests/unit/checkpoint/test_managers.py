"""Any manager of Orbax writes what `items` returns; `from_items` and every reader take it back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as legacy
import pytest
from compare import bitwise
from flax import nnx
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.experimental.emergency import checkpoint_manager as emergency
from train import train

import emaopt
from emaopt import checkpoint


TX = optax.chain(emaopt.adam(0.1), emaopt.ema(0.5))
PARAMS = {"conv": {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3)}, "bias": jnp.arange(3.0)}
PARAMS, STATE = train(TX, PARAMS, [PARAMS] * 3)
REST = {"stats": jnp.full(2, 5.0), "epoch": 7}


def saves(trees):
    return legacy.args.Composite(**{k: legacy.args.StandardSave(v) for k, v in trees.items()})


def restores(trees):
    return legacy.args.Composite(**{k: legacy.args.StandardRestore(v) for k, v in trees.items()})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Steps 1 and 2 of a CheckpointManager."""
    directory = tmp_path_factory.mktemp("manager")
    with legacy.CheckpointManager(directory) as manager:
        for step in (1, 2):
            trees, metadata = checkpoint.items(PARAMS, STATE, **REST)
            manager.save(step, args=saves(trees), custom_metadata={"mine": 1, **metadata})
        manager.wait_until_finished()
    return directory


@pytest.mark.slow
def test_the_manager_restores_what_from_items_takes(run):
    abstract = jax.eval_shape(lambda: (PARAMS, STATE))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract
    )
    template, metadata = checkpoint.items(*abstract, **REST)
    assert metadata["emaopt"]["items"] == ["digests", "opt_state", "params", "rest"]
    with legacy.CheckpointManager(run) as manager:
        restored = manager.restore(2, args=restores(template))
    got = checkpoint.from_items(restored, *abstract, **REST)
    bitwise(got, (PARAMS, STATE, REST))
    damaged = dict(restored) | {"params": jax.tree.map(lambda x: x + 1, restored["params"])}
    with pytest.raises(
        checkpoint.DamagedError, match=r"params/bias, params/conv/kernel is damaged"
    ):
        checkpoint.from_items(damaged, *abstract, **REST)
    other = {"digests": restored["digests"] | {"params": np.zeros(3, np.uint32)}}
    with pytest.raises(checkpoint.DamagedError, match=r"digests of item 'params' are damaged"):
        checkpoint.from_items(dict(restored) | other, *abstract, **REST)


def test_every_reader_reads_the_directory(run, tmp_path):
    want = emaopt.average(PARAMS, STATE)
    bitwise(checkpoint.restore_averages(run, PARAMS, step=1), want)
    bitwise(checkpoint.restore_params(run, PARAMS), PARAMS)
    ((step, watched),) = checkpoint.watch(run, PARAMS, after=1, timeout=0)
    assert step == 2
    bitwise(watched, want)
    with ocp.training.Checkpointer(run) as checkpointer:
        bitwise(checkpoint.resume(checkpointer, PARAMS, STATE, **REST), (PARAMS, STATE, REST))
        *got, skipped = checkpoint.resume_partial(checkpointer, PARAMS, STATE, **REST)
    bitwise(tuple(got), (PARAMS, STATE, REST))
    assert skipped == {}


def test_damage_and_a_lost_item_are_noticed(run, tmp_path):
    about = json.loads((run / "2" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert about["mine"] == 1
    assert about["emaopt"]["stamp"][:2] == [2**32 - 1] * 2  # the step is not known
    (run / "1" / "rest").rename(tmp_path / "rest")
    with pytest.raises(checkpoint.DamagedError, match=r"items \['rest'\] are missing"):
        checkpoint.restore_averages(run, PARAMS, step=1)
    (tmp_path / "rest").rename(run / "1" / "rest")


def test_a_manager_of_one_tree_without_metadata(tmp_path):
    """As the emergency and multi-tier managers write: one item `state`, restored as a whole."""
    trees, _ = checkpoint.items(PARAMS, STATE)
    with legacy.CheckpointManager(tmp_path / "one") as manager:
        manager.save(1, args=legacy.args.Composite(state=legacy.args.PyTreeSave(trees)))
        manager.wait_until_finished()
        args = legacy.args.PyTreeRestore(
            trees, restore_args=legacy.checkpoint_utils.construct_restore_args(trees)
        )
        restored = manager.restore(1, args=legacy.args.Composite(state=args))["state"]
    bitwise(checkpoint.from_items(restored, PARAMS, STATE), (PARAMS, STATE, {}))
    want = emaopt.average(PARAMS, STATE)
    bitwise(checkpoint.restore_averages(tmp_path / "one", PARAMS), want)
    with legacy.CheckpointManager(tmp_path / "several") as manager:
        manager.save(1, args=saves(trees))
        manager.wait_until_finished()
    bitwise(checkpoint.restore_averages(tmp_path / "several", PARAMS), want)


@pytest.mark.slow
def test_the_emergency_manager(tmp_path):
    """It takes one tree, of arrays over the mesh; here its local path, in one process."""
    mesh = jax.make_mesh((2, 4), ("replica", "data"))

    def placed(x):
        spec = ("data",) if np.ndim(x) and len(x) == 4 else ()
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.device_put(x, sharding)

    params = jax.tree.map(placed, {"w": jnp.arange(4.0)})
    opt_state = jax.jit(TX.init)(params)
    trees, metadata = checkpoint.items(params, opt_state, epoch=jnp.asarray(7))
    trees = jax.tree.map(placed, trees)
    options = emergency.CheckpointManagerOptions(
        local=emergency.LocalCheckpointOptions(save_interval_steps=1),
        persistent=emergency.PersistentCheckpointOptions(save_interval_steps=1),
        replica_axis_index=0,
    )
    local, persistent = tmp_path / "local", tmp_path / "persistent"
    local.mkdir(), persistent.mkdir()
    abstract = jax.tree.map(legacy.utils.to_shape_dtype_struct, trees)
    manager = emergency.CheckpointManager(
        local, persistent, global_mesh=mesh, abstract_state=abstract, options=options
    )
    args = legacy.args.Composite(state=legacy.args.PyTreeSave(trees))
    manager.save(1, args=args, custom_metadata=metadata)
    manager.wait_until_finished()
    restored = manager.restore(1)["state"]
    manager.close()
    got = checkpoint.from_items(restored, params, opt_state, epoch=0)
    bitwise(got[:2], (params, opt_state))
    assert int(got[2]["epoch"]) == 7
    bitwise(checkpoint.restore_averages(persistent, params), emaopt.average(params, opt_state))


def test_without_digests_and_with_a_name(tmp_path):
    tx = optax.named_chain(("a", emaopt.ema(0.5)), ("b", emaopt.ema(0.9)))
    params, opt_state = train(tx, PARAMS, [PARAMS])
    trees, metadata = checkpoint.items(params, opt_state, name="b", digest=False)
    assert metadata == {"emaopt": {"items": ["opt_state", "params"]}}
    bitwise(trees["params"], emaopt.average(params, opt_state, "b"))
    bitwise(checkpoint.from_items(trees, params, opt_state), (params, opt_state, {}))


def test_a_module_and_its_optimizer_stay_one():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu)
    optimizer = nnx.ModelAndOptimizer(model, TX)
    want = jax.tree.leaves((nnx.state(model), nnx.state(optimizer)))
    trees, _ = checkpoint.items(model, optimizer)
    other, resumed, _ = checkpoint.from_items(trees, model, optimizer)
    assert resumed.model is other
    bitwise(jax.tree.leaves((nnx.state(other), nnx.state(resumed))), want)


@pytest.mark.parametrize(
    ("change", "rest", "message"),
    [
        (lambda t: t.pop("opt_state"), {}, r"items has 'digests', 'params', and not 'opt_state'"),
        (lambda t: None, {"epoch": 0}, r"items has .*, and not 'rest'. Pass what was restored"),
        (
            lambda t: t["params"].update(v=t["params"].pop("bias")),
            {},
            r"params/bias is missing; close.*; params/v was restored, and is not in what was",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, rest, message):
    trees, _ = checkpoint.items(PARAMS, STATE)
    trees["params"] = dict(trees["params"])
    change(trees)
    with pytest.raises(checkpoint.MismatchError, match=message):
        checkpoint.from_items(trees, PARAMS, STATE, **rest)


def test_a_swapped_state_and_an_object_are_refused():
    with pytest.raises(ValueError, match=r"opt_state is swapped already"):
        checkpoint.items(*emaopt.swap(PARAMS, STATE))
    with pytest.raises(ValueError, match=r"rest/thing is a object"):
        checkpoint.items(PARAMS, STATE, thing=object())
