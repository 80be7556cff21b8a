"""`emaopt merge`: what is read from a run, written, listed, drawn and refused."""

import importlib
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint, posthoc
from emaopt.__main__ import main
from emaopt.checkpoint._stored import Stored
from emaopt.merge import Run
from emaopt.merge._ledgers import Moments, recognize
from emaopt.posthoc._fit import profile_of


pytestmark = pytest.mark.slow  # the runs that all of them merge take seconds

PARAMS = {
    "dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2, jnp.bfloat16)},
    "frozen": jnp.full(2, 7.0),
    "n": jnp.int32(0),
}
T, EVERY = 160, 40
FAST, SLOW = posthoc.gamma(0.05), posthoc.gamma(0.1)
not_frozen = emaopt.matching("dense|^n$")


def power(gamma, **options):
    return emaopt.ema(emaopt.power(gamma), ledger=True, **options)


OPTIMIZERS = {
    "two": optax.named_chain(
        ("fast", optax.masked(power(FAST), not_frozen)),
        ("slow", optax.masked(power(SLOW), not_frozen)),
    ),
    "plain": optax.named_chain(("a", emaopt.ema(0.9)), ("b", emaopt.ema(0.97))),
    "some": optax.named_chain(
        ("all", power(SLOW)), ("kernels", optax.masked(power(FAST), emaopt.matching("kernel")))
    ),
    "narrow": optax.named_chain(("only", power(SLOW, accumulator_dtype=jnp.bfloat16))),
    "hidden": optax.named_chain(
        ("mean", emaopt.ema(emaopt.after(30, emaopt.power(0)), ledger=True))
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one trajectory, by optimizer; and the trajectory, float64 [T + 1, ...] by leaf."""
    root = tmp_path_factory.mktemp("runs")
    noise = np.random.default_rng(0).standard_normal((T, 8)).astype(np.float32)

    @jax.jit
    def step(params, states, noise):
        updates = {
            "dense": {"kernel": noise[:6].reshape(3, 2), "bias": noise[6:].astype(jnp.bfloat16)},
            "frozen": jnp.zeros(2),
            "n": jnp.int32(1),
        }
        states = {n: tx.update(updates, states[n], params)[1] for n, tx in OPTIMIZERS.items()}
        return optax.apply_updates(params, updates), states

    params, states = PARAMS, {n: tx.init(PARAMS) for n, tx in OPTIMIZERS.items()}
    path = [params]
    writers = {n: ocp.training.Checkpointer(str(root / n)) for n in OPTIMIZERS if n != "plain"}
    for t in range(1, T + 1):
        params, states = step(params, states, noise[t - 1])
        path.append(params)
        if t % EVERY:
            continue
        ocp.save(root / "plain" / str(t), {"params": params, "opt_state": states["plain"]})
        for name, writer in writers.items():
            average = {"two": "fast", "some": "all"}.get(name)
            checkpoint.save(writer, t, params, states[name], name=average, seed=t)
    for writer in writers.values():
        writer.close()
    stacked = jax.tree.map(lambda *xs: np.stack(xs).astype(np.float64), *(p["dense"] for p in path))
    return root, stacked


def run(capsys, *arguments):
    main(["merge", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


TWO = [emaopt.power(FAST), emaopt.power(SLOW)]
CASES = [
    ("two", "--sigma-rel 0.15", posthoc.gamma(0.15), TWO, T),
    ("two", "--gamma 5", 5.0, TWO, T),
    ("two", "--half-life 8", emaopt.half_life(8), TWO, T),
    ("two", "--window 40", posthoc.window(40, T), TWO, T),
    ("two", "--linear 20%", posthoc.window(40, T), TWO, T),
    ("two", "--linear 40", posthoc.window(40, T), TWO, T),
    ("two", "--one-minus-sqrt 80", posthoc.one_minus_sqrt(80, T, EVERY), TWO, T),
    ("two", "--factors 1,0.5", posthoc.anneal([1.0, 0.5], T, EVERY), TWO, T),
    ("two", "--mean --last 2", posthoc.window(80, T), TWO, T),
    ("two", "--at 120 --sigma-rel 0.12", posthoc.gamma(0.12), TWO, 120),
    ("two", "--source slow=sigma_rel:0.1 --gamma 6", 6.0, TWO[1:], T),
    ("plain", "--source a=decay:0.9 --source b=decay:0.97 --half-life 12", emaopt.half_life(12),
     [lambda t: jnp.float32(0.9), lambda t: jnp.float32(0.97)], T),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "target", "decays", "at"), CASES)
def test_the_average_is_written_with_the_predicted_error(
    name, options, target, decays, at, runs, tmp_path, capsys
):
    root, path = runs
    told = run(capsys, root / name, *options.split(), tmp_path / "out")
    steps = list(range(EVERY, at + 1, EVERY))
    wanted = profile_of(target, at)
    factors = posthoc.weights(steps, decays, at=at, target=wanted, threshold=0.5)
    columns = [np.pad(emaopt.profile(d, t), (0, at - t)) for t in steps for d in decays]
    off = factors @ columns - wanted
    assert told["residual"] == pytest.approx(np.linalg.norm(off) / np.linalg.norm(wanted), rel=1e-3)
    made = checkpoint.restore_averages(tmp_path / "out", PARAMS)
    again = ocp.load(tmp_path / "out", PARAMS, checkpointable_name="params")
    assert jax.tree.all(jax.tree.map(jnp.array_equal, made, again))
    assert jax.tree.map(jnp.result_type, made) == jax.tree.map(jnp.result_type, PARAMS)
    direct = np.tensordot(wanted, path["kernel"][: at + 1], 1)
    predicted = direct + np.tensordot(off, path["kernel"][: at + 1], 1)
    np.testing.assert_allclose(made["dense"]["kernel"], predicted, atol=2e-5)
    bias = np.tensordot(wanted + off, path["bias"][: at + 1], 1)
    np.testing.assert_allclose(np.float64(made["dense"]["bias"]), bias, rtol=2**-8, atol=1e-5)
    np.testing.assert_array_equal(made["frozen"], [7.0, 7.0])
    assert made["n"] == at


def test_each_leaf_is_made_of_the_averages_that_hold_it(runs, tmp_path, capsys):
    root, path = runs
    target = emaopt.power(posthoc.gamma(0.09))
    told = run(capsys, root / "some", "--sigma-rel", 0.09, tmp_path / "out")
    made = checkpoint.restore_averages(tmp_path / "out", PARAMS)
    steps, wanted = range(EVERY, T + 1, EVERY), emaopt.profile(target, T)
    for leaf, decays in {"kernel": [TWO[1], TWO[0]], "bias": [TWO[1]]}.items():
        factors = posthoc.weights(steps, decays, at=T, target=target)
        columns = [np.pad(emaopt.profile(d, t), (0, T - t)) for t in steps for d in decays]
        expected = np.tensordot(factors @ columns, path[leaf], 1)
        found = np.float64(made["dense"][leaf])
        np.testing.assert_allclose(found, expected, rtol=2**-8, atol=2e-5)
    one = posthoc.residual(steps, TWO[1:], at=T, target=wanted)
    assert told["residual"] == pytest.approx(one, rel=1e-3)
    assert one > 2 * posthoc.residual(steps, TWO, at=T, target=wanted)


def test_narrow_averages_are_added_up_in_the_parameters_dtype(runs, tmp_path):
    Run.open(runs[0] / "narrow").plan(posthoc.gamma(0.12)).write(tmp_path / "out")
    kernel = checkpoint.restore_averages(tmp_path / "out", PARAMS)["dense"]["kernel"]
    assert kernel.dtype == jnp.float32
    assert not np.array_equal(kernel, kernel.astype(jnp.bfloat16).astype(jnp.float32))


def test_in_blocks_it_is_the_same(runs, tmp_path, monkeypatch):
    outs = [tmp_path / "whole", tmp_path / "blocks"]
    for out, size in zip(outs, (2**22, 4), strict=True):
        monkeypatch.setattr("emaopt.merge._blocks.ELEMENTS_AT_ONCE", size)
        monkeypatch.setattr("emaopt.merge._sum.ELEMENTS_AT_ONCE", size)
        Run.open(runs[0] / "two").plan(posthoc.gamma(0.15)).write(out)
    whole, in_blocks = (checkpoint.restore_averages(out, PARAMS) for out in outs)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, whole, in_blocks))


def test_several_merges_are_made_of_a_run_that_is_opened_once(runs, tmp_path):
    run = Run.open(runs[0] / "two")
    for name in ("one", "two"):
        run.plan(posthoc.gamma(0.15)).write(tmp_path / name)
    curve = ["--mean", "80", "--threshold", "9", "--curve", str(tmp_path / "curve")]
    main(["merge", str(runs[0] / "two"), *curve])
    assert {path.name for path in (tmp_path / "curve").iterdir()} == {"80", "120", "160"}


def test_from_python_any_decay_is_a_source_and_any_weights_a_target(runs, tmp_path):
    recorded = Run.open(runs[0] / "hidden", sources={"mean": emaopt.after(30, emaopt.power(0))})
    assert recorded.steps == list(range(EVERY, T + 1, EVERY))
    assert recorded.at == T
    plan = recorded.plan(posthoc.window(80, T))
    plan.write(tmp_path / "out")
    assert plan.residual == recorded.residual(posthoc.window(80, T)) < 1e-6
    made = checkpoint.restore_averages(tmp_path / "out", PARAMS)["dense"]["kernel"]
    np.testing.assert_allclose(made, runs[1]["kernel"][81:].mean(0), atol=1e-5)
    two = Run.open(runs[0] / "two", sources={"fast": FAST, "slow": SLOW})
    assert two.residual(FAST) < 1e-12
    target = posthoc.gamma(0.15)
    predicted = posthoc.residual(two.steps, TWO, at=T, target=emaopt.power(target))
    assert two.residual(target) == pytest.approx(predicted, rel=1e-5)


def test_lists_numbers_texts_and_the_value_of_nnx_stay_what_they_are(tmp_path):
    for step in (1, 2):
        leaf = {"w": [{"value": np.full(2, float(step), np.float32)}], "epoch": 7}
        leaf["kind"] = "linear"
        state = {"shadow": leaf | {"epoch": None, "kind": None}, "step": np.array(step, np.int32)}
        items = {"params": leaf, "opt_state": state}
        ocp.save_checkpointables(tmp_path / "run" / str(step), items)
    recorded = Run.open(tmp_path / "run", sources={"ema": 0.0})
    recorded.plan(posthoc.window(1, 2)).write(tmp_path / "out")
    made = ocp.load(tmp_path / "out", leaf, checkpointable_name="params")
    np.testing.assert_array_equal(made["w"][0]["value"], [3.0, 3.0])  # 2 * 2 - 1
    assert (made["epoch"], made["kind"]) == (7, "linear")
    verified = Stored(epath.Path(tmp_path / "out")).read(
        [("params", "kind")]
    )  # compares the digests
    assert verified == {("params", "kind"): "linear"}


def test_what_is_written_says_what_it_is(runs, tmp_path, capsys):
    out = tmp_path / "out"
    main(["merge", str(runs[0] / "two"), "--sigma-rel", "0.15", str(out)])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.splitlines() == [
        "4 checkpoints, up to update 160, with the averages",
        "  fast  gamma:16.9722, sigma_rel 0.05",
        "  slow  gamma:6.9372, sigma_rel 0.1",
        "",
        "--sigma-rel 0.15: predicted error 0.11",
        f"{out}: written",
        f"As in {runs[0] / 'two' / '160'}, being no averages: frozen, n",
    ]
    about = ocp.checkpointables_metadata(out).custom_metadata["merged"]
    assert about["target"] == "--sigma-rel 0.15"
    assert about["updates"] == T
    assert about["residual"] == pytest.approx(0.105, abs=1e-3)


def test_a_target_that_is_only_near_is_written_with_what_it_would_take(runs, tmp_path, capsys):
    main(["merge", str(runs[0] / "two"), "--one-minus-sqrt", "80", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    target = posthoc.one_minus_sqrt(80, T, EVERY)
    of = lambda every: posthoc.residual(range(every, T + 1, every), TWO, at=T, target=target)
    assert lines[4:6] == [
        f"--one-minus-sqrt 80: predicted error {of(EVERY):.2g}",
        "The sum comes near the target, and is not the same. With averages that are saved every 20 "
        f"updates it would be {of(20):.2g}.",
    ]
    assert of(20) <= posthoc.THRESHOLD < of(EVERY)
    main(["merge", str(runs[0] / "two")])
    assert "roughly" in capsys.readouterr().out


def test_without_a_target_the_list_of_targets_is_shown(runs, capsys):
    told = run(capsys, runs[0] / "two")
    rows = {row["target"]: row for row in told["targets"]}
    steps = range(EVERY, T + 1, EVERY)
    for option, target in {
        "--sigma-rel 0.15": emaopt.power(posthoc.gamma(0.15)),
        "--half-life 5": emaopt.half_life(5),
        "--mean 40": posthoc.window(40, T),
    }.items():
        weights = profile_of(target, T)
        assert rows[option]["residual"] == pytest.approx(
            posthoc.residual(steps, TWO, at=T, target=weights), rel=1e-3
        )
        assert rows[option]["mean_age"] == pytest.approx(weights @ (T - np.arange(T + 1)), rel=1e-6)
        assert rows[option]["within"] == (rows[option]["residual"] <= 0.5)
    assert {row["within"] for row in told["targets"]} == {True, False}
    main(["merge", str(runs[0] / "two"), "--threshold", "0.01"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("--sigma-rel 0.15 ")]
    assert line.split()[3:] == ["0.11", "out", "of", "reach"]
    assert lines[-1] == "Roughly: above 0.15. Out of reach: above --threshold 0.01."


@pytest.mark.slow
def test_cooldowns_are_listed_where_checkpoints_make_steps_of_them(runs, tmp_path, capsys):
    listed = {row["target"] for row in run(capsys, runs[0] / "two")["targets"]}
    assert not [target for target in listed if "sqrt" in target]
    for t in range(1, 17):
        state = {"shadow": {"w": np.ones(2)}, "step": np.array(t, np.int32)}
        ocp.save(tmp_path / str(t), {"params": {"w": np.ones(2)}, "opt_state": state})
    listed = {r["target"] for r in run(capsys, tmp_path, "--source", "ema=gamma:0")["targets"]}
    assert "--one-minus-sqrt 5" in listed
    with pytest.raises(SystemExit):  # nothing is saved more often than every update
        main(["merge", str(tmp_path), "--source", "ema=gamma:0", "--half-life", "99", "new"])
    assert "above --threshold 0.5. More checkpoints, or a second aver" in capsys.readouterr().err


@pytest.mark.slow
def test_the_predicted_errors_are_drawn(runs, tmp_path, capsys):
    from matplotlib.image import imread

    for name, source in (
        ("two", []),
        ("plain", ["--source", "a=decay:0.9", "--source", "b=decay:1"]),
    ):
        main(["merge", str(runs[0] / name), *source, "--plot", str(tmp_path / f"{name}.png")])
    two, plain = (imread(tmp_path / f"{name}.png")[..., :3] for name in ("two", "plain"))
    blue = np.abs(two - np.array([0x1F, 0x77, 0xB4]) / 255).max(axis=2) < 0.02
    rows, columns = np.nonzero(blue)
    assert np.ptp(columns) > 0.7 * two.shape[1]
    assert np.ptp(rows) > 0.7 * two.shape[0]
    assert plain.shape == two.shape
    assert not np.array_equal(two, plain)


@pytest.mark.many(2)
@pytest.mark.parametrize(
    ("decay", "text"),
    [
        (emaopt.power(FAST), "gamma:16.9722, sigma_rel 0.05"),
        (emaopt.power(0.0), "gamma:0, sigma_rel 0.2887"),
        (0.99, "half_life:68.9676"),
        (0.9999, "half_life:6929.9"),
        (emaopt.warmup(0.99), "warmup of half_life:68.9676"),
        (emaopt.debiased(emaopt.half_life(300)), "debiased half_life:300"),
        (emaopt.every(3, 0.99), None),
        (emaopt.inverse_gamma(), None),
        (emaopt.after(100, emaopt.power(0)), None),
        (0.0, None),
    ],
)
def test_a_ledger_tells_the_decay(decay, text):
    mean = emaopt.moving_average(decay, ledger=True)

    def body(state, _):
        state = mean.update(jnp.zeros(1), state)
        return state, state.ledger

    _, scanned = jax.lax.scan(body, mean.init(jnp.zeros(1)), length=1000)
    ledgers = [np.asarray(x) for x in scanned[:3]]
    for steps in ([1, *range(125, 1001, 125)], [1000]):
        moments = [Moments(*(float(x[s - 1]) for x in ledgers)) for s in steps]
        found = recognize([*steps, 0], [*moments, Moments(1.0, 0.0, 1.0)])
        assert (found is None) == (text is None)
        if found:
            assert found.text.startswith(text)
            own, its = emaopt.profile(decay, 1000), profile_of(found.decay, 1000)
            assert np.linalg.norm(own - its) < 1e-3 * np.linalg.norm(own)


@pytest.mark.slow
def test_four_updates_are_enough():
    weights = [emaopt.profile(emaopt.power(FAST), t) for t in (1, 2, 3, 4)]
    moments = [Moments(w[0], w @ np.arange(len(w))[::-1], w @ w) for w in weights]
    found = recognize([1, 2, 3, 4], moments)
    assert found
    assert found.decay == pytest.approx(FAST, rel=1e-4)


def save_plain(path, **states):
    """A checkpoint of averages of w, by name: the count and the value."""
    state = {
        n: {"shadow": {"w": np.array(x)}, "step": np.array(t, np.int32)}
        for n, (t, x) in states.items()
    }
    ocp.save(path, {"params": {"w": np.ones(2)}, "opt_state": state})


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Runs that something is wrong with."""
    tmp_path = tmp_path_factory.mktemp("odd")
    save_plain(tmp_path / "counts" / "1", a=(5, [1.0, 2.0]), b=(3, [1.0, 2.0]))
    for step in (4, 8):
        save_plain(tmp_path / "infinite" / str(step), a=(step, [1.0, np.inf if step < 8 else 2]))
    ocp.save(tmp_path / "none" / "1", {"params": {"w": np.ones(2)}})
    state = {"shadow": {"w": np.ones(2)}, "step": np.array(1)}
    ocp.save(tmp_path / "alone" / "1", {"opt_state": state})
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.many(4)
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "the following arguments are required: RUN"),
        ("{runs}/two --sigma-rel 0.15", "OUT is missing"),
        ("{runs}/two --mean", "OUT is missing"),
        ("{runs}/two new", "a target is missing, such as --mean --last 8"),
        ("{runs}/two --gamma 3 --window 5 new", "--gamma says itself how long it is. Leave out"),
        ("{runs}/two --sigma-rel 0.3 new", "sigma_rel=0.3 is out of range. Pass a number above 0"),
        ("{runs}/two --sigma-rel 0.28 new", "error 0.59 is above --threshold 0.5. With averages"),
        ("{runs}/two --sigma-rel 0.1 --threshold 0 new", "is above --threshold 0. With averages"),
        ("{runs}/two --window 161 new", "n=161 is out of range. .* from 1 to at=160"),
        ("{runs}/two --gamma 5 empty", "empty exists. Pass another DEST"),
        ("{runs}/two --at 90", r"step=90 is not in .*two. Pass one of \[40, 80"),
        ("{runs}/two --plot new/a.png", "No such file or directory"),
        ("{runs}/two --source fast", "--source 'fast' has no name. Pass NAME=DECAY"),
        ("{runs}/two --source fest=gamma:1", "'fest' is no average. Did you mean 'fast'. Pass one"),
        ("{runs}/two --source opt_state=gamma:1", "'opt_state' is more than one average"),
        ("{runs}/two --source fast=foo:1", "'foo:1' is no decay. Pass one of sigma_rel:NUMBER"),
        ("{runs}/two --source fast=decay:2", "'decay:2' is no decay: decay=2.0 is out of range"),
        ("{runs}/two --source fast=gamma:x", "'gamma:x' is no decay: could not convert"),
        ("{runs}/some --source kernels=gamma:1", "no source is an average of dense/bias"),
        ("counts --source a=gamma:1 --source b=gamma:2", "count different updates: a 5, b 3"),
        ("{runs}/two --source fast=gamma:1 --params params", "are averages, and plain parameters"),
        ("empty", "empty holds no finished checkpoint"),
        ("nowhere", "nowhere holds no finished checkpoint"),
    ],
)
def test_a_mistake_of_merge_prints_one_line(arguments, told, runs, odd, monkeypatch, capsys):
    monkeypatch.chdir(odd)
    with pytest.raises(SystemExit) as exit_:
        main(["merge", *arguments.format(runs=runs[0]).split()])
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("emaopt merge: ")
    assert shown.err.count("\n") == 1
    assert re.search(told, shown.err)
    assert not Path("new").exists()


def test_a_checkpoint_that_is_not_finite_is_named(odd, monkeypatch, capsys):
    monkeypatch.chdir(odd)
    with pytest.raises(SystemExit):
        main(["merge", "infinite", "--source", "a=gamma:0", "--window", "4", "new"])
    assert "infinite/4 is not finite at leaf 'w'. Move that" in capsys.readouterr().err
    assert [path.name for path in odd.glob("new*")] == []


def test_nothing_is_overwritten(runs, tmp_path):
    with pytest.raises(FileExistsError, match=r"exists\. Remove it or pass another path"):
        Run.open(runs[0] / "two").plan(5.0).write(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("plain", ["average a has no ledger and is left out", "average b has no ledger and is"]),
        ("hidden", ["average mean has a ledger that fits no simple decay and is left out"]),
    ],
)
def test_averages_of_which_nothing_is_known_are_left_out(name, told, runs, capsys):
    main(["merge", str(runs[0] / name)])
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    for line, start in zip(lines, told, strict=True):
        assert line.startswith(f"emaopt: {start}")
        assert "--source" in line
    assert shown.out.startswith("4 checkpoints of plain parameters, at the steps 40 to 160")


def forget(monkeypatch, *rooms):
    """Have the rooms imported anew in this test, and be the same as before after it."""
    for room in rooms:
        monkeypatch.setattr(room, importlib.import_module(room))
    for room in rooms:
        for module in [name for name in sys.modules if name.startswith(room)]:
            monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize("missing", ["tqdm", "matplotlib.figure"])
def test_without_a_package_the_extra_is_named(missing, runs, tmp_path, monkeypatch, capsys):
    forget(monkeypatch, "emaopt.merge", "emaopt._commands.merge")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit):
        main(["merge", str(runs[0] / "two"), "--plot", str(tmp_path / "a.png")])
    assert f'{missing} is not installed. pip install "emaopt[posthoc]"' in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_added_up_are_the_averages_that_were_evaluated(tmp_path):
    """With their residues: of a compensated bfloat16 average the shadow alone has 8 bits."""
    accumulator = emaopt.compensated(jnp.bfloat16)
    tx = emaopt.ema(emaopt.power(5), accumulator_dtype=accumulator, ledger=True)
    params = {"w": jnp.linspace(1.0, 2.0, 7)}
    opt_state = tx.init(params)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        for step in range(1, 21):
            params = {"w": params["w"] * 1.01}
            _, opt_state = tx.update({"w": jnp.zeros(7)}, opt_state, params)
            if step % 10 == 0:
                checkpoint.save(checkpointer, step, params, opt_state)
    Run.open(tmp_path / "run").plan(5.0).write(tmp_path / "out")
    written = checkpoint.restore_averages(tmp_path / "out", params)["w"]
    np.testing.assert_allclose(written, emaopt.average(params, opt_state)["w"], rtol=1e-5)
