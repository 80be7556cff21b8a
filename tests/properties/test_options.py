"""What the options of an average are compiled to: bytes accessed, copies, memory beside the state.

Of the compiled program, so the same on every machine. `benchmarks/options.py` has the times.
"""

import re

import jax
import optax
import pytest
import trees

import emaopt


PARAMS = {"a": (256, 512), "b": (512, 64), "c": (512,)}
HALF = {"a": True, "b": False, "c": False}
SGD = emaopt.gradient_descent(0.1)
FLOATS = 256 * 512 + 512 * 64 + 512
# option: arrays read and written, of the size of the parameters. The branch of `heal` that looks at
# each element counts two, though it is not taken.
UPDATES = {
    "plain": (emaopt.ema(0.999), 3),
    "warmup": (emaopt.ema(emaopt.warmup(0.999)), 3),
    "every": (emaopt.ema(emaopt.every(10, 0.999)), 3),
    "ledger": (emaopt.ema(0.999, ledger=True), 3),
    "stochastic": (emaopt.ema(0.999, accumulator_dtype=emaopt.stochastic()), 2),
    "stochastic warmup": (
        emaopt.ema(emaopt.warmup(0.999), accumulator_dtype=emaopt.stochastic()),
        2,
    ),
    "heal": (emaopt.heal(emaopt.ema(0.999)), 7),
    "masked": (optax.masked(emaopt.ema(0.999), HALF), 3 * 256 * 512 / FLOATS),
}
STEPS = {
    "plain": (optax.chain(SGD, emaopt.ema(0.999)), 6),
    "overwrite": (optax.chain(SGD, emaopt.overwrite(10, emaopt.ema(0.999))), 8),
    "heal": (optax.chain(SGD, emaopt.heal(emaopt.ema(0.999))), 11),
}


def compiled(step, *arguments):
    fast = {"xla_backend_optimization_level": 0}  # which loops there are is decided before
    donated = tuple(range(len(arguments) - 1))
    return jax.jit(step, donate_argnums=donated).lower(*arguments).compile(compiler_options=fast)


def look(program, carry, arrays):
    """In place, nothing copied, no array kept beside the state, no more memory touched."""
    sizes = program.memory_analysis()
    assert sizes.alias_size_in_bytes == trees.nbytes(carry)
    assert sizes.temp_size_in_bytes < 20_000
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", program.as_text())
    assert not copied
    touched = program.cost_analysis()["bytes accessed"]
    assert touched <= 4 * FLOATS * arrays + 20_000


@pytest.mark.many(2)
@pytest.mark.parametrize("option", UPDATES)
def test_an_update_is_in_place_and_touches_what_it_must(option):
    tx, arrays = UPDATES[option]
    params = trees.abstract(PARAMS)
    state = jax.eval_shape(tx.init, params)
    absent = dict.fromkeys(params)
    look(compiled(lambda s, p: tx.update(absent, s, p)[1], state, params), state, arrays)


@pytest.mark.parametrize("option", STEPS)
def test_a_step_is_in_place_and_touches_what_it_must(option):
    tx, arrays = STEPS[option]
    params = trees.abstract(PARAMS)
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        return emaopt.apply_gradients(tx, grads, params, state)

    look(compiled(step, params, state, params), (params, state), arrays)


def test_compensated_keeps_no_more_than_one_array_beside_its_state():
    tx = emaopt.ema(0.999, accumulator_dtype=emaopt.compensated())
    params = trees.abstract(PARAMS)
    state = jax.eval_shape(tx.init, params)
    absent = dict.fromkeys(params)
    program = compiled(lambda s, p: tx.update(absent, s, p)[1], state, params)
    sizes = program.memory_analysis()
    assert sizes.alias_size_in_bytes == trees.nbytes(state)
    assert sizes.temp_size_in_bytes <= 4 * FLOATS + 20_000
    copied = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", program.as_text())
    assert not copied
    assert program.cost_analysis()["bytes accessed"] <= 4 * FLOATS * 11 + 20_000


def gradient_of(params, x):
    def loss(params):
        hidden = x @ params["a"] @ params["b"]
        return (hidden * hidden).sum() + (params["c"] * params["c"]).sum()

    return jax.grad(loss)(params)


def test_primal_keeps_no_more_than_the_point_of_its_optimizer_beside_its_state():
    """An array per parameter. Behind a gradient it takes the place of the gradient."""
    tx = emaopt.primal(SGD, emaopt.ema(0.999))
    params, batch = trees.abstract(PARAMS), jax.ShapeDtypeStruct((8, 256), "float32")
    carry = params, jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        return emaopt.apply_gradients(tx, grads, params, state)

    alone = compiled(step, *carry, params)
    trained = compiled(lambda p, s, x: step(p, s, gradient_of(p, x)), *carry, batch)
    for program in (alone, trained):
        sizes = program.memory_analysis()
        assert sizes.alias_size_in_bytes == trees.nbytes(carry)
        assert sizes.temp_size_in_bytes <= 4 * FLOATS + 60_000
    assert alone.cost_analysis()["bytes accessed"] <= 4 * FLOATS * 11 + 20_000


def test_averages_in_one_tree_are_read_and_written_once():
    tx = optax.named_chain(("a", emaopt.ema(0.9)), ("b", emaopt.ema(0.99)))
    params = trees.abstract(PARAMS)
    state = jax.eval_shape(tx.init, params)
    program = compiled(lambda p, s: emaopt.stacked(p, s, ["a", "b"]), params, state)
    assert program.memory_analysis().temp_size_in_bytes < 20_000
    assert program.cost_analysis()["bytes accessed"] <= 4 * FLOATS * 4 + 20_000


def test_a_view_of_rows_keeps_what_the_rows_take_and_copies_no_table():
    params = {"table": jax.ShapeDtypeStruct((10_000, 64), "float32")}
    tx = optax.chain(emaopt.adagrad(0.1), emaopt.ema(0.999, rows={"table": True}))
    carry = params, jax.eval_shape(tx.init, params)
    batch = jax.ShapeDtypeStruct((32,), "int32"), trees.abstract({"table": (32, 64)})

    def step(params, state, batch):
        ids, grads = batch
        tables = {"table": emaopt.rows(ids)}
        small = emaopt.take((params, state), tables)
        small = emaopt.apply_gradients(tx, grads, *small)
        return emaopt.put((params, state), small, tables)

    program = compiled(step, *carry, batch)
    sizes = program.memory_analysis()
    assert sizes.alias_size_in_bytes >= trees.nbytes(carry)
    assert sizes.temp_size_in_bytes <= 6 * 4 * 32 * 64
    assert not re.findall(r"= \w+\[10000,\S* copy\(", program.as_text())
