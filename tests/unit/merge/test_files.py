"""Merging runs of TF1, directories of `.safetensors` files, and what such a file cannot hold."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import bitwise
from etils.epath import Path
from orbax.checkpoint import v1 as ocp
from safetensors.flax import load_file, save_file

import emaopt
from emaopt import checkpoint, posthoc
from emaopt.__main__ import main
from emaopt.merge import Run, soup


def test_a_run_of_tf1_is_merged(tmp_path, capsys):
    pytest.importorskip("tensorflow")
    from emaopt import tf1

    tx = optax.chain(emaopt.adam(), emaopt.ema(0.9))
    run = tmp_path / "run"
    run.mkdir()
    for step in (100, 200):
        params = {"conv": {"kernel": jnp.full((2, 3), step / 1)}, "bias": jnp.float32(step)}
        tf1.save(run / f"model.ckpt-{step}", params, tx.init(params))
    main(["merge", str(run), "--mean", str(tmp_path / "mean")])
    main(["merge", *[str(run / f"model.ckpt-{s}") for s in (100, 200)], str(tmp_path / "soup")])
    assert "2 checkpoints" in capsys.readouterr().out
    for name in ("mean", "soup"):
        made = ocp.load(tmp_path / name, checkpointable_name="params")
        np.testing.assert_array_equal(made["conv"]["kernel"], np.full((2, 3), 150, np.float32))
        assert made["bias"] == 150
    assert sorted(made) == ["bias", "conv"]  # no slots, powers or averages


def test_a_directory_of_one_model_is_a_checkpoint_of_a_soup(tmp_path):
    for name, value in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        save_file({"w": jnp.full(2, value)}, tmp_path / name / "model.safetensors")
    soup([tmp_path / "a", tmp_path / "b"], [0.25, 0.75]).write(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(load_file(tmp_path / "out.safetensors")["w"], [2.5, 2.5])


def test_numbers_and_complex_arrays_are_what_they_were(tmp_path):
    for step in (1, 2):
        tree = {"params": {"w": np.full(2, step + 2j * step, np.complex64), "n": step}}
        ocp.save(tmp_path / "run" / str(step), tree)
    run = Run.open(tmp_path / "run")
    run.plan(posthoc.anneal([0.5], 2, on=[1, 2])).write(tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(made["w"], np.full(2, 1.5 + 3j, np.complex64))
    assert made["n"] == 2


def test_a_dtype_that_a_file_cannot_hold_is_refused(tmp_path):
    ocp.save(tmp_path / "1", {"params": {"w": jnp.ones(2, jnp.float8_e4m3b11fnuz)}})
    with pytest.raises(ValueError, match=r"w is float8_e4m3b11fnuz, which a .safetensors file"):
        soup([tmp_path / "1"]).write(tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_lazy_average_of_rows_is_brought_up_to_date(tmp_path):
    table = emaopt.matching("table")
    tx = emaopt.ema(emaopt.power(1), ledger=True, rows=table)
    dense = emaopt.ema(emaopt.power(1))
    params = {"table": jnp.arange(8.0).reshape(4, 2)}
    state, reference = tx.init(params), dense.init(params)
    for step in range(1, 4):
        tables = {"table": emaopt.rows(jnp.array([step]))}
        small, small_state = emaopt.take((params, state), tables)
        updates = {"table": jnp.ones_like(small["table"])}
        updates, small_state = tx.update(updates, small_state, small)
        new = optax.apply_updates(small, updates)
        after, state = emaopt.put((params, state), (new, small_state), tables)
        change = {"table": after["table"] - params["table"]}
        _, reference = dense.update(change, reference, params)
        params = after
        ocp.save(tmp_path / "run" / str(step), {"params": params, "opt_state": state})
    Run.open(tmp_path / "run").plan(1.0).write(tmp_path / "out")
    made = ocp.load(tmp_path / "out", checkpointable_name="params")
    want = emaopt.average(params, reference)["table"]
    np.testing.assert_allclose(made["table"], want, rtol=1e-6)


def test_an_array_that_is_gone_is_named(tmp_path):
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        for step in (1, 2):
            ocp.save(tmp_path / "run" / str(step), {"params": {"w": np.ones(3)}})
    plan = Run.open(tmp_path / "run").plan(posthoc.anneal([0.5], 2, on=[1, 2]))
    (file,) = (tmp_path / "run" / "1").glob("**/params.w/zarr.json")
    file.unlink()
    with pytest.raises(checkpoint.DamagedError, match=r"run/1: .*params/w cannot be read"):
        plan.write(tmp_path / "out")


def test_an_average_of_no_parameter_is_an_error(tmp_path):
    params = {"w": jnp.ones(2), "v": jnp.ones(2)}
    tx = emaopt.ema(emaopt.power(1), ledger=True)
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(params, state, params)
    ocp.save(tmp_path / "run" / "4", {"params": {"w": jnp.ones(2)}, "opt_state": state})
    with pytest.raises(ValueError, match="has no parameters for the averages of v"):
        Run.open(tmp_path / "run")


@pytest.mark.parametrize("more", [{}, {"w": jnp.ones(2), "s": jnp.float32(3)}])
def test_arrays_without_elements_stay_in_a_file(more, tmp_path):
    tree = {"a": jnp.zeros((0, 3)), "b": jnp.zeros((2, 0), jnp.bfloat16), **more}
    save_file(tree, tmp_path / "model.safetensors")
    file = tmp_path / "out.safetensors"
    soup([tmp_path / "model.safetensors"] * 2).write(file)
    bitwise(load_file(file), tree)  # which refuses a file with a byte too many


def test_a_tensor_below_another_one_is_refused(tmp_path):
    save_file({"a": jnp.ones(2), "a/b": jnp.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a/b lies below another array"):
        soup([tmp_path / "model.safetensors"])


def test_the_room_in_a_cloud_is_not_asked_for(tmp_path):
    save_file({"a": jnp.ones(2)}, tmp_path / "model.safetensors")
    soup([tmp_path / "model.safetensors"])._check_room(Path("gs://bucket/merged"))
