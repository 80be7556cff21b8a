"""What of a checkpoint is read, and what is said of one that is not what it says."""

import gc
import json
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as legacy
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint import DamagedError, MismatchError
from emaopt.checkpoint._run import locate
from emaopt.checkpoint._stored import Stored
from emaopt.checkpoint._trees import plain
from emaopt.checkpoint._watch import _state


TX = optax.chain(optax.sgd(0.1), emaopt.ema(0.5))
LIKE = {"w": jnp.zeros(3)}
GOLDEN = Path(__file__).parents[2] / "golden" / "orbax_0.1.0.tar.xz"


def params_of(step):
    return {"w": jnp.full(3, float(step))}


def restored(path):
    return float(checkpoint.restore_averages(path, LIKE)["w"][0])


# ---- what is in a checkpoint ---------------------------------------------------------------------


def test_items_that_are_no_trees_are_passed_over(tmp_path):
    save = legacy.args
    with legacy.CheckpointManager(tmp_path) as manager:
        state = {"params": params_of(1), "opt_state": TX.init(params_of(1))}
        about = save.JsonSave({"epoch": 3})
        manager.save(3, args=save.Composite(state=save.StandardSave(state), about=about))
    assert restored(tmp_path) == 1.0


def test_a_tree_in_one_file_for_each_array_is_read(tmp_path):
    with legacy.Checkpointer(legacy.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        state = {
            "params": params_of(1),
            "opt_state": TX.init(params_of(1)),
            "flag": np.asarray(True),
        }
        checkpointer.save(tmp_path / "one", state)
    assert restored(tmp_path / "one") == 1.0


@pytest.mark.parametrize("items", [["params", "digests"], ["digests"], ["digests", "opt_state"]])
def test_items_of_another_step_are_noticed(items, run):
    for item in items:
        shutil.rmtree(run / "3" / item)
        shutil.copytree(run / "2" / item, run / "3" / item)
    with pytest.raises(DamagedError, match=r"/3: its items are of different saves"):
        restored(run)


def test_two_items_in_each_others_place_are_noticed(run):
    (run / "3" / "params").rename(run / "3" / "x")
    (run / "3" / "opt_state").rename(run / "3" / "params")
    (run / "3" / "x").rename(run / "3" / "opt_state")
    with pytest.raises(ValueError, match=r"checkpoint .*/3"):
        restored(run)


def test_a_checkpoint_of_another_step_is_noticed_and_a_copy_by_name_is_read(run):
    (run / "3").rename(run / "7")
    with pytest.raises(DamagedError, match=r"/7 was saved as step 3. Rename the directory to 3"):
        restored(run)
    (run / "7").rename(run / "final")
    assert restored(run / "final") == 3.0


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "params/_METADATA"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("fifo", "is no regular file"),
        ("[1]", "holds no JSON object"),
        ("[" * 100_000, "RecursionError"),
        ("{", "JSONDecodeError"),
    ],
)
def test_metadata_that_is_none_is_damage(file, damage, message, run):
    (run / "3" / file).unlink()
    if damage == "fifo":
        os.mkfifo(run / "3" / file)
    else:
        (run / "3" / file).write_text(damage)
    with pytest.raises(DamagedError, match=rf"checkpoint .*/3: .*{message}"):
        restored(run)


def test_a_checkpoint_without_a_tree_is_damage(run):
    shutil.rmtree(run / "3" / "params")
    (run / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    for item in ("opt_state", "digests"):
        shutil.rmtree(run / "3" / item)
    with pytest.raises(DamagedError, match=r"There is no item that is a tree"):
        restored(run)


def test_an_array_that_claims_to_be_huge_is_named(tmp_path):
    with legacy.Checkpointer(legacy.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        state = {"params": params_of(1), "opt_state": TX.init(params_of(1))}
        checkpointer.save(tmp_path / "one", state)
    file = tmp_path / "one" / "params.w" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "nonsense"}))
    with pytest.raises(DamagedError, match=r"one: params/w cannot be read"):
        checkpoint.restore_averages(tmp_path / "one", LIKE)


def test_names_from_a_file_are_escaped(run, tmp_path):
    params = {"w\x1b[2J\n": jnp.ones(3)}
    with ocp.training.Checkpointer(tmp_path / "other") as checkpointer:
        checkpoint.save(checkpointer, 1, params, TX.init(params))
        with pytest.raises(MismatchError) as error:
            checkpoint.resume(checkpointer, LIKE, TX.init(LIKE))
    assert r"params/w\x1b[2J\n is stored, but not in what was passed" in str(error.value)


@pytest.mark.slow
def test_checkpoints_of_0_1_0_are_read(tmp_path):
    shutil.unpack_archive(GOLDEN, tmp_path, filter="data")
    compensated = emaopt.compensated(jnp.bfloat16)
    average = emaopt.ema(emaopt.warmup(0.9))
    sgd, masked = optax.sgd(0.1), optax.masked(average, emaopt.matching("kernel"))
    two = ("fast", emaopt.ema(0.5)), ("slow", emaopt.ema(0.9, ledger=True))
    cases = {
        "chain": optax.chain(emaopt.adam(0.1), average),
        "nnx": optax.chain(emaopt.adam(0.1), average),
        "named": optax.named_chain(("sgd", sgd), *two),
        "masked": optax.chain(sgd, masked),
        "accumulated": optax.MultiSteps(optax.chain(emaopt.momentum(0.1, 0.9), average), 2),
        "compensated": optax.chain(sgd, emaopt.ema(0.9, accumulator_dtype=compensated)),
        "undigested": optax.chain(sgd, average),
    }
    blank = {
        "stats": {"mean": jnp.zeros(2)},
        "key": jax.random.key(0),
        "epoch": 0,
        "temperature": 0.0,
        "history": np.zeros(3),
        "label": "",
    }
    kernel = {"kernel": jnp.zeros((2, 3), jnp.bfloat16)}
    for case, tx in cases.items():
        module = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
        like = module if case == "nnx" else {"conv": kernel, "bias": jnp.zeros(3)}
        wanted = np.load(tmp_path / case / "averages.npz"), np.load(tmp_path / case / "raw.npz")
        with ocp.training.Checkpointer(tmp_path / case / "run") as checkpointer:
            got = checkpoint.resume(
                checkpointer, like, tx.init(like), **({} if case == "nnx" else blank)
            )
        averaged = checkpoint.restore_averages(tmp_path / case / "run", like)
        for tree, want in zip((averaged, got[0]), wanted, strict=True):
            for i, leaf in enumerate(jax.tree.leaves(tree)):
                assert np.array_equal(np.asarray(leaf, np.float32), want[str(i)]), case
        if case != "nnx":
            assert np.array_equal(got[2].pop("history"), np.linspace(0.0, 1.0, 3))
            assert got[2].pop("key") == jax.random.key(7)
            assert got[2].pop("stats")["mean"].tolist() == [1.0, 1.0]
            assert got[2] == {"epoch": 3, "temperature": 0.25, "label": "a run"}
    like = {"mlp": {"dense": {"bias": jnp.zeros(4), "kernel": jnp.zeros((3, 4))}}}
    assert checkpoint.restore_averages(tmp_path / "converted/run", like)
    like = {"conv": kernel, "bias": jnp.zeros(3)}
    for case in ("exported", "one_tree"):
        leaves = jax.tree.leaves(checkpoint.restore_averages(tmp_path / case / "run", like))
        want = np.load(tmp_path / "chain" / "averages.npz")
        assert np.array_equal(leaves[0], want["0"])


def test_random_keys_are_resumed_from_abstract_ones(tmp_path):
    key = jax.random.key(3, impl="rbg")
    like = jax.eval_shape(lambda: key)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, LIKE, TX.init(LIKE), key=key, plain=jnp.zeros(4))
        rest = {"key": like, "plain": jnp.zeros(4)}
        got = checkpoint.resume(checkpointer, LIKE, TX.init(LIKE), **rest)[2]["key"]
        other = {"key": jax.random.key(0, impl="unsafe_rbg"), "plain": jnp.zeros(4)}
        with pytest.raises(MismatchError, match=r"rest/key is a random key of 'rbg', asked for as"):
            checkpoint.resume(checkpointer, LIKE, TX.init(LIKE), **other)
    assert got == key
    item = Stored(tmp_path / "1").items["rest"]
    assert item.key_impl(("plain",)) is None
    assert item.key_impl(("nowhere",)) is None


# ---- what reading costs, and what an error says --------------------------------------------------


def memory():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_reading_takes_constant_memory(tmp_path):
    """Through Orbax's metadata it grew by 8 kB per leaf and read: 96 MB here."""
    params = {f"w{i}": jnp.ones(3) for i in range(30)}
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, params, optax.chain(emaopt.adam(), TX).init(params))
    for _ in range(20):
        checkpoint.restore_averages(tmp_path, params)
    before = memory()
    for _ in range(100):
        checkpoint.restore_averages(tmp_path, params)
    assert memory() - before < 10e6


@pytest.mark.slow
def test_thousands_of_wrong_names_are_told_at_once_and_in_short(tmp_path):
    def layers(name):
        return {f"layer{i}": {name: {"kernel": np.ones(1)}} for i in range(2000)}

    state = {"params": layers("attention"), "opt_state": emaopt.ema(0.5).init({"w": jnp.ones(1)})}
    ocp.save_checkpointables(tmp_path / "two", state)
    start = time.process_time()
    with pytest.raises(MismatchError) as error:
        checkpoint.restore_averages(tmp_path / "two", layers("attn"))
    assert time.process_time() - start < 3
    text = str(error.value)
    assert "layer0/attn/kernel is missing; close: layer0/attention/kernel" in text
    assert "1990 more are missing" in text
    assert len(text.splitlines()) < 20


# ---- resume, watch, export -----------------------------------------------------------------------


def test_resume_names_the_leaf_and_both_shapes(run):
    other = {"w": jnp.zeros(4)}
    with ocp.training.Checkpointer(run) as checkpointer:
        with pytest.raises(ValueError, match=r"shape \(4,\) at leaf 'w' where the average has \(3"):
            checkpoint.resume(checkpointer, other, TX.init(LIKE))
        with pytest.raises(MismatchError, match=r"params/w has shape \(3,\), asked for as \(4,\)"):
            checkpoint.resume(checkpointer, other, TX.init(other))


def test_watch_raises_a_wrong_template_at_once(run, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(MismatchError, match=r"params/w has shape"):
        next(checkpoint.watch(run, {"w": jnp.zeros(4)}, interval=30))


@pytest.mark.slow
def test_watch_raises_damage_that_stays(run):
    (run / "3" / "params" / "_METADATA").write_text("{")
    before = time.monotonic()
    with pytest.raises(DamagedError, match=r"checkpoint .*/3: .*Use another step"):
        next(checkpoint.watch(run, LIKE, interval=0.01, timeout=60))
    assert time.monotonic() - before > 2  # a trainer may be deleting it


def test_watch_sees_a_run_that_was_started_again(run):
    watched = checkpoint.watch(run, LIKE, interval=0.01, timeout=60, after=2)
    assert next(watched)[0] == 3
    shutil.rmtree(run)
    with ocp.training.Checkpointer(run) as checkpointer:
        checkpoint.save(checkpointer, 3, params_of(8), TX.init(params_of(8)))
    step, averages = next(watched)
    assert (step, float(averages["w"][0])) == (3, 8.0)
    assert _state(run / "4") is None  # deleted since it was listed


def test_every_reader_takes_the_name_of_an_average(tmp_path):
    tx = optax.named_chain(
        ("a", optax.chain(optax.sgd(0.1), emaopt.ema(0.5))),
        ("b", optax.chain(optax.sgd(0.1), emaopt.ema(0.9))),
    )
    params = {"w": jnp.ones(3)}
    params, opt_state = emaopt.apply_gradients(tx, params, params, tx.init(params))
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpoint.save(checkpointer, 1, params, opt_state, name="a/1")
    for name in ("a/1", "b/1", "b"):
        want = emaopt.average(params, opt_state, name)["w"]
        got = checkpoint.restore_averages(tmp_path / "run", params, name=name)["w"]
        assert np.array_equal(got, want)
        ((_, got),) = checkpoint.watch(tmp_path / "run", params, timeout=0, name=name)
        assert np.array_equal(got["w"], want)
        file = tmp_path / f"{name.replace('/', '_')}.safetensors"
        checkpoint.export_averages(tmp_path / "run", file, name=name)
        assert np.array_equal(load_file(file)["w"], want)
    assert checkpoint.sources(tmp_path / "run", params, name="b/1") == {
        "w": "opt_state/b/1/shadow/w"
    }
    with pytest.raises(MismatchError, match=r"name='1/a' is no average"):
        checkpoint.restore_averages(tmp_path / "run", params, name="1/a")


def test_leaves_that_would_have_one_name_are_not_exported(tmp_path):
    params = {"a": {"b": jnp.ones(2)}, "a/b": jnp.zeros(2)}
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpoint.save(checkpointer, 1, params, TX.init(params))
    assert np.array_equal(
        checkpoint.restore_averages(tmp_path / "run", params)["a/b"], params["a/b"]
    )
    with pytest.raises(ValueError, match=r"two leaves are named 'a/b'"):
        checkpoint.export_averages(tmp_path / "run", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(ValueError, match=r"two leaves are named 'a/b'"):
        checkpoint.sources(tmp_path / "run", params)


def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(tensors, path, texts):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", interrupted)
    with pytest.raises(OSError, match=r"x.safetensors was not saved.*No space left on device"):
        checkpoint.export_averages(run, tmp_path / "x.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_save_that_fails_says_which_and_why(run, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left [tensorstore_spec='{...}']")

    with ocp.training.Checkpointer(run) as checkpointer:
        monkeypatch.setattr(checkpointer, "save_checkpointables", fails)
        message = r"run, step 9, was not saved.*\(RuntimeError: RESOURCE_EXHAUSTED: No space left\)"
        with pytest.raises(OSError, match=message):
            checkpoint.save(checkpointer, 9, LIKE, TX.init(LIKE))


@pytest.mark.parametrize("character", ["[0.1]", "*", "?"])
def test_a_directory_that_orbax_could_not_read_again_is_refused_before_writing(character, tmp_path):
    run = tmp_path / f"lr={character}"
    params = {"w": jnp.ones(3)}
    opt_state = emaopt.ema(0.5).init(params)
    with (
        ocp.training.Checkpointer(run) as checkpointer,
        pytest.raises(ValueError, match=r"checkpointer.directory=.* has a \*, \? or \[ in it"),
    ):
        checkpoint.save(checkpointer, 1, params, opt_state)
    assert not (run / "1").exists()
    source = tmp_path / "run"
    with ocp.training.Checkpointer(source) as checkpointer:
        checkpoint.save(checkpointer, 1, params, opt_state)
    with pytest.raises(ValueError, match="destination="):
        checkpoint.export_averages(source, run / "averages")
    checkpoint.export_averages(source, f"{run}.safetensors")


def test_a_directory_of_the_older_layout_is_one_checkpoint(tmp_path):
    (tmp_path / "_METADATA").write_text("{}")
    assert locate(tmp_path, None) == Path(tmp_path)


def test_a_module_that_is_no_tree_stays_as_it_is():
    class Opaque(nnx.Module, pytree=False):
        pass

    module = Opaque()
    assert plain(module) is module
