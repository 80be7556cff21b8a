"""Checks of arguments, and what an error or a `repr` says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt._tree import checks


@pytest.mark.parametrize(
    ("leaf", "described"),
    [(jnp.zeros((2, 3)), "float32[2,3]"), (np.int8(1), "int8[]"), (2.0, "2.0")],
)
def test_a_leaf_is_described_by_dtype_and_shape(leaf, described):
    assert checks.describe(leaf) == described


def test_a_close_name_is_suggested_and_no_other():
    assert checks.did_you_mean("momentun", ["momentum", "rms"]) == " Did you mean 'momentum'?"
    assert checks.did_you_mean("accumulator", ["rms"]) == ""


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), jnp.float32(0.5), np.array([0.5, 1])])
def test_a_number_in_range_passes(value):
    checks.check("x", value, lambda x: x > 0, "a number above 0")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (-1.0, "-1.0"),
        (np.array([1, -1]), r"array\(\[ 1, -1\]\)"),
        (float("nan"), "nan"),
        ("1", "'1'"),
        (None, "None"),
        (jax.random.key(0), "Array"),
        (lambda t: t, "<function"),
        (True, "True"),
        (np.array([True]), r"array\(\[ True\]\)"),
        (1 + 2j, r"\(1\+2j\)"),
        (jnp.complex64(1), "Array"),
        (10**400, r"10{199}\.\.\."),
    ],
)
def test_a_number_out_of_range_or_no_number_is_named_and_shown(value, found):
    with pytest.raises(
        ValueError, match=rf"(?s)^x={found}.*is out of range\. Pass a number above 0\."
    ):
        checks.check("x", value, lambda x: x > 0, "a number above 0")


@pytest.mark.parametrize("value", ["False", None, 1, jnp.bool_(True)])
@pytest.mark.parametrize(
    ("flag", "make"),
    [
        ("ledger", lambda value: emaopt.ema(ledger=value)),
        ("sequential_update", lambda value: emaopt.ema(sequential_update=value)),
        ("use_nesterov", lambda value: emaopt.momentum(0.1, 0.9, value)),
        ("centered", lambda value: emaopt.rmsprop(0.1, centered=value)),
    ],
)
def test_a_flag_is_true_or_false(flag, make, value):
    make(np.bool_(True))
    with pytest.raises(ValueError, match=rf"^{flag}=.* is neither True nor False\. Pass one"):
        make(value)


def test_names_are_written_apart_or_not_at_all():
    deep = ("k",) * checks.DEEPEST
    paths_ = [("a", "b"), ("a.b",), ("a\nb", "["), deep]
    assert checks.written_names(paths_, range(4)) == ["a/b", "a.b", "a\nb/[", "/".join(deep)]
    with pytest.raises(ValueError, match=r"two leaves are named 'a\.b': 0 and 1.*a '\.' inside"):
        checks.written_names(paths_, range(4), separator=".")
    with pytest.raises(ValueError, match=r"257 levels deep, below 'k/k/k'; .* Flatten that part"):
        checks.written_names([(*deep, "k")], [0])
    with pytest.raises(ValueError, match=r"the name 'a/b\\ud800' has half a character.*Rename"):
        checks.written_names([("a", "b\ud800")], [0])


def test_a_state_is_shown_by_dtypes_and_shapes():
    params = {"w": jnp.ones((2, 3)), "b": None}
    tx = optax.chain(emaopt.adam(), emaopt.ema(0.5, ledger=True))
    adam, average = tx.init(params)
    assert repr(adam) == (
        "OptimizerState(step=0, powers={beta1_power: 0.9, beta2_power: 0.999}, "
        "slots={m/b: None, m/w: float32[2,3], v/b: None, v/w: float32[2,3]})"
    )
    assert repr(average).startswith("EmaState(step=0, shadow={b: None, w: float32[2,3]}, ledger={")
    many = {f"layer{i:02}\n": jnp.ones(2) for i in range(12)}
    _, swapped = emaopt.swap(many, emaopt.ema(0.5).init(many))
    assert repr(swapped).startswith(r"SwappedEmaState(step=0, shadow={layer00\n: float32[2], ")
    assert r"layer07\n: float32[2], ... 4 more}" in repr(swapped)
    assert "step='global_step', shadow={b: None, w: 'w/Exp" in repr(emaopt.names(average))


def test_a_state_that_cannot_be_read_is_shown():
    state = emaopt.ema(0.5).init(jnp.ones(2))
    seen = []
    jax.jit(lambda s: seen.append(repr(s)))(state)
    assert seen == ["EmaState(step=int32[], shadow=float32[2])"]
    state.step.delete()
    assert repr(state) == "EmaState(step=int32[], shadow=float32[2])"
    assert repr(jax.eval_shape(lambda: emaopt.ema(0.5).init(jnp.ones(2)))) == seen[0]
