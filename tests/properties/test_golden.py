"""The numbers of TensorFlow 1.15.5, made by `golden/make.py`.

Under `jit`, within 1e-5 of each value plus 1e-5 of the largest of its tensor; float64 within 1e-12
of the largest. Op by op, the same bit for bit, but for what comes out of a float32 square root
(TensorFlow estimates it) or a reciprocal one.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import replay

import emaopt


TRAINING = replay.cases("training")
# of each optimizer, one case is fast
FIRST = {case["id"].split("/")[0]: case["id"] for case in reversed(TRAINING)}
EACH = [
    pytest.param(case, id=case["id"], marks=[pytest.mark.slow] * (case["id"] not in FIRST.values()))
    for case in TRAINING
]
# "case/variable": all that no root goes into, and where TensorFlow's root is the IEEE one
BITWISE = re.compile(
    r"(gradient_descent|momentum)/|\w+/\w+/(power|slot/(accumulator|accum|m|v|rms|mg))/"
    r"|(adam|rmsprop)/\w*float64/"
)
OP_BY_OP = [
    case
    for case in TRAINING
    if case["id"].startswith(("gradient_descent/", "momentum/"))
    or (case["steps"] <= 100 and not case["clip_norm"])
]


@pytest.fixture
def precision(request):
    """Double precision for the cases that need it."""
    if request.node.callspec.params["case"]["dtype"] == "float64":
        request.getfixturevalue("x64")


def by_id(case):
    return case["id"]


def check(got, want, slack=0.0):
    """One tensor against TensorFlow's; infinities and NaN must be where TensorFlow has them."""
    got, finite = np.asarray(got), np.isfinite(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    np.testing.assert_array_equal(got[~finite], want[~finite])
    got, want = got[finite], want[finite]
    largest = np.abs(want).max(initial=0)
    allowed = 1e-12 * largest if want.dtype == np.float64 else 1e-5 * (np.abs(want) + largest)
    error = np.abs(got - want) - np.broadcast_to(slack, finite.shape)[finite]
    assert (error <= allowed).all(), f"{error.max()} off, largest {largest}"


def variables(case, jitted):
    """All variables of a training run under TensorFlow's names; axis 0 is the step."""
    trees = replay.train(replay.transformation(case), case, jitted)
    named = tuple(map(emaopt.names, trees))
    return dict(zip(jax.tree.leaves(named), jax.tree.leaves(trees), strict=True))


def expected(case):
    """(what, name, TensorFlow's values at the recorded steps) of all variables of a case."""
    for key, name in case["names"].items():
        yield key, name, replay.arrays("training")[f"{case['id']}/{key}"]


@pytest.mark.many(2)
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("case", EACH)
def test_training_under_jit_is_tensorflows_in_every_variable(case):
    got = variables(case, jitted=True)
    for key, name, want in expected(case):
        for t, row in zip(case["recorded"], want, strict=True):
            slack = 0.0
            if case["id"].startswith("ftrl/") and key.startswith("var/") and t > 0:
                # optax adds new_p - p to p, which rounds new_p to the last bits of p
                slack = 2 * np.spacing(np.abs(got[name][t - 1]))
            check(got[name][t], row, slack)
            if t == 0 or key.startswith("power/"):
                np.testing.assert_array_equal(got[name][t], row)


@pytest.mark.slow
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("case", OP_BY_OP, ids=by_id)
def test_training_op_by_op_is_tensorflows_bit_for_bit_where_no_root_is_estimated(case):
    got = variables(case, jitted=False)
    for key, name, want in expected(case):
        if BITWISE.match(f"{case['id']}/{key}"):
            np.testing.assert_array_equal(got[name][case["recorded"]], want)


@pytest.mark.parametrize("case", TRAINING, ids=by_id)
def test_slot_names_are_tensorflows(case):
    params = {"w": jnp.zeros(2), "b": jnp.zeros(2)}
    assert emaopt.slot_names(replay.transformation(case).init(params)) == case["slot_names"]


def test_global_norm_of_a_training_run_is_tensorflows():
    case = next(case for case in TRAINING if case["clip_norm"])
    got = jax.jit(jax.vmap(emaopt.global_norm))(replay.gradients(case))
    check(got, replay.arrays("training")[f"{case['id']}/global_norm"])


@pytest.mark.many(2)
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("case", replay.cases("averages"), ids=by_id)
def test_averages_are_tensorflows(case):
    start, values = replay.values(case)
    decay, num_updates = float(np.float32(case["decay"])), None
    if case["num_updates"] is not None:
        decay, num_updates = emaopt.warmup(decay), case["num_updates"] + jnp.arange(len(values))
    if case["of"] == "debiased":
        decay = emaopt.debiased(decay)
    mean = emaopt.moving_average(decay)
    run = jax.jit(replay.average, static_argnums=0)
    got = run(mean.update, mean.init(start), values, num_updates).shadow
    for row, want in zip(got, replay.arrays("averages")[f"{case['id']}/shadow"], strict=True):
        check(row, want)


def test_average_of_tensorflows_worked_example():
    mean = emaopt.moving_average(emaopt.warmup(0.99))
    state = mean.init(jnp.array(0.0))
    shadow = [state.shadow]
    for value, step in ((5.0, 0), (10.0, 10000), (10.0, 10000)):
        state = mean.update(jnp.array(value), state, num_updates=step)
        shadow.append(state.shadow)
    np.testing.assert_array_equal(shadow, replay.arrays("averages")["worked_example"])
    np.testing.assert_allclose(shadow, [0, 4.5, 4.555, 4.60945], rtol=1e-6)


@pytest.mark.many(3)
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("case", replay.cases("clipping"), ids=by_id)
def test_clipping_is_tensorflows(case):
    data, kwargs = replay.arrays("clipping"), dict(case["kwargs"])
    extra = {}
    if "use_norm" in kwargs:
        extra["use_norm"] = jnp.asarray(float(kwargs.pop("use_norm")), case["dtype"])
    if isinstance(kwargs.get("clip_value_min"), list):
        kwargs = {name: {"w": jnp.asarray(x), "none": None} for name, x in kwargs.items()}
    tx = getattr(emaopt, case["op"])(**kwargs)
    clip = jax.jit(lambda g: (tx.update(g, tx.init(g), **extra)[0], emaopt.global_norm(g)))
    for inputs in case["inputs"]:
        grads = {k: data[f"in/{inputs}/{k}"].astype(case["dtype"]) for k in case["leaves"]}
        got, norm = clip(grads | {"none": None})
        assert got.pop("none") is None
        for k in case["leaves"]:
            check(got[k], data[f"{case['id']}/{inputs}/{k}"])
        if case["op"] == "clip_by_global_norm" and not extra:
            check(norm, data[f"{case['id']}/{inputs}/norm"])


@pytest.mark.many(13)
@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("case", replay.cases("schedules"), ids=by_id)
def test_exponential_decay_is_tensorflows(case, jitted):
    data = replay.arrays("schedules")
    schedule = jax.vmap(emaopt.exponential_decay(**case["kwargs"]))
    got = (jax.jit(schedule) if jitted else schedule)(jnp.asarray(data[f"{case['id']}/steps"]))
    # TensorFlow's graph rewriting makes some stairs one step late; emaopt has them as written
    which = "as_written" if case["kwargs"]["staircase"] else "values"
    check(got, data[f"{case['id']}/{which}"])


@pytest.mark.parametrize("chosen", ["all", "v1", "v2", "global_step"])
def test_variables_to_restore_are_tensorflows(chosen):
    params = {"v1": jnp.array(1.0), "v2": jnp.array(2.0)}
    averaged = {"v1": jnp.array(1.0), "v3": jnp.array(3.0)}
    state = emaopt.gradient_descent(0.1).init(params), emaopt.ema(0.99).init(averaged)
    got = emaopt.variables_to_restore(params, state, None if chosen == "all" else [chosen])
    assert got == replay.cases("variables_to_restore")[chosen]
