"""What a new user does wrong first, and what the message says: what was found, and the fix.

Some mistakes cannot be seen, and nothing here pretends to:

* `ema` before the optimizer, or outside `MultiSteps` and `apply_if_finite`: a chain's state is a
  tuple, as is a pair of states that the user holds himself, and jit sorts the dict of a
  `named_chain`. The first sentence of `ema` says where; with decay 0 a wrong place shows
  (`docs/averaging.md`), as the last test here has it.
* Raw parameters evaluated: they are a tree like any other. `docs/frameworks.md` keeps them out of
  the evaluation; checkpoints have the averages where parameters are looked for.
* 0.001 for 0.999, or a function that counts from 0: both are decays. `profile` shows of what.
* `optax.apply_updates` forgotten: the state cannot know. `apply_gradients` does not forget it.
* The state of another run of the same model, or numbers in the order of Optax's arguments.
"""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
TX = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(0.99))
STATE = TX.init(PARAMS)
TWO = optax.named_chain(("fast", emaopt.ema(0.9)), ("slow", emaopt.ema(0.999))).init(PARAMS)
SWAPPED = emaopt.swap(PARAMS, STATE)
LINEN = {"params": PARAMS, "batch_stats": {"mean": jnp.zeros(3)}}
HALF = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)


class Model(nnx.Module):
    def __init__(self):
        self.dense, self.drop = (
            nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
            nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
        )


def loss(params):
    return jnp.sum(params["kernel"])


def loss_and_logits(params):
    return loss(params), params["bias"]


def masked(pattern):
    return optax.masked(emaopt.ema(0.99), emaopt.matching(pattern)).init(PARAMS)


def train_state():
    return TrainState.create(apply_fn=None, params=PARAMS, tx=TX)


# what is done, what is said to be wrong, and what to do
MISTAKES = {
    "params not passed to update": (
        lambda: TX.update(GRADS, STATE),
        "params is missing: ema",
        r"Call tx\.update\(grads, state, params\)",
    ),
    "a decay in percent": (lambda: emaopt.ema(99.9), r"decay=99\.9", "Pass a number from 0 to 1"),
    "a decay above 1": (lambda: emaopt.warmup(1.001), r"decay=1\.001", "a number from 0 to 1"),
    "a decay that was not called": (
        lambda: emaopt.ema(emaopt.warmup),
        "decay=warmup is a function that does not make a number of t",
        r"call .* first: warmup\(0\.999\)",
    ),
    "a decay rounded to bfloat16": (
        lambda: emaopt.ema(jnp.bfloat16(0.999)),
        r"decay=1\.0 has dtype bfloat16",
        "Pass a Python number",
    ),
    "a decay rounded by Optax": (
        lambda: optax.inject_hyperparams(emaopt.ema)(decay=0.999).init(HALF),
        r"decay=1\.0 has dtype bfloat16",
        r"hyperparam_dtype=jnp\.float32",
    ),
    "a decay taken for a schedule by Optax": (
        lambda: optax.inject_hyperparams(emaopt.ema)(decay=emaopt.warmup(0.999)).init(PARAMS),
        "t=Array.0, dtype=int32. is out of range",
        'static_args="decay"',
    ),
    "a decay that is started later by hand": (
        lambda: emaopt.ema(lambda t: jnp.where(t < 100, 0.0, emaopt.power(7)(t - 99))),
        "t=Array.-98, dtype=int32. is out of range",
        r"To start later: emaopt\.after\(n, decay\)",
    ),
    "the warm-up of an average for the learning rate": (
        lambda: emaopt.adam(emaopt.warmup(0.001)),
        "learning_rate is the decay of an average",
        r"Pass a number or a schedule: .*warmup_constant_schedule",
    ),
    "a decay that looks at t in Python": (
        lambda: emaopt.ema(lambda t: 0.9 if t < 100 else 0.999),
        "decay is a function that looks at the value of t",
        r"jnp\.where",
    ),
    "every with its arguments exchanged": (
        lambda: emaopt.every(0.999, 10),
        r"n=0\.999",
        "Pass a whole number",
    ),
    "exponential_decay with TF1's global_step": (
        lambda: emaopt.exponential_decay(0.1, 5, 1000, 0.96),
        r"staircase=0\.96",
        "no global_step here",
    ),
    "exponential_decay over no steps": (
        lambda: emaopt.exponential_decay(0.1, 0, 0.96),
        "decay_steps=0",
        "Pass a number above 0",
    ),
    "a negative norm": (
        lambda: emaopt.clip_by_global_norm(-1.0),
        r"clip_norm=-1\.0",
        "Pass a number above 0",
    ),
    "no ema in the chain": (
        lambda: emaopt.average(PARAMS, emaopt.adam().init(PARAMS)),
        "opt_state holds no average",
        r"Put emaopt\.ema\(decay\) last in the optax\.chain",
    ),
    "Optax's ema, which averages updates": (
        lambda: emaopt.average(PARAMS, optax.chain(optax.sgd(0.1), optax.ema(0.9)).init(PARAMS)),
        "opt_state holds no average",
        r"Put emaopt\.ema",
    ),
    "no average to move to the host": (
        lambda: emaopt.on_host(emaopt.adam().init(PARAMS)),
        "opt_state holds no average",
        r"Put emaopt\.ema",
    ),
    "average with its arguments exchanged": (
        lambda: emaopt.average(STATE, PARAMS),
        "opt_state holds no average",
        "pass the state .* after params",
    ),
    "the chain for its state": (
        lambda: emaopt.average(PARAMS, TX),
        "opt_state holds no average",
        "pass the state that belongs to that chain",
    ),
    "a name misspelt": (
        lambda: emaopt.average(PARAMS, TWO, "slwo"),
        "name='slwo'",
        "Did you mean 'slow'.*'fast', 'slow'",
    ),
    "a position for a name": (
        lambda: emaopt.average(PARAMS, STATE, 1),
        "name=1 is not an average",
        "Did you mean '1'",
    ),
    "several averages and no name": (
        lambda: emaopt.average(PARAMS, TWO),
        "name is missing",
        "Pass name=, one of: 'fast', 'slow'",
    ),
    "a mask that leaves out all": (
        lambda: emaopt.average(PARAMS, masked("kernels")),
        "pattern='kernels' is found in no name of the tree",
        "Pass a pattern of names that are there: 'bias', 'kernel'",
    ),
    "the average of swapped parameters": (
        lambda: emaopt.average(*SWAPPED),
        "opt_state is swapped: the averages are in params",
        "Evaluate params, or call .*swap",
    ),
    "training on swapped parameters": (
        lambda: TX.update(GRADS, SWAPPED[1], SWAPPED[0]),
        "opt_state is swapped: its shadow holds the parameters",
        r"Call params, opt_state = emaopt\.swap\(params, opt_state\)",
    ),
    "a TrainState for its parameters": (
        lambda: emaopt.average(train_state(), train_state().opt_state),
        "params has the leaves that opt_state averages below 'params'",
        "Pass that part",
    ),
    "Linen's variables for the parameters": (
        lambda: emaopt.average(LINEN, STATE),
        "params has the leaves that opt_state averages below 'params'",
        "Pass that part",
    ),
    "an NNX model for its parameters": (
        lambda: TX.init(Model()),
        "params has dtype uint32 at leaf 'drop/rngs/count'",
        r"nnx\.state\(model, nnx\.Param\)",
    ),
    "an NNX optimizer of everything": (
        lambda: nnx.Optimizer(Model(), TX, wrt=nnx.Variable),
        "params has dtype uint32",
        r"nnx\.Param",
    ),
    "the state of another model": (
        lambda: emaopt.average({"kernel": PARAMS["kernel"], "scale": PARAMS["bias"]}, STATE),
        "params has no leaf 'bias'.* it has 'kernel', 'scale'",
        r"Pass the parameters that tx\.init was given",
    ),
    "the state of a model of another size": (
        lambda: emaopt.average(PARAMS | {"bias": jnp.zeros(4)}, STATE),
        r"params has shape \(4,\) at leaf 'bias' where the average has \(3,\)",
        "made from the same parameters",
    ),
    "integer parameters": (
        lambda: emaopt.adam().init(PARAMS | {"bias": jnp.arange(3)}),
        "params has dtype int32 at leaf 'bias'",
        r"optax\.masked",
    ),
    "moving_average's arguments exchanged": (
        lambda: emaopt.moving_average(0.9).update(emaopt.moving_average(0.9).init(PARAMS), PARAMS),
        "state is a dict, not an average",
        "Pass the EmaState",
    ),
    "no ledger": (
        lambda: emaopt.ledgers(STATE),
        "opt_state holds no ledger",
        r"emaopt\.ema\(decay, ledger=True\)",
    ),
    "an optimizer that was not called": (
        lambda: emaopt.minimize(loss, emaopt.adam),
        "tx is a function",
        r"Pass what a call made.* emaopt\.adam\(\)",
    ),
    "TF1's apply_gradients": (
        lambda: emaopt.apply_gradients(GRADS, TX, PARAMS, STATE),
        "tx is a dict, not a gradient transformation",
        "Pass what a call made",
    ),
    "all that compute_gradients returns for the gradients": (
        lambda: emaopt.apply_gradients(TX, emaopt.compute_gradients(loss, PARAMS), PARAMS, STATE),
        "grads does not have the tree structure of params: .*only in grads: 0, 1/bias, 1/kernel",
        "Pass params and grads",
    ),
    "a loss with more than a value": (
        lambda: emaopt.minimize(loss_and_logits, TX)(PARAMS, STATE),
        r"loss returns \(",
        "pass has_aux=True",
    ),
}


def check(do, said, fix):
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        do()
    message = str(raised.value)
    assert re.search(f"(?s){said}", message)
    assert re.search(f"(?s){fix}", message)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_tells_what_was_found_and_the_fix(mistake):
    check(*MISTAKES[mistake])


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


ON_DISK = {
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


@pytest.mark.parametrize("mistake", ON_DISK)
def test_the_message_about_a_checkpoint_tells_what_was_found_and_the_fix(mistake, runs):
    do, said, fix = ON_DISK[mistake]
    check(lambda: do(runs), said, fix)


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


def test_parameters_given_to_a_step_are_used_up():
    step = emaopt.minimize(loss, TX)
    params, opt_state = jax.tree.map(jnp.copy, (PARAMS, STATE))
    step(params, opt_state)
    with pytest.raises(RuntimeError, match="deleted"):  # JAX's own words
        jax.device_get(params)


def test_what_looks_like_a_mistake_and_is_none():
    model = Model()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    averages = emaopt.average(nnx.state(model, nnx.Param), optimizer)
    assert emaopt.names(averages) == emaopt.names(nnx.state(model, nnx.Param))
    assert emaopt.average(PARAMS, train_state())["kernel"].shape == (2, 3)
    start = lambda decay: emaopt.moving_average(decay).init({"frozen": True, "phase": 1j}).step
    assert start(jnp.bfloat16(0.5)) == jax.jit(start)(jnp.bfloat16(0.5)) == 0
    whole = emaopt.gradient_descent(1)  # a whole number for the learning rate
    updates, _ = whole.update(GRADS, whole.init(PARAMS))
    assert updates["bias"].tolist() == [-1, -1, -1]
    assert emaopt.average({}, emaopt.ema(0.9).init({})) == {}


COPY = emaopt.ema(0)
SGD = emaopt.gradient_descent(0.1)
# the chain; whether the average is the parameters; whether it counts the steps that were made
PLACES = {
    "last": (optax.chain(SGD, COPY), True, True),
    "before the optimizer": (optax.chain(COPY, SGD), False, True),
    "before the clipping": (optax.chain(SGD, COPY, optax.clip(0.01)), False, True),
    "inside MultiSteps": (optax.MultiSteps(optax.chain(SGD, COPY), 2), True, True),
    "outside MultiSteps": (optax.chain(optax.MultiSteps(SGD, 2), COPY), True, False),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_place_shows_with_decay_0(place):
    tx, copies, counts = PLACES[place]
    params, opt_state = PARAMS, tx.init(PARAMS)
    made = 0
    for _ in range(2):
        before = params
        with jax.numpy_dtype_promotion("standard"):  # MultiSteps mixes integers and floats
            params, opt_state = emaopt.apply_gradients(tx, GRADS, params, opt_state)
        made += not jax.tree.all(jax.tree.map(jnp.array_equal, before, params))
    (state,) = emaopt.averages(opt_state).values()
    averaged = emaopt.average(params, opt_state)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, averaged, params)) == copies
    assert (state.step == made) == counts
