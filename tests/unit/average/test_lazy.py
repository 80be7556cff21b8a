"""The average of the rows of tables, which is brought up to date when a row is touched or read.

Held against a dense run: the same steps, and an average of every row at every step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compare import near

import emaopt


ROWS, WIDTH, STEPS = 9, 3, 40
TABLES = emaopt.matching("table")
PARAMS = {
    "table": jnp.linspace(-2.0, 3.0, ROWS * WIDTH).reshape(ROWS, WIDTH),
    "bias": jnp.array([0.5, -1.0]),
}
DECAYS = {
    "constant": 0.9,
    "zero": 0.0,
    "one": 1.0,
    "long": 0.9999,
    "warmup": emaopt.warmup(0.99),
    "debiased": emaopt.debiased(0.9),
    "mean": emaopt.power(0.0),
    "power": emaopt.power(6.0),
    "inverse gamma": emaopt.inverse_gamma(),
    "half life": emaopt.half_life(3.0),
    "every": emaopt.every(3, 0.9),
    "after": emaopt.after(10, 0.8),
    "copies between": lambda t: jnp.where(t % 7 == 0, 0.0, 0.9),
    "rests between": lambda t: jnp.where(t % 3 == 0, 0.9, 1.0),
}


def batches():
    """Ids and gradients: row 0 once at the start, row 8 never, the others now and then."""
    draw = np.random.default_rng(0)
    ids = draw.integers(1, ROWS - 1, (STEPS, 2))
    ids[0, 0] = 0
    ids[20] = 5  # a batch of one row
    return ids.astype(np.int32), draw.normal(size=(STEPS, 2, WIDTH)).astype(np.float32)


def sparse_grads(params, positions, values):
    table = jnp.zeros_like(params["table"]).at[positions].add(values.astype(params["table"].dtype))
    return {"table": table, "bias": params["bias"]}


def lazily(tx, params, read=None, steps=STEPS, **extra):
    """Steps on rows; `read(params, opt_state)` after each."""

    @jax.jit
    def step(params, opt_state, ids, values):
        tables = {"table": emaopt.rows(ids)}
        small, small_state = emaopt.take((params, opt_state), tables)
        grads = sparse_grads(small, tables["table"].positions, values)
        updates, small_state = tx.update(grads, small_state, small, **extra)
        small = optax.apply_updates(small, updates)
        return emaopt.put((params, opt_state), (small, small_state), tables)

    carry, found = (params, tx.init(params)), []
    for ids, values in list(zip(*batches(), strict=True))[:steps]:
        carry = step(*carry, ids, values)
        found.append(read and read(*carry))
    return carry, found


def densely(tx, params, steps=STEPS, **extra):
    """The same steps on whole tables; the parameters after each, and the averages of `tx`."""

    @jax.jit
    def step(params, opt_state, ids, values):
        updates, opt_state = tx.update(
            sparse_grads(params, ids, values), opt_state, params, **extra
        )
        return optax.apply_updates(params, updates), opt_state

    carry, values, averages = (params, tx.init(params)), [params], []
    for ids, x in list(zip(*batches(), strict=True))[:steps]:
        carry = step(*carry, ids, x)
        values.append(carry[0])
        averages.append(emaopt.average(*carry))
    return values, averages


def chain(**options):
    """Gradient descent, which leaves the rows that have no gradient where they are."""
    return lambda decay: optax.chain(emaopt.gradient_descent(0.1), emaopt.ema(decay, **options))


@pytest.mark.many(1)
@pytest.mark.parametrize("decay", DECAYS)
def test_every_row_is_as_in_an_average_of_all_rows_after_every_step(decay):
    decay = DECAYS[decay]
    _, lazy = lazily(chain(rows=TABLES)(decay), PARAMS, jax.jit(emaopt.average))
    _, dense = densely(chain()(decay), PARAMS)
    for got, want in zip(lazy, dense, strict=True):
        near(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("jitted", [False, True])
def test_where_the_decay_is_0_or_1_it_is_exact(jitted):
    read = jax.jit(emaopt.average) if jitted else emaopt.average
    for decay in (0.0, emaopt.after(25, 0.5), lambda t: jnp.where(t % 5 == 0, 0.0, 0.9)):
        carry, _ = lazily(chain(rows=TABLES)(decay), PARAMS, steps=25)
        jax.tree.map(np.testing.assert_array_equal, read(*carry), carry[0])
    carry, _ = lazily(chain(rows=TABLES)(1.0), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, read(*carry), PARAMS)


@pytest.mark.slow
def test_num_updates_replaces_t():
    lazy_tx, dense_tx = chain(rows=TABLES)(emaopt.warmup(0.999)), chain()(emaopt.warmup(0.999))
    extra = {"num_updates": jnp.int32(12)}
    _, lazy = lazily(lazy_tx, PARAMS, emaopt.average, steps=12, **extra)
    _, dense = densely(dense_tx, PARAMS, steps=12, **extra)
    near(lazy[-1], dense[-1])


@pytest.mark.slow
def test_the_parameters_from_before_the_update():
    options = {"sequential_update": False}
    tx = chain(rows=TABLES, **options)
    # the average is of the values before the update, and a row that rests is at its new value
    _, lazy = lazily(tx(0.8), PARAMS, emaopt.average, steps=12)
    values, _ = densely(chain(**options)(0.8), PARAMS, steps=12)
    want = reference.theta_bar(lambda t: 0.8, [values[0]["table"], *(v["table"] for v in values)])
    got = lazy[-1]["table"]
    ids, _ = batches()
    touched_last = np.unique(ids[11])
    np.testing.assert_allclose(got[touched_last], want[12][touched_last], rtol=1e-5)


@pytest.mark.slow
def test_a_float64_average_has_times_of_float64(x64):
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), PARAMS)
    decay = emaopt.half_life(5.0)
    carry, lazy = lazily(chain(rows=TABLES)(decay), params, emaopt.average)
    assert carry[1][-1].rows.now.dtype == jnp.float64
    values, _ = densely(chain()(decay), params)
    want = reference.theta_bar(lambda t: 0.5**0.2, [v["table"] for v in values])
    np.testing.assert_allclose(lazy[-1]["table"], want[-1], rtol=0, atol=1e-14)


@pytest.mark.slow
def test_compensated_it_is_as_exact_as_float64():
    exact = emaopt.compensated()
    _, lazy = lazily(chain(rows=TABLES, accumulator_dtype=exact)(0.99), PARAMS, emaopt.average)
    values, _ = densely(chain()(0.99), PARAMS)
    want = reference.theta_bar(
        lambda t: 1 - np.float64(np.float32(1) - np.float32(0.99)), [v["table"] for v in values]
    )
    np.testing.assert_allclose(lazy[-1]["table"], want[-1], rtol=2e-7, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("accumulator", [jnp.bfloat16, emaopt.stochastic()])
def test_in_two_bytes_to_their_precision(accumulator):
    carry, lazy = lazily(
        chain(rows=TABLES, accumulator_dtype=accumulator)(0.9), PARAMS, emaopt.average
    )
    assert carry[1][-1].shadow["table"].dtype == jnp.bfloat16
    _, dense = densely(chain()(0.9), PARAMS)
    near(lazy[-1], dense[-1], 0.05)


@pytest.mark.slow
def test_complex_tables():
    params = {name: x.astype(jnp.complex64) for name, x in PARAMS.items()}
    descent = optax.sgd(0.1)
    _, lazy = lazily(
        optax.chain(descent, emaopt.ema(0.9, rows=TABLES)), params, emaopt.average, steps=20
    )
    _, dense = densely(optax.chain(descent, emaopt.ema(0.9)), params, steps=20)
    near(lazy[-1], dense[-1])


@pytest.mark.slow
def test_over_a_million_updates():
    """The sum of logarithms is compensated: alone it would be off by 0.8 % after so many."""
    decay = 0.9
    mean = emaopt.moving_average(decay, rows={"table": True})
    params = {"table": jnp.ones((4, 2))}
    state = mean.init(params)
    update = jax.jit(mean.update)
    idle = {"table": emaopt.rows(jnp.array([3]))}  # only row 3 is touched

    @jax.jit
    def rest(state, n):
        def body(_, state):
            small = emaopt.take(state, idle)
            return emaopt.put(state, mean.update({"table": jnp.ones((1, 2))}, small), idle)

        return jax.lax.fori_loop(0, n, body, state)

    state = rest(state, 10**6)
    assert float(state.rows.now[0]) < -1e5
    # touch rows 1 and 2 now: they move to 5, and rest for 20 updates at 9
    at = {"table": emaopt.rows(jnp.array([1, 2]))}
    small = update(
        {"table": jnp.full((2, 2), 5.0)}, emaopt.take(state, at), before={"table": jnp.ones((2, 2))}
    )
    state = rest(emaopt.put(state, small, at), 20)
    values = {"table": params["table"].at[1:3].set(9.0)}
    got = emaopt.average(values, state)["table"]
    start = 1 + (5 - 1) * (1 - decay)
    np.testing.assert_allclose(got[1:3], 9 + (start - 9) * decay**20, rtol=1e-6)
    np.testing.assert_allclose(got[0], 1.0, rtol=1e-7)


def test_the_times_are_exact_to_the_bit_of_a_float32_over_a_million_updates():
    from emaopt._average.lazy import Rested, touch

    rates = 1 / (10 + np.arange(10**6, dtype=np.float64) % 1000)

    @jax.jit
    def run(rates):
        def body(rested, rate):
            return touch({}, rested, rate), None

        return jax.lax.scan(body, Rested(jnp.zeros(3), {}), rates)[0].now

    now = np.asarray(run(jnp.asarray(rates, jnp.float32)), np.float64)
    want = np.sum(np.log1p(-rates.astype(np.float32).astype(np.float64)))
    assert abs(now[0] + now[1] - want) < 3e-8 * abs(want)


# what reads it


def unequal():
    """Parameters and a state in which every row has rested for a time of its own."""
    return lazily(chain(rows=TABLES, ledger=True)(0.9), PARAMS)[0]


def test_swapped_it_is_the_average_and_swapping_back_loses_nothing():
    params, opt_state = unequal()
    averaged, swapped = emaopt.swap(params, opt_state)
    jax.tree.map(np.testing.assert_array_equal, averaged, emaopt.average(params, opt_state))
    back, settled = emaopt.swap(averaged, swapped)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    jax.tree.map(np.testing.assert_array_equal, emaopt.average(back, settled), averaged)
    jax.tree.map(
        np.testing.assert_array_equal, emaopt.swap(*emaopt.swap(back, settled)), (back, settled)
    )


def test_swapped_abstract_trees_stay_abstract():
    params, opt_state = unequal()
    abstract = jax.eval_shape(lambda tree: tree, (params, opt_state))
    averaged, swapped = emaopt.swap(*abstract)
    real = emaopt.swap(params, opt_state)
    assert jax.tree.structure((averaged, swapped)) == jax.tree.structure(real)


@pytest.mark.slow
def test_read_settled_or_not_the_training_goes_on_to_the_same_numbers():
    """A run that was saved and resumed."""
    tx = chain(rows=TABLES)(emaopt.warmup(0.99))

    def through_a_swap(params, opt_state):
        return emaopt.swap(*emaopt.swap(params, opt_state))

    @functools.partial(jax.jit, static_argnums=4)
    def step(params, opt_state, ids, values, reads):
        tables = {"table": emaopt.rows(ids)}
        small, small_state = emaopt.take((params, opt_state), tables)
        grads = sparse_grads(small, tables["table"].positions, values)
        updates, small_state = tx.update(grads, small_state, small)
        small = optax.apply_updates(small, updates)
        new = emaopt.put((params, opt_state), (small, small_state), tables)
        return through_a_swap(*new) if reads else new

    plain = resumed = PARAMS, tx.init(PARAMS)
    for t, (ids, values) in enumerate(zip(*batches(), strict=True)):
        plain = step(*plain, ids, values, False)
        resumed = step(*resumed, ids, values, t % 9 == 0)
    near(emaopt.average(*resumed), emaopt.average(*plain))


@pytest.mark.slow
def test_stacked_and_the_ledger():
    tx = optax.chain(
        emaopt.gradient_descent(0.1),
        optax.named_chain(
            ("fast", emaopt.ema(0.5, rows=TABLES)),
            ("slow", emaopt.ema(0.95, rows=TABLES, ledger=True)),
        ),
    )
    carry, _ = lazily(tx, PARAMS)
    both = emaopt.stacked(*carry)
    for i, decay in enumerate((0.5, 0.95)):
        _, dense = densely(chain()(decay), PARAMS)
        near(jax.tree.map(lambda x, i=i: x[i], both), dense[-1])
    ledger = emaopt.ledgers(carry[1])
    (found,) = ledger.values()
    np.testing.assert_allclose(found["initial_weight"], 0.95**STEPS, rtol=1e-4)
    # swapping one of two averages brings the other up to date as well: both may be read from disk
    _, swapped = emaopt.swap(*carry, "1/fast")
    slow = swapped[1]["slow"]
    np.testing.assert_array_equal(slow.shadow["table"], both["table"][1])


@pytest.mark.slow
def test_healed_a_bad_row_keeps_its_average():
    tx = optax.chain(emaopt.gradient_descent(0.1), emaopt.heal(emaopt.ema(0.9, rows=TABLES)))
    (params, opt_state), _ = lazily(tx, PARAMS, steps=10)
    before = emaopt.average(params, opt_state)
    tables = {"table": emaopt.rows(jnp.array([2, 3]))}
    small, small_state = emaopt.take((params, opt_state), tables)
    grads = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), small)
    updates, small_state = tx.update(grads, small_state, small)
    small = optax.apply_updates(small, updates)
    params, opt_state = emaopt.put((params, opt_state), (small, small_state), tables)
    after = emaopt.average(params, opt_state)
    assert jnp.all(jnp.isnan(params["table"][2:4]))
    np.testing.assert_array_equal(after["table"][2:4], before["table"][2:4])
    assert jnp.all(jnp.isfinite(after["table"]))


@pytest.mark.slow
def test_a_dense_step_in_between_is_right_too():
    tx = chain(rows=TABLES)(0.9)
    (params, opt_state), _ = lazily(tx, PARAMS, steps=10)
    wanted = emaopt.average(params, opt_state)
    updates, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    params = optax.apply_updates(params, updates)
    want = jax.tree.map(lambda s, p: s - (s - p) * 0.1, wanted, params)
    near(emaopt.average(params, opt_state), want)


def test_overwritten_rows_are_those_of_the_view():
    tx = optax.chain(
        emaopt.gradient_descent(0.1), emaopt.overwrite(2, emaopt.ema(0.9, rows=TABLES))
    )
    (params, opt_state), _ = lazily(tx, PARAMS, steps=2)
    ids = np.unique(batches()[0][1])
    averaged = emaopt.average(params, opt_state)
    np.testing.assert_allclose(params["table"][ids], averaged["table"][ids], rtol=1e-6)
    assert not np.array_equal(params["table"][0], averaged["table"][0])


def test_reset_it_starts_again_from_the_parameters():
    params, opt_state = unequal()
    again = emaopt.reset(params, opt_state)
    jax.tree.map(np.testing.assert_array_equal, emaopt.average(params, again), params)
    moved = jax.tree.map(lambda x: x + 1.0, params)
    state = emaopt.moving_average(0.9, rows=TABLES, ledger=True).update(
        moved, again[-1], before=params
    )
    want = jax.tree.map(lambda x: x + 0.1, params)
    near(emaopt.average(moved, state), want)


def test_of_abstract_parameters_it_is_abstract():
    tx = chain(rows=TABLES)(0.9)
    abstract = jax.eval_shape(lambda tree: tree, PARAMS)
    state = emaopt.ema(0.9, rows=TABLES).init(abstract)
    want = jax.eval_shape(tx.init, PARAMS)[-1]
    assert isinstance(state.rows.then["table"], jax.ShapeDtypeStruct)
    assert state.rows.then["table"].shape == want.rows.then["table"].shape == (ROWS, 3)


# a moving average by itself


def test_a_moving_average_of_whole_trees():
    mean = emaopt.moving_average(0.9, rows=TABLES)
    state, want = mean.init(PARAMS), emaopt.moving_average(0.9).init(PARAMS)
    values = PARAMS
    for t in range(3):
        before, values = values, jax.tree.map(lambda x, t=t: x + t, values)
        state = mean.update(values, state, before=before) if t else mean.update(values, state)
        want = emaopt.moving_average(0.9).update(values, want)
    jax.tree.map(np.testing.assert_array_equal, state.shadow, want.shadow)


@pytest.mark.slow
def test_without_the_values_from_before_a_row_that_rested_is_nan():
    mean = emaopt.moving_average(0.9, rows=TABLES)
    state = mean.init(PARAMS)
    tables = {"table": emaopt.rows(jnp.array([2]))}
    small = emaopt.take(state, tables)
    state = emaopt.put(
        state, mean.update({"table": jnp.ones((1, WIDTH)), "bias": PARAMS["bias"]}, small), tables
    )
    assert jnp.all(jnp.isfinite(state.shadow["table"]))  # row 2 had not rested
    tables = {"table": emaopt.rows(jnp.array([3]))}
    small = mean.update(
        {"table": jnp.ones((1, WIDTH)), "bias": PARAMS["bias"]}, emaopt.take(state, tables)
    )
    assert jnp.all(jnp.isnan(small.shadow["table"]))


def test_an_absent_table_rests_on():
    mean = emaopt.moving_average(0.5, rows=TABLES)
    state = mean.init(PARAMS)
    absent = {"table": None, "bias": PARAMS["bias"]}
    state = mean.update(absent, state)
    got = emaopt.average(PARAMS, state)
    np.testing.assert_array_equal(got["table"], PARAMS["table"])


MISTAKES = {
    "true nowhere": (
        lambda: emaopt.ema(0.9, rows={"table": False, "bias": None}).init(PARAMS),
        "rows is true at no leaf of params, which has 'bias', 'table'",
    ),
    "no mask": (
        lambda: emaopt.ema(0.9, rows={"table": 1.0, "bias": False}).init(PARAMS),
        "rows is not a mask: it has 1.0 at leaf 'table'",
    ),
    "of a scalar": (
        lambda: emaopt.ema(0.9, rows={"a": True}).init({"a": jnp.float32(1)}),
        "rows is true at leaf 'a', which is not a table",
    ),
    "of integers": (
        lambda: emaopt.ema(0.9, rows={"a": True}).init({"a": jnp.arange(3)}),
        "rows is true at leaf 'a', which is not a table",
    ),
    "parameters that never rest": (
        lambda: emaopt.primal(optax.sgd(0.1), emaopt.ema(0.9, rows=TABLES)).init(PARAMS),
        "average has rows=, but primal moves every row. Leave rows= out",
    ),
    "another state": (
        lambda: emaopt.ema(0.9, rows=TABLES).update(PARAMS, emaopt.ema(0.9).init(PARAMS), PARAMS),
        "state has no rows: it was made without rows=",
    ),
    "a state with rows": (
        lambda: emaopt.ema(0.9).update(PARAMS, emaopt.ema(0.9, rows=TABLES).init(PARAMS), PARAMS),
        "state has the rows: it was made with rows=mask",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_an_error_that_says_what_to_do(name):
    do, said = MISTAKES[name]
    with pytest.raises(ValueError, match=said):
        do()


def test_names_of_the_times():
    state = emaopt.ema(0.9, rows=TABLES).init(PARAMS)
    found = emaopt.names(state)
    assert found.rows.now == "rows/now"
    assert found.rows.then == {
        "table": "table/ExponentialMovingAverage/then",
        "bias": None,
    }


@pytest.mark.slow
def test_it_costs_the_rows_and_not_the_table():
    params = {"table": jnp.ones((50_000, 16)), "bias": PARAMS["bias"]}
    tx = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(0.99, rows=TABLES))

    def step(params, opt_state, ids):
        tables = {"table": emaopt.rows(ids)}
        small, small_state = emaopt.take((params, opt_state), tables)
        grads = jax.tree.map(jnp.cos, small)
        updates, small_state = tx.update(grads, small_state, small)
        small = optax.apply_updates(small, updates)
        return emaopt.put((params, opt_state), (small, small_state), tables)

    carry = params, tx.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, jnp.arange(16)).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < params["table"].nbytes / 50
    assert memory.alias_size_in_bytes > 3 * params["table"].nbytes


def test_a_state_of_abstract_tables_is_abstract_where_the_table_is():
    table = {"table": jax.ShapeDtypeStruct((5, 2), jnp.float32)}
    tx = emaopt.ema(0.5, rows={"table": True})
    abstract, real = tx.init(table), tx.init({"table": jnp.zeros((5, 2))})
    shapes = lambda state: [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    assert shapes(abstract) == shapes(real)
