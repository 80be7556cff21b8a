"""compute_gradients, apply_gradients and minimize."""

import contextlib
import gc
import signal
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import equal

import emaopt
from emaopt import apply_gradients, compute_gradients, matching, minimize
from emaopt._optimizers import interrupts


PARAMS = {
    "conv": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])},
    "steps": jnp.array([3]),
    "on": jnp.array(True),
    "key": jax.random.key(0),
    "absent": None,
}
NOT_TRAINED = {"steps": None, "on": None, "key": None, "absent": None}


def loss(params, x=1.0):
    return x * (jnp.sum(params["conv"]["kernel"] ** 2) + params["conv"]["bias"][0] ** 2)


def test_gradients_are_those_of_jax_where_there_can_be_one():
    value, grads = compute_gradients(loss, PARAMS, 10.0)
    assert value == 52.5
    equal(
        grads,
        {"conv": {"kernel": np.array([20.0, -40.0]), "bias": np.array([10.0])}, **NOT_TRAINED},
    )


@pytest.mark.parametrize(
    "var_list",
    [
        matching("kernel$"),
        matching("kernel$")(PARAMS),
        {
            "conv": {"kernel": np.True_, "bias": np.False_},
            "steps": True,
            "on": False,
            "key": True,
            "absent": None,
        },
        {
            "conv": {"kernel": True, "bias": None},
            "steps": None,
            "on": None,
            "key": None,
            "absent": None,
        },
    ],
    ids=["function", "tree", "numpy", "none"],
)
def test_leaves_outside_var_list_have_no_gradient(var_list):
    _, grads = compute_gradients(loss, PARAMS, var_list=var_list)
    equal(grads, {"conv": {"kernel": np.array([2.0, -4.0]), "bias": None}, **NOT_TRAINED})


def test_a_loss_of_many_elements_counts_as_their_sum():
    value, grads = compute_gradients(lambda p: p**2, jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(value, [1.0, 4.0, 9.0])
    np.testing.assert_array_equal(grads, [2.0, 4.0, 6.0])


@pytest.mark.parametrize("grad_loss", [[1.0, 0.0, -2.0], np.array([1, 0, -2])])
def test_grad_loss_is_the_gradient_coming_in(grad_loss):
    _, grads = compute_gradients(lambda p: p**2, jnp.array([1.0, 2.0, 3.0]), grad_loss=grad_loss)
    np.testing.assert_array_equal(grads, [2.0, 0.0, -12.0])


@pytest.mark.parametrize("var_list", [None, matching("conv")])
def test_aux_comes_beside_the_value(var_list):
    with_aux = lambda params, x: (loss(params, x), {"seen": x, "steps": params["steps"]})
    (value, aux), grads = compute_gradients(with_aux, PARAMS, 10.0, var_list=var_list, has_aux=True)
    assert value == 52.5
    assert (aux["seen"], aux["steps"][0]) == (10.0, 3)
    equal(grads, compute_gradients(loss, PARAMS, 10.0)[1])


def test_the_gradient_has_the_dtype_of_its_parameter():
    params = {"half": jnp.bfloat16(2), "float": jnp.float32(3)}
    product = lambda p: p["half"].astype(jnp.float32) * p["float"]
    _, grads = compute_gradients(product, params)
    equal(grads, {"half": jnp.bfloat16(3), "float": jnp.float32(2)})
    assert grads["half"].dtype == jnp.bfloat16


def test_python_numbers_are_parameters_too():
    value, grads = compute_gradients(lambda p: p["a"] * p["b"], {"a": 2.0, "b": 3})
    assert (value, grads) == (6.0, {"a": 3.0, "b": None})


def test_gradients_under_jit_are_the_same():
    arrays = {"conv": PARAMS["conv"], "steps": PARAMS["steps"]}
    jitted = jax.jit(lambda p: compute_gradients(loss, p, var_list=matching("conv")))
    equal(jitted(arrays), compute_gradients(loss, arrays))


def test_apply_gradients_is_one_step_of_the_transformation():
    tx = emaopt.momentum(0.5, 0.9)
    params = PARAMS["conv"]
    grads = {"kernel": jnp.array([2.0, 4.0]), "bias": jnp.array([1.0])}
    new, state = apply_gradients(tx, grads, params, tx.init(params))
    equal(new, {"kernel": np.array([0.0, -4.0]), "bias": np.array([0.0])})
    equal(state.slots["momentum"], grads)


@pytest.mark.parametrize(
    "tx",
    [emaopt.momentum(0.5, 0.9), emaopt.adam(0.5), optax.sgd(0.5), emaopt.clip_by_norm(1.0)],
    ids=["momentum", "adam", "sgd", "clip"],
)
def test_a_leaf_without_a_gradient_stays_bitwise(tx):
    params = {"a": jnp.array([-0.0, np.nan, 1e-45]), "b": jnp.array([1.0]), "n": jnp.array(7)}
    masked = optax.masked(tx, {"a": True, "b": True, "n": False})
    state = masked.init(params)
    grads = {"a": None, "b": jnp.array([1.0]), "n": None}
    new, new_state = apply_gradients(masked, grads, params, state)
    assert (np.asarray(new["a"]).view(np.int32) == np.asarray(params["a"]).view(np.int32)).all()
    assert new["n"] == 7
    assert new["b"] != params["b"]
    for slot in getattr(state.inner_state, "slots", {}).values():
        assert not slot["a"].any()
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_an_absent_gradient_and_one_that_jax_calls_float0_leave_integers_and_keys():
    params = {"w": jnp.float32(1), "n": jnp.array(7), "key": jax.random.key(1)}
    tx = optax.identity()
    float0 = np.zeros((), jax.dtypes.float0)
    grads = {"w": jnp.float32(2), "n": float0, "key": float0}
    new, _ = apply_gradients(tx, grads, params, tx.init(params))
    assert (new["w"], new["n"], new["key"]) == (3, 7, jax.random.key(1))


@pytest.fixture
def traces():
    """A loss that counts how often it is traced."""
    seen = []

    def counted(params, x):
        seen.append(x)
        return jnp.sum((params["w"] - x) ** 2) + params["b"] ** 2

    counted.seen = seen
    return counted


def fresh():
    return {"w": jnp.array([1.0, 2.0]), "b": jnp.array(3.0, jnp.float32)}


def recipe():
    rate = emaopt.exponential_decay(0.1, 2, 0.5, staircase=True)
    return optax.chain(
        emaopt.clip_by_global_norm(1.0),
        emaopt.momentum(rate, 0.9),
        emaopt.ema(emaopt.warmup(0.9)),
    )


def test_minimize_is_compute_and_apply_with_the_average_moved(traces):
    tx = recipe()
    step = minimize(traces, tx)
    params, state = fresh(), tx.init(fresh())
    expected_params, expected_state = fresh(), tx.init(fresh())
    for x in (1.0, -2.0, 3.0):
        params, state, value = step(params, state, x)
        expected, grads = compute_gradients(traces, expected_params, x)
        expected_params, expected_state = apply_gradients(
            tx, grads, expected_params, expected_state
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        (params, state),
        (expected_params, expected_state),
    )
    assert emaopt.global_step(state) == 3


def test_minimize_compiles_once(traces):
    tx = recipe()
    step = minimize(traces, tx)
    params, state = fresh(), tx.init(fresh())
    for x in (1.0, 2.0, 3.0):
        params, state, _ = step(params, state, x)
    assert len(traces.seen) == 1


def test_minimize_takes_over_the_buffers_that_it_is_given(traces):
    tx = recipe()
    params, state = fresh(), tx.init(fresh())
    kept = fresh()
    step = minimize(traces, tx)
    new_params, new_state, _ = step(params, state, 1.0)
    assert all(x.is_deleted() for x in jax.tree.leaves((params, state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((new_params, new_state, kept)))


def test_minimize_trains_var_list_only():
    tx = optax.chain(emaopt.adam(0.1), emaopt.ema(0.5))
    step = minimize(lambda p: p["w"][0] * p["b"], tx, var_list=matching("w"))
    params, state, _ = step(fresh(), tx.init(fresh()))
    np.testing.assert_array_equal(params["b"], fresh()["b"])
    assert params["w"][0] < fresh()["w"][0]
    assert emaopt.slot(state, "m")["b"] == 0
    np.testing.assert_array_equal(emaopt.average(params, state)["b"], params["b"])


def test_minimize_gives_aux_beside_the_value():
    tx = emaopt.gradient_descent(0.5)
    step = minimize(lambda p, x: (p["b"] * x, p["w"] + x), tx, has_aux=True)
    params, _, (value, aux) = step(fresh(), tx.init(fresh()), 2.0)
    assert (params["b"], value) == (2.0, 6.0)
    np.testing.assert_array_equal(aux, [3.0, 4.0])


def test_training_reaches_the_minimum():
    tx = optax.chain(emaopt.adam(0.1), emaopt.ema(emaopt.power(2.0)))
    step = minimize(lambda p, x: jnp.sum((p["w"] - x) ** 2) + p["b"] ** 2, tx)
    params, state = fresh(), tx.init(fresh())
    for _ in range(300):
        params, state, _ = step(params, state, 5.0)
    averaged = emaopt.average(params, state)
    np.testing.assert_allclose(averaged["w"], [5.0, 5.0], atol=0.02)
    np.testing.assert_allclose(averaged["b"], 0, atol=0.02)


@pytest.fixture
def lenient():
    """Optax's line searches and SAM promote integers and weak types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


ADVERSARY = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))


@pytest.mark.many(1)
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.lbfgs(), emaopt.ema(0.5)),
        optax.chain(emaopt.gradient_descent(0.1), optax.scale_by_backtracking_linesearch(15)),
        optax.chain(optax.polyak_sgd(), emaopt.ema(0.5)),
        optax.chain(emaopt.gradient_descent(0.1), optax.contrib.reduce_on_plateau(patience=5)),
        optax.contrib.sam(optax.sgd(0.05), ADVERSARY, opaque_mode=True),
        optax.chain(optax.contrib.sam(optax.sgd(0.1), ADVERSARY), emaopt.ema(0.5)),
        optax.apply_if_finite(optax.chain(optax.lbfgs(), emaopt.ema(0.5)), 3),
    ],
    ids=["lbfgs", "backtracking", "polyak", "plateau", "sam_opaque", "sam", "finite"],
)
@pytest.mark.parametrize("has_aux", [False, True])
def test_minimize_gives_the_chain_what_it_searches_along(tx, has_aux):
    distance = lambda p, x: jnp.sum((p["w"] - x) ** 2)
    step = minimize(
        lambda p, x: (distance(p, x), x) if has_aux else distance(p, x), tx, has_aux=has_aux
    )
    params = {"w": jnp.array([1.0, 2.0])}
    state = tx.init(params)
    for _ in range(50):
        params, state, _ = step(params, state, jnp.array([3.0, -1.0]))
    np.testing.assert_allclose(params["w"], [3.0, -1.0], atol=0.1)


def recorder(seen):
    """A link that records the extra arguments of its update."""

    def update(updates, state, params=None, **extra):
        seen.append(extra | {"probe": extra["value_fn"](params)} if "value_fn" in extra else extra)
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def test_what_the_chain_is_given_is_of_this_step():
    seen = []
    tx = optax.chain(recorder(seen), emaopt.gradient_descent(0.5))
    with jax.disable_jit():
        minimize(lambda p, x: p["b"] * p["w"] * x, tx)(fresh(), tx.init(fresh()), jnp.float32(2))
    (extra,) = seen
    assert extra["value"] == extra["probe"] == 18  # a loss of two elements counts as their sum
    equal(extra["grad"], {"w": np.array([6.0, 6.0]), "b": np.float32(6)})


def test_apply_gradients_passes_on_what_links_take_and_others_ignore():
    seen = []
    params, extra = fresh(), {"num_updates": 3, "use_norm": 4.0, "value": 1.0}
    tx = optax.chain(
        emaopt.clip_by_global_norm(1.0), recorder(seen), emaopt.ema(emaopt.warmup(0.9))
    )
    new, state = apply_gradients(tx, params, params, tx.init(params), **extra)
    assert seen == [extra]
    np.testing.assert_array_equal(new["b"], 3 + 3 / 4)
    np.testing.assert_allclose(state[-1].shadow["b"], 3 + 0.75 * (1 - 4 / 13), rtol=1e-6)
    plain = optax.GradientTransformation(optax.init_empty_state, lambda u, s, p=None: (u, s))
    assert apply_gradients(plain, params, params, optax.EmptyState(), **extra)[0]["b"] == 6


def test_an_error_of_a_link_is_not_changed():
    def update(updates, state, params=None, **extra):
        raise TypeError("the link")

    tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    with pytest.raises(TypeError, match="the link"):
        minimize(lambda p: p["b"], tx)(fresh(), tx.init(fresh()))


def test_keyword_and_static_arguments_reach_the_loss():
    seen = []

    def loss(params, x, train, name="mean", scale=1.0, length=2):
        seen.append((train, name, length))
        kept = params["w"][:length] if train else params["w"] * 0
        return jnp.sum(kept * x) * scale if name == "sum" else jnp.mean(kept * x)

    step = minimize(loss, emaopt.gradient_descent(0.5), static_argnames="length")
    state = emaopt.gradient_descent(0.5).init(fresh())
    keep = minimize(loss, emaopt.gradient_descent(0.5), donate=False, static_argnames=["length"])
    call = lambda *args, **kwargs: keep(fresh(), state, *args, **kwargs)[2]
    assert call(2.0, train=True) == 3
    assert call(2.0, True) == 3
    assert call(2.0, False) == 0
    assert call(2.0, train=True, name="sum", scale=0.5) == 3
    assert call(2.0, train=True, name="sum", scale=jnp.float32(3), length=1) == 6
    number = len(seen)
    assert call(4.0, train=True, name="sum", scale=jnp.float32(1.5), length=1) == 6
    assert call(4.0, True) == 6
    assert len(seen) == number  # numbers and arrays are traced: nothing is compiled anew
    assert "stablehlo" in step.lower(fresh(), state, 2.0, train=True, length=1).as_text()


def test_without_donation_what_goes_in_stays():
    tx = recipe()
    params, state = fresh(), tx.init(fresh())
    loss = lambda p: jnp.sum(p["w"]) * p["b"]
    kept = minimize(loss, tx, donate=False)(params, state)
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, state)))
    equal(minimize(loss, tx)(params, state), kept)


def test_a_deleted_array_is_named_with_what_to_do():
    tx = recipe()
    params, state = fresh(), tx.init(fresh())
    step = minimize(lambda p: jnp.sum(p["w"]) * p["b"], tx)
    new = step(params, state)[0]
    with pytest.raises(RuntimeError, match=r"params has a deleted array at leaf 'b'.*donate=False"):
        step(params, state)
    with pytest.raises(RuntimeError, match=r"opt_state has a deleted array at leaf '1/step'"):
        step(new, state)


def test_an_error_of_the_loss_is_not_changed():
    def broken(params):
        raise RuntimeError("the loss")

    tx = recipe()
    with pytest.raises(RuntimeError, match="the loss"):
        minimize(broken, tx)(fresh(), tx.init(fresh()))


def test_minimize_descends_in_complex_parameters():
    tx = optax.chain(emaopt.momentum(0.1, 0.5), emaopt.ema(0.5))
    step = minimize(lambda p, x: jnp.sum(jnp.abs(p - x) ** 2), tx)
    params = jnp.array([1 + 1j, -2j])
    state = tx.init(params)
    goal = jnp.array([3 - 2j, 1 + 1j])
    for _ in range(60):
        params, state, _ = step(params, state, goal)
    np.testing.assert_allclose(params, goal, atol=1e-3)
    np.testing.assert_allclose(emaopt.average(params, state), goal, atol=1e-3)


@jax.tree_util.register_pytree_node_class
class Interrupting:
    """What a loss returns beside: the user interrupts when it is put together, `after` times."""

    armed = False

    def __init__(self, x):
        self.x = x

    def tree_flatten(self):
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        if cls.armed:
            cls.armed = False
            raise KeyboardInterrupt
        return cls(*children)


def interrupted_step():
    """A step, its arguments, and its results where it is interrupted."""
    tx = recipe()
    step = minimize(lambda p: (p["b"] ** 2, Interrupting(p["b"])), tx, has_aux=True)
    params, state = fresh(), tx.init(fresh())
    params, state, _ = step(params, state)
    Interrupting.armed = True
    params, state, _ = step(params, state)
    assert not Interrupting.armed
    return step, params, state


def test_an_interrupted_step_is_finished_and_the_next_one_is_not_begun():
    step, params, state = interrupted_step()
    with pytest.raises(KeyboardInterrupt, match="which was finished first"):
        step(params, state)
    assert emaopt.global_step(state) == 2
    assert step(params, state)[1][1].step == 3
    time.sleep(1.5 * interrupts._WAIT)  # and nothing more comes of it


def test_an_interrupt_is_raised_soon_where_there_is_no_next_step(monkeypatch):
    monkeypatch.setattr(interrupts, "_WAIT", 0.05)
    step, params, state = interrupted_step()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(20)
    assert time.monotonic() - start < 10
    step(params, state)
    monkeypatch.delattr(signal, "pthread_kill")
    step, params, state = interrupted_step()
    with pytest.raises(KeyboardInterrupt):
        any(time.sleep(0.05) for _ in range(100))
    step(params, state)


def test_an_interrupt_that_was_raised_holds_no_arrays():
    step, params, state = interrupted_step()
    with contextlib.suppress(KeyboardInterrupt):
        step(params, state)
    alive = weakref.ref(params["b"])
    del params, state
    gc.collect()
    assert alive() is None  # not in the thread that waits: it would delete them as Python ends


def test_an_interrupt_before_the_computation_is_raised_at_once():
    def interrupting(params):
        raise KeyboardInterrupt

    tx = recipe()
    params, state = fresh(), tx.init(fresh())
    with pytest.raises(KeyboardInterrupt):
        minimize(interrupting, tx)(params, state)
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, state)))


@pytest.mark.slow
def test_loops_that_are_interrupted_at_any_moment_keep_everything():
    def interrupt(*_):
        raise KeyboardInterrupt

    tx = optax.chain(emaopt.adam(), emaopt.ema(0.9))
    step = minimize(lambda p, x: sum(jnp.sum((x @ w) ** 2) for w in p.values()), tx)
    x, before = jnp.ones((64, 64)), signal.signal(signal.SIGALRM, interrupt)
    for trial in range(40):
        params = {f"w{i}": jnp.ones((64, 64)) / 64 for i in range(4)}
        state = tx.init(params)
        params, state, value = step(params, state, x)
        signal.setitimer(signal.ITIMER_REAL, 0.01 + trial % 7 / 90)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                params, state, value = step(params, state, x)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, state, value)))
        assert state[0].step == state[1].step
    signal.signal(signal.SIGALRM, before)
