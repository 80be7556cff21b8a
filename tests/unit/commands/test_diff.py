"""`emaopt diff`: what differs between two checkpoints, and by how much."""

import json
import math
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

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
from emaopt._commands import diff, progress
from emaopt._tree.checks import describe


tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs the extra tf1")

INF, NAN = math.inf, math.nan
# leaf: its values in A and in B, the largest difference, and the relative one
PAIRS = {
    "shapes": (np.ones(2, np.float32), np.ones((2, 1), np.float32), None, None),
    "text": ("one", "two", None, None),
    "nan": (np.float32([NAN, 1, 2]), np.float32([NAN, NAN, 2]), NAN, NAN),
    "infinity": (np.float32([INF, 1]), np.float32([INF, INF]), INF, INF),
    "opposite": (np.float32([1, 0]), np.float32([-1, 0]), 2, 2),
    "zero": (np.zeros(3, np.float32), np.float32([0, 2, 0]), 2, 1),
    "floats": (np.float32([3, 4, NAN]), np.float32([3, 1, NAN]), 3, 0.6),
    "bool": (np.array([True, True]), np.array([True, False]), 1, 0.5**0.5),
    "complex": (np.complex64([3 + 4j]), np.complex64([3]), 4, 0.8),
    "half": (jnp.bfloat16(2), jnp.bfloat16(1), 1, 0.5),
    "count": (np.int32(10), np.int32(8), 2, 0.2),
    "large": (np.int64([2**53]), np.int64([2**53 + 1]), 0, 0),
    "dtypes": (np.float32([1, 2]), np.float64([1, 2]), 0, 0),
    "alike": (np.float32([NAN, INF, 1]), np.float32([NAN, INF, 1]), 0, 0),
    "same text": ("one", "one", None, None),
}
EQUAL = {"alike", "same text"}


def saved(path, side):
    leaves = {name: pair[side] for name, pair in PAIRS.items()}
    arrays = {n: x if isinstance(x, str) else np.asarray(x) for n, x in leaves.items()}
    ocp.save(path, arrays | {f"only {side}": np.ones(1)})
    return str(path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return saved(root / "a", 0), saved(root / "b", 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of a run, and their state in plain Orbax."""
    root = tmp_path_factory.mktemp("run")
    params = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.0], jnp.bfloat16)}
    tx = optax.chain(emaopt.gradient_descent(1.0), emaopt.ema(0.5))
    opt_state = tx.init(params)
    grads = {"w": jnp.array([0.0, 6.0]), "b": jnp.zeros(1, jnp.bfloat16)}
    with ocp.training.Checkpointer(str(root / "steps")) as checkpointer:
        for step in 1, 2:
            params, opt_state = emaopt.apply_gradients(tx, grads, params, opt_state)
            checkpoint.save(checkpointer, step, params, opt_state, seed=7)
    ocp.save(root / "plain", {"params": params, "opt_state": opt_state})
    return root


def called(capsys, *arguments):
    """The exit code, and what was printed."""
    code = 0
    try:
        main(["diff", *map(str, arguments)])
    except SystemExit as exit_:
        code = exit_.code
    return code, capsys.readouterr().out


def in_json(capsys, *arguments):
    code, out = called(capsys, *arguments, "--json")
    refuse = lambda text: pytest.fail(f"{text} is no JSON")
    shown = json.loads(out, parse_constant=refuse)
    return code, shown, {leaf["name"]: leaf for leaf in shown["leaves"]}


def test_every_leaf_has_its_distance(pair, capsys):
    code, shown, leaves = in_json(capsys, *pair)
    assert code == 1
    finite = lambda x: None if x is None or not math.isfinite(x) else pytest.approx(x)
    assert {name.removeprefix("state/"): leaf for name, leaf in leaves.items()} == {
        name: {
            "name": f"state/{name}",
            "a": describe(np.asarray(a)),
            "b": describe(np.asarray(b)),
            "equal": name in EQUAL,
            "max_abs": finite(most),
            "relative": finite(relative),
        }
        for name, (a, b, most, relative) in PAIRS.items()
    }
    assert (shown["only_in_a"], shown["only_in_b"]) == (["state/only 0"], ["state/only 1"])
    assert (shown["equal"], shown["a"], shown["b"]) == (False, *pair)
    assert shown["total"] == {"max_abs": None, "relative": None}


def test_the_text_has_what_differs_and_most_first(pair, capsys):
    code, out = called(capsys, *pair)
    assert code == 1
    head, *rows, empty, count, total = out.splitlines()
    assert head.split() == ["max", "abs", "relative", "leaf"]
    assert rows == [
        "       inf         inf  state/infinity",
        "       nan         nan  state/nan",
        "         -           -  state/shapes: float32[2] in A, float32[2,1] in B",
        "         -           -  state/text",
        "         2           2  state/opposite",
        "         2           1  state/zero",
        "         4         0.8  state/complex",
        "         1       0.707  state/bool",
        "         3         0.6  state/floats",
        "         1         0.5  state/half",
        "         2         0.2  state/count",
        "         0           0  state/dtypes: float32[2] in A, float64[2] in B",
        "         0           0  state/large",
        "only in A: state/only 0",
        "only in B: state/only 1",
    ]
    assert empty == ""
    assert count == "13 of 15 common leaves differ"
    assert total == "without integers, together: max abs nan, relative nan"


def test_a_long_name_has_a_line_of_its_own(capsys):
    names = ["x" * 56, "x" * 57]
    leaves = [diff.Compared(name, "float32[]", "float32[]", False, 1.0, 0.5) for name in names]
    diff.show(diff.Difference(leaves, [], []), "a", "b", as_json=False)
    _, first, second, name, *_ = capsys.readouterr().out.splitlines()
    numbers = "         1         0.5"
    assert [first, second, name] == [f"{numbers}  {names[0]}", numbers, f"  {names[1]}"]


def test_all_floating_point_leaves_count_together(run, capsys):
    _, shown, leaves = in_json(capsys, run / "steps/1", run / "steps/2")
    # averages [3, 1] and [3, -3.5], raw [3, -2] and [3, -8]; the steps are no part of it
    norms = [np.linalg.norm(x) for x in ([3, 1, 3, -2], [3, -3.5, 3, -8])]
    relative = np.linalg.norm([4.5, 6]) / max(norms)
    assert shown["total"] == {"max_abs": 6, "relative": pytest.approx(relative)}
    assert leaves["opt_state/1/step"]["max_abs"] == 1
    assert not any(name.startswith("digests") for name in leaves)


def test_what_is_equal_is_told_in_one_line(run, pair, capsys):
    assert called(capsys, run / "steps", run / "steps/2") == (0, "8 leaves, all equal\n")
    code, shown, _ = in_json(capsys, pair[0], pair[0])
    assert (code, shown["equal"], shown["only_in_a"]) == (0, True, [])


@pytest.mark.parametrize("name", ["steps", "steps/2", "plain"])
def test_one_alone_is_its_averages_against_its_parameters(name, run, capsys):
    code, shown, leaves = in_json(capsys, run / name)
    assert (code, shown["b"]) == (1, None)
    assert leaves.keys() == {"w", "b"}
    assert leaves["w"]["max_abs"] == 4.5
    assert leaves["w"]["relative"] == pytest.approx(4.5 / 73**0.5)
    assert (leaves["b"]["a"], leaves["b"]["b"]) == ("float32[1]", "bfloat16[1]")
    assert leaves["b"]["max_abs"] == 0


def test_several_averages_are_called_by_where_they_are(tmp_path, capsys):
    params = {"w": jnp.array([1.0]), "b": jnp.array([5.0])}
    tx = optax.named_chain(
        ("fast", emaopt.ema(0.5)), ("slow", optax.masked(emaopt.ema(0.5), {"w": True, "b": False}))
    )
    _, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    ocp.save(tmp_path / "all", {"params": params, "opt_state": opt_state})
    _, _, leaves = in_json(capsys, tmp_path / "all")
    assert leaves.keys() == {
        "b",
        "state/opt_state/fast/w",
        "state/opt_state/slow/inner_state/w",
    }
    assert {leaf["max_abs"] for leaf in leaves.values()} == {0.5}


@pytest.mark.parametrize("at_once", [1, 13])
def test_the_parts_that_are_read_change_nothing(at_once, pair, monkeypatch):
    whole = diff.compare(*pair)
    monkeypatch.setattr(diff, "BYTES_AT_ONCE", at_once)
    monkeypatch.setattr(diff, "ELEMENTS_AT_ONCE", 1)
    reads = []
    read = diff.Stored.read
    monkeypatch.setattr(diff.Stored, "read", lambda self, p: reads.append(len(p)) or read(self, p))
    assert repr(diff.compare(*pair)) == repr(whole)
    assert max(reads) < 4
    assert sum(reads) == 2 * len(PAIRS)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_after_two_seconds_how_far_it_is(terminal, pair, capsys, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    monkeypatch.setattr(diff, "BYTES_AT_ONCE", 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    diff.compare(*pair)
    told = capsys.readouterr().err.split("\r")
    if not terminal:
        assert told == [""]
        return
    assert len(told) == len(PAIRS) + 1
    assert told[-3:] == ["compared 100%", " " * 13, ""]
    assert told[1] < told[2] < told[3]


@tensorflow
@pytest.mark.parametrize("name", ["adam", "rmsprop_swapped", "bfloat16"])
def test_a_converted_checkpoint_is_equal_to_that_of_tf1(name, tmp_path, capsys):
    from emaopt._commands.convert import convert

    convert(str(GOLDEN / name), str(tmp_path / "orbax"))
    for sides in ((GOLDEN / name, tmp_path / "orbax"), (tmp_path / "orbax", GOLDEN / name)):
        code, out = called(capsys, *sides)
        assert (code, out.endswith(" leaves, all equal\n")) == (0, True)


@tensorflow
def test_a_trained_state_is_compared_by_the_names_of_tf1(tmp_path, capsys):
    params = {"w": jnp.array([1.0, 2.0]), "half": jnp.ones(2, jnp.bfloat16)}
    tx = optax.chain(emaopt.adam(0.3), emaopt.ema(0.9))
    opt_state = tx.init(params)
    params, opt_state = emaopt.apply_gradients(tx, params, params, opt_state)
    emaopt_tf1 = pytest.importorskip("emaopt.tf1")
    emaopt_tf1.save(tmp_path / "model.ckpt-0", params, opt_state)
    changed = {**params, "w": params["w"].at[0].add(4)}
    with ocp.training.Checkpointer(str(tmp_path / "run")) as checkpointer:
        checkpoint.save(checkpointer, 0, changed, opt_state)
    code, shown, leaves = in_json(capsys, tmp_path / "model.ckpt-0", tmp_path / "run")
    assert code == 1
    assert {name for name, leaf in leaves.items() if not leaf["equal"]} == {"w"}
    assert leaves["w"]["max_abs"] == pytest.approx(4, abs=1e-6)
    assert {"w/Adam_1", "w/ExponentialMovingAverage", "beta1_power", "global_step"} < leaves.keys()
    assert (shown["only_in_a"], shown["only_in_b"]) == ([], [])


@tensorflow
def test_the_averages_of_tf1_are_compared_with_their_variables(capsys):
    from emaopt.tf1._files import Checkpoint

    code, _, leaves = in_json(capsys, GOLDEN / "adam")
    assert (code, leaves.keys()) == (1, {"mlp/dense/kernel", "mlp/dense/bias"})
    stored = Checkpoint(GOLDEN / "adam")
    of = lambda name: stored.value(name).astype(float)
    for name, leaf in leaves.items():
        distance = of(emaopt.average_name(name)) - of(name)
        assert leaf["max_abs"] == np.max(np.abs(distance))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "emaopt diff: the following arguments are required: A"),
        ("none", "/none holds no average to compare with its parameters. Pass B as well"),
        ("none nowhere", "/nowhere does not exist. "),
        pytest.param("golden", "golden holds no average to compare", marks=tensorflow),
    ],
)
def test_a_mistake_of_diff_prints_one_line_and_exits_with_2(
    arguments, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    ocp.save(tmp_path / "none", {"params": np.ones(2)})
    (tmp_path / "golden").symlink_to(GOLDEN / "no_average")
    with pytest.raises(SystemExit) as exit_:
        main(["diff", *arguments.split()])
    shown = capsys.readouterr()
    assert (exit_.value.code, shown.out) == (2, "")
    assert told in shown.err
    assert shown.err.endswith(" See emaopt diff --help.\n")
    assert shown.err.count("\n") == 1


def test_without_tensorflow_what_to_install_is_told(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(SystemExit, match="2"):
        main(["diff", str(run / "steps"), str(GOLDEN / "adam")])
    assert 'tensorflow is not installed. pip install "emaopt[tf1]"' in capsys.readouterr().err


def test_an_average_of_16_bits_is_compared_with_its_residue(tmp_path, capsys):
    params = {"w": jnp.linspace(1.0, 2.0, 50)}
    exact = emaopt.compensated(jnp.bfloat16)
    ocp.save_checkpointables(
        tmp_path / "x",
        {"params": params, "opt_state": emaopt.ema(0.9, accumulator_dtype=exact).init(params)},
    )
    _, shown, _ = in_json(capsys, tmp_path / "x")
    assert 0 < shown["total"]["relative"] < 2**-16  # 2**-9 without


def test_leaves_whose_names_would_be_the_same_are_both_compared(tmp_path, capsys):
    for side, values in (("a", (0.0, 5.0)), ("b", (100.0, 5.0))):
        inner, outer = (np.full(2, value) for value in values)
        ocp.save(tmp_path / side, {"a/b": outer, "a": {"b": inner}})
    code, _, leaves = in_json(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert {name: leaf["max_abs"] for name, leaf in leaves.items()} == {
        "state/a/b": 100,
        r"state/a\/b": 0,
    }


def test_a_safetensors_file_is_compared_by_its_names(tmp_path, capsys):
    save_file = pytest.importorskip("safetensors.flax").save_file
    tree = {"conv": jnp.arange(3.0), "bias": jnp.ones(2, jnp.bfloat16)}
    save_file(tree, tmp_path / "a.safetensors")
    save_file(tree | {"bias": tree["bias"] * 3}, tmp_path / "b.safetensors")
    code, _, leaves = in_json(capsys, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert code == 1
    assert {name: leaf["max_abs"] for name, leaf in leaves.items()} == {"conv": 0, "bias": 2}
    for name, tensor in tree.items():
        (tmp_path / "shards").mkdir(exist_ok=True)
        save_file({name: tensor}, tmp_path / "shards" / f"{name}.safetensors")
    assert called(capsys, tmp_path / "a.safetensors", tmp_path / "shards") == (
        0,
        "2 leaves, all equal\n",
    )
    with pytest.raises(SystemExit, match="2"):
        main(["diff", str(tmp_path / "a.safetensors")])
    assert "holds no average to compare" in capsys.readouterr().err


def test_unprintable_characters_do_not_reach_the_terminal(tmp_path, capsys):
    for side in 0, 1:
        ocp.save(tmp_path / str(side), {"\x1b[2J": np.full(2, side), f"\x07{side}": np.ones(1)})
    _, out = called(capsys, tmp_path / "0", tmp_path / "1")
    assert out.isascii()
    assert "\x1b" not in out
    assert "\x07" not in out
    assert r"state/\x1b[2J" in out
    assert r"only in A: state/\x070" in out


@tensorflow
def test_a_cut_off_file_is_no_difference(tmp_path, capsys):
    shutil.copytree(GOLDEN / "adam", tmp_path / "cut")
    data = tmp_path / "cut" / "model.ckpt-20.data-00000-of-00001"
    data.chmod(0o644)
    os.truncate(data, 100)
    with pytest.raises(SystemExit, match="2"):
        main(["diff", str(tmp_path / "cut"), str(GOLDEN / "adam")])
    said = capsys.readouterr().err
    assert "/cut/model.ckpt-20: mlp/dense/" in said
    assert "cannot be read, the data is cut off" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error_and_the_code_stays(pair):
    read, write_end = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "emaopt", "diff", *pair]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


def test_help_shows_examples_and_exit_codes(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["diff", "--help"])
    shown = capsys.readouterr().out
    for told in "--json", "emaopt diff run/model.ckpt-20 converted", "1 if anything differs":
        assert told in shown
