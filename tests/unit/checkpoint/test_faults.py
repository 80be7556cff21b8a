"""DamagedError files, killed processes, several processes: nothing wrong is ever loaded."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trainer
from compare import bitwise, equal
from orbax.checkpoint import v1 as ocp
from processes import finish, together
from trainer import environment
from trees import EVERY_KIND

import emaopt
from emaopt import checkpoint
from emaopt.checkpoint import DamagedError
from emaopt.checkpoint._digest import digests
from emaopt.checkpoint._item import Item
from emaopt.checkpoint._stored import Stored


TRAINER = [sys.executable, trainer.__file__]


def single_device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_all_kinds_of_leaves_are_saved_verified_and_resumed(tmp_path):
    tx = optax.chain(optax.sgd(0.1), emaopt.ema(0.9))
    params = {"w": jnp.ones(3)}
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, params, tx.init(params), **EVERY_KIND)
        *_, rest = checkpoint.resume(checkpointer, params, tx.init(params), **EVERY_KIND)
    for name, leaf in EVERY_KIND.items():
        assert np.array_equal(digests([rest[name]]), digests([leaf])), name


# ---- damage -------------------------------------------------------------------------------------


TX = optax.chain(emaopt.adam(0.1), emaopt.ema(0.9))
PARAMS = {
    "dense": {
        "kernel": jnp.asarray(np.random.default_rng(0).standard_normal((64, 32)), jnp.float32),
        "bias": jnp.arange(32.0),
    }
}


STATS = {"stats": jnp.ones((5, 5))}
WANT = (*emaopt.apply_gradients(TX, PARAMS, PARAMS, TX.init(PARAMS)), STATS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    with ocp.training.Checkpointer(path) as checkpointer:
        checkpoint.save(checkpointer, 1, *WANT[:2], **STATS)
    return path


def load(path):
    with ocp.training.Checkpointer(path) as checkpointer:
        return checkpoint.resume(checkpointer, PARAMS, TX.init(PARAMS), **STATS)


def opens(path):
    try:
        ocp.training.Checkpointer(path).close()
    except ValueError:
        return False
    return True


def flip(data, rng):
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]


DAMAGES = {
    "flipped": flip,
    "truncated": lambda data, rng: data[: rng.randrange(len(data))],
    "overwritten": lambda data, rng: rng.randbytes(len(data)),
    "missing": lambda data, rng: None,
}


def every(path, glob, damage):
    for file in path.rglob(glob):
        damage(file)


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def scramble(file):
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
def test_what_plain_orbax_does_with_each_of_these_is_as_the_page_says(tmp_path):
    """The column beside ours in docs/checkpoints.md."""
    tx, run = optax.chain(optax.sgd(0.1), emaopt.ema(0.9)), tmp_path / "run"
    values = {step: jax.random.normal(jax.random.key(step), (300,)) for step in (1, 2)}
    with ocp.training.Checkpointer(run) as checkpointer:
        for step, w in values.items():
            checkpoint.save(checkpointer, step, {"w": w}, tx.init({"w": w}))

    def load(step, name="w", size=300, dtype=jnp.float32):
        like = {name: jax.ShapeDtypeStruct((size,), dtype)}
        return ocp.load(run / str(step), like, checkpointable_name="params")[name]

    file = max((run / "1" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    whole, silent = file.read_bytes(), 0
    for at in range(0, len(whole), 50):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with contextlib.suppress(Exception):
            silent += not np.array_equal(load(1), values[1])
    file.write_bytes(whole)
    assert silent > len(whole) / 50 / 2  # mostly silently wrong
    assert load(2, dtype=jnp.int32).dtype == jnp.int32
    with pytest.raises(ValueError, match=r"^(?!.*params/w)"):
        load(2, size=301)
    lenient = ocp.Context()
    lenient.pytree.loading.partial_load = True
    with lenient:
        assert isinstance(load(2, name="v"), jax.ShapeDtypeStruct)  # the template
    shutil.copytree(run / "2", run / "best_7")
    with ocp.training.Checkpointer(run) as checkpointer:
        assert [saved.step for saved in checkpointer.checkpoints] == [1, 2]
    shutil.rmtree(run / "2" / "params")
    shutil.copytree(run / "1" / "params", run / "2" / "params")
    assert np.array_equal(load(2), values[1])  # items of two steps
    shutil.rmtree(run / "2" / "opt_state")
    assert np.array_equal(load(2), values[1])  # an item is gone


# What plain Orbax does of each of these: a wrong value, an error without a name, or a dump.
FAILURES = {
    "bit flipped in array data": (
        lambda run: every(run / "1" / "params" / "ocdbt.process_0", "d/*", scramble),
        r"params/dense/(bias|kernel)",
    ),
    "data file truncated": (
        lambda run: every(run / "1" / "opt_state", "d/*", half),
        r"opt_state/0/step cannot be read.*OUT_OF_RANGE: .*file .*/opt_state/.*not valid",
    ),
    "data file removed": (
        lambda run: every(run / "1" / "rest", "d/*", lambda file: file.unlink()),
        r"rest/stats cannot be read.*NOT_FOUND: .* of local file .*/rest/",
    ),
    "bad manifest": (
        lambda run: scramble(run / "1" / "params" / "manifest.ocdbt"),
        r"params/dense/bias cannot.*DATA_LOSS: .*/params/.*Error decoding manifest",
    ),
    "bad _METADATA": (
        lambda run: half(run / "1" / "opt_state" / "_METADATA"),
        r"file is damaged.*JSONDecodeError",
    ),
    "bad _sharding": (
        lambda run: scramble(run / "1" / "opt_state" / "_sharding"),
        r"^$",
    ),
    "no _METADATA": (
        lambda run: (run / "1" / "params" / "_METADATA").unlink(),
        r"The items \['params'\] have no file _METADATA",
    ),
    "item removed": (
        lambda run: shutil.rmtree(run / "1" / "opt_state"),
        r"items \['opt_state'\] are missing",
    ),
    "digests removed": (
        lambda run: shutil.rmtree(run / "1" / "digests"),
        r"items \['digests'\] are missing",
    ),
    "completion mark removed": (
        lambda run: (run / "1" / "_CHECKPOINT_METADATA").unlink(),
        r"holds no finished checkpoint",
    ),
}


def outcome(path):
    """What comes of loading: the error, or None if every bit is right."""
    if not opens(path):
        return "not even Orbax opens the run"
    try:
        got = load(path)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    bitwise(got, WANT)
    return None


def report(path):
    """What comes of every damage and of every failure, one at a time, on a saved checkpoint."""
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.stat().st_size)
    damages = {name: [] for name in DAMAGES}
    for name, damage in DAMAGES.items():
        rng = random.Random(name)
        for i in range(60):
            file = files[i % len(files)]
            data = file.read_bytes()
            damaged = damage(data, rng)
            file.write_bytes(damaged) if damaged is not None else file.unlink()
            damages[name].append(outcome(path))
            file.write_bytes(data)
    failures = {}
    for name, (damage, _) in FAILURES.items():
        copy = path.with_name("damaged")
        shutil.copytree(path, copy)
        damage(copy)
        failures[name] = outcome(copy)
        shutil.rmtree(copy)
    return {"damages": damages, "failures": failures, "intact": outcome(path)}


@pytest.fixture(scope="module")
def reported(saved, tmp_path_factory):
    """`report`, from a process of its own: a failed read leaves threads of Orbax's behind."""
    path = tmp_path_factory.mktemp("report")
    shutil.copytree(saved, path / "run")
    script = (
        "import json, os, pathlib, sys, test_faults as t\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "(path / 'report.json').write_text(json.dumps(t.report(path / 'run')))\n"
        "os._exit(0)"
    )
    command = [sys.executable, "-c", script, path]
    here = os.path.dirname(__file__)
    subprocess.run(command, check=True, cwd=here, env=environment(1), stderr=subprocess.DEVNULL)
    return json.loads((path / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_detected_or_touches_no_bit_that_is_loaded(damage, reported):
    """60 files each; what is not detected was in a file, or a part, that nothing depends on."""
    errors = [error for error in reported["damages"][damage] if error is not None]
    assert len(errors) >= 15
    for error in errors:
        if error != "not even Orbax opens the run":
            assert "report0/run" in error
            assert "damaged" in error or "no finished checkpoint" in error
    assert reported["intact"] is None


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_the_error_names_checkpoint_leaf_and_cause(failure, reported):
    error = reported["failures"][failure]
    if error is None:  # nothing is read of that file
        assert failure == "bad _sharding"
        return
    assert re.search(FAILURES[failure][1], error), error
    assert "report0/damaged" in error


@pytest.mark.many(2)
@pytest.mark.parametrize("item", ["params", "opt_state", "rest"])
def test_the_damaged_leaf_is_named(item, saved, monkeypatch):
    """A bit flipped in what was read, for each leaf: what bit rot in array data comes to."""
    for leaf in Stored(saved / "1").items[item]:
        with monkeypatch.context() as patch:
            flip_what_is_read(patch, item, leaf)
            name = "/".join((item, *leaf))
            with pytest.raises(
                DamagedError, match=rf"checkpoint .*/1: {name} is damaged: its bits"
            ):
                load(saved)


@pytest.mark.parametrize("item", ["params", "stamp"])
def test_damaged_digests_are_not_blamed_on_the_data(item, saved, monkeypatch):
    flip_what_is_read(monkeypatch, "digests", (item,))
    message = {"params": "the digests of item 'params' are damaged", "stamp": "different saves"}
    with pytest.raises(DamagedError, match=message[item]):
        load(saved)


def flip_what_is_read(patch, name, leaf):
    read = Item.read

    def flipping(item, targets):
        values = read(item, targets)
        if item.directory.name == name and leaf in values:
            value = np.asarray(values[leaf]).copy()
            value.reshape(-1).view(np.uint8)[0] ^= 1
            values[leaf] = value
        return values

    patch.setattr(Item, "read", flipping)


def test_without_digests_a_checkpoint_loads_unverified(tmp_path):
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, PARAMS, TX.init(PARAMS), digest=False)
        assert not (tmp_path / "1" / "digests").exists()
        params, *_ = checkpoint.resume(checkpointer, PARAMS, TX.init(PARAMS))
    bitwise(params, PARAMS)


# ---- kill -9 ------------------------------------------------------------------------------------


def check_newest(path):
    """The newest step that is listed is complete and right."""
    like = trainer.init(single_device())
    with ocp.training.Checkpointer(path) as checkpointer:
        if checkpointer.latest is None:
            return 0
        *state, rest = checkpoint.resume(checkpointer, *like, step_=0)
    bitwise(tuple(state), trainer.state_after(rest["step_"], single_device()))
    return rest["step_"]


@pytest.mark.slow
def test_killed_at_random_moments_the_newest_step_is_right_and_the_next_run_resumes(tmp_path):
    rng = random.Random(0)
    newest = 0
    for _ in range(int(os.environ.get("EMAOPT_KILLS", "4"))):
        lines = rng.randrange(2, 6)
        with subprocess.Popen(
            [*TRAINER, tmp_path / "run", "--steps", "10000"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(1),
        ) as process:
            for _ in range(lines):
                process.stdout.readline()
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        step = check_newest(tmp_path / "run")
        # a resumed run says so first; the step that was announced last may not be finished
        assert step >= newest + lines - (2 if newest else 1)
        newest = step


@pytest.mark.slow
def test_watch_beside_a_trainer_that_deletes_old_steps(tmp_path):
    command = [*TRAINER, tmp_path / "run", "--steps", "12"]
    like, _ = trainer.init(single_device())
    seen = []
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(1)
    ):
        for step, averaged in checkpoint.watch(tmp_path / "run", like, interval=0.02, timeout=60):
            state = trainer.state_after(step, single_device())
            bitwise(averaged, emaopt.average(*state))
            seen.append(step)
            if step == 12:
                break
    assert seen[-1] == 12
    assert len(seen) == len(set(seen))
    assert not (tmp_path / "run" / "1").exists()


# ---- several processes --------------------------------------------------------------------------


def trainers(run, steps, devices=2, processes=2):
    return together([*TRAINER, run, "--steps", str(steps)], environment(devices), processes)


@pytest.mark.slow
def test_two_processes_save_together_and_one_or_two_resume(tmp_path):
    run = tmp_path / "run"
    finish(trainers(run, 2), 180)
    assert check_newest(run) == 2
    (out,) = finish(trainers(run, 3, devices=1, processes=1), 180)
    assert "resumed 2\n" in out
    for out in finish(trainers(run, 4), 180):
        assert "resumed 3\n" in out
    assert check_newest(run) == 4


@pytest.mark.slow
def test_one_of_two_processes_killed_leaves_the_newest_step_right(tmp_path):
    survivor, killed = trainers(tmp_path / "run", 10000)
    assert any(line == "step 4\n" for line in killed.stdout)
    killed.kill()
    try:
        survivor.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        survivor.kill()
        survivor.communicate()
    killed.communicate()
    step = check_newest(tmp_path / "run")
    assert step >= 3
    for out in finish(trainers(tmp_path / "run", step + 1), 180):
        assert f"resumed {step}\n" in out
    assert check_newest(tmp_path / "run") == step + 1


def in_half(keys, leaf):
    """What Orbax asks for each leaf: how it is stored."""
    del leaf
    dtype = jnp.float16 if "shadow" in jax.tree_util.keystr(keys) else None
    return ocp.options.ArrayOptions.Saving.StorageOptions(dtype=dtype, chunk_byte_size=16)


@pytest.mark.parametrize("where", ["around the call", "of the checkpointer"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_a_context_that_casts_is_refused(where, dtype, tmp_path):
    context = ocp.Context()
    if dtype is None:
        context.array.saving.scoped_storage_options_creator = in_half
    else:
        context.array.saving.storage_options.dtype = dtype
    params = {"w": jnp.arange(12.0)}
    state = emaopt.ema(0.9).init(params)
    around = context if where == "around the call" else contextlib.nullcontext()
    given = {} if where == "around the call" else {"context": context}
    name, cast = ("opt_state/shadow/w", "float16") if dtype is None else ("params/w", "bfloat16")
    message = f"would cast '{name}' from float32 to {cast}, .*Leave it out of the context"
    with around, ocp.training.Checkpointer(tmp_path, **given) as checkpointer:
        with pytest.raises(ValueError, match=message):
            checkpoint.save(checkpointer, 1, params, state, epoch="one")
        assert checkpointer.latest is None


def test_a_context_that_does_not_cast_is_followed(tmp_path):
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = in_half
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = False
    params = {"w": jnp.arange(12, dtype=jnp.float16)}
    state = emaopt.ema(0.9, accumulator_dtype=jnp.float16).init(params)
    with context, ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, params, state, epoch="one")
    assert list(tmp_path.glob("1/params/w/.zarray"))
    equal(checkpoint.restore_averages(tmp_path, params), params)
    context.array.saving.storage_options.dtype = jnp.float16
    refused = pytest.raises(ValueError, match="'opt_state/step' from int32 to float16")
    with context, ocp.training.Checkpointer(tmp_path) as checkpointer, refused:
        checkpoint.save(checkpointer, 2, params, state, epoch="one")
