"""TF1's seven optimizers: one rule per optimizer, one builder for all.

A rule is what TF1's kernel does to one leaf, in the kernel's order of operations:
`rule(g, p, *slots, **hyper) -> (update, *slots)`. It never sees a tree. The builder does the tree
work, keeps the state, rounds every hyper-parameter to the dtype that the leaf is computed in,
and never sees a formula. The state is exactly TF1's variables: the slots under TF1's slot names,
Adam's two beta powers, and the step.

Hyper-parameters may be numbers or traced values (`optax.inject_hyperparams`); only numbers can be
checked. Every optimizer takes a learning rate that is a number or a schedule, a function of the
number of updates before this one.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from ._tree import (
    Tree,
    beside,
    check,
    check_floating,
    check_shape,
    is_concrete,
    leaf_names,
    scalar,
    tree_map,
    wide,
    zip_leaves,
)


LearningRate = ArrayLike | optax.Schedule

_NOT_NEGATIVE = (lambda x: x >= 0, "a number, 0 or above")
_SHARE = (lambda x: (x >= 0) & (x <= 1), "a number from 0 to 1")
_RANGES = dict.fromkeys(("beta1", "beta2", "decay", "rho"), _SHARE) | {"epsilon": _NOT_NEGATIVE}


class OptimizerState(NamedTuple):
    """What TF1 keeps in variables.

    `step`: int32 [], TF1's global step. `powers`: float32 [] each, Adam's `beta1_power` and
    `beta2_power`, else empty. `slots`: by TF1's slot names, trees like the parameters, float32 or
    wider.
    """

    step: jax.Array
    powers: dict[str, jax.Array]
    slots: dict[str, Tree]


def gradient_descent(learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
    """`p -= g * lr`. TF1's `GradientDescentOptimizer`; no slots.

    >>> tx, p = gradient_descent(0.5), jnp.array([1.0])
    >>> tx.update(jnp.array([4.0]), tx.init(p), p)[0]
    Array([-2.], dtype=float32)
    """

    def rule(g, p, *, learning_rate):
        return (-(g * learning_rate),)

    return _optimizer(rule, {}, learning_rate=learning_rate)


def momentum(
    learning_rate: LearningRate, momentum: ArrayLike, use_nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    """`a = a * momentum + g; p -= a * lr`. TF1's `MomentumOptimizer`; slot `momentum`, from 0.

    With `use_nesterov`: `p -= g * lr + a * momentum * lr`. The learning rate is outside the
    accumulator. Qian 1999; Sutskever et al. 2013.

    >>> tx, p = momentum(1.0, 0.5), jnp.array([0.0])
    >>> u1, state = tx.update(jnp.array([2.0]), tx.init(p), p)
    >>> tx.update(jnp.array([2.0]), state, p)[0]
    Array([-3.], dtype=float32)
    """

    def rule(g, p, a, *, learning_rate, momentum):
        a = a * momentum + g
        if use_nesterov:
            return -(g * learning_rate + a * momentum * learning_rate), a
        return -(a * learning_rate), a

    return _optimizer(rule, {"momentum": 0.0}, learning_rate=learning_rate, momentum=momentum)


def adagrad(
    learning_rate: LearningRate, initial_accumulator_value: ArrayLike = 0.1
) -> optax.GradientTransformationExtraArgs:
    """`a += g * g; p -= g * lr / sqrt(a)`. TF1's `AdagradOptimizer`; slot `accumulator`.

    No epsilon: the start value of the accumulator, above 0, is in its place. Duchi et al. 2011.

    >>> tx, p = adagrad(1.0, initial_accumulator_value=16.0), jnp.array([0.0])
    >>> tx.update(jnp.array([3.0]), tx.init(p), p)[0]  # -3 / sqrt(16 + 9)
    Array([-0.6], dtype=float32)
    """
    positive = (lambda x: x > 0, "a number above 0")
    check("initial_accumulator_value", initial_accumulator_value, *positive)

    def rule(g, p, a, *, learning_rate):
        a = a + g * g
        return -(g * learning_rate * jax.lax.rsqrt(a)), a

    slots = {"accumulator": initial_accumulator_value}
    return _optimizer(rule, slots, learning_rate=learning_rate)


def adadelta(
    learning_rate: LearningRate = 0.001, rho: ArrayLike = 0.95, epsilon: ArrayLike = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """TF1's `AdadeltaOptimizer`; slots `accum` and `accum_update`, from 0.

    `a = a * rho + g * g * (1 - rho)`, `u = sqrt(d + epsilon) / sqrt(a + epsilon) * g`,
    `p -= u * lr`, `d = d * rho + u * u * (1 - rho)`: the accumulated update `d` does not contain
    the learning rate. Zeiler, arXiv:1212.5701.

    >>> tx, p = adadelta(1.0, rho=0.0, epsilon=9.0), jnp.array([0.0])
    >>> tx.update(jnp.array([4.0]), tx.init(p), p)[0]  # -sqrt(9) / sqrt(16 + 9) * 4
    Array([-2.4], dtype=float32)
    """

    def rule(g, p, a, d, *, learning_rate, rho, epsilon):
        a = a * rho + g * g * (1 - rho)
        u = jnp.sqrt(d + epsilon) * jax.lax.rsqrt(a + epsilon) * g
        d = d * rho + u * u * (1 - rho)
        return -(u * learning_rate), a, d

    slots = {"accum": 0.0, "accum_update": 0.0}
    return _optimizer(rule, slots, learning_rate=learning_rate, rho=rho, epsilon=epsilon)


def adam(
    learning_rate: LearningRate = 0.001,
    beta1: ArrayLike = 0.9,
    beta2: ArrayLike = 0.999,
    epsilon: ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """TF1's `AdamOptimizer`; slots `m` and `v`, from 0.

    `m += (g - m) * (1 - beta1)`, `v += (g * g - v) * (1 - beta2)`,
    `p -= m * alpha / (sqrt(v) + epsilon)` with
    `alpha = lr * sqrt(1 - beta2_power) / (1 - beta1_power)`. So epsilon is the paper's "epsilon
    hat", not scaled by the bias correction. The powers are variables that start at beta1 and
    beta2 and are multiplied after each update. Kingma and Ba, arXiv:1412.6980.

    >>> tx, p = adam(0.5, epsilon=0.0), jnp.array([0.0])
    >>> round(float(tx.update(jnp.array([-7.0]), tx.init(p), p)[0][0]), 4)  # of length lr
    0.5
    """

    def rule(g, p, m, v, *, learning_rate, beta1, beta2, epsilon, beta1_power, beta2_power):
        alpha = learning_rate * jnp.sqrt(1 - beta2_power) / (1 - beta1_power)
        m = m + (g - m) * (1 - beta1)
        v = v + (g * g - v) * (1 - beta2)
        return -(m * alpha / (jnp.sqrt(v) + epsilon)), m, v

    return _optimizer(
        rule,
        {"m": 0.0, "v": 0.0},
        powers={"beta1_power": beta1, "beta2_power": beta2},
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
    )


def ftrl(
    learning_rate: LearningRate,
    learning_rate_power: ArrayLike = -0.5,
    initial_accumulator_value: ArrayLike = 0.1,
    l1_regularization_strength: ArrayLike = 0.0,
    l2_regularization_strength: ArrayLike = 0.0,
    l2_shrinkage_regularization_strength: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """TF1's `FtrlOptimizer`; slots `accum` and `linear` (from 0).

    With `q = -learning_rate_power` and `n = accum + g * g`:
    `linear += g + 2 * shrinkage * p - (n**q - accum**q) / lr * p`, `accum = n`, and the new
    parameter is `(l1 * sign(linear) - linear) / (n**q / lr + 2 * l2)` where `|linear| > l1`, else
    exactly 0. The parameter is computed anew from `linear`, so its initial value is soon
    forgotten, and a zero first gradient sets it to 0. McMahan et al. 2013.

    >>> tx, p = ftrl(1.0, initial_accumulator_value=0.0), jnp.array([0.0, 5.0])
    >>> optax.apply_updates(p, tx.update(jnp.array([4.0, 0.0]), tx.init(p), p)[0])
    Array([-1.,  0.], dtype=float32)
    """
    if not callable(learning_rate):
        check("learning_rate", learning_rate, lambda x: x > 0, "a number above 0")
    check("learning_rate_power", learning_rate_power, lambda x: x <= 0, "a number, 0 or below")
    check("initial_accumulator_value", initial_accumulator_value, *_NOT_NEGATIVE)
    check("l1_regularization_strength", l1_regularization_strength, *_NOT_NEGATIVE)
    check("l2_regularization_strength", l2_regularization_strength, *_NOT_NEGATIVE)
    shrinkage = l2_shrinkage_regularization_strength
    check("l2_shrinkage_regularization_strength", shrinkage, *_NOT_NEGATIVE)

    def rule(g, p, accum, linear, *, learning_rate, power, l1, l2, shrinkage):
        n = accum + g * g
        root, old_root = _root(n, -power), _root(accum, -power)
        linear = linear + (g + 2 * shrinkage * p - (root - old_root) / learning_rate * p)
        quadratic = root / learning_rate + 2 * l2
        new_p = jnp.where(jnp.abs(linear) > l1, (l1 * jnp.sign(linear) - linear) / quadratic, 0)
        return new_p - p, n, linear

    return _optimizer(
        rule,
        {"accum": initial_accumulator_value, "linear": 0.0},
        needs_params="Ftrl computes the parameter anew",
        learning_rate=learning_rate,
        power=learning_rate_power,
        l1=l1_regularization_strength,
        l2=l2_regularization_strength,
        shrinkage=shrinkage,
    )


def rmsprop(
    learning_rate: LearningRate,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-10,
    centered: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """TF1's `RMSPropOptimizer`; slots `rms` (from 1) and `momentum`; `mg` too if centered.

    `rms += (g * g - rms) * (1 - decay)`, `mom = mom * momentum + g * lr / sqrt(rms + epsilon)`,
    `p -= mom`. With `centered`: `mg += (g - mg) * (1 - decay)` and `rms - mg * mg + epsilon` under
    the root. Epsilon is inside the root and the learning rate inside the momentum. Tieleman and
    Hinton 2012.

    >>> tx, p = rmsprop(1.0, decay=0.0, epsilon=9.0), jnp.array([0.0])
    >>> tx.update(jnp.array([4.0]), tx.init(p), p)[0]  # -4 / sqrt(16 + 9)
    Array([-0.8], dtype=float32)
    """

    def rule(g, p, rms, mom, *, learning_rate, decay, momentum, epsilon):
        rms = rms + (g * g - rms) * (1 - decay)
        mom = mom * momentum + g * learning_rate / jnp.sqrt(rms + epsilon)
        return -mom, rms, mom

    def centered_rule(g, p, rms, mg, mom, *, learning_rate, decay, momentum, epsilon):
        rms = rms + (g * g - rms) * (1 - decay)
        mg = mg + (g - mg) * (1 - decay)
        mom = mom * momentum + g * learning_rate / jnp.sqrt(rms - mg * mg + epsilon)
        return -mom, rms, mg, mom

    hyper: dict[str, Any] = {"decay": decay, "momentum": momentum, "epsilon": epsilon}
    if centered:
        slots = {"rms": 1.0, "mg": 0.0, "momentum": 0.0}
        return _optimizer(centered_rule, slots, learning_rate=learning_rate, **hyper)
    slots = {"rms": 1.0, "momentum": 0.0}
    return _optimizer(rule, slots, learning_rate=learning_rate, **hyper)


def _optimizer(
    rule: Callable,
    slots: Mapping[str, Any],
    powers: Mapping[str, Any] | None = None,
    *,
    needs_params: str = "",
    **hyper: Any,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a rule. `slots`: start values, in the order of the rule's arguments."""
    powers = powers or {}
    for name, value in hyper.items():
        if not (name == "learning_rate" and callable(value)):
            check(name, value, *_RANGES.get(name, (np.isfinite, "a finite number")))

    def init(params):
        check_floating("params", params)
        return OptimizerState(
            step=beside(params, jnp.zeros((), jnp.int32)),
            powers={k: beside(params, jnp.array(v, jnp.float32)) for k, v in powers.items()},
            slots={
                name: tree_map(lambda p, start=start: _slot(p, start), params=params)
                for name, start in slots.items()
            },
        )

    def update(updates, state, params=None, **extra):
        del extra
        if params is None and needs_params:
            raise ValueError(
                f"params is missing: {needs_params}. Call tx.update(grads, state, params)."
            )
        if not isinstance(state, OptimizerState) or set(state.slots) != set(slots):
            kind = list(state.slots) if isinstance(state, OptimizerState) else type(state).__name__
            raise ValueError(
                f"state is of another transformation: it has {kind}, where this optimizer keeps "
                f"{list(slots)}. Pass the state that its own init made."
            )
        check_floating("updates", updates)
        now = {k: v(state.step) if callable(v) else v for k, v in hyper.items()} | state.powers
        given = {"updates": updates} | {f"state.slots[{k!r}]": state.slots[k] for k in slots}
        if params is not None:
            given["params"] = params
        rows, treedef = zip_leaves(**given)

        def leaf(name, g, *rest):
            old, p = (rest, None) if params is None else (rest[:-1], rest[-1])
            if g is None:
                return None, *old
            g = jnp.asarray(g)
            check_shape(name, **dict(zip(given, (g, *rest), strict=True)))
            dtype = old[0].dtype if old else wide(g.dtype)
            p = None if p is None else jnp.asarray(p).astype(dtype)
            scalars = {k: scalar(v, dtype) for k, v in now.items()}
            update, *new = rule(g.astype(dtype), p, *old, **scalars)
            return update.astype(g.dtype), *new

        columns = [leaf(name, *row) for name, row in zip(leaf_names(updates), rows, strict=True)]
        new_updates, *new_slots = (
            treedef.unflatten([column[i] for column in columns]) for i in range(1 + len(slots))
        )
        return new_updates, OptimizerState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            powers={
                name: power * scalar(powers[name], power.dtype)
                for name, power in state.powers.items()
            },
            slots=dict(zip(slots, new_slots, strict=True)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _slot(p, start: ArrayLike) -> jax.Array:
    """A slot at its start value, sharded as its parameter is, also when made under jit."""
    p = jnp.asarray(p)
    slot = jnp.full_like(p, scalar(start, wide(p.dtype)), dtype=wide(p.dtype))
    # a constant has no sharding of its own; a select on the parameter takes the parameter's
    return slot if is_concrete(p) else jnp.where(p == p, slot, slot)


def _root(n, q):
    """n**q; TF1's kernel takes the square root for its default power."""
    if is_concrete(q):
        return jnp.sqrt(n) if q == 0.5 else jnp.power(n, q)
    return jnp.where(q == 0.5, jnp.sqrt(n), jnp.power(n, q))
