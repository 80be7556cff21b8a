"""What a training step is compiled to: nothing copied, nothing touched twice, nothing kept.

Of the compiled program, so the same on every machine: no timing.
"""

import functools
import itertools
import re

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from train import step_of
from trees import OPTIMIZERS, PLACES

import emaopt


TREES = {
    "resnet_like": trees.each_rank_once(trees.RESNET50) | {"scalar": ()},
    "vit_like": trees.each_rank_once(trees.VIT_B),
    "resnet50": trees.RESNET50,
    "vit_b": trees.VIT_B,
}


@functools.cache
def abstract(tree):
    return trees.abstract(TREES[tree])


def hand_gradient_descent(g, p, step):
    return (p - 0.1 * g,)


def hand_momentum(g, p, step, a):
    a = a * 0.9 + g
    return p - 0.1 * a, a


def hand_nesterov(g, p, step, a):
    a = a * 0.9 + g
    return p - 0.1 * (g + a * 0.9), a


def hand_adagrad(g, p, step, a):
    a = a + g * g
    return p - 0.1 * g / jnp.sqrt(a), a


def hand_adadelta(g, p, step, a, d):
    a = a * 0.95 + g * g * 0.05
    u = jnp.sqrt(d + 1e-8) / jnp.sqrt(a + 1e-8) * g
    return p - 0.1 * u, a, d * 0.95 + u * u * 0.05


def hand_adam(g, p, step, m, v):
    m, v = m + 0.1 * (g - m), v + 0.001 * (g * g - v)
    alpha = 0.001 * jnp.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    return p - alpha * m / (jnp.sqrt(v) + 1e-8), m, v


def hand_rmsprop(g, p, step, r, m):
    r = r + 0.1 * (g * g - r)
    m = m * 0.9 + 0.1 * g / jnp.sqrt(r + 1e-10)
    return p - m, r, m


def hand_ftrl(g, p, step, n, z):
    new = n + g * g
    z = z + g - (jnp.sqrt(new) - jnp.sqrt(n)) / 0.1 * p
    return -z * 0.1 / jnp.sqrt(new), new, z


def hand_rmsprop_centered(g, p, step, r, mean, m):
    r, mean = r + 0.1 * (g * g - r), mean + 0.1 * (g - mean)
    m = m * 0.9 + 0.1 * g / jnp.sqrt(r - mean * mean + 1e-10)
    return p - m, r, mean, m


HAND = {name: globals()[f"hand_{name}"] for name in OPTIMIZERS}
EVERYWHERE = list(itertools.product(("resnet_like", "vit_like"), OPTIMIZERS, PLACES))
WHOLE = [("resnet50", "ftrl", "both")]


def hand_step(name, place):
    """The same step as anyone would write it down."""
    rule = HAND[name]

    def step(carry, grads):
        params, slots, shadow, number = carry
        number = number + 1
        if place in ("clip", "both"):
            norm = jnp.sqrt(sum(jnp.sum(g * g) for g in grads.values()))
            grads = {k: g * (1.0 / jnp.maximum(norm, 1.0)) for k, g in grads.items()}
        new = {k: rule(grads[k], params[k], number, *(s[k] for s in slots)) for k in params}
        params, *slots = ({k: row[i] for k, row in new.items()} for i in range(1 + len(slots)))
        if shadow is not None:
            shadow = {k: s - (s - params[k]) * 0.001 for k, s in shadow.items()}
        return params, slots, shadow, number

    return step


def compile_donated(step, *arguments):
    fast = {"xla_backend_optimization_level": 0}  # which loops there are is decided before
    return jax.jit(step, donate_argnums=0).lower(*arguments).compile(compiler_options=fast)


def hand_bytes(tree, name, place):
    params = abstract(tree)
    slots = [params] * (rule_arguments(HAND[name]) - 3)
    carry = params, slots, params if place in ("ema", "both") else None, NUMBER
    return compile_donated(hand_step(name, place), carry, params).cost_analysis()["bytes accessed"]


NUMBER = jax.ShapeDtypeStruct((), jnp.float32)


def rule_arguments(rule):
    return rule.__code__.co_argcount


@pytest.mark.slow
@pytest.mark.parametrize(("tree", "name", "place"), EVERYWHERE + WHOLE)
def test_a_step_is_in_place_and_touches_no_more_memory_than_by_hand(tree, name, place):
    tx, params = PLACES[place](OPTIMIZERS[name]), abstract(tree)
    carry = params, jax.eval_shape(tx.init, params)
    step = compile_donated(step_of(tx), carry, params)
    sizes = step.memory_analysis()
    assert sizes.alias_size_in_bytes == trees.nbytes(carry)
    assert sizes.temp_size_in_bytes < 1_000_000
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", step.as_text())
    assert not list(filter(None, copied))
    assert step.cost_analysis()["bytes accessed"] <= 1.001 * hand_bytes(tree, name, place)


@pytest.mark.many(1)
@pytest.mark.parametrize("place", ["alone", "both"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_compiles_once_and_scans(name, place):
    tx, params = PLACES[place](OPTIMIZERS[name]), {"w": jnp.ones(2), "b": jnp.ones(())}
    step, first = compiling.jit(step_of(tx)), (params, tx.init(params))
    carry = step(step(first, params), params)
    assert compiling.compilations(step) == 1
    assert jax.tree.map(jnp.result_type, carry) == jax.tree.map(jnp.result_type, first)
    scanned, _ = jax.lax.scan(lambda c, _: (step(c, params), None), first, length=2)
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(carry), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.many(1)
@pytest.mark.parametrize("place", ["ema", "both"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_sharded_parameters_sends_one_norm_at_most(name, place):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx, params = PLACES[place](OPTIMIZERS[name]), {"kernel": (16, 4), "bias": (8,)}
    put = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, P("x") if x.shape else P())
    )
    params = jax.tree.map(put, trees.abstract(params))
    carry = params, jax.tree.map(put, jax.eval_shape(tx.init, params))
    step = compile_donated(step_of(tx), carry, params)
    for after, before in zip(*map(jax.tree.leaves, (step.output_shardings, carry)), strict=True):
        assert after.is_equivalent_to(before.sharding, before.ndim)
    sends = r"= ([^=\n]*) (?:all-|collective-|reduce-scatter|send)[\w-]*\("
    sent = [set(re.findall(r"\w+\[[^\]]*\]", types)) for types in re.findall(sends, step.as_text())]
    assert sent == [{"f32[]"}] * (place in ("clip", "both"))


def test_the_sum_of_a_global_norm_is_computed_once():
    params = {f"{i:02}": jax.ShapeDtypeStruct((8,), jnp.float32) for i in range(50)}
    clip = emaopt.clip_by_global_norm(1.0)
    step = jax.jit(lambda g: clip.update(g, optax.EmptyState())[0]).lower(params).compile()
    additions = len(re.findall(r"= f32\[\] add\(", step.as_text()))
    assert additions < 2 * len(params)


def test_the_trees_are_those_of_the_papers():
    sizes = {tree: [np.prod(x.shape, dtype=int) for x in abstract(tree).values()] for tree in TREES}
    assert (len(sizes["resnet50"]), sum(sizes["resnet50"])) == (161, 25_557_032)
    assert (len(sizes["vit_b"]), sum(sizes["vit_b"])) == (152, 86_567_656)
