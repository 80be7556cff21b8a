"""A TF1 run with sparse gradients, taken over and handed back (`golden/make_clicks.py`)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt import checkpoint


tf = pytest.importorskip("tensorflow")

from emaopt import tf1  # noqa: E402


RUN = Path(__file__).parents[2] / "golden" / "clicks"
TABLES = emaopt.matching("weights$")
TX = optax.chain(
    emaopt.ftrl(0.5, l1_regularization_strength=0.02),
    emaopt.ema(emaopt.warmup(0.99), rows=TABLES),
)
PARAMS = {
    "bias": jnp.zeros(1),
    "user": {"weights": jnp.ones((500, 1))},
    "page": {"weights": jnp.ones((200, 1))},
}


@pytest.fixture(scope="module")
def run():
    with np.load(RUN / "run.npz") as stored:
        return dict(stored)


@jax.jit
def step(params, opt_state, users, pages, clicks):
    tables = {"user/weights": emaopt.rows(users), "page/weights": emaopt.rows(pages)}
    small, small_state = emaopt.take((params, opt_state), tables)

    def loss(small):
        logits = small["bias"]
        for field in ("user", "page"):
            positions = tables[f"{field}/weights"].positions
            logits = logits + small[field]["weights"][positions][:, 0]
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, clicks))

    updates, small_state = TX.update(jax.grad(loss)(small), small_state, small)
    small = optax.apply_updates(small, updates)
    return emaopt.put((params, opt_state), (small, small_state), tables)


def trained(params, opt_state, run, first, last):
    for t in range(first, last):
        batch = run["ids/user"][t], run["ids/page"][t], run["clicks"][t]
        params, opt_state = step(params, opt_state, *batch)
    return params, opt_state


def in_tf1(path):
    reader = tf.train.load_checkpoint(str(path))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def assert_tf1(path, run):
    """The file has the variables of TF1's run after its last step."""
    found = in_tf1(path)
    want = {name: x for name, x in run.items() if name.split("/")[0] not in ("ids", "clicks")}
    assert found.keys() == want.keys()
    for name, value in want.items():
        allowed = 1e-5 * np.abs(value) + 1e-5 * np.max(np.abs(value))
        assert np.all(np.abs(found[name] - value) <= allowed), name
        assert found[name].dtype == value.dtype


@pytest.mark.slow
@pytest.mark.parametrize("abstract", [False, True])
def test_loaded_trained_on_and_handed_back_it_is_tf1s_own_run(abstract, run, tmp_path):
    like = PARAMS, TX.init(PARAMS)
    if abstract:
        like = jax.eval_shape(lambda tree: tree, like)
    params, opt_state = tf1.load(RUN / "model.ckpt-20", *like)
    assert emaopt.global_step(opt_state) == 20
    params, opt_state = trained(params, opt_state, run, 20, 40)
    tf1.save(tmp_path / "model.ckpt-40", params, opt_state)
    assert_tf1(tmp_path / "model.ckpt-40", run)
    assert np.array_equal(params["user"]["weights"] == 0, run["user/weights"] == 0)


@pytest.mark.slow
def test_in_between_it_can_be_an_orbax_checkpoint(run, tmp_path):
    """Saved with the averages under the original names, which are up to date there."""
    from orbax.checkpoint import v1 as ocp

    carry = tf1.load(RUN / "model.ckpt-20", PARAMS, TX.init(PARAMS))
    params, opt_state = trained(*carry, run, 20, 30)
    averaged = emaopt.average(params, opt_state)
    with ocp.training.Checkpointer(str(tmp_path / "run")) as checkpointer:
        checkpoint.save(checkpointer, 30, params, opt_state)
        loaded, state, _ = checkpoint.resume(checkpointer, PARAMS, TX.init(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    stored = checkpoint.restore_averages(tmp_path / "run", PARAMS)
    jax.tree.map(np.testing.assert_array_equal, stored, averaged)
    checkpoint.export_averages(tmp_path / "run", tmp_path / "x.safetensors")
    from safetensors.numpy import load_file

    exported = load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(exported["user/weights"], averaged["user"]["weights"])
    tf1.save(tmp_path / "x-40", *trained(loaded, state, run, 30, 40))
    assert_tf1(tmp_path / "x-40", run)


@pytest.mark.slow
def test_what_fits_is_loaded_and_a_new_average_of_rows_starts(run):
    params, opt_state, skipped = tf1.load_partial(
        RUN / "model.ckpt-20",
        PARAMS,
        TX.init(PARAMS),
        average_name="none",
    )
    assert "user/weights/none" in skipped
    averaged = emaopt.average(params, opt_state)
    jax.tree.map(np.testing.assert_array_equal, averaged, params)
    trained(params, opt_state, run, 20, 22)


@pytest.mark.slow
def test_swapped_the_averages_are_up_to_date_under_the_names_of_the_variables(run, tmp_path):
    params, opt_state = trained(
        *tf1.load(RUN / "model.ckpt-20", PARAMS, TX.init(PARAMS)), run, 20, 40
    )
    tf1.save(tmp_path / "x", params, opt_state, swapped=True)
    found = in_tf1(tmp_path / "x")
    averaged = emaopt.average(params, opt_state)
    np.testing.assert_array_equal(found["user/weights"], averaged["user"]["weights"])
    np.testing.assert_array_equal(
        found["user/weights/ExponentialMovingAverage"], params["user"]["weights"]
    )
