"""Every error about a checkpoint says what was found, and the fix."""

import jax
import jax.numpy as jnp
import optax
import pytest
from errors import check
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
TX = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(0.99))
STATE = TX.init(PARAMS)
TWO = optax.named_chain(("fast", emaopt.ema(0.9)), ("slow", emaopt.ema(0.999))).init(PARAMS)
SWAPPED = emaopt.swap(PARAMS, STATE)
LINEN = {"params": PARAMS, "batch_stats": {"mean": jnp.zeros(3)}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of one checkpoint, a run without any, and one of TF1."""
    folder = tmp_path_factory.mktemp("runs")
    with ocp.training.Checkpointer(folder / "run") as checkpointer:
        checkpoint.save(checkpointer, 10, PARAMS, STATE)
    (folder / "empty").mkdir()
    (folder / "tf1").mkdir()
    (folder / "tf1" / "model.ckpt-10.index").touch()
    return folder


def restore(path, like=PARAMS, **options):
    return lambda runs: checkpoint.restore_averages(runs / path, like, **options)


def saved(params=PARAMS, opt_state=STATE):
    return lambda runs: checkpoint.save(
        ocp.training.Checkpointer(runs / "run"), 20, params, opt_state
    )


def resumed(path="run", tx=TX, **options):
    def do(runs):
        with ocp.training.Checkpointer(runs / path) as checkpointer:
            checkpoint.resume(checkpointer, PARAMS, tx.init(PARAMS), **options)

    return do


CHECKPOINTS = {
    "a relative path": (
        lambda runs: checkpoint.restore_averages("run", PARAMS),
        "path='run' is relative",
        "Pass an absolute path",
    ),
    "a path that is not there": (
        restore("rnu"),
        "path='.*rnu' is not a directory",
        "Pass a checkpoint or run",
    ),
    "a run without a checkpoint": (
        restore("empty"),
        "empty holds no finished checkpoint",
        "Pass another path",
    ),
    "a first run, resumed": (
        resumed("new"),
        "new holds no finished checkpoint",
        "Pass another path",
    ),
    "a step that was not saved": (
        resumed(step=11),
        "step=11 is not in .*run",
        r"Pass one of \[10\]",
    ),
    "a path for the checkpointer": (
        lambda runs: checkpoint.save(runs / "run", 20, PARAMS, STATE),
        "checkpointer is a PosixPath",
        r"Pass .*orbax\.checkpoint\.v1\.training\.Checkpointer\(directory\)",
    ),
    "a path to save to in the background": (
        lambda runs: checkpoint.save_async(str(runs / "run"), 20, PARAMS, STATE),
        "checkpointer is a str",
        r"Checkpointer\(directory\)",
    ),
    "a path to resume from": (
        lambda runs: checkpoint.resume(str(runs / "run"), PARAMS, STATE),
        "checkpointer is a str",
        r"Checkpointer\(directory\)",
    ),
    "swapped before it is saved": (
        saved(*SWAPPED),
        "opt_state is swapped already",
        "Pass the state before emaopt.swap; save calls it",
    ),
    "nothing averaged to save": (
        saved(opt_state=emaopt.adam().init(PARAMS)),
        "opt_state holds no average",
        r"Put emaopt\.ema",
    ),
    "several averages to save and no name": (
        saved(opt_state=TWO),
        "name is missing",
        "Pass name=, one of: 'fast', 'slow'",
    ),
    "a name that no saved average has": (
        restore("run", name="slow"),
        "name='slow' is no average of checkpoint .*10",
        "Pass .* opt_state/1",
    ),
    "other parameters than those saved": (
        restore("run", {"kernel": PARAMS["kernel"], "biases": PARAMS["bias"]}),
        "biases is missing; close: .*bias",
        "Pass trees like those that were saved",
    ),
    "parameters of another shape": (
        restore("run", PARAMS | {"bias": jnp.zeros(4)}),
        r"params/bias has shape \(3,\), asked for as \(4,\)",
        "Pass trees like those that were saved",
    ),
    "Linen's variables to restore": (
        restore("run", LINEN),
        "params/bias is missing",
        r"pass that part alone, like\['params'\]",
    ),
    "another optimizer than that saved": (
        resumed(tx=optax.chain(emaopt.adam(), emaopt.ema(0.99))),
        "0/slots/m/bias is missing",
        "Pass trees like those that were saved",
    ),
    "no average in the chain that resumes": (
        resumed(tx=emaopt.momentum(0.1, 0.9)),
        r"checkpoint .* has its averages at \['1'\], opt_state has \[\]",
        "Pass the state of the optimizer that was saved",
    ),
    "a directory of TF1": (restore("tf1"), "tf1' is of TF1", r"Call emaopt\.tf1\.load"),
    "a prefix of TF1": (
        restore("tf1/model.ckpt-10"),
        "model.ckpt-10' is of TF1",
        r"Call emaopt\.tf1\.load, or emaopt convert",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_error_about_a_checkpoint_names_what_was_found_and_the_fix(name, runs):
    do, said, fix = CHECKPOINTS[name]
    check(lambda: do(runs), f".*{said}", fix)  # a path comes first


@pytest.mark.parametrize("path", ["run", "run/10"])
def test_a_checkpoint_of_orbax_is_not_taken_for_one_of_tf1(path, runs):
    pytest.importorskip("tensorflow")
    from emaopt import tf1

    fix = r"Call emaopt\.checkpoint\.resume or restore_averages"
    check(lambda: tf1.load(runs / path, PARAMS, STATE), f"path='.*{path}' is of Orbax", fix)


def test_in_a_run_that_tf1_began_the_checkpoints_of_orbax_are_found(tmp_path):
    (tmp_path / "model.ckpt-10.index").touch()
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 20, PARAMS, STATE)
    averages = checkpoint.restore_averages(tmp_path, PARAMS)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, averages, PARAMS))
