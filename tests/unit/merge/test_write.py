"""How a merged checkpoint is written: killed half way, from damaged data, by two processes."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import merger
import numpy as np
import pytest
from compare import bitwise
from orbax.checkpoint import v1 as ocp
from processes import finish, together
from trainer import environment

import emaopt
from emaopt import checkpoint, posthoc
from emaopt.__main__ import main
from emaopt._commands import merge as command
from emaopt.merge import Run, soup
from emaopt.merge._blocks import Form, block_shape, blocks
from emaopt.merge._orbax import OrbaxTree


def save(run, steps=(1, 2), size=6):
    for step in steps:
        ocp.save(run / str(step), {"params": {"w": np.full(size, float(step)), "v": np.ones(3)}})
    return run


@pytest.mark.parametrize(
    ("chunk", "block"),
    [
        ((1, 1, 1), (1, 2, 8)),  # every element can be read alone
        ((4, 6, 8), (4, 6, 8)),  # a chunk that is too large
        ((1, 3, 8), (1, 3, 8)),
        ((1, 1, 2), (1, 2, 8)),
        ((2, 1, 4), (2, 1, 8)),
    ],
)
def test_blocks_are_whole_chunks_and_cover_the_array(chunk, block, monkeypatch):
    monkeypatch.setattr("emaopt.merge._blocks.ELEMENTS_AT_ONCE", 16)
    shape = (4, 6, 8)
    assert block_shape(Form(shape, np.dtype(np.float32)), chunk) == block
    seen = np.zeros(shape, int)
    for index in blocks(shape, block):
        seen[index] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_sums_are_exact_to_the_last_place(dtype, tmp_path):
    noise = np.random.default_rng(0)
    values = [noise.standard_normal(500).astype(jnp.dtype(dtype)) for _ in range(5)]
    for step, value in enumerate(values):
        ocp.save(tmp_path / "run" / str(step), {"params": {"w": value}})
    run = Run.open(tmp_path / "run")
    target = posthoc.anneal([0.9, 0.7, 0.4, 0.1], at=4, on=range(5))
    run.plan(target).write(tmp_path / "out")
    made = ocp.load(tmp_path / "out", checkpointable_name="params")["w"]
    exact = sum(
        np.longdouble(f) * x.astype(np.longdouble) for f, x in zip(target, values, strict=True)
    )
    eps = float(jnp.finfo(dtype).eps)
    assert made.dtype == jnp.dtype(dtype)
    off = np.abs(made.astype(np.longdouble) - exact)
    assert (off <= eps * np.abs(exact) + float(jnp.finfo(dtype).smallest_subnormal)).all()


@pytest.mark.slow
def test_damage_of_what_was_read_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    tx = emaopt.ema(emaopt.power(1), ledger=True)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        params, state = {"w": jnp.ones(4)}, tx.init({"w": jnp.ones(4)})
        for step in (1, 2):
            _, state = tx.update({"w": jnp.ones(4)}, state, params)
            checkpoint.save(checkpointer, step, params, state)
    plan = Run.open(tmp_path / "run").plan(1.0)
    tree = plan.parts[0].terms[0].tree
    assert isinstance(tree, OrbaxTree)
    read = tree.stored.read
    tree.stored.read = lambda paths: {p: x + (x > 0) for p, x in read(paths).items()}
    with pytest.raises(checkpoint.DamagedError, match="the digests of item 'params' are damaged"):
        plan.write(tmp_path / "out")
    tree.stored.read = read
    monkeypatch.setattr("emaopt.checkpoint._blocks.digest_of_block", lambda *_: 1)
    with pytest.raises(checkpoint.DamagedError, match="params/w is damaged: its bits are not"):
        plan.write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_data_that_is_cut_off_is_named(tmp_path):
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        save(tmp_path / "run")
    plan = Run.open(tmp_path / "run").plan(posthoc.anneal([0.5], 2, on=[1, 2]))
    (chunk,) = (tmp_path / "run" / "1").glob("**/params.w/c/0")
    chunk.write_bytes(b"x")
    with pytest.raises(checkpoint.DamagedError, match=r"run/1: .*params/w cannot be read"):
        plan.write(tmp_path / "out")
    for file in (tmp_path / "run" / "1").glob("**/params.w/zarr.json"):
        file.write_text("{")
    with pytest.raises(checkpoint.DamagedError, match=r"run/1: .*params/w cannot be read"):
        Run.open(tmp_path / "run").plan(posthoc.anneal([0.5], 2, on=[1, 2])).write(tmp_path / "o")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    plan = soup([save(tmp_path / "run")])
    usage = type("usage", (), {"free": 3})
    monkeypatch.setattr("emaopt.merge._plan.shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"out needs 0 MB, and 0 MB are free. Pass a path on another"):
        plan.write(tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("emaopt.merge._write.ocp.save_checkpointables", lambda *_, **__: 1 / 0)
    with pytest.raises(OSError, match=r"out cannot be written. \(ZeroDivisionError: division"):
        plan.write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_is_not_written_to_through_a_link(tmp_path):
    save(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    plan = soup([tmp_path / "run" / "1", tmp_path / "run" / "2"])
    with pytest.raises(ValueError, match=r"run/3 would be taken for a step of the run .*/run\. Pa"):
        plan.write(tmp_path / "link" / "3")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2"]


def test_the_c_library_is_asked_to_give_back_what_is_freed(monkeypatch):
    called = []
    library = SimpleNamespace(mallopt=lambda *arguments: called.append(arguments))
    for found in (library, object()):  # another C library has no such function
        monkeypatch.setattr("ctypes.CDLL", lambda name, found=found: found)
        command._give_back_memory()
    assert called == [(-3, 2**20)]


KILLED = """
import os, signal, sys
import emaopt.merge._write as w
put = w.OrbaxWriter.put
def dies(self, group):
    for wait in put(self, group): wait()
    os.kill(os.getpid(), signal.SIGKILL)
w.OrbaxWriter.put = dies
from emaopt.__main__ import main
main(["merge", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_killed_half_way_it_leaves_nothing_that_looks_finished(tmp_path, capsys):
    save(tmp_path / "run")
    arguments = [str(tmp_path / "run"), "--mean", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("out*")
    assert left.name.startswith("out.tmp")
    assert not list(left.glob("**/_CHECKPOINT_METADATA"))
    with pytest.raises(SystemExit):
        main(["ls", str(left)])
    capsys.readouterr()
    main(["merge", *arguments])
    assert f"removed {left}, which an interrupted command left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def merge_together(out, *runs):
    command = [sys.executable, merger.__file__, out, ":".join(map(str, runs))]
    # Gloo says a line of its own first
    return [out.splitlines()[-1] for out in finish(together(command, environment(1)), 120)]


@pytest.mark.slow
def test_two_processes_each_add_up_their_share(tmp_path):
    ones = jnp.ones((1200, 1000))
    for i in (1, 2):
        with ocp.training.Checkpointer(tmp_path / str(i)) as checkpointer:
            params = {"a": [ones, ones, ones, ones], "n": jnp.arange(3), "b": jnp.full(5000, i / 1)}
            checkpoint.save(checkpointer, 7, params, emaopt.ema(0.9).init(params))
    bytes_ = [int(out) for out in merge_together(tmp_path / "out", tmp_path / "1", tmp_path / "2")]
    assert min(bytes_) > sum(bytes_) / 4
    made = checkpoint.restore_params(tmp_path / "out", like=params)
    bitwise(made, {**params, "b": jnp.full(5000, 1.5)})
    bitwise(ocp.load(tmp_path / "out", made, checkpointable_name="params"), made)
    (kept,) = merge_together(tmp_path / "2" / "7", tmp_path / "1", tmp_path / "2")[:1]
    assert kept.startswith("FileExistsError: ")
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    said = merge_together(tmp_path / "out2.safetensors", tmp_path / "1", tmp_path / "2")
    assert all("is one file, and there are 2 processes of JAX" in each for each in said)


@pytest.mark.slow
def test_what_one_of_two_processes_finds_stops_both(tmp_path):
    tree = {f"w{i}": np.full((3000, 1000), float(i), np.float32) for i in range(2)}
    ocp.save(tmp_path / "1", {"params": tree})
    tree["w1"][5, 5] = np.nan
    ocp.save(tmp_path / "2", {"params": tree})
    said = sorted(merge_together(tmp_path / "out", tmp_path / "1", tmp_path / "2"))
    assert "RuntimeError: process" in said[0]
    assert "could not go on. ValueError: " in said[0]
    assert "2 is not finite at leaf 'w1'" in said[1]
    assert [path.name for path in tmp_path.glob("out*")] == []
