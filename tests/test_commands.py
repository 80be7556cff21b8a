"""`emaopt ls` and `emaopt convert`: what they show, what they write, and what they refuse."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint, tf1
from emaopt.__main__ import main
from emaopt._tree import key_paths
from emaopt.listing import Leaf, table


tf = pytest.importorskip("tensorflow")


GOLDEN = pathlib.Path(__file__).parent / "golden" / "checkpoints"
PARAMS = {"conv": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "bias": jnp.ones(3, jnp.bfloat16)}
OPTIMIZERS = {
    "adam": emaopt.adam(),
    "gradient_descent": emaopt.gradient_descent(0.1),
    "of optax": optax.scale_by_adam(),
}


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    """Runs of Orbax with two steps: by emaopt, and one by plain Orbax without items."""
    root = tmp_path_factory.mktemp("orbax")
    for name, optimizer in OPTIMIZERS.items():
        tx = optax.chain(optimizer, emaopt.ema(0.9))
        params, opt_state = PARAMS, tx.init(PARAMS)
        params = {"conv": {"kernel": params["conv"]["kernel"] + 1}, "bias": params["bias"] * 2}
        with ocp.training.Checkpointer(str(root / name)) as checkpointer:
            for step in 2, 10:
                checkpoint.save(checkpointer, step, params, opt_state, seed=step)
    tx = optax.chain(emaopt.adam(), emaopt.ema(0.9))
    adam, ema = tx.init(PARAMS)
    with ocp.training.Checkpointer(str(root / "steps")) as checkpointer:
        checkpoint.save(checkpointer, 1, PARAMS, (adam._replace(step=jnp.array(4)), ema))
    ocp.save(root / "words", {"word": "a"})
    ocp.save(root / "plain", {"params": PARAMS, "trace": PARAMS, "epoch": 3})
    return root


def write(prefix, **values):
    """A checkpoint of TF1."""
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=[tf.constant(value) for value in values.values()],
    )


def stored(path):
    """All variables of a checkpoint of TF1: dtype, shape and bits."""
    reader = tf.train.load_checkpoint(str(path))
    values = {n: np.asarray(reader.get_tensor(n)) for n in reader.get_variable_to_shape_map()}
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in values.items()}


def bits(tree):
    return {
        "/".join(path): (x.dtype, x.shape, np.asarray(x).tobytes())
        for path, x in zip(key_paths(tree), jax.tree.leaves(tree), strict=True)
    }


def listed(capsys, path):
    main(["ls", str(path), "--json"])
    shown = json.loads(capsys.readouterr().out)
    return shown, {leaf["name"]: leaf for leaf in shown["leaves"]}


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
    assert newest["checkpoint"] == str(orbax / "adam")
    assert of_newest["params/bias"]["dtype"] == "float32"
    assert of_newest["opt_state/1/shadow/bias"]["bytes"] == 6


def test_ls_in_a_pipe_is_plain_quiet_and_whole():
    command = [sys.executable, "-m", "emaopt", "ls", str(GOLDEN / "adam" / "model.ckpt-20")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["name", "shape", "dtype", "bytes", "role"]
    row = "mlp/dense/kernel/ExponentialMovingAverage  [3,4]  float32     48  "
    assert lines[-3] == row + "average of mlp/dense/kernel"
    assert lines[-1] == "11 leaves, 272 bytes"


@pytest.mark.parametrize("width", [60, 80, 120, None])
def test_the_table_fits_the_terminal(width):
    long = Leaf("a/" + "x" * 60 + "/kernel", (3, 4), "float32", "average of a" + "x" * 60, 48)
    lines = table([long, Leaf("b", (), "int64", "variable", 8)], width)
    longest = max(map(len, lines))
    assert longest <= width if width else longest > 120
    assert ("…" in lines[1]) == (width is not None)
    assert "[3,4]  float32     48  " in lines[1]


@pytest.mark.parametrize(
    "run",
    ["adam", "rmsprop_centered_swapped", "float64", "bfloat16", "other_name", "no_average", "slim"],
)
def test_tf1_to_orbax_and_back_is_the_same(run, tmp_path, capsys):
    main(["convert", str(GOLDEN / run), str(tmp_path / "orbax")])
    main(["convert", str(tmp_path / "orbax"), str(tmp_path / "back" / "model.ckpt-1")])
    assert stored(tmp_path / "back") == stored(GOLDEN / run)
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "checkpoint",
        "model.ckpt-1.data-00000-of-00001",
        "model.ckpt-1.index",
    ]
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""


def test_every_dtype_and_name_survives(tmp_path):
    dtypes = ["float16", "bfloat16", "float64", "complex64", "bool", "int8", "uint16", "int64"]
    values = {f"{d}/w.1": np.arange(3).astype(jnp.dtype(d)) for d in dtypes}
    names = ["/from/root", "a", "a/b", "a/b/ExponentialMovingAverage", "b//c", "w/Adam", "shadow"]
    values |= {name: np.float32(i) for i, name in enumerate(names)}
    write(tmp_path / "tf1", **values)
    main(["convert", str(tmp_path / "tf1"), str(tmp_path / "orbax")])
    main(["convert", str(tmp_path / "orbax"), str(tmp_path / "back")])
    assert stored(tmp_path / "back") == stored(tmp_path / "tf1")
    assert len(stored(tmp_path / "tf1")) == 15


def test_what_was_converted_is_read_by_orbax_and_by_emaopt(tmp_path, capsys):
    main(["convert", str(GOLDEN / "adam"), str(tmp_path / "all")])
    main(["convert", "--averages", str(GOLDEN / "adam"), str(tmp_path / "averages")])
    in_tf1 = stored(GOLDEN / "adam")
    like = {"mlp": {"dense": {"bias": np.zeros(4, "f4"), "kernel": np.zeros((3, 4), "f4")}}}
    params = bits(ocp.load(tmp_path / "all", like, checkpointable_name="params"))
    averages = bits(ocp.load(tmp_path / "averages", like, checkpointable_name="params"))
    assert params == {name: in_tf1[name] for name in params}
    assert averages == {name: in_tf1[emaopt.average_name(name)] for name in params} != params
    assert bits(checkpoint.restore_averages(tmp_path / "all", like)) == averages
    assert set(ocp.checkpointables_metadata(tmp_path / "averages").metadata) == {
        "params",
        "digests",
    }
    _, leaves = listed(capsys, tmp_path / "all")
    assert leaves["tf1/other/mlp/dense/bias/Adam_1"]["role"] == "slot v of mlp/dense/bias"
    assert leaves["tf1/shadow/mlp/dense/bias"]["role"] == "average of mlp/dense/bias"
    assert leaves["params/mlp/dense/bias"]["role"] == "variable"


def test_averages_of_some_variables_go_with_the_other_variables(tmp_path):
    main(["convert", "--averages", str(GOLDEN / "slim"), str(tmp_path / "orbax")])
    main(["convert", str(tmp_path / "orbax"), str(tmp_path / "back")])
    in_tf1, back = stored(GOLDEN / "slim"), stored(tmp_path / "back")
    mean, bias = "Net/Stem/BatchNorm/moving_mean", "Net/Stem/BatchNorm/beta"
    assert back[mean] == in_tf1[mean]
    assert back[bias] == in_tf1[emaopt.average_name(bias)] != in_tf1[bias]
    assert not [name for name in back if "Momentum" in name or "Average" in name]


@pytest.mark.parametrize("run", ["adam", "gradient_descent", "of optax"])
def test_a_checkpoint_of_emaopt_becomes_what_tf1_save_writes(run, orbax, tmp_path):
    tx = optax.chain(OPTIMIZERS[run], emaopt.ema(0.9))
    with ocp.training.Checkpointer(str(orbax / run)) as checkpointer:
        params, opt_state, _ = checkpoint.resume(checkpointer, PARAMS, tx.init(PARAMS), seed=0)
    tf1.save(tmp_path / "saved", params, opt_state)
    main(["convert", str(orbax / run), str(tmp_path / "all")])
    main(["convert", "--averages", str(orbax / run), str(tmp_path / "averages")])
    saved, converted = stored(tmp_path / "saved"), stored(tmp_path / "all")
    of_tf1 = {name for name in saved if not name.startswith("0/")}  # Optax's own
    assert {name: converted[name] for name in of_tf1} == {name: saved[name] for name in of_tf1}
    assert stored(tmp_path / "averages") == {
        name: saved[emaopt.average_name(name)] for name in ("bias", "conv/kernel")
    }
    assert saved["bias"] != saved[emaopt.average_name("bias")]


def test_a_large_checkpoint_is_written_in_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("emaopt.convert.AT_ONCE", 40)
    main(["convert", str(GOLDEN / "adam"), str(tmp_path / "orbax")])
    main(["convert", str(tmp_path / "orbax"), str(tmp_path / "back")])
    assert len(list(tmp_path.glob("back.data-*"))) > 3
    assert stored(tmp_path / "back") == stored(GOLDEN / "adam")
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("ls", "emaopt ls: the following arguments are required: CHECKPOINT"),
        ("ls nowhere", "nowhere does not exist"),
        ("ls golden/model.ckpt-21", "/golden/model.ckpt-21 does not exist"),
        ("ls golden/model.ckpt-21", "golden has checkpoint, model.ckpt-20.data-00000-of-00001, m"),
        ("ls empty", "/empty holds no finished checkpoint, neither of Orbax nor of TF1"),
        ("ls file", "/file' is no checkpoint of TF1"),
        ("convert golden", "emaopt convert: the following arguments are required: DESTINATION"),
        ("convert nowhere new", "nowhere does not exist"),
        ("convert empty new", "/empty holds no finished checkpoint"),
        ("convert golden empty", "/empty exists. Pass another DESTINATION"),
        ("convert {orbax}/adam golden/model.ckpt-20", "/golden/model.ckpt-20 exists"),
        ("convert {orbax}/adam file/model.ckpt-20", "/file/model.ckpt-20 cannot be written: "),
        ("convert --averages no_average new", "SOURCE has no averages. Leave out --averages"),
        ("convert --averages {orbax}/plain new/model.ckpt-1", "/plain holds no average"),
        ("convert {orbax}/words new/model.ckpt-1", "/words holds no arrays"),
        ("convert strings new", "/strings holds strings, which Orbax cannot save: words"),
        ("convert {orbax}/steps new/model.ckpt-1", "TF1 has one global step: opt_state/0/step is"),
    ],
)
def test_what_is_wrong_gets_one_line(arguments, told, orbax, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no checkpoint")
    (tmp_path / "golden").symlink_to(GOLDEN / "adam")
    (tmp_path / "no_average").symlink_to(GOLDEN / "no_average")
    write(tmp_path / "strings", words=np.array([b"a"], object))
    with pytest.raises(SystemExit) as exit_:
        main(arguments.format(orbax=orbax).split())
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err
    assert shown.err.endswith(" --help.\n")
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_reader_that_has_seen_enough_is_no_error(orbax):
    read, write_end = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "emaopt", "ls", str(orbax / "adam")]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("source", [GOLDEN / "adam", "adam"])
def test_an_interrupt_leaves_nothing_behind(source, orbax, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("emaopt.convert.digests", interrupted)
    monkeypatch.setattr("emaopt.convert._write", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(orbax / source), str(tmp_path / "new")])
    assert exit_.value.code == 130
    assert list(tmp_path.iterdir()) == []


def test_the_value_of_nnx_is_no_part_of_a_name_and_strings_are_left_out(tmp_path):
    leaf = {"w": {"value": jnp.ones(2)}}
    items = {
        "params": leaf,
        "opt_state": {"shadow": leaf, "step": jnp.array(3)},
        "rest": {"s": "a"},
    }
    ocp.save_checkpointables(tmp_path / "nnx", items)
    main(["convert", str(tmp_path / "nnx"), str(tmp_path / "back")])
    assert set(stored(tmp_path / "back")) == {"w", emaopt.average_name("w"), "global_step"}


@pytest.mark.parametrize("missing", ["tensorflow", "tqdm"])
def test_without_a_package_the_extra_is_named(missing, monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "emaopt.convert", raising=False)
    monkeypatch.delattr(emaopt, "convert", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(GOLDEN / "adam"), str(tmp_path / "new")])
    assert exit_.value.code == 2
    assert 'pip install "emaopt[tf1]"' in capsys.readouterr().err
