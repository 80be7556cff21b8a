"""The rows of tables: `rows`, `take` and `put`, by themselves and in a step."""

import re

import compiling
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import emaopt
from emaopt._tree.rows import OUTSIDE, PADDING


TABLE = jnp.arange(12.0).reshape(6, 2)
PARAMS = {"table": TABLE, "bias": jnp.ones(3)}


def tables_of(*ids, size=None):
    return {"table": emaopt.rows(jnp.array(ids), size)}


@pytest.mark.many(2)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 3), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize("jitted", [False, True])
def test_ids_stand_once_each_and_positions_lead_back(shape, jitted):
    ids = np.random.default_rng(0).integers(0, 5, shape)
    make = jax.jit(emaopt.rows) if jitted else emaopt.rows
    found = make(jnp.asarray(ids, jnp.int32))
    distinct = np.unique(ids)
    assert found.ids.shape == (ids.size,)
    assert found.ids.dtype == found.positions.dtype == jnp.int32
    np.testing.assert_array_equal(found.ids[: distinct.size], distinct)
    np.testing.assert_array_equal(found.ids[distinct.size :], PADDING)
    np.testing.assert_array_equal(np.asarray(found.ids)[np.asarray(found.positions)], ids)


@pytest.mark.many(2)
@pytest.mark.parametrize("size", [3, 4, 9])
def test_size_is_the_number_of_rows(size):
    found = emaopt.rows(jnp.array([8, 1, 8, 4]), size)
    np.testing.assert_array_equal(found.ids, [1, 4, 8, *[PADDING] * 6][:size])
    np.testing.assert_array_equal(found.positions, [2, 0, 2, 1])


@pytest.mark.many(2)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32])
def test_ids_of_any_integer_dtype(dtype):
    ids = np.array([200 if dtype == np.uint8 else 20_000, 3], dtype)
    for found in (emaopt.rows(ids), jax.jit(emaopt.rows)(ids)):
        np.testing.assert_array_equal(found.ids, np.sort(ids))


@pytest.mark.usefixtures("x64")
def test_ids_of_64_bits():
    ids = jnp.array([7, 2**40, 2])
    with pytest.raises(ValueError, match="1099511627776, which is not a row number"):
        emaopt.rows(ids)
    found = jax.jit(emaopt.rows)(ids)
    np.testing.assert_array_equal(found.ids, [2, 7, OUTSIDE])
    np.testing.assert_array_equal(found.positions, [1, 2, 0])


@pytest.mark.slow
def test_several_lookups_in_one_table():
    ids = {"item": jnp.array([5, 1]), "history": jnp.array([[1, 0], [5, 5]])}
    found = emaopt.rows(ids)
    assert found.ids.tolist() == [0, 1, 5, *[PADDING] * 3]
    for name, own in ids.items():
        np.testing.assert_array_equal(found.ids[found.positions[name]], own)


def test_a_list_of_numbers_is_an_array():
    assert emaopt.rows([3, 0, 3]).ids.tolist() == [0, 3, PADDING]


def test_take_gives_the_rows_and_leaves_the_rest():
    small = emaopt.take(PARAMS, tables_of(4, 1, 4))
    np.testing.assert_array_equal(small["table"][:2], TABLE[jnp.array([1, 4])])
    assert small["bias"] is PARAMS["bias"]


def test_put_writes_them_back_and_nothing_else():
    tables = tables_of(4, 1, 4)
    small = {"table": jnp.full((3, 2), 7.0), "bias": jnp.zeros(3)}
    back = emaopt.put(PARAMS, small, tables)
    np.testing.assert_array_equal(back["table"], TABLE.at[jnp.array([1, 4])].set(7.0))
    np.testing.assert_array_equal(back["bias"], 0)


@pytest.mark.many(2)
@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_tables_of_any_rank_and_dtype(shape, dtype):
    table = jnp.arange(np.prod(shape)).reshape(shape).astype(dtype)
    tables = tables_of(5, 0)
    small = emaopt.take({"table": table}, tables)
    assert small["table"].dtype == dtype
    back = emaopt.put({"table": table}, small, tables)
    np.testing.assert_array_equal(back["table"], table)


OTHER_STATES = {
    "sgd": optax.sgd(0.1, 0.9),
    "adam": optax.adam(0.1),
    "adagrad": optax.adagrad(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9),
    "amsgrad": optax.amsgrad(0.1),
    "lion": optax.lion(0.1),
    "yogi": optax.yogi(0.1),
    "ours": optax.chain(emaopt.clip_by_global_norm(1.0), emaopt.ftrl(0.1)),
    "masked": optax.masked(emaopt.momentum(0.1, 0.9), {"table": True, "bias": False}),
    "masked out": optax.masked(emaopt.adam(0.1), {"table": False, "bias": True}),
    "parts": optax.partition(
        {"rows": emaopt.adagrad(0.1), "rest": optax.adam(0.1)}, {"table": "rows", "bias": "rest"}
    ),
    "finite": optax.apply_if_finite(emaopt.rmsprop(0.1), 3),
    "injected": optax.inject_hyperparams(optax.adam)(0.1),
    "named": optax.named_chain(("a", emaopt.momentum(0.1, 0.9)), ("b", optax.adam(0.1))),
}


def looked_up(table, positions):
    return jnp.sum(table[positions] ** 2 * jnp.array([[1.0], [2.0], [-3.0]]))


@pytest.mark.many(1)
@pytest.mark.parametrize("name", OTHER_STATES)
@jax.numpy_dtype_promotion("standard")  # Optax divides by integers
def test_a_step_on_rows_is_a_dense_step_for_those_rows(name):
    """Of any optimizer; the rows that were not looked up, and their slots, stay bit for bit."""
    tx, ids = OTHER_STATES[name], jnp.array([4, 1, 4])

    def dense(params):
        return looked_up(params["table"], ids) + jnp.sum(params["bias"] ** 2)

    def sparse(params, positions):
        return looked_up(params["table"], positions) + jnp.sum(params["bias"] ** 2)

    params, opt_state = PARAMS, tx.init(PARAMS)
    updates, wanted_state = tx.update(jax.grad(dense)(params), opt_state, params)
    wanted = optax.apply_updates(params, updates), wanted_state

    tables = {"table": emaopt.rows(ids)}
    small, small_state = emaopt.take((params, opt_state), tables)
    grads = jax.grad(sparse)(small, tables["table"].positions)
    updates, small_state = tx.update(grads, small_state, small)
    new = emaopt.put(
        (params, opt_state), (optax.apply_updates(small, updates), small_state), tables
    )
    touched, rested = np.array([1, 4]), np.array([0, 2, 3, 5])
    trees = map(jax.tree.leaves, (new, wanted, (params, opt_state)))
    for got, want, old in zip(*trees, strict=True):
        if got.shape == TABLE.shape:
            np.testing.assert_allclose(got[touched], want[touched], rtol=1e-6)
            np.testing.assert_array_equal(got[rested], old[rested])
        else:
            np.testing.assert_allclose(got, want, rtol=1e-6)


def test_of_a_state_alone_the_same_leaves():
    opt_state = optax.chain(optax.adam(0.1), emaopt.rmsprop(0.1)).init(PARAMS)
    tables = tables_of(4, 1)
    _, both = emaopt.take((PARAMS, opt_state), tables)
    alone = emaopt.take(opt_state, tables)
    jax.tree.map(np.testing.assert_array_equal, alone, both)
    jax.tree.map(np.testing.assert_array_equal, emaopt.put(opt_state, alone, tables), opt_state)


@pytest.mark.parametrize("of_state", [False, True])
def test_a_name_that_ends_another_one_is_its_own(of_state):
    params = {"table": TABLE, "user": {"table": TABLE + 100.0}}
    opt_state = optax.chain(optax.adam(0.1), emaopt.momentum(0.1, 0.9)).init(params)
    tree = opt_state if of_state else (params, opt_state)
    for name in ("table", "user/table"):
        small = emaopt.take(tree, {name: emaopt.rows(jnp.array([3]))})
        for path, leaf in jax.tree_util.tree_flatten_with_path(small)[0]:
            if leaf.ndim == 2:
                inside = any(getattr(key, "key", "") == "user" for key in path)
                assert leaf.shape[0] == (1 if inside == (name == "user/table") else 6)


def test_adafactor_keeps_its_sums_of_columns_whole():
    params = {"table": jnp.ones((256, 128))}
    tx = optax.adafactor(0.1)
    tables = tables_of(3, 250)
    _, small = emaopt.take((params, tx.init(params)), tables)
    shapes = {leaf.shape for leaf in jax.tree.leaves(small)}
    assert {(2,), (128,)} <= shapes
    assert (256,) not in shapes


def test_in_a_train_state_by_the_end_of_the_name():
    tree = {"params": PARAMS, "opt_state": optax.adam(0.1).init(PARAMS)}
    small = emaopt.take(tree, tables_of(3, 1))
    shapes = [leaf.shape for leaf in jax.tree.leaves(small) if leaf.ndim == 2]
    assert shapes == [(2, 2)] * 3


def test_a_packed_tree_with_a_table_in_it():
    params = emaopt.pack({"table": jnp.ones((4, 3)), "a": jnp.ones(2), "b": jnp.ones(3)}, None, 5)
    opt_state = emaopt.momentum(0.1, 0.9).init(params)
    tables = tables_of(3, 1)
    small, small_state = emaopt.take((params, opt_state), tables)
    assert emaopt.unpack(small)["table"].shape == (2, 3)
    back = emaopt.put((params, opt_state), (small, small_state), tables)
    jax.tree.map(np.testing.assert_array_equal, back, (params, opt_state))


@pytest.mark.slow
def test_two_tables_with_lookups_of_their_own():
    params = {"user": TABLE, "item": jnp.arange(20.0).reshape(10, 2)}
    tables = {"user": emaopt.rows(jnp.array([[5], [2]])), "item": emaopt.rows(jnp.array([9]))}
    small = emaopt.take(params, tables)
    assert {name: x.shape for name, x in small.items()} == {"user": (2, 2), "item": (1, 2)}
    back = emaopt.put(params, jax.tree.map(lambda x: -x, small), tables)
    np.testing.assert_array_equal(back["user"][2], -TABLE[2])
    np.testing.assert_array_equal(back["item"][:9], params["item"][:9])


TX = optax.chain(emaopt.clip_by_global_norm(1.0), emaopt.adagrad(0.5))


def step(params, opt_state, ids):
    tables = {"table": emaopt.rows(ids)}
    small, small_state = emaopt.take((params, opt_state), tables)

    def loss(small, positions):
        return jnp.sum(jnp.cos(small["table"][positions])) + jnp.sum(small["bias"] ** 2)

    grads = jax.grad(loss)(small, tables["table"].positions)
    updates, small_state = TX.update(grads, small_state, small)
    small = optax.apply_updates(small, updates)
    return emaopt.put((params, opt_state), (small, small_state), tables)


@pytest.mark.slow
def test_in_a_scan_as_step_by_step():
    batches = jax.random.randint(jax.random.key(0), (5, 4), 0, 6)

    def body(carry, ids):
        return step(*carry, ids), None

    scanned, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, batches))(
        (PARAMS, TX.init(PARAMS))
    )
    carry = PARAMS, TX.init(PARAMS)
    for ids in batches:
        carry = jax.jit(step)(*carry, ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scanned, carry)


@pytest.mark.slow
def test_donated_the_step_is_in_place_and_compiles_once():
    params = {"table": jnp.ones((20_000, 16)), "bias": jnp.ones(3)}
    carry = params, TX.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, jnp.arange(8)).compile()
    memory = compiled.memory_analysis()
    table = params["table"].nbytes
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes - 8 * len(
        jax.tree.leaves(carry)
    )
    assert memory.temp_size_in_bytes < table / 100
    jitted = compiling.jit(step, donate_argnums=(0, 1))
    before = carry[0]["table"].unsafe_buffer_pointer()
    for i in range(3):
        carry = jitted(*carry, jnp.arange(i, i + 8))
    assert carry[0]["table"].unsafe_buffer_pointer() == before
    assert compiling.compilations(jitted) == 1


def test_a_cpu_reads_each_row_in_vectors_and_others_read_the_table_alone():
    params = {"table": jax.ShapeDtypeStruct((10_000, 64), jnp.float32)}
    ids = jax.ShapeDtypeStruct((16,), jnp.int32)
    view = jax.jit(lambda params, ids: emaopt.take(params, {"table": emaopt.rows(ids)}))
    on_cpu = view.trace(params, ids).lower(lowering_platforms=("cpu",)).compile()
    # the choice is in the loop that gathers, so that nothing of the size of the table is written
    (gather,) = re.findall(r"f32\[16,\S* gather\(%(\S+),", on_cpu.as_text())
    assert re.search(rf"%{gather} = f32\[10000,64\]\S* select\(", on_cpu.as_text())
    assert on_cpu.memory_analysis().temp_size_in_bytes < 20_000
    on_gpu = view.trace(params, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(r"(select|compare).*tensor<10000x64x", on_gpu)


@pytest.mark.slow
@pytest.mark.parametrize("jitted", [False, True])
def test_a_row_goes_through_a_view_with_every_bit(jitted):
    special = [-0.0, 1e-40, -1e-45, jnp.inf, -jnp.inf, jnp.nan, 1e-30, 3e38]
    params = {"table": jnp.asarray([[x] * 64 for x in special], jnp.float32)}
    tables = tables_of(*range(8))
    take = jax.jit(emaopt.take) if jitted else emaopt.take
    after = emaopt.put(params, take(params, tables), tables)
    assert np.asarray(after["table"]).tobytes() == np.asarray(params["table"]).tobytes()


@pytest.mark.slow
def test_padding_is_harmless():
    """No NaN from accumulators of zero, and next to nothing in a norm behind the optimizer."""
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_rss(0.0, 0.0), TX)
    opt_state = tx.init(PARAMS)
    tables = tables_of(2, 2, 2, 2)
    small, small_state = emaopt.take((PARAMS, opt_state), tables)
    grads = jax.tree.map(jnp.zeros_like, small)
    updates, _ = tx.update(grads, small_state, small)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updates))
    for tx in (emaopt.adagrad(0.1, 1e-30), emaopt.adam(0.1, epsilon=0.0), emaopt.ftrl(0.1)):
        small, small_state = emaopt.take((PARAMS, tx.init(PARAMS)), tables)
        grads = jax.tree.map(jnp.zeros_like, small)
        updates, _ = tx.update(grads, small_state, small)
        assert jnp.max(jnp.abs(updates["table"][1:])) < 1e-12


def test_weight_decay_acts_on_the_rows_of_the_view():
    tx = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
    tables = tables_of(3)
    small, small_state = emaopt.take((PARAMS, tx.init(PARAMS)), tables)
    updates, small_state = tx.update(jax.tree.map(jnp.zeros_like, small), small_state, small)
    new, _ = emaopt.put(
        (PARAMS, tx.init(PARAMS)), (optax.apply_updates(small, updates), small_state), tables
    )
    np.testing.assert_array_equal(new["table"], TABLE.at[3].multiply(0.5))


# what cannot be seen under jit


def test_under_jit_an_id_outside_reads_nan_and_writes_nothing():
    @jax.jit
    def run(params, ids):
        tables = {"table": emaopt.rows(ids)}
        small = emaopt.take(params, tables)
        looked_up = small["table"][tables["table"].positions]
        return looked_up, emaopt.put(params, jax.tree.map(jnp.zeros_like, small), tables)

    looked_up, new = run(PARAMS, jnp.array([2, -1, 6, PADDING]))
    np.testing.assert_array_equal(jnp.isnan(looked_up), [[False] * 2, *[[True] * 2] * 3])
    np.testing.assert_array_equal(looked_up[0], TABLE[2])
    np.testing.assert_array_equal(new["table"], TABLE.at[2].set(0.0))


@pytest.mark.slow
def test_under_jit_too_small_a_size_is_all_nan_and_writes_nothing():
    tx = optax.apply_if_finite(TX, 2)

    @jax.jit
    def run(params, opt_state, ids):
        tables = {"table": emaopt.rows(ids, 3)}
        small, small_state = emaopt.take((params, opt_state), tables)
        loss = lambda p, at: jnp.sum(p["table"][at]) * jnp.sum(p["bias"])
        value, grads = jax.value_and_grad(loss)(small, tables["table"].positions)
        updates, small_state = tx.update(grads, small_state, small)
        small = optax.apply_updates(small, updates)
        return value, emaopt.put((params, opt_state), (small, small_state), tables)

    value, (new, _) = run(PARAMS, tx.init(PARAMS), jnp.array([0, 2, 4, 5]))
    assert jnp.isnan(value)
    jax.tree.map(np.testing.assert_array_equal, new, PARAMS)
    value, (new, _) = run(PARAMS, tx.init(PARAMS), jnp.array([0, 2, 0, 5]))
    assert jnp.isfinite(value)
    assert not np.array_equal(new["table"], TABLE)


# in other people's models


@pytest.mark.slow
def test_linen_has_a_table_as_large_as_the_view():
    class Model(nn.Module):
        number: int

        @nn.compact
        def __call__(self, ids):
            return nn.Dense(1)(nn.Embed(self.number, 4, name="embed")(ids))

    ids = jnp.array([[7, 2], [2, 2]])
    params = Model(10).init(jax.random.key(0), ids)["params"]
    table = emaopt.rows(ids)
    small = emaopt.take(params, {"embed/embedding": table})
    got = Model(table.ids.size).apply({"params": small}, table.positions)
    np.testing.assert_array_equal(got, Model(10).apply({"params": params}, ids))


@pytest.mark.slow
def test_nnx_looks_positions_up_in_a_model_of_the_small_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(10, 4, rngs=rngs)
            self.out = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, ids):
            return self.out(self.embed(ids))

    model = Model(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    ids = jnp.array([7, 2, 2])
    tables = {"embed/embedding": emaopt.rows(ids)}
    tx = emaopt.adagrad(0.1)
    small, small_state = emaopt.take((params, tx.init(params)), tables)
    at = tables["embed/embedding"].positions
    np.testing.assert_array_equal(nnx.merge(graph, small)(at), model(ids))
    grads = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(at)))(small)
    updates, small_state = tx.update(grads, small_state, small)
    small = optax.apply_updates(small, updates)
    params, _ = emaopt.put((params, tx.init(params)), (small, small_state), tables)
    moved = jnp.any(params["embed"]["embedding"][...] != model.embed.embedding[...], axis=1)
    np.testing.assert_array_equal(np.flatnonzero(moved), [2, 7])


@pytest.mark.slow
def test_equinox_modules_are_trees():
    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        out: eqx.nn.Linear

        def __call__(self, i):
            return self.out(self.embed(i))

    keys = jax.random.split(jax.random.key(0))
    model = Model(eqx.nn.Embedding(10, 4, key=keys[0]), eqx.nn.Linear(4, 1, key=keys[1]))
    ids = jnp.array([7, 2, 2])
    tables = {"embed/weight": emaopt.rows(ids)}
    small = emaopt.take(model, tables)
    got = jax.vmap(small)(tables["embed/weight"].positions)
    np.testing.assert_array_equal(got, jax.vmap(model)(ids))
    back = emaopt.put(model, small, tables)
    jax.tree.map(np.testing.assert_array_equal, eqx.filter(back, eqx.is_array), model)


# bad input

MULTI = optax.MultiSteps(emaopt.momentum(0.1, 0.9), 4)
MISTAKES = {
    "ids of floats": (lambda: emaopt.rows(jnp.ones(3)), "ids has dtype float32. Pass integers"),
    "booleans": (lambda: emaopt.rows(jnp.ones(3, bool)), "ids has dtype bool. Pass integers"),
    "a negative id": (lambda: emaopt.rows(jnp.array([3, -1])), "ids holds -1, which is not a row"),
    "too small": (lambda: emaopt.rows(jnp.arange(5), 4), "ids has 5 distinct ids. Pass size=5"),
    "half a size": (lambda: emaopt.rows(jnp.arange(5), 4.5), "size=4.5 is not a number of rows"),
    "an id outside": (lambda: emaopt.take(PARAMS, tables_of(6)), "the id 6, and the table has 6"),
    "put outside": (
        lambda: emaopt.put(PARAMS, PARAMS, tables_of(0, 1, 2, 3, 4, 7)),
        "has the id 7, and the table has 6 rows",
    ),
    "no dict": (lambda: emaopt.take(PARAMS, emaopt.rows(jnp.arange(2))), "not a dict of Rows"),
    "ids alone": (lambda: emaopt.take(PARAMS, {"table": jnp.arange(2)}), "not a dict of Rows"),
    "no such table": (
        lambda: emaopt.take((PARAMS, ()), {"tabel": emaopt.rows(jnp.arange(2))}),
        "'tabel', with which no leaf of tree ends. Did you mean 'table'?",
    ),
    "none in the state": (
        lambda: emaopt.take(TX.init(PARAMS), {"embed": emaopt.rows(jnp.arange(2))}),
        "'embed', with which no leaf of tree ends",
    ),
    "a scalar": (
        lambda: emaopt.take({"a": jnp.float32(1)}, {"a": emaopt.rows(jnp.arange(1))}),
        "tree has no array at leaf 'a'",
    ),
    "two of one name": (
        lambda: emaopt.take({"a/b": TABLE, "a": {"b": TABLE}}, {"a/b": emaopt.rows([1])}),
        "two leaves are named 'a/b'",
    ),
    "two networks": (
        lambda: emaopt.take(
            ({"a": {"table": TABLE}, "b": {"table": TABLE}}, ()), {"table": emaopt.rows([1])}
        ),
        "several tables with this name: '0/a/table', '0/b/table'. Pass the whole name",
    ),
    "another view": (
        lambda: emaopt.put(PARAMS, emaopt.take(PARAMS, tables_of(1, 2)), tables_of(3)),
        r"small has float32\[2,2\] at leaf 'table', where a view of tree .* has float32\[1,2\]",
    ),
    "a wider view": (
        lambda: emaopt.put(PARAMS, {"table": np.ones((1, 2)), "bias": jnp.ones(3)}, tables_of(1)),
        r"small has float64\[1,2\] at leaf 'table'",
    ),
    "half of it": (
        lambda: emaopt.put((PARAMS, ()), (PARAMS["table"], ()), tables_of(1)),
        "small does not have the structure of tree",
    ),
    "micro-batches": (
        lambda: emaopt.take((PARAMS, MULTI.init(PARAMS)), tables_of(1)),
        "Pass the ids of all micro-batches to one emaopt.rows",
    ),
    "an average of all rows": (
        lambda: emaopt.take((PARAMS, emaopt.ema(0.9).init(PARAMS)), tables_of(1)),
        r"moves every row at every step, at '1/shadow/table'. Make it with ema\(decay, rows=",
    ),
    "an optimizer with a history of the table": (
        lambda: emaopt.take((PARAMS, optax.lbfgs().init(PARAMS)), tables_of(1)),
        r"at '1/0/diff_params_memory/table', a history of the table 'table', of which no rows",
    ),
    "that average alone": (
        lambda: emaopt.take(emaopt.ema(0.9).init(PARAMS), tables_of(1)),
        "moves every row at every step, at 'shadow/table'",
    ),
}


def test_a_table_on_the_host_is_an_error():
    state = emaopt.on_host(emaopt.ema(0.9, rows=emaopt.matching("table")).init(PARAMS))
    with pytest.raises(ValueError, match="in the memory of the host"):
        emaopt.take((PARAMS, state), tables_of(1))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_an_error_that_says_what_to_do(name):
    do, said = MISTAKES[name]
    with pytest.raises(ValueError, match=said):
        do()


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps mixes dtypes
def test_the_gradients_of_micro_batches_add_up_in_one_view():
    """What the error about `optax.MultiSteps` names as the right way."""
    batches = jnp.array([[4, 1], [1, 0], [3, 3]])
    tables = {"table": emaopt.rows(batches)}
    tx = emaopt.adagrad(0.5)
    opt_state = tx.init(PARAMS)
    small, small_state = emaopt.take((PARAMS, opt_state), tables)
    loss = lambda p, at: jnp.mean(jnp.cos(p["table"][at]))
    grads = [jax.grad(loss)(small, at) for at in tables["table"].positions]
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *grads)
    updates, small_state = tx.update(mean, small_state, small)
    small = optax.apply_updates(small, updates)
    got, _ = emaopt.put((PARAMS, opt_state), (small, small_state), tables)

    multi = optax.MultiSteps(tx, 3)
    params, state = PARAMS, multi.init(PARAMS)
    for ids in batches:
        updates, state = multi.update(jax.grad(loss)(params, ids), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(got["table"], params["table"], rtol=1e-6)


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, "x")], ids=str)
def test_a_table_of_an_explicit_mesh_needs_no_mesh_around_the_step(spec):
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Explicit,))
    tx = emaopt.ema(0.5, rows=emaopt.matching("table"))
    tables = {"table": emaopt.rows(jnp.array([3, 0]))}

    @jax.jit
    def step(params, opt_state):
        small = emaopt.take((params, opt_state), tables)
        _, state = tx.update(jax.tree.map(jnp.ones_like, small[0]), small[1], small[0])
        new = jax.tree.map(lambda x: x + 1, small[0])
        return emaopt.put((params, opt_state), (new, state), tables)

    def averaged(table):
        params = {"table": table}
        return emaopt.average(*step(params, jax.jit(tx.init)(params)))["table"]

    table = jnp.arange(4.0 * devices**2).reshape(4 * devices, devices)
    sharded = averaged(jax.device_put(table, NamedSharding(mesh, spec)))
    np.testing.assert_array_equal(sharded, averaged(table))
    assert not sharded.sharding.is_fully_replicated or devices == 1
