"""`emaopt ls`: what it shows of a checkpoint, and what it refuses."""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import jax.numpy as jnp
import optax
import pytest
from folders import CHECKPOINTS as GOLDEN
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint
from emaopt.__main__ import main
from emaopt._commands.ls import Row, load_tensorflow, table


PARAMS = {"conv": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "bias": jnp.ones(3, jnp.bfloat16)}
tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs the extra tf1")


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    """Runs with two steps, and one checkpoint of plain Orbax."""
    root = tmp_path_factory.mktemp("orbax")
    average = emaopt.ema(0.9, accumulator_dtype=emaopt.compensated(), ledger=True)
    for name, optimizer in {"adam": emaopt.adam(), "of optax": optax.scale_by_adam()}.items():
        opt_state = optax.chain(optimizer, average).init(PARAMS)
        with ocp.training.Checkpointer(str(root / name)) as checkpointer:
            for step in 2, 10:
                checkpoint.save(checkpointer, step, PARAMS, opt_state, seed=step)
    ocp.save(root / "plain", {"params": PARAMS, "trace": PARAMS, "epoch": 3})
    return root


def listed(capsys, path):
    main(["ls", str(path), "--json"])
    shown = json.loads(capsys.readouterr().out)
    return shown, {leaf["name"]: leaf for leaf in shown["leaves"]}


@tensorflow
@pytest.mark.parametrize("ending", ["", "/model.ckpt-20", "/model.ckpt-20.index"])
def test_ls_shows_the_variables_of_tf1(ending, capsys):
    shown, leaves = listed(capsys, f"{GOLDEN}/adam{ending}")
    assert len(leaves) == 11
    assert shown["bytes"] == 272 == sum(leaf["bytes"] for leaf in leaves.values())
    assert leaves["mlp/dense/kernel/Adam_1"] == {
        "name": "mlp/dense/kernel/Adam_1",
        "shape": [3, 4],
        "dtype": "float32",
        "role": "slot v of mlp/dense/kernel",
        "bytes": 48,
    }


@pytest.mark.parametrize(
    ("run", "roles"),
    [
        (
            "adam",
            {
                "params/conv/kernel": "average of conv/kernel",
                "params/bias": "average of bias",
                "opt_state/0/slots/m/conv/kernel": "slot m of conv/kernel",
                "opt_state/0/slots/v/bias": "slot v of bias",
                "opt_state/0/powers/beta2_power": "power",
                "opt_state/0/step": "global step",
                "opt_state/1/shadow/bias": "raw parameter of bias",
                "opt_state/1/step": "global step",
                "opt_state/1/emaopt_swapped": "mark of a swap",
                "opt_state/1/ledger/age": "ledger",
                "opt_state/1/residue/bias": "residue of bias",
                "digests/rest": "digests of rest",
                "rest/seed": "rest",
            },
        ),
        ("of optax", {"opt_state/0/mu/bias": "slot mu of bias", "opt_state/0/count": "rest"}),
        (
            "plain",
            {
                "state/params/conv/kernel": "variable",
                "state/trace/bias": "slot trace of bias",
                "state/epoch": "rest",
            },
        ),
    ],
)
def test_ls_shows_what_each_leaf_of_orbax_is(run, roles, orbax, capsys):
    _, leaves = listed(capsys, orbax / run)
    assert {name: leaves[name]["role"] for name in roles} == roles


def test_ls_takes_a_run_or_a_step_of_it(orbax, capsys, monkeypatch):
    monkeypatch.chdir(orbax)
    newest, of_newest = listed(capsys, "adam")
    assert listed(capsys, "adam/10")[0]["leaves"] == newest["leaves"]
    assert newest["checkpoint"] == str(orbax / "adam/10")
    assert of_newest["params/bias"]["dtype"] == "float32"
    assert of_newest["opt_state/1/shadow/bias"]["bytes"] == 6


@pytest.mark.slow
@tensorflow
def test_ls_in_a_pipe_is_plain_quiet_and_whole():
    checkpoint = str(GOLDEN / "adam" / "model.ckpt-20")
    command = [sys.executable, "-m", "emaopt", "ls", checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["name", "shape", "dtype", "bytes", "role"]
    row = "mlp/dense/kernel/ExponentialMovingAverage  [3,4]  float32     48  "
    assert lines[-3] == row + "average of mlp/dense/kernel"
    assert lines[-1] == f"11 leaves, 272 bytes: {checkpoint}"


def test_what_tensorflow_prints_when_it_is_loaded_is_not_shown(tmp_path, monkeypatch, capfd):
    (tmp_path / "tensorflow.py").write_text("import os; os.write(2, b'no GPU')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # what was there, or nothing, comes back
    del sys.modules["tensorflow"]
    load_tensorflow()
    os.write(2, b"shown")
    assert capfd.readouterr().err == "shown"


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_the_table_fits_the_terminal(width):
    long = Row("a/" + "x" * 60 + "/kernel", (3, 4), "float32", "average of a" + "x" * 60, 48)
    lines = table([long, Row("b", (), "int64", "variable", 8)], width)
    longest = max(map(len, lines))
    assert longest <= width if width else longest > 120
    assert ("…" in lines[1]) == (width is not None)
    assert "[3,4]  float32     48  " in lines[1]


def test_a_reader_that_has_seen_enough_is_no_error(orbax):
    read, write_end = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "emaopt", "ls", str(orbax / "adam")]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("", "emaopt ls: the following arguments are required: CHECKPOINT"),
        ("nowhere", "nowhere does not exist"),
        ("golden/model.ckpt-21", "/golden/model.ckpt-21 does not exist"),
        ("golden/model.ckpt-21", "golden has checkpoint, model.ckpt-20.data-00000-of-00001, m"),
        ("empty", "/empty holds no finished checkpoint, neither of Orbax nor of TF1"),
        pytest.param("file", "/file' is no checkpoint of TF1", marks=tensorflow),
    ],
)
def test_what_is_wrong_gets_one_line(path, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no checkpoint")
    (tmp_path / "golden").symlink_to(GOLDEN / "adam")
    with pytest.raises(SystemExit) as exit_:
        main(["ls", *path.split()])
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err
    assert shown.err.endswith(" --help.\n")
    assert shown.err.count("\n") == 1


@pytest.fixture
def without_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.delitem(sys.modules, "emaopt.tf1", raising=False)


@pytest.mark.usefixtures("without_tensorflow")
def test_without_tensorflow_the_import_says_what_to_install():
    with pytest.raises(ModuleNotFoundError, match=r'TensorFlow: pip install "emaopt\[tf1\]"'):
        importlib.import_module("emaopt.tf1")


@pytest.mark.usefixtures("without_tensorflow")
def test_without_tensorflow_ls_says_what_to_install(capsys):
    with pytest.raises(SystemExit):
        main(["ls", str(GOLDEN / "adam")])
    assert 'emaopt ls: emaopt.tf1 needs TensorFlow: pip install "emaopt[tf1]"' in (
        capsys.readouterr().err
    )
