"""`emaopt ls`: what it shows of a checkpoint, and what it refuses."""

import json
import os
import re
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
from emaopt._commands.ls import Row, table
from emaopt._commands.paths import load_tensorflow


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


@pytest.mark.many(2)
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


@tensorflow
@pytest.mark.slow
def test_ls_in_a_pipe_is_plain_quiet_whole_and_80_wide():
    checkpoint = str(GOLDEN / "adam" / "model.ckpt-20")
    command = [sys.executable, "-m", "emaopt", "ls", checkpoint]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    table, _, total = done.stdout.rpartition("\n\n")
    lines = table.splitlines()
    assert total.split() == ["11", "leaves,", "272", "bytes:", checkpoint]
    assert max(map(len, lines)) <= 80
    assert "*/Adam_1: slot v\n  mlp/dense/bias    [4]    float32  16\n" in done.stdout
    assert "power\n  beta1_power  []  float32  4\n" in done.stdout


def test_leaves_are_in_groups_of_one_role(orbax, capsys):
    main(["ls", str(orbax / "adam")])
    groups = [group.splitlines() for group in capsys.readouterr().out.split("\n\n")]
    assert " ".join(groups[-1]).split() == ["27", "leaves,", "347", "bytes:", f"{orbax}/adam/10"]
    assert groups[0][0] == "digests"
    names = {title: [row.split()[0] for row in rows] for title, *rows in groups[:-1]}
    assert names["params: average"] == ["bias", "conv/kernel"]
    assert names["opt_state/1/shadow: raw parameter"] == ["bias", "conv/kernel"]
    assert names["opt_state/0/slots/m: slot m"] == ["bias", "conv/kernel"]
    assert names["global step"] == ["opt_state/0/step", "opt_state/1/step"]
    assert sum(map(len, names.values())) == 27


def test_the_averages_alone_are_listed(orbax, capsys):
    main(["ls", str(orbax / "adam"), "--averages"])
    end = " " if len(f"2 leaves, 36 bytes: {orbax}/adam/10") <= 80 else "\n  "
    assert capsys.readouterr().out == (
        "params: average\n"
        "  bias         [3]    float32  12\n"
        "  conv/kernel  [2,3]  float32  24\n\n"
        f"2 leaves, 36 bytes:{end}{orbax / 'adam/10'}\n"
    )
    with pytest.raises(SystemExit, match="2"):
        main(["ls", str(orbax / "plain"), "--averages"])
    assert "holds no average. Leave out --averages" in capsys.readouterr().err


def test_a_run_one_level_below_is_found_and_named(orbax, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoints").symlink_to(orbax / "adam")
    (tmp_path / "out/logs").mkdir()
    main(["ls", str(tmp_path / "out"), "--averages"])
    shown = capsys.readouterr()
    assert shown.out.endswith(f"{tmp_path}/out/checkpoints/10\n")
    assert shown.err == "emaopt: the run is one level below, in checkpoints.\n"
    (tmp_path / "out/more").symlink_to(orbax / "plain")
    with pytest.raises(SystemExit, match="2"):
        main(["ls", str(tmp_path / "out")])
    told = f"holds several runs. Pass one of: {tmp_path}/out/checkpoints, {tmp_path}/out/more"
    assert told in capsys.readouterr().err


def test_a_safetensors_file_is_read(tmp_path, capsys):
    save_file = pytest.importorskip("safetensors.flax").save_file
    tensors = {"conv/kernel": jnp.ones((2, 3)), "bias": jnp.ones(3, jnp.bfloat16)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "flax"})
    _, leaves = listed(capsys, tmp_path / "a.safetensors")
    assert {name: (x["shape"], x["dtype"], x["role"]) for name, x in leaves.items()} == {
        "conv/kernel": ([2, 3], "float32", "variable"),
        "bias": ([3], "bfloat16", "variable"),
    }


def save_shards(directory):
    """A model in two files, with an index."""
    save_file = pytest.importorskip("safetensors.flax").save_file
    directory.mkdir(parents=True)
    files = {x: f"model-0000{i}-of-00002.safetensors" for i, x in enumerate("wv", 1)}
    for name, file in files.items():
        save_file({name: jnp.ones((2, 3))}, directory / file)
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize(
    "path", ["", "/model.safetensors.index.json", "/model.safetensors", "/..", "no index"]
)
def test_a_model_in_several_files_is_listed_as_one(path, tmp_path, capsys):
    model = save_shards(tmp_path / "run" / "checkpoint-20")
    if path == "no index":
        (model / "model.safetensors.index.json").unlink()
        path = ""
    shown, leaves = listed(capsys, f"{model}{path}")
    assert leaves.keys() == {"w", "v"}
    assert shown["bytes"] == 48


def test_of_a_run_of_safetensors_the_newest_is_listed(tmp_path, capsys):
    save_file = pytest.importorskip("safetensors.flax").save_file
    for step in (9, 10):
        save_shards(tmp_path / "run" / f"checkpoint-{step}")
        save_file({"w": jnp.ones(step)}, tmp_path / f"model_{step}.safetensors")
    shown, _ = listed(capsys, tmp_path / "run")
    assert shown["checkpoint"] == f"{tmp_path}/run/checkpoint-10"
    shown, leaves = listed(capsys, tmp_path)
    assert shown["checkpoint"] == f"{tmp_path}/model_10.safetensors"
    assert leaves["w"]["shape"] == [10]


def rewrite(file, old, new):
    """Change a text in the header of a file, whose length stays."""
    assert len(old) == len(new)
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))


DAMAGES = {
    "lacks model-00001-of-00002.safetensors. Copy all": lambda d, w: w.unlink(),
    "00001-of-00002.safetensors is damaged, or no .saf": lambda d, w: w.write_bytes(b"1"),
    "w is cut off": lambda d, w: w.write_bytes(w.read_bytes()[:-4]),
    "w is float32[2, 3], and its bytes are 4 to 24; those before it end at 0": (
        lambda d, w: rewrite(w, b'"data_offsets":[0,24]', b'"data_offsets":[4,24]')
    ),
    "w is float32[2, 4], and its bytes are 0 to 24": lambda d, w: rewrite(w, b"[2,3]", b"[2,4]"),
    "w has the dtype F99, which is not known": lambda d, w: rewrite(w, b'"F32"', b'"F99"'),
    "00001-of-00002.safetensors lacks w, which the index": lambda d, w: rewrite(w, b'"w"', b'"u"'),
    "v is in {w} and in model-00002-of-00002.safetensors.": lambda d, w: w.write_bytes(
        (d / "model-00002-of-00002.safetensors").read_bytes()
    ),
    "json is damaged, or no index ('weight_map')": (
        lambda d, w: (d / "model.safetensors.index.json").write_text("{}")
    ),
    "has several models. Pass one of": lambda d, w: (d / "b.safetensors.index.json").write_text(""),
}


@pytest.mark.parametrize("told", DAMAGES)
def test_damage_of_one_of_several_files_is_one_line(told, tmp_path, capsys):
    directory = save_shards(tmp_path / "model")
    first = directory / "model-00001-of-00002.safetensors"
    if told.startswith("v is in"):
        (directory / "model.safetensors.index.json").unlink()
    DAMAGES[told](directory, first)
    for command in ("ls", "diff"):
        with pytest.raises(SystemExit, match="2"):
            main([command, str(directory), *[str(directory)] * (command == "diff")])
        (line,) = capsys.readouterr().err.splitlines()
        assert told.format(w=first) in line


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "JSONDecodeError"),
        (b"\xff" * 16, "ValueError: a header of 18446744073709551615 bytes in 16"),
        (b"\x02" + b"\0" * 7 + b"[]", "TypeError"),
        (
            b"\x48" + b"\0" * 7 + b'{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'
            b"             ",
            "w is cut off",
        ),
    ],
)
def test_a_damaged_safetensors_file_is_one_line(content, told, tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        main(["ls", str(tmp_path / "a.safetensors")])
    said = capsys.readouterr().err
    assert "a.safetensors is damaged, or no .safetensors file" in said
    assert told in said


def test_unprintable_characters_do_not_reach_the_terminal(tmp_path, capsys):
    evil = {"\x1b[31mred\x07": jnp.ones(2), "a\nb: evil": jnp.ones(2)}
    ocp.save(tmp_path / "evil", {"params": evil})
    main(["ls", str(tmp_path / "evil")])
    shown = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", shown)
    assert r"\x1b[31mred\x07" in shown
    assert r"a\nb: evil" in shown


def test_names_that_would_be_the_same_are_told_apart(tmp_path, capsys):
    ocp.save(tmp_path / "same", {"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}})
    _, leaves = listed(capsys, tmp_path / "same")
    assert leaves.keys() == {"state/a/b", r"state/a\/b"}


def test_what_tensorflow_prints_when_it_is_loaded_is_not_shown(tmp_path, monkeypatch, capfd):
    (tmp_path / "tensorflow.py").write_text("import os; os.write(2, b'no GPU')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # what was there, or nothing, comes back
    del sys.modules["tensorflow"]
    load_tensorflow()
    os.write(2, b"shown")
    assert capfd.readouterr().err == "shown"


@pytest.mark.parametrize("width", [0, 40, 80, 120])
def test_the_table_fits_the_terminal_and_long_names_are_whole(width):
    long = "a/" + "x" * 60 + "/kernel"
    rows = [Row(long, (3, 4), "float32", "variable", 48), Row("b", (), "int64", "variable", 8)]
    lines = table(rows, width)
    assert any(long in line for line in lines)
    assert max(len(line) for line in lines if long not in line) <= max(width, 44)
    assert len(lines) == (3 if width == 120 else 4)
    assert lines[-2].endswith("[3,4]  float32  48")


@pytest.mark.slow
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
        ("empty", "/empty holds no finished checkpoint of Orbax, TF1 or safetensors"),
        pytest.param("file", "/file' is not a checkpoint of TF1", marks=tensorflow),
    ],
)
def test_a_mistake_of_ls_prints_one_line(path, told, tmp_path, monkeypatch, capsys):
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


def test_without_tensorflow_ls_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(SystemExit, match="2"):
        main(["ls", str(GOLDEN / "adam")])
    told = 'emaopt ls: tensorflow is not installed. pip install "emaopt[tf1]"'
    assert told in capsys.readouterr().err
