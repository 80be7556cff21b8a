"""Saving swapped, resuming exactly, and the averages out of any checkpoint, with real Orbax."""

import dataclasses
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as legacy
import pytest
from compare import bitwise
from flax import linen, nnx
from flax.training.train_state import TrainState
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file
from train import train

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint._stored import Stored


# Orbax looks for the sharding itself where plain Orbax code gives none
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")

PARAMS = {
    "conv": {"kernel": jnp.linspace(-1, 1, 6, dtype=jnp.bfloat16).reshape(2, 3)},
    "bias": jnp.arange(3.0),
}
GRADS = jax.tree.map(lambda p: p + jnp.asarray(0.37, p.dtype), PARAMS)
LABELS = {"conv": "kernels", "bias": "rest"}

average = emaopt.ema(emaopt.warmup(0.9))
rate = emaopt.exponential_decay(0.1, 2, 0.5, staircase=True)
OPTIMIZERS = {
    "chain": optax.chain(emaopt.clip_by_global_norm(1.0), emaopt.adam(rate), average),
    "named": optax.named_chain(("train", emaopt.momentum(0.1, 0.9)), ("mean", average)),
    "masked": optax.chain(emaopt.rmsprop(0.1), optax.masked(average, emaopt.matching("kernel"))),
    "accumulated": optax.MultiSteps(optax.chain(emaopt.adagrad(0.1), average), 2),
    "finite": optax.apply_if_finite(optax.chain(emaopt.ftrl(0.1), average), 3),
    "partition": optax.chain(
        optax.adam(0.1),
        optax.partition({"kernels": average, "rest": emaopt.ema(0.5)}, LABELS),
    ),
    "injected": optax.inject_hyperparams(
        lambda learning_rate: optax.chain(emaopt.momentum(learning_rate, 0.9), average)
    )(learning_rate=0.1),
    "alone": average,
    "waiting": optax.chain(optax.sgd(0.1), emaopt.ema(emaopt.after(100, 0.9))),
}


@pytest.fixture(autouse=True)
def _standard_promotion():
    """optax.MultiSteps and apply_updates rely on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def trained(tx, steps, params=PARAMS, opt_state=None):
    return train(tx, params, [GRADS] * steps, opt_state)


@pytest.fixture
def run(tmp_path):
    """A run of `chain`, saved after 1, 2 and 3 steps."""
    tx, params, opt_state = OPTIMIZERS["chain"], PARAMS, None
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        for step in (1, 2, 3):
            params, opt_state = trained(tx, 1, params, opt_state)
            assert checkpoint.save(checkpointer, step, params, opt_state, stats=jnp.ones(2))
    return tmp_path / "run", params, opt_state


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_resumes_bit_for_bit(name, tmp_path):
    tx = OPTIMIZERS[name]
    rest = {
        "batch_stats": {"mean": jnp.ones(2)},
        "key": jax.random.key(7),
        "epoch": 3,
        "temperature": 0.25,
        "history": np.arange(3.0),
        "label": "a run",
    }
    params, opt_state = trained(tx, 3)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpoint.save(checkpointer, 3, params, opt_state, **rest)
        blank = rest | {"epoch": 0, "temperature": 0.0, "label": ""}
        got = checkpoint.resume(checkpointer, PARAMS, tx.init(PARAMS), **blank)
    bitwise(got, (params, opt_state, rest))
    bitwise(trained(tx, 3, *got[:2]), trained(tx, 6))


@pytest.mark.slow
def test_resume_from_abstract_trees(tmp_path):
    tx = OPTIMIZERS["chain"]
    params, opt_state = trained(tx, 2)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 2, params, opt_state)
        like = jax.eval_shape(lambda: (PARAMS, tx.init(PARAMS)))
        bitwise(checkpoint.resume(checkpointer, *like), (params, opt_state, {}))


def test_an_ordinary_checkpoint_resumes_too(tmp_path):
    tx = OPTIMIZERS["chain"]
    params, opt_state = trained(tx, 2)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_checkpointables(2, {"params": params, "opt_state": opt_state})
        got = checkpoint.resume(checkpointer, PARAMS, tx.init(PARAMS))
    bitwise(got, (params, opt_state, {}))


def test_a_step_is_a_whole_number(tmp_path):
    params, state = {"w": jnp.ones(2)}, emaopt.ema(0.5).init({"w": jnp.ones(2)})
    calls = [
        lambda step: checkpoint.save(checkpointer, step, params, state),
        lambda step: checkpoint.snapshot(checkpointer, step, state),
        lambda step: checkpoint.resume(checkpointer, params, state, step=step),
        lambda step: checkpoint.restore_averages(tmp_path, params, step=step),
    ]
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, np.int64(1), params, state)
        for step in (1.5, 1.0, "1", True, -1, [1], float("nan"), np.array([1]), 2**70):
            message = re.escape(f"step={step!r} is not the number of a step. Pass an int, 0 or")
            for call in calls:
                with pytest.raises(ValueError, match=message):
                    call(step)
        assert [each.step for each in checkpointer.checkpoints] == [1]


@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.save_async])
def test_an_array_that_a_step_deleted_is_named_and_not_saved(save, tmp_path):
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    opt_state = emaopt.ema(0.5).init(params)
    opt_state.shadow["b"].delete()
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(RuntimeError, match=r"saved as 'params/b' is a deleted array: a step"):
            save(checkpointer, 1, params, opt_state, digest=False)
        assert checkpointer.latest is None


def test_parameters_without_leaves_are_not_saved(tmp_path):
    refused = pytest.raises(ValueError, match=r"params has no leaves.*Pass the parameters")
    with ocp.training.Checkpointer(tmp_path) as checkpointer, refused:
        checkpoint.save(checkpointer, 1, {}, emaopt.ema(0.5).init({}))


def test_a_number_comes_back_as_what_is_asked_for(tmp_path):
    params, opt_state = trained(OPTIMIZERS["chain"], 1)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, params, opt_state, epoch=7, step_=jnp.int32(9))
        like = (PARAMS, OPTIMIZERS["chain"].init(PARAMS))
        *_, rest = checkpoint.resume(checkpointer, *like, epoch=jnp.int32(0), step_=0)
    bitwise(rest, {"epoch": jnp.int32(7), "step_": 9})


def test_resume_takes_the_step_asked_for(run):
    path, params, opt_state = run
    with ocp.training.Checkpointer(path) as checkpointer:
        like = (PARAMS, OPTIMIZERS["chain"].init(PARAMS))
        got = checkpoint.resume(checkpointer, *like, step=2, stats=jnp.zeros(2))
        bitwise(got[:2], trained(OPTIMIZERS["chain"], 2))
        got = checkpoint.resume(checkpointer, *like, stats=jnp.zeros(2))
        bitwise(got, (params, opt_state, {"stats": jnp.ones(2)}))


def test_the_named_one_of_two_averages_is_swapped(tmp_path):
    tx = optax.named_chain(("fast", emaopt.ema(0.5)), ("slow", emaopt.ema(0.9)))
    params, opt_state = trained(tx, 3)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match=r"name is missing.*'fast', 'slow'"):
            checkpoint.save(checkpointer, 3, params, opt_state)
        checkpoint.save(checkpointer, 3, params, opt_state, name="slow")
        got = checkpoint.resume(checkpointer, PARAMS, tx.init(PARAMS))
    bitwise(got, (params, opt_state, {}))
    for name in ("fast", "slow"):
        got = checkpoint.restore_averages(tmp_path, PARAMS, name=name)
        bitwise(got, emaopt.average(params, opt_state, name))
    bitwise(
        checkpoint.restore_averages(tmp_path, PARAMS), emaopt.average(params, opt_state, "slow")
    )


def test_an_asynchronous_save_survives_donation(tmp_path):
    tx = OPTIMIZERS["chain"]
    step = jax.jit(partial(emaopt.apply_gradients, tx), donate_argnums=(1, 2))
    params, opt_state = trained(tx, 1, jax.tree.map(jnp.copy, PARAMS))
    want = jax.tree.map(np.asarray, (params, opt_state))
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        response = checkpoint.save_async(checkpointer, 1, params, opt_state)
        for _ in range(3):
            params, opt_state = step(GRADS, params, opt_state)
        assert response.result()
        got = checkpoint.resume(checkpointer, PARAMS, tx.init(PARAMS))
    bitwise(jax.tree.map(np.asarray, got[:2]), want)


def test_the_users_policy_decides(tmp_path):
    policy = ocp.training.save_decision_policies.FixedIntervalPolicy(2)
    params, opt_state = trained(OPTIMIZERS["chain"], 1)
    with ocp.training.Checkpointer(tmp_path, save_decision_policy=policy) as checkpointer:
        saved = [checkpoint.save(checkpointer, s, params, opt_state) for s in (0, 1, 2)]
        assert saved == [True, False, True]
        assert checkpoint.save_async(checkpointer, 3, params, opt_state) is None


def test_plain_orbax_finds_the_averages_under_the_original_names(run):
    path, _params, opt_state = run
    like = jax.eval_shape(lambda: emaopt.averages(opt_state)["2"].shadow)
    got = ocp.load(path / "3", like, checkpointable_name="params")
    bitwise(got, emaopt.averages(opt_state)["2"].shadow)


def test_nothing_is_stored_twice(tmp_path):
    size = 1 << 16
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(size), jnp.float32)}
    opt_state = average.init(params)
    with ocp.training.Checkpointer(tmp_path / "swapped") as checkpointer:
        checkpoint.save(checkpointer, 0, params, opt_state)
    ocp.save(tmp_path / "plain", {"params": params, "opt_state": opt_state})
    bytes_of = lambda path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert bytes_of(tmp_path / "swapped") < 1.05 * bytes_of(tmp_path / "plain")


@pytest.mark.slow
def test_a_resume_that_forgets_to_swap_back_fails(run):
    path, params, opt_state = run
    with pytest.raises(Exception, match=r"emaopt_swapped|structure"):
        ocp.load(path / "3", opt_state, checkpointable_name="opt_state")
    swapped = emaopt.swap(params, opt_state)[1]
    with pytest.raises(ValueError, match="opt_state is swapped"):
        OPTIMIZERS["chain"].update(GRADS, swapped, params)


def test_a_double_swap_is_refused(tmp_path):
    swapped = emaopt.swap(*trained(OPTIMIZERS["chain"], 1))
    with (
        ocp.training.Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match="opt_state is swapped already"),
    ):
        checkpoint.save(checkpointer, 1, *swapped)


# ---- the averages of any checkpoint -----------------------------------------------------------


def one_tree(path, params, opt_state):
    ocp.save(path, {"params": params, "opt_state": opt_state, "step": np.asarray(3)})


def train_state(path, params, opt_state):
    tx = optax.identity()
    state = TrainState(step=3, apply_fn=None, params=params, tx=tx, opt_state=opt_state)
    ocp.save(path, state)


def items_of_other_names(path, params, opt_state):
    ocp.save_checkpointables(path, {"model": params, "optimizer": opt_state})


def swapped_items(path, params, opt_state):
    with ocp.training.Checkpointer(path) as checkpointer:
        checkpoint.save(checkpointer, 3, params, opt_state)


def swapped_one_tree(path, params, opt_state):
    one_tree(path, *emaopt.swap(params, opt_state))


def legacy_one_tree(path, params, opt_state):
    with legacy.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"params": params, "opt_state": opt_state})


def legacy_manager(path, params, opt_state):
    save = legacy.args.StandardSave
    with legacy.CheckpointManager(path) as manager:
        items = legacy.args.Composite(params=save(params), opt_state=save(opt_state))
        manager.save(3, args=items)


def legacy_manager_swapped(path, params, opt_state):
    legacy_manager(path, *emaopt.swap(params, opt_state))


LAYOUTS = [
    one_tree,
    train_state,
    items_of_other_names,
    swapped_items,
    swapped_one_tree,
    legacy_one_tree,
    legacy_manager,
    legacy_manager_swapped,
]


@pytest.mark.many(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_averages_of_any_checkpoint(layout, name, tmp_path):
    params, opt_state = trained(OPTIMIZERS[name], 3)
    layout(tmp_path / "run", params, opt_state)
    got = checkpoint.restore_averages(tmp_path / "run", jax.eval_shape(lambda: PARAMS))
    bitwise(got, emaopt.average(params, opt_state))


def test_the_legacy_manager_resumes_through_swap(tmp_path):
    tx = OPTIMIZERS["chain"]
    params, opt_state = trained(tx, 3)
    legacy_manager_swapped(tmp_path, params, opt_state)
    like = emaopt.swap(PARAMS, tx.init(PARAMS))
    restore = legacy.args.StandardRestore
    with legacy.CheckpointManager(tmp_path) as manager:
        items = legacy.args.Composite(params=restore(like[0]), opt_state=restore(like[1]))
        got = manager.restore(3, args=items)
    bitwise(emaopt.swap(got["params"], got["opt_state"]), (params, opt_state))


@pytest.mark.slow
def test_only_the_averages_are_read(tmp_path):
    """One copy of the parameters, to 5 %, of the five that are stored."""
    rng = np.random.default_rng(0)
    params = {
        f"layer{i}": jnp.asarray(rng.standard_normal((256, 256)), "float32") for i in range(8)
    }
    opt_state = optax.chain(emaopt.adam(0.1), average).init(params)
    size = 8 * 256 * 256 * 4
    for layout in (swapped_items, one_tree, legacy_one_tree):
        path = tmp_path / layout.__name__
        layout(path, params, opt_state)
        checkpoint.restore_averages(path, params)  # imports and caches are not what is counted
        before = bytes_read()
        checkpoint.restore_averages(path, params)
        assert bytes_read() - before < 1.05 * size


def bytes_read():
    with open("/proc/self/io") as f:
        return int(f.readline().split()[1])


def test_sources_show_what_is_read(run, tmp_path):
    assert checkpoint.sources(run[0], PARAMS) == {
        "bias": "params/bias",
        "conv/kernel": "params/conv/kernel",
    }
    one_tree(tmp_path / "one", *trained(OPTIMIZERS["masked"], 1))
    assert checkpoint.sources(tmp_path / "one", PARAMS) == {
        "bias": "state/params/bias",
        "conv/kernel": "state/opt_state/1/inner_state/shadow/conv/kernel",
    }


@pytest.mark.slow
def test_linen_train_state_with_batch_statistics(tmp_path):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            return linen.BatchNorm(use_running_average=not train)(linen.Dense(2)(x))

    variables = Net().init(jax.random.key(0), jnp.ones((1, 3)), train=False)
    tx = OPTIMIZERS["chain"]
    state = TrainState.create(apply_fn=Net().apply, params=variables["params"], tx=tx)
    fresh, stats = state, variables["batch_stats"]
    for _ in range(2):
        state = state.apply_gradients(grads=state.params)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(
            checkpointer, 2, state.params, state.opt_state, batch_stats=stats, count=state.step
        )
        params, opt_state, rest = checkpoint.resume(
            checkpointer, fresh.params, fresh.opt_state, batch_stats=stats, count=0
        )
    bitwise((params, opt_state), (state.params, state.opt_state))
    bitwise(rest, {"batch_stats": stats, "count": 2})
    averaged = checkpoint.restore_averages(tmp_path, fresh.params)
    bitwise(averaged, emaopt.average(state.params, state.opt_state))


@pytest.mark.slow
def test_nnx_with_batch_norm(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.dense(x))

    @nnx.jit
    def step(net, optimizer):
        optimizer.update(net, nnx.grad(lambda m: (m(jnp.eye(3)) ** 2).mean())(net))

    def parts(net, optimizer):
        stats = nnx.state(net, nnx.BatchStat)
        return nnx.state(net, nnx.Param), optimizer.opt_state, {"stats": stats}

    def fresh():
        net = Net()
        return net, nnx.Optimizer(net, OPTIMIZERS["chain"], wrt=nnx.Param)

    trained_net, optimizer = fresh()
    for _ in range(3):
        step(trained_net, optimizer)
    params, opt_state, rest = parts(trained_net, optimizer)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 3, params, opt_state, **rest)
        like = parts(*fresh())
        got = checkpoint.resume(checkpointer, like[0], like[1], **like[2])
    bitwise(got, (params, opt_state, rest))
    want = emaopt.average(params, opt_state)
    bitwise(checkpoint.restore_averages(tmp_path, like[0]), want)


@pytest.mark.slow
def test_a_dataclass_module(tmp_path):
    @partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=["name"])
    @dataclasses.dataclass
    class Module:
        layers: list
        name: str

    module = Module([jnp.ones(2), jnp.zeros(3)], "mlp")
    tx = optax.chain(emaopt.momentum(0.1, 0.9), average)
    params, opt_state = emaopt.apply_gradients(tx, module, module, tx.init(module))
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, params, opt_state)
        got = checkpoint.resume(checkpointer, module, tx.init(module))
    bitwise(got, (params, opt_state, {}))
    averaged = checkpoint.restore_averages(tmp_path, module)
    bitwise(averaged, emaopt.average(params, opt_state))


@pytest.mark.many(1)
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("spec", [("x", None), (None, "x"), (None, None)])
def test_restored_onto_another_mesh(devices, spec, tmp_path_factory, sharded_run):
    path, params, opt_state = sharded_run
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    like = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)}
    averaged = checkpoint.restore_averages(path, like)
    assert averaged["w"].sharding == sharding
    bitwise(averaged, emaopt.average(params, opt_state))
    init = optax.chain(emaopt.momentum(0.1, 0.9), average).init
    fresh = jax.device_put(jax.tree.map(jnp.zeros_like, params), sharding)
    with ocp.training.Checkpointer(path) as checkpointer:
        got = checkpoint.resume(checkpointer, fresh, init(fresh))
    assert got[0]["w"].sharding == sharding
    bitwise(got, (params, opt_state, {}))


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory):
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), sharding)}
    tx = optax.chain(emaopt.momentum(0.1, 0.9), average)
    params, opt_state = emaopt.apply_gradients(tx, params, params, tx.init(params))
    path = tmp_path_factory.mktemp("sharded")
    with ocp.training.Checkpointer(path) as checkpointer:
        checkpoint.save(checkpointer, 1, params, opt_state)
    return path, params, opt_state


# ---- watching and exporting -------------------------------------------------------------------


def test_watch_yields_each_checkpoint_once_the_newest_first(run):
    path, params, opt_state = run
    seen = list(checkpoint.watch(path, PARAMS, interval=0.01, timeout=0))
    assert [step for step, _ in seen] == [3, 2, 1]
    bitwise(seen[0][1], emaopt.average(params, opt_state))
    later = checkpoint.watch(path, PARAMS, interval=0.01, timeout=0, after=2)
    assert [step for step, _ in later] == [3]


def test_watch_passes_over_what_is_unfinished_or_vanishes(run, monkeypatch):
    path, *_ = run
    (path / "7").mkdir()  # Orbax lists it as a step
    (path / "9.orbax-checkpoint-tmp").mkdir()
    reader = Stored.load_averages

    def vanishing(stored, *arguments):
        if stored.path.name == "2":
            for file in (path / "2").rglob("*"):
                if file.is_file():
                    file.unlink()
        return reader(stored, *arguments)

    monkeypatch.setattr(Stored, "load_averages", vanishing)
    seen = [step for step, _ in checkpoint.watch(path, PARAMS, interval=0.01, timeout=0.05)]
    assert seen == [3, 1]


def test_watch_waits_for_a_directory_that_is_not_there_yet(tmp_path):
    assert list(checkpoint.watch(tmp_path / "later", PARAMS, interval=0.01, timeout=0.05)) == []


def test_watch_raises_what_is_wrong_with_a_checkpoint_that_stays(run):
    path, *_ = run
    with pytest.raises(ValueError, match=r"extra is missing"):
        list(checkpoint.watch(path, PARAMS | {"extra": jnp.ones(1)}, interval=0.01, timeout=0))


@pytest.mark.slow
@pytest.mark.parametrize("like", [None, PARAMS])
def test_export_is_the_averages_alone(run, like, tmp_path):
    path, params, opt_state = run
    want = emaopt.average(params, opt_state)
    checkpoint.export_averages(path, tmp_path / "served", like=like)
    assert sorted(p.name for p in (tmp_path / "served").iterdir() if p.is_dir()) == [
        "digests",
        "params",
    ]
    bitwise(checkpoint.restore_averages(tmp_path / "served", PARAMS), want)
    bitwise(ocp.load(tmp_path / "served", PARAMS, checkpointable_name="params"), want)


def test_an_export_and_a_list_can_be_exported(run, tmp_path):
    path, params, opt_state = run
    want = emaopt.average(params, opt_state)
    ocp.save(tmp_path / "list", [params, opt_state])
    checkpoint.export_averages(path, tmp_path / "first")
    for source in ("list", "first"):
        checkpoint.export_averages(tmp_path / source, tmp_path / f"{source} exported")
        bitwise(checkpoint.restore_averages(tmp_path / f"{source} exported", PARAMS), want)


@pytest.mark.parametrize("save", [checkpoint.save, checkpoint.save_async])
def test_a_relative_directory_is_refused_before_orbax_fails_in_it(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        ocp.training.Checkpointer("run") as checkpointer,
        pytest.raises(ValueError, match=r"'run', which is relative.*os\.path\.abspath"),
    ):
        save(checkpointer, 1, PARAMS, OPTIMIZERS["chain"].init(PARAMS))


def test_export_to_safetensors_without_the_package_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        checkpoint.export_averages(run[0], tmp_path / "a.safetensors")


def test_export_to_safetensors_has_flat_names(run, tmp_path):
    path, params, opt_state = run
    checkpoint.export_averages(path, tmp_path / "a.safetensors", step=3)
    got = load_file(tmp_path / "a.safetensors")
    want = emaopt.average(params, opt_state)
    assert got.keys() == {"bias", "conv/kernel"}
    assert np.array_equal(got["bias"], want["bias"])
    assert np.array_equal(got["conv/kernel"], np.asarray(want["conv"]["kernel"]))


# ---- errors, before anything is read -----------------------------------------------------------


def resumed(path, params=PARAMS, opt_state=None, **rest):
    opt_state = OPTIMIZERS["chain"].init(params) if opt_state is None else opt_state
    with ocp.training.Checkpointer(path) as checkpointer:
        return checkpoint.resume(checkpointer, params, opt_state, **{"stats": jnp.ones(2)} | rest)


def deep(levels):
    """A leaf that many levels down."""
    tree = jnp.ones(1)
    for _ in range(levels):
        tree = {"x": tree}
    return tree


MISTAKES = {
    "misspelt": (
        lambda p: checkpoint.restore_averages(p, {"conv": {"kernle": PARAMS["bias"]}}),
        r"conv/kernle is missing; close: conv/kernel",
    ),
    "shape": (
        lambda p: checkpoint.restore_averages(p, PARAMS | {"bias": jnp.ones(4)}),
        r"params/bias has shape \(3,\), asked for as \(4,\)",
    ),
    "dtype": (
        lambda p: checkpoint.restore_averages(p, PARAMS | {"bias": jnp.ones(3, jnp.bfloat16)}),
        r"params/bias is float32\[3\], asked for as bfloat16\[3\]",
    ),
    "all at once": (
        lambda p: checkpoint.restore_averages(
            p, {"bias": jnp.ones(4), "conv": {"kernel": jnp.ones((2, 3), jnp.int32)}, "x": 1.0}
        ),
        r"(?s)x is missing.*params/bias has shape.*params/conv/kernel is float32",
    ),
    "relative path": (
        lambda p: checkpoint.restore_averages("run", PARAMS),
        r"path='run' is relative\. Pass an absolute path",
    ),
    "no directory": (
        lambda p: checkpoint.restore_averages(p / "nowhere", PARAMS),
        r"path='.*nowhere' is not a directory",
    ),
    "empty run": (
        lambda p: checkpoint.restore_averages(p.parent, PARAMS),
        r"holds no finished checkpoint",
    ),
    "step": (
        lambda p: checkpoint.restore_averages(p, PARAMS, step=5),
        r"step=5 is not in .*Pass one of \[1, 2, 3\]",
    ),
    "step to resume": (lambda p: resumed(p, step=5), r"step=5 is not in .*\[1, 2, 3\]"),
    "name": (
        lambda p: checkpoint.restore_averages(p, PARAMS, name="slow"),
        r"name='slow' is no average of checkpoint .*/2",
    ),
    "other optimizer": (
        lambda p: resumed(p, opt_state=optax.chain(emaopt.adam(0.1), average).init(PARAMS)),
        r"has its averages at \['2'\], opt_state has \['1'\].*restore_averages",
    ),
    "other slots": (
        lambda p: resumed(
            p,
            opt_state=optax.chain(optax.identity(), emaopt.momentum(0.1, 0.9), average).init(
                PARAMS
            ),
        ),
        r"(?s)opt_state/1/slots/m/bias is stored, but not in what was passed",
    ),
    "rest forgotten": (
        lambda p: resumed(p, stats=None),
        r"rest/stats is stored, but not in what was passed",
    ),
    "rest invented": (lambda p: resumed(p, key=jnp.ones(1)), r"key is missing"),
    "interval": (
        lambda p: next(checkpoint.watch(p, PARAMS, interval=0)),
        r"interval=0 is out of range",
    ),
    "timeout that never ends": (
        lambda p: next(checkpoint.watch(p, PARAMS, timeout=float("nan"))),
        r"timeout=nan is out of range\. Pass seconds, 0 or above, or None",
    ),
    "after no step": (
        lambda p: next(checkpoint.watch(p, PARAMS, after=1.5)),
        r"after=1\.5 is not the number of a step",
    ),
    "watch a relative path": (
        lambda p: next(checkpoint.watch("run", PARAMS)),
        r"directory='run' is relative",
    ),
    "no path": (
        lambda p: checkpoint.restore_params(None, PARAMS),
        r"path=None is no path\. Pass a str",
    ),
    "like without leaves": (
        lambda p: checkpoint.restore_averages(p, {}),
        r"like has no leaves\. Pass the parameters",
    ),
    "like with one other leaf": (
        lambda p: checkpoint.restore_averages(p, {"x": jnp.ones(2)}),
        r"(?s)^(?!.*several parts).* x is missing",
    ),
    "rest as text": (
        lambda p: checkpoint.export_averages(p, p.parent / "new", rest="stats"),
        r"rest='stats' is one string\. Pass a list: \['stats'\]",
    ),
    "destination": (
        lambda p: checkpoint.export_averages(p, p),
        r"destination=.* exists\. Remove it",
    ),
}


@pytest.mark.many(1)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_anything_is_read(mistake, run, monkeypatch):
    call, message = MISTAKES[mistake]
    monkeypatch.setattr(ocp, "load", lambda *_, **__: pytest.fail("something was read"))
    with pytest.raises((ValueError, OSError), match=message):
        call(run[0])


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (
            {"a.b": jnp.ones(1), "a": {"b": jnp.ones(2)}},
            r"two leaves are named 'rest\.a\.b': .*\[2\]",
        ),
        ({"none": jnp.zeros((0, 3))}, r"rest/none has no elements"),
        ({"raw": b"bytes"}, r"rest/raw is a bytes, which a checkpoint cannot hold"),
        ({"raw": np.bytes_(b"bytes")}, r"rest/raw has dtype \|S5"),
        ({"words": np.array(["a", "b"])}, r"rest/words has dtype <U1"),
        ({"things": np.array([{}])}, r"rest/things has dtype object"),
        ({"pairs": np.zeros(2, "i4,f4")}, r"rest/pairs has dtype \[\('f0'"),
        ({"big": np.zeros(2, ">f4")}, r"rest/big has dtype >f4.*byte order"),
        ({"when": np.datetime64("2026-11-28")}, r"rest/when has dtype datetime64"),
        ({"wide": np.longdouble(1)}, r"rest/wide has dtype float128"),
        ({"small": jnp.zeros(2, jnp.uint4)}, r"rest/small has dtype uint4.*that TensorStore has"),
        ({"small": np.zeros(2, jnp.float4_e2m1fn)}, r"rest/small has dtype float4_e2m1fn"),
        ({"\ud800": jnp.zeros(2)}, r"the name 'rest\.\\ud800' has half a character"),
        ({"place": Path("/run")}, r"rest/place is a PosixPath"),
        ({"many": {1, 2}}, r"rest/many is a set"),
        ({"count": 2**64}, r"rest/count is 18446744073709551616, which 64 bits do not hold"),
        ({"deep": deep(300)}, r"levels deep, below 'rest\.deep\.x'"),
    ],
)
def test_what_orbax_would_not_read_back_is_not_saved(rest, message, tmp_path):
    params, opt_state = trained(OPTIMIZERS["chain"], 1)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match=message):
            checkpoint.save(checkpointer, 1, params, opt_state, **rest)
        assert checkpointer.latest is None


KEPT = {
    "float64": np.mean([0.1, 0.2, 0.3]),
    "large": np.float64(1e300),
    "float64 array": np.array([0.1, 1e300]),
    "int64": np.int64(2**40 + 1),
    "uint8": np.uint8(200),
    "bool_": np.bool_(True),
    "float16": np.float16(0.1),
    "complex": 1 + 2j,
    "complex128": np.complex128(0.1j),
    "bool": True,
    "int": 2**62,
    "float": 0.1,
    "str_": np.str_("words"),
    "str": "",
    "bfloat16": np.asarray(0.1, jnp.bfloat16),
}


def test_what_is_in_rest_comes_back_as_it_went(tmp_path):
    params, opt_state = trained(OPTIMIZERS["chain"], 1)
    blank = {
        n: np.zeros_like(x) if isinstance(x, np.ndarray) else type(x)() for n, x in KEPT.items()
    }
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpoint.save(checkpointer, 1, params, opt_state, **KEPT)
        *_, rest = checkpoint.resume(checkpointer, params, opt_state, **blank)
    assert rest.keys() == KEPT.keys()
    for name, want in KEPT.items():
        assert type(rest[name]) is type(want), name
        assert getattr(rest[name], "dtype", None) == getattr(want, "dtype", None), name
        assert np.array_equal(rest[name], want), name


@pytest.mark.parametrize(
    ("saved", "like", "message"),
    [
        (2**40 + 1, np.int32(0), r"rest/x is 1099511627777, which int32 does not hold exactly"),
        (2**40 + 1, jnp.int32(0), r"rest/x is 1099511627777, which int32 does not hold exactly"),
        (0.1, jnp.float32(0), r"rest/x is 0.1, which float32 does not hold exactly.*Python float"),
        (1.5, 1j, r"rest/x is 0.0, asked for as 1j"),
        (np.float64(0.1), np.float32(0), r"rest/x is float64\[\], asked for as float32\[\]"),
    ],
)
def test_what_would_be_rounded_is_refused(saved, like, message, tmp_path):
    params, opt_state = trained(OPTIMIZERS["chain"], 1)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, params, opt_state, x=saved)
        with pytest.raises(checkpoint.MismatchError, match=message):
            checkpoint.resume(checkpointer, params, opt_state, x=like)


def test_a_counter_named_step_is_saved_and_comes_back(tmp_path):
    params, opt_state = trained(OPTIMIZERS["chain"], 1)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 20, params, opt_state, step=jnp.int32(20), epoch=3)
        for step in (None, 20, jnp.int32(20)):
            got = checkpoint.resume(checkpointer, params, opt_state, step=step, epoch=0)
            bitwise(got[2], {"step": jnp.int32(20), "epoch": 3})


def test_what_orbax_takes_reaches_orbax(tmp_path):
    params, opt_state = trained(OPTIMIZERS["chain"], 1)
    best = ocp.training.preservation_policies.BestN(get_metric_fn=lambda m: m["accuracy"], n=1)
    every = ocp.training.save_decision_policies.FixedIntervalPolicy(100)
    with ocp.training.Checkpointer(
        tmp_path, preservation_policy=best, save_decision_policy=every
    ) as checkpointer:
        for step, accuracy in ((0, 0.9), (100, 0.5), (200, 0.4)):
            metrics = {"accuracy": accuracy}
            checkpoint.save(checkpointer, step, params, opt_state, metrics=metrics)
        checkpointer.wait()
        assert [(c.step, c.metrics) for c in checkpointer.checkpoints] == [(0, {"accuracy": 0.9})]
        about, best_yet = {"config": "resnet"}, {"accuracy": 0.95}
        assert not checkpoint.save(checkpointer, 250, params, opt_state)
        assert checkpoint.save(
            checkpointer,
            250,
            params,
            opt_state,
            force=True,
            metrics=best_yet,
            custom_metadata=about,
        )
        custom = ocp.checkpointables_metadata(tmp_path / "250").custom_metadata
        assert custom["config"] == "resnet"
        with pytest.raises(ValueError, match=r"step=250 is in .* already\. Pass another step"):
            checkpoint.save(checkpointer, 250, params, opt_state, force=True)
        done = checkpoint.save_async(
            checkpointer, 250, params, opt_state, force=True, overwrite=True, metrics=best_yet
        )
        assert done.result()


def test_a_state_without_an_average_is_not_saved_or_restored(tmp_path):
    with (
        ocp.training.Checkpointer(tmp_path / "run") as checkpointer,
        pytest.raises(ValueError, match="opt_state holds no average"),
    ):
        checkpoint.save(checkpointer, 1, PARAMS, optax.sgd(0.1).init(PARAMS))
    one_tree(tmp_path / "one", PARAMS, optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="holds no average"):
        checkpoint.restore_averages(tmp_path / "one", PARAMS)


def test_several_averages_of_a_leaf_need_a_name(tmp_path):
    tx = optax.named_chain(("fast", emaopt.ema(0.5)), ("slow", emaopt.ema(0.9)))
    params, opt_state = trained(tx, 2)
    one_tree(tmp_path / "one", params, opt_state)
    with pytest.raises(ValueError, match=r"name is missing.*opt_state/fast, state/opt_state/slow"):
        checkpoint.restore_averages(tmp_path / "one", PARAMS)
    got = checkpoint.restore_averages(tmp_path / "one", PARAMS, name="fast")
    bitwise(got, emaopt.average(params, opt_state, "fast"))


def test_an_item_that_is_not_there_is_an_error(tmp_path):
    params, opt_state = trained(OPTIMIZERS["chain"], 1)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_checkpointables(1, {"model": params, "opt_state": opt_state})
        with pytest.raises(ValueError, match=r"there is no item 'params', only model, opt_state"):
            checkpoint.resume(checkpointer, PARAMS, opt_state)


def test_cast_converts_what_else_would_be_an_error(run):
    path, _params, opt_state = run
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float16), PARAMS)
    got = checkpoint.restore_averages(path, like, cast=True)
    shadow = emaopt.averages(opt_state)["2"].shadow
    bitwise(got, jax.tree.map(lambda s: s.astype(jnp.float16), shadow))


def test_the_average_may_be_read_in_its_own_precision(run):
    path, _params, opt_state = run
    shadow = emaopt.averages(opt_state)["2"].shadow
    bitwise(checkpoint.restore_averages(path, jax.eval_shape(lambda: shadow)), shadow)


def test_averages_are_restored_as_numpy_arrays_where_like_has_them(run):
    path, params, opt_state = run
    like = jax.tree.map(np.asarray, PARAMS)
    got = checkpoint.restore_averages(path, like)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(got))
    bitwise(got, emaopt.average(params, opt_state))
