"""Resume with something changed: what is stored is restored, and what is not is told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import close, equal
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


PARAMS = {"conv": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "w": jnp.ones(3)}
OLD = optax.chain(emaopt.adam(0.1), emaopt.ema(0.5))


def train(tx, params, steps=3):
    opt_state = tx.init(params)
    for t in range(steps):
        grads = jax.tree.map(lambda p, t=t: jnp.cos(p) + t, params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    params, opt_state = train(OLD, PARAMS)
    with ocp.training.Checkpointer(path) as checkpointer:
        checkpoint.save(checkpointer, 3, params, opt_state, epoch=7)
    return path, params, opt_state


def resume(run, tx, params=PARAMS, **rest):
    with ocp.training.Checkpointer(run[0]) as checkpointer:
        return checkpoint.resume_partial(checkpointer, params, tx.init(params), **rest)


@pytest.mark.slow
def test_what_fits_as_a_whole_is_resume(run):
    _, params, opt_state = run
    got = resume(run, OLD, epoch=0)
    equal(got[:2], (params, opt_state))
    assert got[2:] == ({"epoch": 7}, {})


def test_another_optimizer_keeps_parameters_step_and_average(run):
    tx = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(0.5))
    params, opt_state, rest, skipped = resume(run, tx)
    equal(params, run[1])
    equal(opt_state[1], run[2][1])
    assert opt_state[0].step == 3
    assert not np.any(opt_state[0].slots["momentum"]["w"])
    assert skipped["opt_state/0/slots/momentum/w"] == "is not in the checkpoint"
    assert rest == {}


def test_an_average_is_switched_off(run):
    params, opt_state, _, skipped = resume(run, emaopt.adam(0.1))
    equal((params, opt_state), (run[1], run[2][0]))
    assert "opt_state/1" in skipped


def test_an_average_is_switched_on_and_starts_as_the_restored_parameters(tmp_path):
    params, opt_state = train(emaopt.adam(0.1), PARAMS)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_checkpointables(3, {"params": params, "opt_state": opt_state})
        fresh = jax.tree.map(jnp.zeros_like, PARAMS)
        got, state, _, skipped = checkpoint.resume_partial(checkpointer, fresh, OLD.init(fresh))
    equal(got, params)
    equal(state[0], opt_state)
    equal(emaopt.average(got, state), params)
    assert state[1].step == 0
    assert skipped["opt_state/1/shadow/w"].endswith("the average starts as params/w")
    donated = jax.jit(lambda p, s: (p, s), donate_argnums=(0, 1))(got, state)  # no shared buffer
    equal(donated[0], params)


def test_a_second_average_starts_beside_the_first(run):
    tx = optax.chain(emaopt.adam(0.1), emaopt.ema(0.5), emaopt.ema(0.9))
    params, opt_state, _, skipped = resume(run, tx)
    equal(opt_state[:2], run[2])
    equal(opt_state[2].shadow, params)
    assert set(skipped) == {
        "opt_state/2/shadow/conv/kernel",
        "opt_state/2/shadow/w",
        "opt_state/2/step",
    }


def test_another_place_in_the_chain_is_found(run):
    tx = optax.chain(
        emaopt.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.1),
        emaopt.adam(0.1),
        emaopt.heal(emaopt.ema(0.9, ledger=True)),
    )
    params, opt_state, _, skipped = resume(run, tx)
    equal(params, run[1])
    equal(opt_state[2], run[2][0])
    equal(opt_state[3].state.shadow, run[2][1].shadow)
    assert opt_state[3].state.step == 3
    assert "opt_state/3/state/ledger/age" in skipped
    assert "opt_state/2/slots/m/w" not in skipped


def test_averages_are_found_by_name(tmp_path):
    both = optax.named_chain(
        ("sgd", optax.sgd(0.1)), ("fast", emaopt.ema(0.5)), ("slow", emaopt.ema(0.9))
    )
    params, opt_state = train(both, PARAMS)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 3, params, opt_state, name="slow")
        tx = optax.chain(optax.named_chain(("slow", emaopt.ema(0.9))), optax.sgd(0.1))
        got, state, _, skipped = checkpoint.resume_partial(checkpointer, PARAMS, tx.init(PARAMS))
    equal(got, params)
    equal(emaopt.average(got, state), emaopt.average(params, opt_state, "slow"))
    assert "opt_state/fast" in skipped


@pytest.mark.many(2)
@pytest.mark.parametrize(
    "accumulator", [None, jnp.bfloat16, emaopt.compensated(), emaopt.compensated(jnp.bfloat16)]
)
def test_an_average_may_be_stored_in_another_way(run, accumulator, tmp_path):
    tx = optax.chain(emaopt.adam(0.1), emaopt.ema(0.5, accumulator_dtype=accumulator))
    params, opt_state, _, _ = resume(run, tx)
    wanted = emaopt.average(*run[1:])
    wide = accumulator is not jnp.bfloat16
    for a, b in zip(
        *map(jax.tree.leaves, (emaopt.average(params, opt_state), wanted)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5 if wide else 1e-2)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 4, params, opt_state)
        back = checkpoint.resume_partial(checkpointer, PARAMS, OLD.init(PARAMS))
    close(emaopt.average(*back[:2]), wanted, 2e-5 if wide else 1e-2)


def test_a_new_head_stays_as_passed_with_its_average(run):
    like = {**jax.tree.map(jnp.zeros_like, PARAMS), "head": jnp.full(2, 5.0)}
    params, opt_state, _, skipped = resume(run, OLD, like)
    equal({k: params[k] for k in PARAMS}, run[1])
    np.testing.assert_array_equal(params["head"], [5.0, 5.0])
    np.testing.assert_array_equal(opt_state[1].shadow["head"], [5.0, 5.0])
    equal({k: opt_state[1].shadow[k] for k in PARAMS}, run[2][1].shadow)
    assert opt_state[1].step == 3
    assert skipped["params/head"] == "is not in the checkpoint"


def test_a_head_of_another_shape_stays_as_passed(run):
    like = {**PARAMS, "w": jnp.full(4, 5.0)}
    params, opt_state, _, skipped = resume(run, OLD, like)
    np.testing.assert_array_equal(params["w"], np.full(4, 5.0))
    np.testing.assert_array_equal(opt_state[1].shadow["w"], np.full(4, 5.0))
    np.testing.assert_array_equal(params["conv"]["kernel"], run[1]["conv"]["kernel"])
    assert skipped["params/w"] == "has shape (3,) in the checkpoint, (4,) here"


def test_a_leaf_that_was_dropped_is_told(run):
    _, _, _, skipped = resume(run, OLD, {"w": jnp.ones(3)})
    assert skipped["params/conv/kernel"] == "is in the checkpoint, and not in params"


def test_abstract_leaves_are_restored_or_refused(run):
    abstract = jax.eval_shape(lambda: PARAMS)
    state = jax.eval_shape(OLD.init, PARAMS)
    with ocp.training.Checkpointer(run[0]) as checkpointer:
        got = checkpoint.resume_partial(checkpointer, abstract, state)
        equal(got[:2], run[1:])
        more = {**abstract, "head": jax.ShapeDtypeStruct((2,), jnp.float32)}
        with pytest.raises(checkpoint.MismatchError, match=r"params/head is not in.*Pass arrays"):
            checkpoint.resume_partial(checkpointer, more, jax.eval_shape(OLD.init, more))


def test_parameters_of_another_model_are_refused(run):
    with pytest.raises(checkpoint.MismatchError, match="holds no leaf of params"):
        resume(run, OLD, {"other": jnp.ones(3)})


def test_a_swapped_state_is_refused(run):
    with (
        ocp.training.Checkpointer(run[0]) as checkpointer,
        pytest.raises(ValueError, match="opt_state is swapped"),
    ):
        checkpoint.resume_partial(checkpointer, *emaopt.swap(*run[1:]))


def test_the_raw_parameters_alone(run, tmp_path):
    equal(checkpoint.restore_params(run[0], PARAMS), run[1])
    equal(checkpoint.restore_params(run[0] / "3", PARAMS, step=None), run[1])
    part = checkpoint.restore_params(run[0], {"w": jnp.zeros(3)}, step=3)
    equal(part, {"w": run[1]["w"]})
    ocp.save(tmp_path / "plain", {"params": run[1], "step": 3})
    equal(checkpoint.restore_params(tmp_path / "plain", PARAMS), run[1])


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"v": jnp.ones(3)}, "v is missing"),
        ({"w": jnp.ones(4)}, r"has shape \(3,\), asked for as \(4,\)"),
        ({"w": jnp.ones(3, jnp.bfloat16)}, r"is float32\[3\], asked for as bfloat16"),
    ],
)
def test_raw_parameters_that_are_not_there_are_named(run, like, message):
    with pytest.raises(checkpoint.MismatchError, match=message):
        checkpoint.restore_params(run[0], like)


def test_another_dtype_stays_as_passed_and_integers_go_on(tmp_path):
    params = {"w": jnp.ones(3), "seen": jnp.array(5)}
    tx = optax.chain(optax.masked(optax.sgd(0.1), {"w": True, "seen": False}), emaopt.ema(0.5))
    opt_state = tx.init(params)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, params, opt_state)
        like = {"w": jnp.zeros(3, jnp.bfloat16), "seen": jnp.array(0)}
        got, state, _, skipped = checkpoint.resume_partial(checkpointer, like, tx.init(like))
    assert skipped["params/w"] == "is float32[3] in the checkpoint, bfloat16[3] here"
    assert (got["w"].dtype, int(got["seen"]), int(state[1].shadow["seen"])) == (jnp.bfloat16, 5, 5)
    np.testing.assert_array_equal(state[1].shadow["w"], np.ones(3))  # the average is float32


@pytest.mark.slow
def test_averages_of_rows_go_on_as_they_were(tmp_path):
    params = {"table": jnp.arange(12.0).reshape(6, 2)}
    tx = optax.chain(optax.sgd(0.1), emaopt.ema(0.5, rows={"table": True}))

    def step(params, opt_state, ids):
        view = {"table": emaopt.rows(jnp.array(ids))}
        small, state = emaopt.take((params, opt_state), view)
        updates, state = tx.update(jax.tree.map(jnp.ones_like, small), state, small)
        small = optax.apply_updates(small, updates)
        return emaopt.put((params, opt_state), (small, state), view)

    opt_state = tx.init(params)
    for ids in ([0, 1], [1, 2], [5, 1]):
        params, opt_state = step(params, opt_state, ids)
    ocp.save_checkpointables(tmp_path / "3", {"params": params, "opt_state": opt_state})
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        fresh = jax.tree.map(jnp.zeros_like, params)
        got = checkpoint.resume_partial(checkpointer, fresh, tx.init(fresh))
    assert got[3] == {}
    close(emaopt.average(*got[:2]), emaopt.average(params, opt_state), 1e-6)
    one, other = step(params, opt_state, [0, 3]), step(*got[:2], [0, 3])
    close(emaopt.average(*other), emaopt.average(*one), 1e-6)
