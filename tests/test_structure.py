"""What a training step is compiled to: nothing copied, nothing touched twice, nothing kept.

Of the compiled program, so the same on every machine: no timing.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from trees import step_of

import emaopt


SMALL = {"kernel": (3, 3, 64, 64), "bias": (64,), "dense": (256, 128), "scalar": ()}
TREES = {"small": SMALL, "resnet50": trees.RESNET50, "vit_b": trees.VIT_B}


@functools.cache
def abstract(tree):
    return trees.abstract(TREES[tree])


def hand_momentum(g, p, step, a):
    a = a * 0.9 + g
    return p - 0.1 * a, a


def hand_adam(g, p, step, m, v):
    m, v = m + 0.1 * (g - m), v + 0.001 * (g * g - v)
    alpha = 0.001 * jnp.sqrt(1 - 0.999**step) / (1 - 0.9**step)
    return p - alpha * m / (jnp.sqrt(v) + 1e-8), m, v


def hand_rmsprop(g, p, step, r, m):
    r = r + 0.1 * (g * g - r)
    m = m * 0.9 + 0.1 * g / jnp.sqrt(r + 1e-10)
    return p - m, r, m


HAND = {"momentum": hand_momentum, "adam": hand_adam, "rmsprop": hand_rmsprop}
OPTIMIZERS = {
    "gradient_descent": emaopt.gradient_descent(0.1),
    "momentum": emaopt.momentum(0.1, 0.9),
    "nesterov": emaopt.momentum(0.1, 0.9, use_nesterov=True),
    "adagrad": emaopt.adagrad(0.1),
    "adadelta": emaopt.adadelta(0.1),
    "adam": emaopt.adam(0.001),
    "ftrl": emaopt.ftrl(0.1),
    "rmsprop": emaopt.rmsprop(0.1, momentum=0.9),
    "rmsprop_centered": emaopt.rmsprop(0.1, momentum=0.9, centered=True),
}
PLACES = {
    "alone": lambda tx: tx,
    "clip": lambda tx: optax.chain(emaopt.clip_by_global_norm(1.0), tx),
    "ema": lambda tx: optax.chain(tx, emaopt.ema(0.999)),
    "both": lambda tx: optax.chain(
        emaopt.clip_by_global_norm(1.0), tx, emaopt.ema(emaopt.warmup(0.999))
    ),
}
EVERYWHERE = [("small", name, place) for name in OPTIMIZERS for place in PLACES]
BIG = [
    ("resnet50", "momentum", "both"),
    ("resnet50", "rmsprop", "ema"),
    ("resnet50", "ftrl", "both"),
    ("resnet50", "adadelta", "ema"),
    ("vit_b", "momentum", "clip"),
    ("vit_b", "adam", "both"),
]


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


@functools.cache
def hand_bytes(tree, name, place):
    params = abstract(tree)
    slots = [params] * (rule_arguments(HAND[name]) - 3)
    carry = params, slots, params if place in ("ema", "both") else None, NUMBER
    compiled = jax.jit(hand_step(name, place), donate_argnums=0).lower(carry, params).compile()
    return compiled.cost_analysis()["bytes accessed"]


NUMBER = jax.ShapeDtypeStruct((), jnp.float32)


def rule_arguments(rule):
    return rule.__code__.co_argcount


@functools.cache
def compiled(tree, name, place):
    """The step, donated, and what is carried from step to step."""
    tx, params = PLACES[place](OPTIMIZERS[name]), abstract(tree)
    carry = params, jax.eval_shape(tx.init, params)
    return jax.jit(step_of(tx), donate_argnums=0).lower(carry, params).compile(), carry


@pytest.mark.parametrize(("tree", "name", "place"), EVERYWHERE + BIG)
def test_a_step_is_in_place(tree, name, place):
    step, carry = compiled(tree, name, place)
    sizes = step.memory_analysis()
    carried = [x.size * x.dtype.itemsize for x in jax.tree.leaves(carry)]
    assert sizes.alias_size_in_bytes == sum(carried)
    assert sizes.temp_size_in_bytes < 1_000_000
    copied = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", step.as_text())
    assert not list(filter(None, copied))


@pytest.mark.parametrize(("tree", "name", "place"), [x for x in EVERYWHERE + BIG if x[1] in HAND])
def test_a_step_touches_no_more_memory_than_the_same_step_by_hand(tree, name, place):
    step, _ = compiled(tree, name, place)
    assert step.cost_analysis()["bytes accessed"] <= 1.001 * hand_bytes(tree, name, place)


@pytest.mark.parametrize("place", ["alone", "both"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_compiles_once_and_scans(name, place):
    tx, params = PLACES[place](OPTIMIZERS[name]), {"w": jnp.ones(2), "b": jnp.ones(())}
    step, first = jax.jit(step_of(tx)), (params, tx.init(params))
    carry = step(step(first, params), params)
    assert step._cache_size() == 1
    assert jax.tree.map(jnp.result_type, carry) == jax.tree.map(jnp.result_type, first)
    scanned, _ = jax.lax.scan(lambda c, _: (step(c, params), None), first, length=2)
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(carry), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


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
