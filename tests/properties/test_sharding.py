"""Parameters sharded over eight devices: states follow them, and averaging needs no communication.

In meshes of both kinds: those where the compiler decides on shardings (Auto), and those where
they are part of the types (Explicit).
"""

import functools
import re

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sharded import collectives
from train import step_of
from trees import OPTIMIZERS

import emaopt


ELEMENTWISE = OPTIMIZERS | {
    "adam": emaopt.adam(0.1, epsilon=1e-3),
    "rmsprop": emaopt.rmsprop(0.1, epsilon=1e-3),
    "rmsprop_centered": emaopt.rmsprop(0.1, epsilon=1e-3, centered=True),
    "clip_by_value": emaopt.clip_by_value(-0.5, 0.5),
    "ema": emaopt.ema(0.9),
    "ema_of_halves": emaopt.ema(0.9, accumulator_dtype=jnp.bfloat16),
    "ema_warmup": emaopt.ema(emaopt.warmup(0.9)),
    "ema_power": emaopt.ema(emaopt.power(3.0)),
    "ema_every": emaopt.ema(emaopt.every(2, 0.9)),
    "ema_ledger": emaopt.ema(0.9, ledger=True),
    "ema_before": emaopt.ema(0.9, sequential_update=False),
    "ema_compensated": emaopt.ema(0.9, accumulator_dtype=emaopt.compensated()),
    "ema_stochastic": emaopt.ema(0.9, accumulator_dtype=emaopt.stochastic()),
}
NORMS = {
    "clip_by_norm": emaopt.clip_by_norm(0.5),
    "clip_by_average_norm": emaopt.clip_by_average_norm(0.5),
    "clip_by_global_norm": emaopt.clip_by_global_norm(0.5),
}
TRANSFORMATIONS = ELEMENTWISE | NORMS

each = pytest.mark.parametrize("name", TRANSFORMATIONS)
each_mesh = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)

SPECS = {"rows": P("x", None), "vector": P("x"), "replicated": P(None), "scalar": P()}
PLAIN = {
    "rows": jnp.linspace(-1.0, 1.0, 32).reshape(8, 4),
    "vector": jnp.linspace(0.5, 2.0, 16),
    "replicated": jnp.asarray([1.0, -2.0, 3.0]),
    "scalar": jnp.float32(0.7),
}


@functools.cache
def sharded(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    # through a jitted function, which writes P("x", None) as all jitted functions do, maybe P("x")
    return jax.jit(lambda tree: tree)(jax.device_put(PLAIN, shardings))


@functools.cache
def plain(name):
    """Three steps on one device."""
    tx = TRANSFORMATIONS[name]
    step, carry = jax.jit(step_of(tx)), (PLAIN, tx.init(PLAIN))
    for _ in range(3):
        carry = step(carry, PLAIN)
    return carry


@functools.cache
def compiled(name, kind):
    params = sharded(kind)
    tx = TRANSFORMATIONS[name]
    carry = params, jax.jit(tx.init)(params)
    return jax.jit(step_of(tx)).lower(carry, params).compile().as_text()


def assert_beside_params(tree, params):
    """Every leaf is where the parameter of that name is; step and powers are everywhere."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = getattr(path[-1], "key", "scalar")
        like = params.get(name, params["scalar"])
        assert leaf.shape == like.shape
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), path
        assert len(leaf.sharding.device_set) == 8


@pytest.mark.many(20)
@each
@each_mesh
def test_states_are_made_where_their_parameters_are(name, kind):
    params = sharded(kind)
    assert_beside_params(TRANSFORMATIONS[name].init(params), params)


# a lone step, all that gradient descent has, is a constant that jit makes on one device
@pytest.mark.many(10)
@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name != "gradient_descent"])
@each_mesh
def test_states_are_made_where_their_parameters_are_under_jit(name, kind):
    params = sharded(kind)
    assert_beside_params(jax.jit(TRANSFORMATIONS[name].init)(params), params)


@pytest.mark.many(2)
@each
@each_mesh
def test_a_step_keeps_shardings_and_numbers_and_compiles_once(name, kind):
    tx, params = TRANSFORMATIONS[name], sharded(kind)
    step = compiling.jit(step_of(tx))
    carry, expected = (params, tx.init(params)), plain(name)
    for _ in range(3):
        carry = step(carry, params)
    assert compiling.compilations(step) == 1
    assert_beside_params(carry, params)
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b, np.float64)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, rtol=1e-6, atol=1e-7 * np.max(np.abs(b))
        )


@pytest.mark.many(3)
@pytest.mark.parametrize("name", ELEMENTWISE)
@each_mesh
def test_optimizers_and_averages_compile_to_no_collective(name, kind):
    assert collectives(compiled(name, kind)) == []


@pytest.mark.many(3)
@pytest.mark.parametrize("name", NORMS)
@each_mesh
def test_a_norm_costs_one_reduction_of_scalars(name, kind):
    (sent,) = collectives(compiled(name, kind))
    assert sent[1] == "all-reduce"
    assert set(re.findall(r"\w+\[[^\]]*\]", sent[0])) == {"f32[]"}


@each_mesh
def test_average_and_swap_move_nothing(kind):
    params = sharded(kind)
    opt_state = emaopt.ema(0.5).init(params)
    average = jax.jit(emaopt.average)
    assert collectives(average.lower(params, opt_state).compile().as_text()) == []
    assert_beside_params(average(params, opt_state), params)
    averages, swapped = emaopt.swap(params, opt_state)
    assert_beside_params((averages, swapped.shadow), params)
