"""`emaopt convert`: what it writes, and what it refuses."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from folders import CHECKPOINTS as GOLDEN
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint
from emaopt.__main__ import main
from emaopt._commands import paths
from emaopt._commands.convert import _writing
from emaopt._files import _is_running
from emaopt._tree.paths import key_paths


tf = pytest.importorskip("tensorflow")

from emaopt import tf1  # noqa: E402


PARAMS = {"conv": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "bias": jnp.ones(3, jnp.bfloat16)}
EXACT = emaopt.compensated(jnp.bfloat16)
CHAINS = {
    "adam": optax.chain(emaopt.adam(), emaopt.ema(0.9)),
    "gradient_descent": optax.chain(emaopt.gradient_descent(0.1), emaopt.ema(0.9)),
    "of optax": optax.chain(optax.scale_by_adam(), emaopt.ema(0.9)),
    "ledger": optax.chain(emaopt.adam(), emaopt.ema(0.9, accumulator_dtype=EXACT, ledger=True)),
}
INTEGER = {"w": jnp.ones(2), "n": jnp.array(4)}


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    """Runs of Orbax with two steps: by emaopt, and single checkpoints of plain Orbax."""
    root = tmp_path_factory.mktemp("orbax")
    for name, tx in CHAINS.items():
        params, opt_state = PARAMS, tx.init(PARAMS)
        params = {"conv": {"kernel": params["conv"]["kernel"] + 1}, "bias": params["bias"] * 2}
        with ocp.training.Checkpointer(str(root / name)) as checkpointer:
            for step in 2, 10:
                checkpoint.save(checkpointer, step, params, opt_state, seed=step)
    adam, ema = CHAINS["adam"].init(PARAMS)
    with ocp.training.Checkpointer(str(root / "steps")) as checkpointer:
        checkpoint.save(checkpointer, 1, PARAMS, (adam._replace(step=jnp.array(4)), ema))
    for name, params, opt_state in (
        ("two", PARAMS, {"fast": ema, "slow": ema}),
        ("none", PARAMS, adam),
        ("integer", INTEGER, emaopt.ema(0.9).init(INTEGER)),
    ):
        ocp.save_checkpointables(root / name, {"params": params, "opt_state": opt_state})
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


@pytest.mark.many(2)
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


NAME = "ExponentialMovingAverage"


@pytest.mark.many(1)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("run", "average_name"), [*((run, NAME) for run in CHAINS), ("adam", "{}/of/{}")]
)
def test_a_checkpoint_of_emaopt_becomes_what_tf1_save_writes(
    run, average_name, swapped, orbax, tmp_path
):
    with ocp.training.Checkpointer(str(orbax / run)) as checkpointer:
        like = PARAMS, CHAINS[run].init(PARAMS)
        params, opt_state, _ = checkpoint.resume(checkpointer, *like, seed=0)
    form = {"swapped": swapped, "average_name": average_name}
    tf1.save(tmp_path / "saved", params, opt_state, **form)
    options = ["--average-name", average_name, *["--swapped"] * swapped]
    main(["convert", *options, str(orbax / run), str(tmp_path / "all")])
    saved, converted = stored(tmp_path / "saved"), stored(tmp_path / "all")
    of_tf1 = {name for name in saved if not name.startswith("0/")}  # Optax's own
    assert {name: converted[name] for name in of_tf1} == {name: saved[name] for name in of_tf1}
    main(["convert", "--averages", str(orbax / run), str(tmp_path / "averages")])
    averages = {name: average_name.replace("{}", name) for name in ("bias", "conv/kernel")}
    if average_name == NAME:
        averages = {name: emaopt.average_name(name) for name in averages}
    assert saved["bias"] != saved[averages["bias"]]
    assert stored(tmp_path / "averages") == {
        name: saved[name if swapped else average] for name, average in averages.items()
    }


def test_an_average_of_16_bits_is_written_with_its_residue(tmp_path):
    params = {"w": jnp.linspace(1.0, 2.0, 50)}
    opt_state = emaopt.ema(0.9, accumulator_dtype=EXACT).init(params)
    ocp.save_checkpointables(tmp_path / "x", {"params": params, "opt_state": opt_state})
    main(["convert", "--averages", str(tmp_path / "x"), str(tmp_path / "averages")])
    wanted = np.asarray(emaopt.average(params, opt_state)["w"])
    assert stored(tmp_path / "averages") == {"w": (wanted.dtype, wanted.shape, wanted.tobytes())}


def test_the_average_of_an_integer_is_its_variable(orbax, tmp_path):
    main(["convert", str(orbax / "integer"), str(tmp_path / "tf1")])
    assert set(stored(tmp_path / "tf1")) == {"w", "n", "global_step", emaopt.average_name("w")}


@pytest.mark.parametrize("step", [True, False])
def test_what_a_swapping_saver_wrote_gets_the_right_roles(step, tmp_path, capsys):
    names = {"w": 1, "w/ExponentialMovingAverage": 2, "alone": 3, "w/Adam": 4}
    names |= {
        "w/more": 5,
        "w/more/ExponentialMovingAverage": 6,
        "w/late/ExponentialMovingAverage": 8,
    }
    names |= {"global_step": 7} if step else {}
    write(tmp_path / "tf1", **{name: np.float32(value) for name, value in names.items()})
    for options, destination in ([], "all"), (["--averages"], "averages"):
        arguments = ["--swapped", *options, tmp_path / "tf1", tmp_path / destination]
        main(["convert", *map(str, arguments)])
    main(["convert", "--swapped", str(tmp_path / "all"), str(tmp_path / "back")])
    assert stored(tmp_path / "back") == stored(tmp_path / "tf1")
    like = {"w": np.float32(0), "alone": np.float32(0)}
    assert ocp.load(tmp_path / "all", like, checkpointable_name="params") == {"w": 2, "alone": 3}
    averages = ocp.load(tmp_path / "averages", like, checkpointable_name="params")
    assert averages == {"w": 1, "alone": 3}
    roles = [leaf["role"] for leaf in listed(capsys, tmp_path / "all")[1].values()]
    assert roles.count("average of w") == 1
    if step:
        assert checkpoint.restore_averages(tmp_path / "all", like) == averages


def test_an_average_in_a_scope_keeps_its_name(tmp_path):
    write(tmp_path / "tf1", **{"w": 1.0, "train/w/ExponentialMovingAverage": 2.0, "global_step": 3})
    main(["convert", str(tmp_path / "tf1"), str(tmp_path / "all")])
    main(["convert", str(tmp_path / "all"), str(tmp_path / "back")])
    assert stored(tmp_path / "back") == stored(tmp_path / "tf1")
    like = {"w": np.zeros((), "f4")}
    with pytest.raises(ValueError, match="holds no average"):
        checkpoint.restore_averages(tmp_path / "all", like)
    name = "train/{}/ExponentialMovingAverage"
    arguments = ["--average-name", name, str(tmp_path / "tf1"), str(tmp_path / "named")]
    main(["convert", *arguments])
    assert checkpoint.restore_averages(tmp_path / "named", like) == {"w": 2}


@pytest.mark.parametrize("run", ["adam_swapped", "other_name"])
def test_the_form_of_tf1_is_kept_on_the_way_back(run, tmp_path):
    options = {"adam_swapped": ["--swapped"], "other_name": ["--average-name", "slow"]}[run]
    main(["convert", *options, str(GOLDEN / run), str(tmp_path / "orbax")])
    main(["convert", *options, str(tmp_path / "orbax"), str(tmp_path / "back")])
    assert stored(tmp_path / "back") == stored(GOLDEN / run)
    averages = {
        "adam_swapped": {"mlp": {"dense": {"bias": "mlp/dense/bias"}}},
        "other_name": {"w": "w/slow"},
    }[run]
    in_tf1 = stored(GOLDEN / run)
    like = jax.tree.map(lambda name: np.zeros(in_tf1[name][1], "f4"), averages)
    found = checkpoint.restore_averages(tmp_path / "orbax", like)
    assert list(bits(found).values()) == [in_tf1[name] for name in jax.tree.leaves(averages)]


def test_a_large_checkpoint_is_written_in_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("emaopt._commands.convert.BYTES_AT_ONCE", 40)
    main(["convert", str(GOLDEN / "adam"), str(tmp_path / "orbax")])
    main(["convert", str(tmp_path / "orbax"), str(tmp_path / "back")])
    assert len(list(tmp_path.glob("back.data-*"))) > 3
    assert stored(tmp_path / "back") == stored(GOLDEN / "adam")
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("convert golden", "emaopt convert: the following arguments are required: DESTINATION"),
        ("convert nowhere new", "nowhere does not exist"),
        ("convert empty new", "/empty holds no finished checkpoint"),
        ("convert golden empty", "/empty exists. Pass another DESTINATION"),
        (
            "convert {orbax}/adam golden/model.ckpt-20",
            "/golden/model.ckpt-20.",
        ),
        ("convert {orbax}/adam half/m", "/half/m.data-00000-of-00001 exists. Pass another DEST"),
        (
            "convert {orbax}/adam garbage/m",
            "/garbage/checkpoint is not the file in which TF1 names",
        ),
        ("convert {orbax}/adam new/m.index", "/new/m.index' ends like a file of a checkpoint"),
        ("convert {orbax}/adam new/m.meta", "ends like a file of a checkpoint"),
        ("convert {orbax}/adam new/m.data-00000-of-00001", "ends like a file of a checkpoint"),
        ("convert {orbax}/adam new/[1]/m", "takes that for a pattern and could not read"),
        ("convert golden new/[1]", "/new/[1]' has a *, ? or [ in it. Orbax takes that for"),
        ("convert tensors.safetensors new", "/tensors.safetensors is of .safetensors. Pass"),
        ("convert {orbax}/adam file/model.ckpt-20", "/file/model.ckpt-20 cannot be written: "),
        ("convert --averages no_average new", "SOURCE has no averages named Exponen"),
        ("convert --swapped no_average new", "another --average-name, or leave out --averages"),
        ("convert --average-name slow golden new", "SOURCE has no averages named slow. Pass"),
        ("convert --averages scope new", "Pass --average-name 'train/{}/ExponentialMovingAv"),
        ("convert --swapped {orbax}/none new/model.ckpt-1", "SOURCE has no averages named"),
        ("convert --swapped {orbax}/two new/model.ckpt-1", "bias has several averages. Leave out"),
        (
            "convert --average-name Adam {orbax}/adam new/model.ckpt-1",
            "--average-name Adam: bias/Adam, conv/kernel/Adam is there already",
        ),
        ("convert --averages {orbax}/plain new/model.ckpt-1", "/plain holds no average"),
        ("convert {orbax}/words new/model.ckpt-1", "/words holds no arrays"),
        ("convert strings new", "/strings holds strings, which Orbax cannot save: words"),
        ("convert {orbax}/steps new/model.ckpt-1", "TF1 has one global step: opt_state/0/step is"),
    ],
)
def test_a_mistake_of_convert_prints_one_line(
    arguments, told, orbax, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no checkpoint")
    (tmp_path / "tensors.safetensors").write_text("")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/m.data-00000-of-00001").write_text("precious")
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage/checkpoint").write_text("precious")
    (tmp_path / "golden").symlink_to(GOLDEN / "adam")
    (tmp_path / "no_average").symlink_to(GOLDEN / "no_average")
    write(tmp_path / "strings", words=np.array([b"a"], object))
    write(tmp_path / "scope", **{"a/w": 1.0, "train/a/w/ExponentialMovingAverage": 2.0})
    with pytest.raises(SystemExit) as exit_:
        main(arguments.format(orbax=orbax).split())
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err
    assert shown.err.endswith(" --help.\n")
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "half/m.data-00000-of-00001").read_text() == "precious"
    assert (tmp_path / "garbage/checkpoint").read_text() == "precious"


@pytest.mark.parametrize("source", [GOLDEN / "adam", "adam"])
def test_an_interrupt_leaves_nothing_behind(source, orbax, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("emaopt._commands.convert.digests", interrupted)
    monkeypatch.setattr("emaopt.tf1._files._save", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(orbax / source), str(tmp_path / "new")])
    assert exit_.value.code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", [GOLDEN / "adam", "adam"])
def test_what_a_killed_command_left_is_removed_by_the_next_one(source, orbax, tmp_path, capsys):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    for process in (killed.pid, os.getpid(), os.getppid(), 10**30):
        (tmp_path / f"new.tmp{process}").mkdir()
        (tmp_path / f"new.tmp{process}/part").touch()
    main(["convert", str(orbax / source), str(tmp_path / "new")])
    told = capsys.readouterr().err.splitlines()
    assert sorted(told) == sorted(
        f"emaopt: removed {tmp_path}/new.tmp{process}, which an interrupted command left."
        for process in (killed.pid, os.getpid(), 10**30)
    )
    assert [path.name for path in tmp_path.glob("*.tmp*")] == [f"new.tmp{os.getppid()}"]


def test_what_cannot_be_removed_is_named(tmp_path, monkeypatch, capsys):
    """Threads of Orbax may go on writing for a while."""
    monkeypatch.setattr("emaopt._files.time.sleep", lambda _: None)
    monkeypatch.setattr("emaopt._files.shutil.rmtree", lambda *_, **__: None)
    paths.remove(tmp_path)
    assert capsys.readouterr().err == (
        f"emaopt: {tmp_path} is left. The next command with this DESTINATION removes it.\n"
    )


def test_a_process_of_another_user_is_running(monkeypatch):
    def kill(process, number):
        raise PermissionError

    monkeypatch.setattr("emaopt._files.os.kill", kill)
    assert _is_running(1)


@pytest.mark.slow
def test_a_full_disk_is_named_as_the_cause(orbax, tmp_path):
    """The limit on the size of a file stands for the disk: both fail in the same place."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)); "
        "from emaopt.__main__ import main; main(sys.argv[1:])"
    )
    for source, destination in ((GOLDEN / "adam", "orbax"), (orbax / "adam", "tf1")):
        arguments = ["convert", str(source), str(tmp_path / destination)]
        # what measures coverage could not write its own file either
        environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 2
        # some versions of TensorFlow log a warning of their own before
        *logged, told = done.stderr.splitlines()
        assert all(line.startswith(("WARNING: All log messages", "W0000 ")) for line in logged)
        assert f"{tmp_path}/{destination} cannot be written: " in told
        assert "File too large" in told
        assert len(told) < 900
    assert not list(tmp_path.iterdir())


def test_a_name_of_many_levels_is_kept_whole(tmp_path):
    names = ["/".join("a" * n) for n in (200, 300, 500, 3000)]
    write(tmp_path / "tf1", **{name: np.float32(i) for i, name in enumerate(names)})
    main(["convert", str(tmp_path / "tf1"), str(tmp_path / "orbax")])
    main(["convert", str(tmp_path / "orbax"), str(tmp_path / "back")])
    assert stored(tmp_path / "back") == stored(tmp_path / "tf1")


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


def test_without_tensorflow_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(GOLDEN / "adam"), str(tmp_path / "new")])
    assert exit_.value.code == 2
    assert 'pip install "emaopt[tf1]"' in capsys.readouterr().err


def test_the_innermost_cause_of_what_orbax_raises_is_told(tmp_path):
    cause = ValueError("disk quota exceeded [tensorstore_spec=x")
    with (
        pytest.raises(OSError, match=f"{tmp_path} cannot be written: disk quota exceeded$"),
        _writing(tmp_path),
    ):
        raise RuntimeError("not saved") from cause
