"""Snapshots: the averages alone, in fewer bytes, which everything that reads averages reads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import bitwise
from flax import linen, nnx
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file
from train import train

import emaopt
from emaopt import checkpoint
from emaopt.__main__ import main


TX = optax.chain(optax.adam(0.1), emaopt.ema(0.5, ledger=True))
PARAMS = {"conv": {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3)}, "bias": jnp.arange(3.0)}


def trained(tx, params=PARAMS, steps=3):
    return train(tx, params, [jax.tree.map(jnp.ones_like, params)] * steps)


def taken(directory, opt_state, *arguments, step=3, **options):
    with ocp.training.Checkpointer(directory) as checkpointer:
        assert checkpoint.snapshot(checkpointer, step, opt_state, *arguments, **options)
    return directory


def rounded(tree, dtype):
    return jax.tree.map(lambda x: x if dtype is None else x.astype(dtype).astype(x.dtype), tree)


@pytest.mark.many(2)
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_snapshot_is_restored_watched_and_exported(dtype, tmp_path):
    params, opt_state = trained(TX)
    want = rounded(emaopt.average(params, opt_state), dtype)
    run = taken(tmp_path / "run", opt_state, dtype)
    bitwise(checkpoint.restore_averages(run, params), want)
    ((_, watched),) = checkpoint.watch(run, params, timeout=0)
    bitwise(watched, want)
    checkpoint.export_averages(run, tmp_path / "served")
    served = ocp.load(tmp_path / "served", checkpointable_name="params")
    assert served["bias"].dtype == (dtype or jnp.float32)
    checkpoint.export_averages(run, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["bias"].dtype == (dtype or jnp.float32)
    assert not (run / "3" / "params").exists()


def test_it_has_steps_and_ledger_and_no_optimizer(tmp_path, capsys):
    run = taken(tmp_path, trained(TX)[1], jnp.bfloat16)
    main(["ls", str(run), "--json"])
    listed = capsys.readouterr().out
    assert "opt_state/1/step" in listed
    assert "opt_state/1/ledger/age" in listed
    assert "mu" not in listed
    main(["diff", str(run), str(run)])
    assert "differ" not in capsys.readouterr().out.replace("0 differ", "")


@pytest.mark.slow
def test_a_flipped_bit_is_noticed_in_what_was_cast(tmp_path, monkeypatch):
    run = taken(tmp_path, trained(TX)[1], jnp.bfloat16)
    monkeypatch.setattr(
        "emaopt.checkpoint._digest._mix", lambda h: h
    )  # other digests, as of other bits
    jax.clear_caches()
    with pytest.raises(checkpoint.DamagedError, match=r"cannot be trusted|is damaged"):
        checkpoint.restore_averages(run, PARAMS)
    monkeypatch.undo()
    jax.clear_caches()


def test_numbers_at_the_ends_of_the_range_keep_their_digests(tmp_path):
    values = [np.nan, -np.nan, np.inf, 1e-45, -1e-40, 6e-8, 1.00390625, 3e38]
    state = emaopt.ema(0.5).init({"w": jnp.array(values, jnp.float32)})
    run = taken(tmp_path, state, jnp.bfloat16)
    got = checkpoint.restore_averages(run, {"w": jnp.zeros(8)})["w"]
    assert np.array_equal(np.isfinite(got), np.isfinite(np.float32(values)))


def test_float16_refuses_what_it_does_not_hold(tmp_path):
    state = optax.chain(optax.sgd(1), emaopt.ema(0.5)).init({"w": jnp.array([1e6, jnp.inf])})
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match=r"float16 does not hold 1/shadow/w.*Pass bfloat16"):
            checkpoint.snapshot(checkpointer, 1, state, jnp.float16)
        with pytest.raises(ValueError, match=r"dtype=float64 is out of range. Pass float32"):
            checkpoint.snapshot(checkpointer, 1, state, np.float64)
        assert not checkpointer.checkpoints


@pytest.mark.slow
def test_it_is_merged_with_full_checkpoints_and_after_them(tmp_path):
    tx = optax.chain(optax.sgd(0.1), emaopt.ema(emaopt.power(3), ledger=True))
    params, opt_state = PARAMS, None
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        for step in (4, 8):
            params, opt_state = train(tx, params, [PARAMS] * 4, opt_state)
            if step == 4:
                checkpoint.save(checkpointer, step, params, opt_state)
            else:
                checkpoint.snapshot(checkpointer, step, opt_state)
    main(["merge", str(tmp_path / "run"), str(tmp_path / "out"), "--gamma", "3"])
    got = checkpoint.restore_averages(tmp_path / "out", params)
    want = emaopt.average(params, opt_state)
    assert all(map(np.allclose, jax.tree.leaves(got), jax.tree.leaves(want)))


@pytest.mark.slow
def test_full_checkpoints_come_and_go_while_snapshots_stay(tmp_path):
    keep = ocp.training.preservation_policies.LatestN(2)
    params, opt_state = PARAMS, None
    with (
        ocp.training.Checkpointer(tmp_path / "full", preservation_policy=keep) as full,
        ocp.training.Checkpointer(tmp_path / "averages") as light,
    ):
        for step in range(1, 5):
            params, opt_state = train(TX, params, [PARAMS], opt_state)
            checkpoint.save(full, step, params, opt_state)
            checkpoint.snapshot(light, step, opt_state, jnp.bfloat16)
        assert [c.step for c in full.checkpoints] == [3, 4]
        assert [c.step for c in light.checkpoints] == [1, 2, 3, 4]
        bitwise(checkpoint.resume(full, params, opt_state)[:2], (params, opt_state))
        with pytest.raises(checkpoint.MismatchError, match=r"holds averages alone.*Pass the step"):
            checkpoint.resume(light, params, opt_state)
        with pytest.raises(checkpoint.MismatchError, match=r"holds averages alone.*Pass the step"):
            checkpoint.resume_partial(light, params, opt_state)
        with pytest.raises(ValueError, match=r"step=4 is in .* already"):
            checkpoint.snapshot(light, 4, opt_state)
    with pytest.raises(checkpoint.MismatchError, match=r"no parameters. For the averages, call"):
        checkpoint.restore_params(tmp_path / "averages", params)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_a_compensated_average_is_its_value(dtype, tmp_path):
    tx = optax.chain(optax.sgd(0.1), emaopt.ema(0.9, accumulator_dtype=emaopt.compensated()))
    params, opt_state = trained(tx, steps=9)
    run = taken(tmp_path, opt_state, dtype)
    bitwise(checkpoint.restore_averages(run, params), emaopt.average(params, opt_state))
    paths = checkpoint.sources(run, params).values()
    assert all(path.startswith("opt_state/1/shadow") for path in paths)


def test_a_healed_average_is_found_in_its_place(tmp_path):
    tx = optax.chain(optax.sgd(0.1), emaopt.heal(emaopt.ema(0.9)))
    params, opt_state = trained(tx)
    run = taken(tmp_path, opt_state)
    bitwise(checkpoint.restore_averages(run, params), emaopt.average(params, opt_state))


def test_several_averages_of_several_networks(tmp_path):
    tx = optax.named_chain(("sgd", optax.sgd(0.1)), ("a", emaopt.ema(0.5)), ("b", emaopt.ema(0.9)))
    params = {name: {"w": jnp.full(2, x)} for name, x in (("gen", 1.0), ("disc", 6.0))}
    states = {name: trained(tx, params[name])[1] for name in params}
    run = taken(tmp_path, states)
    want = emaopt.average(params, states, "b")
    bitwise(checkpoint.restore_averages(run, params, name="b"), want)
    bitwise(checkpoint.restore_averages(run, params["gen"], name="gen/b"), want["gen"])
    with pytest.raises(
        checkpoint.MismatchError, match=r"several averages of '(gen|disc)/w'. Pass name="
    ):
        checkpoint.restore_averages(run, params)
    with pytest.raises(checkpoint.MismatchError, match=r"gen/v is missing"):
        checkpoint.restore_averages(run, {"gen": {"v": jnp.ones(2)}}, name="b")


def test_parts_that_have_averages_of_their_own_are_exported_together(tmp_path):
    tx = optax.partition({"k": emaopt.ema(0.5), "b": emaopt.ema(0.9)}, {"conv": "k", "bias": "b"})
    params, opt_state = trained(tx)
    run = taken(tmp_path / "run", opt_state)
    checkpoint.export_averages(run, tmp_path / "served")
    want = emaopt.average(params, opt_state)
    bitwise(checkpoint.restore_averages(tmp_path / "served", params), want)


def test_a_list_is_exported_as_a_list(tmp_path):
    params = [jnp.ones(2), {"w": jnp.ones(3)}]
    tx = optax.partition({"k": emaopt.ema(0.5), "b": emaopt.ema(0.9)}, ["k", "b"])
    run = taken(tmp_path / "run", tx.init(params))
    checkpoint.export_averages(run, tmp_path / "served")
    bitwise(checkpoint.restore_averages(tmp_path / "served", params), params)


def test_leaves_without_an_average_are_not_there(tmp_path):
    tx = optax.masked(emaopt.ema(0.5), emaopt.matching("kernel"))
    params, opt_state = trained(tx)
    run = taken(tmp_path, opt_state)
    got = checkpoint.restore_averages(run, {"conv": params["conv"]})
    bitwise(got["conv"], emaopt.average(params, opt_state)["conv"])
    with pytest.raises(checkpoint.MismatchError, match=r"bias is missing"):
        checkpoint.restore_averages(run, params)


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        init = linen.with_partitioning(linen.initializers.ones, ("in", "out"))
        return x @ self.param("kernel", init, (2, 2))


@pytest.mark.slow
def test_names_see_through_boxes_and_modules(tmp_path):
    boxed = Dense().init(jax.random.key(0), jnp.ones((1, 2)))
    run = taken(tmp_path / "boxes", TX.init(boxed), jnp.bfloat16)
    bitwise(checkpoint.restore_averages(run, boxed), boxed)
    haliax = {"w": {"array": jnp.ones(2)}}  # as it lies on disk
    run = taken(tmp_path / "named", TX.init(haliax))
    bitwise(checkpoint.restore_averages(run, {"w": jnp.zeros(2)}), {"w": jnp.ones(2)})
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu)
    optimizer = nnx.ModelAndOptimizer(model, TX)
    run = taken(tmp_path / "nnx", optimizer, jnp.bfloat16)
    got = checkpoint.restore_averages(run, nnx.state(model, nnx.Param))
    want = rounded(nnx.state(model, nnx.Param), jnp.bfloat16)
    bitwise(got, want)


@pytest.mark.slow
def test_many_sharded_leaves_on_eight_devices(tmp_path):
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((4, 2), ("a", "b")), jax.sharding.PartitionSpec("a", "b")
    )
    params = {f"w{i}": jax.device_put(jnp.full((8, 4), i / 3), sharding) for i in range(84)}
    run = taken(tmp_path, jax.jit(TX.init)(params), jnp.bfloat16)
    got = checkpoint.restore_averages(run, params)
    assert got["w7"].sharding == sharding
    bitwise(got, rounded(params, jnp.bfloat16))


@pytest.mark.slow
def test_rows_must_be_up_to_date(tmp_path):
    tx = emaopt.ema(0.5, rows={"table": True})
    params = {"table": jnp.arange(8.0).reshape(4, 2)}
    opt_state = tx.init(params)
    rested = opt_state.rows._replace(now=opt_state.rows.now.at[0].add(jnp.log(0.5)))
    params, opt_state = jax.tree.map(lambda x: x + 1, params), opt_state._replace(rows=rested)
    with (
        ocp.training.Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match=r"rows of 'table' have rested.*emaopt.swap\(\*emaopt.swap"),
    ):
        checkpoint.snapshot(checkpointer, 1, opt_state)
    params, opt_state = emaopt.swap(*emaopt.swap(params, opt_state))
    run = taken(tmp_path, opt_state)
    want = emaopt.average(params, opt_state)
    assert float(want["table"][0, 0]) == 0.5
    bitwise(checkpoint.restore_averages(run, params), want)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (optax.sgd(0.1).init(PARAMS), r"opt_state holds no average. Pass the state of a chain"),
        (emaopt.swap(PARAMS, TX.init(PARAMS))[1], r"opt_state is swapped: average '1' is in the"),
    ],
)
def test_a_state_without_averages_in_it_is_refused(state, message, tmp_path):
    with (
        ocp.training.Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match=message),
    ):
        checkpoint.snapshot(checkpointer, 1, state)
