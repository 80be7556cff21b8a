"""Plain parameters of any run, and soups: what is found, the factors, and what is refused."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as legacy
import pytest
from flax.training.train_state import TrainState
from orbax.checkpoint import v1 as ocp
from safetensors.flax import load_file, save_file

import emaopt
from emaopt import checkpoint, posthoc
from emaopt.__main__ import main
from emaopt.merge import Run, soup


STEPS = (10, 20, 30, 40)
FACTORS = [0.1, 0.2, 0.3, 0.4]


def params_of(step):
    noise = np.random.default_rng(step)
    kernel = noise.standard_normal((6, 4)).astype(np.float32)
    return {"layers": [{"kernel": kernel}], "bias": jnp.asarray(kernel[0], jnp.bfloat16), "n": step}


TARGET = posthoc.anneal([0.9, 0.7, 0.4], at=40, on=STEPS)
EXACT = sum(
    f * np.float64(params_of(s)["layers"][0]["kernel"]) for f, s in zip(FACTORS, STEPS, strict=True)
)
LIKE = jax.tree.map(lambda x: np.zeros_like(x), params_of(0))


def state_of(step):
    params = {"params": params_of(step)}
    state = TrainState.create(apply_fn=print, params=params, tx=optax.adam(0.1))
    return state.replace(step=jnp.int32(step))


def save_by_manager(run, items):
    with legacy.CheckpointManager(run) as manager:
        for step in STEPS:
            saved = {n: legacy.args.StandardSave(tree) for n, tree in items(step).items()}
            manager.save(step, args=legacy.args.Composite(**saved))


def flax_v0(run):
    with legacy.StandardCheckpointer() as checkpointer:
        for step in STEPS:
            checkpointer.save(run / str(step), state_of(step))


def flax_in_v1(run):
    for step in STEPS:
        ocp.save(run / str(step), state_of(step), checkpointable_name="state")


def pytree_v0(run):
    with legacy.Checkpointer(legacy.PyTreeCheckpointHandler()) as checkpointer:
        for step in STEPS:
            checkpointer.save(run / f"step_{step}", {"params": params_of(step), "step": step})


def one_item(run):  # kauldron
    with legacy.CheckpointManager(run) as manager:
        for step in STEPS:
            tree = {"params": params_of(step), "opt_state": {"mu": {"params": params_of(step)}}}
            manager.save(step, args=legacy.args.StandardSave(tree))


def tunix(run):
    save_by_manager(
        run, lambda s: {"model_params": params_of(s), "optimizer_state": {"mu": params_of(s)}}
    )


def maxtext(run):
    def items(step):
        variables = {"params": params_of(step)}
        return {"items": {"params": variables, "opt_state": {"mu": variables}, "step": step}}

    save_by_manager(run, items)


def nnx(run):
    save_by_manager(run, lambda s: {"model": params_of(s), "optimizer": {"mu": params_of(s)}})


def alone(run):
    for step in STEPS:
        ocp.save(run / str(step), params_of(step))


LAYOUTS = [flax_v0, flax_in_v1, pytree_v0, one_item, tunix, maxtext, nnx, alone]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parameters_of_a_run_of_any_library_are_found(layout, tmp_path):
    layout(tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.is_plain
    assert run.steps == list(STEPS)
    plan = run.plan(TARGET)
    assert plan.noise == pytest.approx(0.3)
    plan.write(tmp_path / "out")
    inside = layout in (flax_v0, flax_in_v1, maxtext)  # Linen's variables
    like = {"params": LIKE} if inside else LIKE
    made = ocp.load(tmp_path / "out", like, checkpointable_name="params")
    made = made["params"] if inside else made
    np.testing.assert_array_equal(made["layers"][0]["kernel"], EXACT.astype(np.float32))
    assert made["bias"].dtype == jnp.bfloat16
    assert made["n"] == 40
    assert checkpoint.restore_averages(tmp_path / "out", like)


def test_several_places_are_listed_and_one_argument_says_which(tmp_path):
    for step in STEPS:
        nets = {net: {"params": {"w": np.full(2, float(step))}} for net in ("gen", "disc")}
        ocp.save(tmp_path / "run" / str(step), nets)
    with pytest.raises(ValueError, match=r"several places.*--params NODE.*state/disc/params, st"):
        Run.open(tmp_path / "run")
    assert Run.open(tmp_path / "run", params="gen/params").base.leaves.keys() == {("w",)}
    for name, told in (("params", "several nodes"), ("other", "no node")):
        with pytest.raises(ValueError, match=f"params='{name}' is {told} of .*. Pass one of state"):
            Run.open(tmp_path / "run", params=name)
    ocp.save_checkpointables(tmp_path / "none" / "1", {"opt": {"m": np.ones(2)}, "rng": np.ones(2)})
    with pytest.raises(ValueError, match="has parameters nowhere"):
        Run.open(tmp_path / "none")


def test_plain_parameters_beside_averages_are_merged_when_that_is_asked(tmp_path):
    tx = emaopt.ema(emaopt.power(1), ledger=True)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        for step in STEPS:
            params = {"w": np.full(2, float(step), np.float32)}
            checkpoint.save(checkpointer, step, params, tx.init({"w": jnp.zeros(2)}))
    run = Run.open(tmp_path / "run", params="params")
    run.plan(TARGET).write(tmp_path / "out")
    made = checkpoint.restore_params(tmp_path / "out", {"w": np.zeros(2, np.float32)})
    np.testing.assert_array_equal(made["w"], np.full(2, 30, np.float32))


def flat(step):
    params = params_of(step)
    return {"layers/0/kernel": jnp.asarray(params["layers"][0]["kernel"]), "bias": params["bias"]}


def save_shards(run, step):
    directory = run / f"checkpoint-{step}"
    directory.mkdir(parents=True)
    names = {}
    for i, (name, x) in enumerate(flat(step).items()):
        names[name] = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: x}, directory / names[name])
    about = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(about))


def test_safetensors_files_are_merged(tmp_path):
    (tmp_path / "files").mkdir()
    for step in STEPS:
        save_file(flat(step), tmp_path / "files" / f"model_{step}.safetensors")
        save_shards(tmp_path / "shards", step)
    save_file(flat(1), tmp_path / "files" / "best.safetensors")  # it has no step
    for name in ("files", "shards"):
        run = Run.open(tmp_path / name)
        assert run.steps == list(STEPS)
        run.plan(TARGET).write(tmp_path / f"{name}.safetensors")
        made = load_file(tmp_path / f"{name}.safetensors")
        np.testing.assert_array_equal(made["layers/0/kernel"], EXACT.astype(np.float32))
        assert made["bias"].dtype == jnp.bfloat16
    run.plan(TARGET).write(tmp_path / "orbax")
    made = ocp.load(tmp_path / "orbax", checkpointable_name="params")
    np.testing.assert_array_equal(made["layers"]["0"]["kernel"], EXACT.astype(np.float32))
    with pytest.raises(ValueError, match=r"params='x' says where .* of safetensors. Leave it out"):
        Run.open(tmp_path / "files", params="x")
    (tmp_path / "shards" / "checkpoint-40" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00001-of-00002.safetensors. Copy all shar"):
        Run.open(tmp_path / "shards")


def run_in_json(capsys, *arguments):
    main(["merge", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run = tmp_path_factory.mktemp("plain") / "run"
    for step in STEPS:
        ocp.save(run / str(step), {"params": params_of(step)})
    return run


SHAPES = {
    "--mean": ([0.25, 0.25, 0.25, 0.25], STEPS),
    "--linear --last 2": ([0.5, 0.5], (30, 40)),
    "--one-minus-sqrt 20": ([0.5**0.5, 1 - 0.5**0.5], (30, 40)),
    "--cosine --window 30": ([0.25, 0.5, 0.25], (20, 30, 40)),
    "--factors 0.75,0.25": ([0.25, 0.5, 0.25], (20, 30, 40)),
    "--mean --every 15": ([0.5, 0.5], (20, 40)),
    "--window 30 --at 30": ([1 / 3] * 3, (10, 20, 30)),
    "--mean 75%": ([1 / 3] * 3, (20, 30, 40)),
    "--linear --window 52.5%": ([0.5, 0.5], (30, 40)),
}


@pytest.mark.parametrize("options", SHAPES)
def test_the_factors_stand_on_the_checkpoints(options, plain, tmp_path, capsys):
    factors, steps = SHAPES[options]
    told = run_in_json(capsys, plain, *options.split(), tmp_path / "out")
    assert told["noise"] == pytest.approx(np.square(factors).sum())
    assert told["residual"] == 0
    kernels = [np.float64(params_of(s)["layers"][0]["kernel"]) for s in steps]
    made = ocp.load(tmp_path / "out", LIKE, checkpointable_name="params")["layers"][0]["kernel"]
    np.testing.assert_allclose(made, np.tensordot(factors, kernels, 1), rtol=2e-7)
    about = ocp.checkpointables_metadata(tmp_path / "out").custom_metadata["merged"]
    assert about["target"] == told["target"]


def test_what_is_within_reach_is_listed(plain, capsys):
    main(["merge", str(plain)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 checkpoints of plain parameters, at the steps 10 to 40"
    assert lines[2].split() == ["target", "mean", "age", "noise", "that", "remains"]
    assert "--mean --last 4                    15                0.25" in lines
    rows = {row["target"]: row for row in run_in_json(capsys, plain)["targets"]}
    assert rows["--one-minus-sqrt --last 2"]["noise"] == pytest.approx(2 - 2**0.5)


def test_a_curve_has_a_checkpoint_for_each_window(plain, tmp_path, capsys):
    told = run_in_json(capsys, plain, "--mean", "--last", "2", "--curve")
    assert [row["at"] for row in told["curve"]] == [20, 30, 40]
    arguments = [plain, "--mean", "--last", "2", "--curve", tmp_path / "out"]
    run_in_json(capsys, *arguments)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["20", "30", "40"]
    made = ocp.load(tmp_path / "out" / "30", LIKE, checkpointable_name="params")
    kernels = [params_of(s)["layers"][0]["kernel"] for s in (20, 30)]
    np.testing.assert_allclose(made["layers"][0]["kernel"], np.mean(kernels, 0), rtol=1e-6)
    (tmp_path / "out" / "30").rename(tmp_path / "gone")
    run_in_json(capsys, *arguments)  # goes on where it was interrupted
    assert (tmp_path / "out" / "30").exists()
    assert run_in_json(capsys, plain, "--window", "20", "--curve")["curve"] == told["curve"]
    told = run_in_json(capsys, plain, "--mean", "50%", "--curve")  # the last 1, 1, 2 and 2
    assert {row["at"]: row["noise"] for row in told["curve"]} == {30: 0.5, 40: 0.5}
    assert told["target"] == "--mean 50%"


def test_soups_are_means_of_runs(plain, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    save_file({"w": jnp.ones(2)}, other)
    told = run_in_json(capsys, plain / "10", plain / "20", plain, tmp_path / "out")
    assert told["weights"] == [1 / 3] * 3
    assert told["runs"][2] == str(plain / "40")
    made = ocp.load(tmp_path / "out", LIKE, checkpointable_name="params")
    kernels = [params_of(s)["layers"][0]["kernel"] for s in (10, 20, 40)]
    np.testing.assert_allclose(made["layers"][0]["kernel"], np.mean(kernels, 0), rtol=1e-6)
    main(["merge", str(other), str(other), str(tmp_path / "x.safetensors"), "--weights", "-2,3"])
    assert "3         " in capsys.readouterr().out
    assert load_file(tmp_path / "x.safetensors")["w"].tolist() == [1, 1]


def test_of_a_checkpoint_with_averages_a_soup_takes_these(tmp_path):
    tx = emaopt.ema(0.5)
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        for step, value in ((1, 2.0), (2, 4.0)):
            state = tx.init({"w": jnp.full(2, value), "n": jnp.int32(0)})
            checkpoint.save(checkpointer, step, {"w": jnp.zeros(2), "n": jnp.int32(step)}, state)
    soup([tmp_path / "run" / "1", tmp_path / "run" / "2"]).write(tmp_path / "averages")
    soup([tmp_path / "run"], params="params").write(tmp_path / "plain")
    for name, value in (("averages", 3), ("plain", 0)):
        made = ocp.load(tmp_path / name, checkpointable_name="params")
        assert made["w"].tolist() == [value, value]
        assert made["n"] == 2


MISTAKES = {
    "{plain} --mean --curve --sigma-rel 0.1": "not allowed with argument",
    "{plain} --sigma-rel 0.1 --curve": "--curve needs a window that slides, such as --mean --last",
    "{plain} --mean --last 9 --curve": "--mean --last 9 is longer than the run, or shorter than",
    "{plain} --mean --last 9 new": "--mean --last 9 needs 9 checkpoints, and there are 4, at the",
    "{plain} --mean 5 new": "--mean 5 needs 2 checkpoints, and there are 1, at the steps 40",
    "{plain} --mean 5 --window 9 new": "--mean 5 is a window already. Leave out --window",
    "{plain} --mean 1% new": "--mean 1% needs 2 checkpoints, and there are 1, at the steps 40",
    "{plain} --mean 1% --curve": "--mean 1% is longer than the run, or shorter than from o",
    "{plain} --window 101% new": "'101%' is no share of the updates, such as 10%",
    "{plain} --window x% new": "'x%' is no share of the updates, such as 10%",
    "{plain} --factors 0.5,0.6,0.1 new": r"factors=\[0.5, 0.6, 0.1\] rises",
    "{plain} --factors 0.5,x new": "'0.5,x' is no list of numbers",
    "{plain} --half-life 20 new": "error 2 is above --threshold 0.5. Of plain parameters ask",
    "{plain} --mean {plain}": "plain.*/run exists. Pass another DESTINATION",
    "{plain} --mean --at 35 new": r"step=35 is not in .*run. Pass one of \[10, 20, 30, 40\]",
    "{plain} {plain} new --weights 1,2": "are 2 numbers with the sum 3, for 2 checkpoints. Pass a",
    "{plain} new --weights 1": "--weights is for several runs. Pass RUN RUN OUT",
    "{plain} {plain} new --mean": "--mean is for the checkpoints of one run, and several are given",
    "{plain} lacks new": "is of another tree than .*lacks/1: it has also layers/0/kernel, n",
    "shapes --mean new": r"w has shape \(2,\) in .*shapes/1, and \(3,\) in .*shapes/2. Leave one",
    "trees --mean new": "trees/1 is of another tree than .*trees/2: it lacks v. Leave it out, or",
    "nan --mean new": "nan/1 is not finite at leaf 'b/w'. Move that checkpoint to another place",
    "{plain} text new.safetensors": "is of another tree",
    "text text strings.safetensors": "name is a string, which a .safetensors file cannot hold",
    "kinds --mean new": "w is whole numbers in .*kinds/1, and complex in .*kinds/3. Leave one",
    "kinds/2 kinds/3 new": "w is real in .*kinds/2, and complex in .*kinds/3. Leave one out, or",
    "{plain}/10 --mean new": "run/10 is one checkpoint. Pass the run that it is of, or several ch",
    "twice/a-1.safetensors": "a-1.safetensors is one checkpoint. Pass the run that it is of, or",
    "{plain} --mean {plain}/50": "run/50 would be taken for a step of the run .*/run. Pass anothe",
    "{plain} --mean {plain}/40/new": "40/new is inside the checkpoint .*run/40. Pass another path",
    "twice --mean new": "twice has step 1 twice: 'a-1.safetensors' and 'b-1.safetensors'. Move one",
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Runs that something is wrong with."""
    root = tmp_path_factory.mktemp("odd")

    def save(path, **tree):
        ocp.save(root / path, {"params": tree})

    save("lacks/1", bias=np.ones(2))
    save("shapes/1", w=np.ones(2)), save("shapes/2", w=np.ones(3))
    save("trees/1", w=np.ones(2)), save("trees/2", w=np.ones(2), v=np.ones(1))
    save("nan/1", a=np.ones(2), b={"w": np.array([1, np.nan])})
    save("nan/2", a=np.ones(2), b={"w": np.ones(2)})
    save("text/1", name="x", w=np.ones(2))
    for step, value in enumerate((np.int8(1), np.float32(1), np.complex64(1)), 1):
        save(f"kinds/{step}", w=np.full(2, value))
    (root / "twice").mkdir()
    for name in "ab":
        save_file({"w": jnp.ones(2)}, root / "twice" / f"{name}-1.safetensors")
    return root


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, plain, odd, monkeypatch, capsys):
    monkeypatch.chdir(odd)
    before = sorted(odd.iterdir())
    with pytest.raises(SystemExit) as exit_:
        main(["merge", *arguments.format(plain=plain).split()])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(MISTAKES[arguments], line), line
    assert sorted(odd.iterdir()) == before


def test_a_sum_that_its_dtype_does_not_hold_is_refused(tmp_path):
    for step, value in ((1, -60000), (2, 60000)):
        ocp.save(tmp_path / "run" / str(step), {"params": {"w": np.full(2, value, np.float16)}})
    with pytest.raises(ValueError, match=r"the sum is too large for float16 at leaf 'w'. Pass ano"):
        soup([tmp_path / "run" / "1", tmp_path / "run" / "2"], [-1, 2]).write(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_curve_does_not_go_on_in_another_one(plain, tmp_path, capsys):
    main(["merge", str(plain), "--mean", "--last", "3", "--curve", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main(["merge", str(plain), "--cosine", "--last", "3", "--curve", str(tmp_path / "out")])
    assert "out/30 exists, and is another one. Pass another OUT" in capsys.readouterr().err
