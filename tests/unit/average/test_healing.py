"""One bad number, wherever it comes from, and what keeps it out of an average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt


BAD = [np.nan, np.inf, -np.inf]
PARAMS = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0]), "n": jnp.arange(2), "none": None}
ZERO = {"a": jnp.zeros(2), "b": jnp.zeros(1), "n": jnp.zeros(2, jnp.int32), "none": None}
ONE = {"a": jnp.ones(2), "b": jnp.ones(1), "n": jnp.zeros(2, jnp.int32), "none": None}
KINDS = [None, jnp.bfloat16, emaopt.compensated(), emaopt.stochastic()]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
bad = pytest.mark.parametrize("bad", BAD)


def is_finite(tree):
    return all(jnp.isfinite(x).all() for x in jax.tree.leaves(tree))


def shadow_of(state):
    (average,) = emaopt.averages(state).values()
    return average.shadow


def poisoned(state, leaf, value):
    """The state with a bad number in one leaf of the shadow (and of the residue)."""
    inner = state.state
    fields = {
        field: {**tree, leaf: tree[leaf].at[0].set(value)}
        for field in ("shadow", "residue")
        if (tree := getattr(inner, field)) is not None
    }
    return state._replace(state=inner._replace(**fields))


@bad
def test_without_any_of_this_one_bad_gradient_is_for_ever(bad):
    tx = optax.chain(emaopt.gradient_descent(0.1), emaopt.ema(0.9))
    params = {"w": jnp.ones(2)}
    _, state = tx.update({"w": jnp.array([bad, 0.0])}, tx.init(params), params)
    for _ in range(50):
        _, state = tx.update({"w": jnp.zeros(2)}, state, params)
    assert not is_finite(shadow_of(state))


@pytest.mark.slow
@bad
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx, average: optax.apply_if_finite(optax.chain(tx, average), 5),
        lambda tx, average: optax.chain(optax.zero_nans(), tx, emaopt.heal(average)),
        lambda tx, average: optax.chain(tx, emaopt.heal(average)),
        lambda tx, average: optax.MultiSteps(
            optax.chain(tx, average), 1, should_skip_update_fn=optax.skip_not_finite
        ),
    ],
    ids=["apply_if_finite", "zero_nans and heal", "heal", "MultiSteps that skips"],
)
def test_a_bad_gradient_does_not_reach_the_average(wrap, bad):
    tx = wrap(emaopt.gradient_descent(0.1), emaopt.ema(0.9))
    params = {"w": jnp.ones(2), "b": jnp.ones(1)}
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        _, state = tx.update(
            {"w": jnp.array([bad, 0.0]), "b": jnp.ones(1)}, tx.init(params), params
        )
    assert is_finite(shadow_of(state))
    np.testing.assert_array_equal(shadow_of(state)["w"], params["w"])


@pytest.mark.slow
@bad
@kinds
def test_bad_parameters_leave_their_leaf_and_only_it(kind, bad):
    tx = emaopt.heal(emaopt.ema(0.5, accumulator_dtype=kind))
    params = {**PARAMS, "a": jnp.array([bad, 2.0])}
    updates, state = jax.jit(tx.update)(ZERO, tx.init(PARAMS), params)
    assert updates["a"].tolist() == [0, 0]
    assert state.state.shadow["a"].tolist() == [1, 2]
    _, state = jax.jit(tx.update)(ONE, state, PARAMS)
    assert is_finite(state)
    assert jax.tree.leaves(state.healed) == [0, 0, 0]
    if kind != emaopt.stochastic():
        assert state.state.shadow["a"].tolist() == [1.5, 2.5]
        assert state.state.shadow["b"].tolist() == [3.5]


@pytest.mark.many(1)
@bad
@kinds
def test_a_poisoned_leaf_starts_again_from_the_parameters_and_is_counted(kind, bad):
    tx = emaopt.heal(emaopt.ema(0.5, accumulator_dtype=kind))
    traced = []

    @jax.jit
    def update(*args):
        traced.append(args)
        return tx.update(*args)

    state = poisoned(tx.init(PARAMS), "a", bad)
    _, state = update(ZERO, state, {**PARAMS, "a": jnp.array([np.nan, 2.0])})
    assert state.healed["a"] == 0  # nothing to start from
    _, state = update(ONE, state, PARAMS)
    assert state.state.shadow["a"].tolist() == [2, 3]
    assert is_finite(state)
    assert {k: int(n) for k, n in state.healed.items() if n is not None} == {"a": 1, "b": 0, "n": 0}
    _, state = update(ONE, poisoned(state, "a", bad), PARAMS)
    assert state.healed["a"] == 2
    assert len(traced) == 1


def test_where_nothing_is_bad_it_changes_no_bit():
    plain, healing = emaopt.ema(0.9), emaopt.heal(emaopt.ema(0.9))
    states = plain.init(PARAMS), healing.init(PARAMS)
    for _ in range(3):
        states = (
            plain.update(ONE, states[0], PARAMS)[1],
            healing.update(ONE, states[1], PARAMS)[1],
        )
    jax.tree.map(np.testing.assert_array_equal, states[0], states[1].state)


def test_it_goes_around_masks_and_several_averages():
    tx = emaopt.heal(
        optax.named_chain(
            ("a", optax.masked(emaopt.ema(0.5), emaopt.matching("a"))),
            ("b", optax.masked(emaopt.ema(0.75), emaopt.matching("b"))),
        )
    )
    params = {"a": jnp.array([1.0]), "b": jnp.array([jnp.nan])}
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    shadows = [s.shadow for s in emaopt.averages(state).values()]
    assert shadows[0]["a"].tolist() == [1.5]
    assert state.healed["a"] == 0
    params = {"a": jnp.array([1.0]), "b": jnp.array([4.0])}
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    assert emaopt.average(params, state) == {"a": jnp.array([1.75]), "b": jnp.array([5.0])}
    assert state.healed["b"] == 1


def test_a_state_beside_the_average_passes():
    rate = optax.scale_by_schedule(lambda count: 1.0)
    tx = emaopt.heal(optax.chain(rate, emaopt.ema(0.5)))
    params = jnp.array([1.0])
    _, state = tx.update(jnp.array([jnp.nan]), tx.init(params), params)
    assert state.state[0].count == 1
    assert emaopt.average(params, state) == 1


def test_absent_parameters_and_python_numbers_are_averages_too():
    tx = emaopt.heal(emaopt.ema(0.5))
    state = tx.init({"absent": jnp.ones(2), "number": 1.0})
    _, state = tx.update({"absent": None, "number": None}, state, {"absent": None, "number": 3.0})
    assert state.state.shadow["absent"].tolist() == [1, 1]
    assert state.state.shadow["number"] == 2


def test_an_overflow_between_two_finite_numbers_is_not_taken():
    tx = emaopt.heal(emaopt.ema(0.5))
    params = {"w": jnp.array([3e38])}
    _, state = tx.update({"w": jnp.zeros(1)}, tx.init(params), {"w": jnp.array([-3e38])})
    assert state.state.shadow["w"].tolist() == [params["w"].item()]


def test_params_missing_is_named():
    tx = emaopt.heal(emaopt.ema(0.9))
    with pytest.raises(ValueError, match=r"params is missing: ema"):
        tx.update(ONE, tx.init(PARAMS))


@pytest.mark.many(2)
@kinds
def test_large_numbers_whose_sum_overflows_are_finite(kind):
    tx = emaopt.heal(emaopt.ema(0.5, accumulator_dtype=kind))
    params = {"w": jnp.full(4, 2e38), "b": jnp.ones(2)}
    state = tx.init(params)
    _, state = jax.jit(tx.update)({"w": jnp.zeros(4), "b": jnp.ones(2)}, state, params)
    average = emaopt.average(params, state)
    np.testing.assert_allclose(average["w"], params["w"], rtol=2**-7)
    np.testing.assert_allclose(average["b"], 1.5, rtol=2**-7)
    poisoned_b = {"w": jnp.zeros(4), "b": jnp.array([jnp.nan, 0.0])}
    _, after = jax.jit(tx.update)(poisoned_b, state, params)
    np.testing.assert_array_equal(after.state.shadow["b"], state.state.shadow["b"])
    assert {k: int(n) for k, n in after.healed.items()} == {"w": 0, "b": 0}


@pytest.mark.slow
def test_complex_numbers_are_finite_though_their_size_overflows():
    tx = emaopt.heal(emaopt.ema(0.5))
    params = jnp.array([3e38 + 3e38j, 1.0])
    _, state = tx.update(jnp.zeros(2, jnp.complex64), tx.init(params), params)
    assert state.healed == 0
    params = params.at[1].set(3.0)
    _, state = tx.update(jnp.zeros(2, jnp.complex64), state, params)
    assert state.state.shadow.tolist()[1] == 2


def test_an_overflow_leaves_its_element_and_the_others_move():
    tx = emaopt.heal(emaopt.ema(0.5))
    params = jnp.array([3e38, 1.0])
    _, state = tx.update(jnp.zeros(2), tx.init(params), jnp.array([-3e38, 3.0]))
    assert state.state.shadow.tolist() == [params[0].item(), 2]


@pytest.mark.slow
def test_op_by_op_the_second_update_compiles_nothing(caplog):
    tx = emaopt.heal(emaopt.ema(0.5))
    params = {"w": jnp.ones(7)}
    with jax.log_compiles():
        _, state = tx.update(params, tx.init(params), params)
        assert "Compiling" in caplog.text
        caplog.clear()
        tx.update(params, state, params)
    assert "Compiling" not in caplog.text


def test_there_is_nothing_to_mend_where_nothing_is_a_floating_point_number():
    params = {"seen": jnp.array([1])}
    tx = emaopt.heal(emaopt.ema(0.5))
    _, state = tx.update({"seen": jnp.array([1])}, tx.init(params), params)
    assert int(emaopt.average(params, state)["seen"][0]) == 2


def test_the_state_of_another_transformation_is_refused():
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="state is a EmaState, not that of heal"):
        emaopt.heal(emaopt.ema()).update(params, emaopt.ema().init(params), params)


def test_what_holds_no_average_is_refused():
    with pytest.raises(ValueError, match=r"average='ema' is not a transformation\. Pass emaopt"):
        emaopt.heal("ema")
    with pytest.raises(ValueError, match=r"average holds no average. Pass emaopt.ema\(decay\)"):
        emaopt.heal(emaopt.adam()).init({"w": jnp.ones(2)})
