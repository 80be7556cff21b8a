"""TF1's seven optimizers: what each does to one leaf, in the order of TF1's kernel.

Hyper-parameters may be numbers or traced values (`optax.inject_hyperparams`); only numbers can be
checked. Every optimizer takes a learning rate that is a number or a schedule, a function of the
number of updates before this one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from emaopt._tree.checks import NOT_NEGATIVE, POSITIVE, check
from emaopt._tree.numbers import is_concrete

from .builder import optimizer
from .learning_rate import LearningRate


# the word that TF1 puts into the names of slots, by the slots in TF1's order of creation
KINDS = {
    (): "GradientDescent",
    ("momentum",): "Momentum",
    ("accumulator",): "Adagrad",
    ("accum", "accum_update"): "Adadelta",
    ("m", "v"): "Adam",
    ("accum", "linear"): "Ftrl",
    ("rms", "momentum"): "RMSProp",
    ("rms", "mg", "momentum"): "RMSProp",
}


def gradient_descent(learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
    """`p -= g * lr`. TF1's `GradientDescentOptimizer`; no slots.

    >>> tx, p = gradient_descent(0.5), jnp.array([1.0])
    >>> tx.update(jnp.array([4.0]), tx.init(p), p)[0]
    Array([-2.], dtype=float32)
    """

    def rule(g, p, *, learning_rate):
        return (-(g * learning_rate),)

    return optimizer(rule, {}, learning_rate=learning_rate)


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

    return optimizer(rule, {"momentum": 0.0}, learning_rate=learning_rate, momentum=momentum)


def adagrad(
    learning_rate: LearningRate, initial_accumulator_value: ArrayLike = 0.1
) -> optax.GradientTransformationExtraArgs:
    """`a += g * g; p -= g * lr / sqrt(a)`. TF1's `AdagradOptimizer`; slot `accumulator`.

    No epsilon: the start value of the accumulator, above 0, is in its place. Duchi et al. 2011.

    >>> tx, p = adagrad(1.0, initial_accumulator_value=16.0), jnp.array([0.0])
    >>> tx.update(jnp.array([3.0]), tx.init(p), p)[0]  # -3 / sqrt(16 + 9)
    Array([-0.6], dtype=float32)
    """
    check("initial_accumulator_value", initial_accumulator_value, *POSITIVE)

    def rule(g, p, a, *, learning_rate):
        a = a + g * g
        return -(g * learning_rate * jax.lax.rsqrt(a)), a

    slots = {"accumulator": initial_accumulator_value}
    return optimizer(rule, slots, learning_rate=learning_rate)


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
        def step(a, d):
            return jnp.sqrt(d + epsilon) * jax.lax.rsqrt(a + epsilon) * g

        a = a * rho + g * g * (1 - rho)
        update = -(step(a, d) * learning_rate)
        new_p = update if p is None else p + update
        d = _again(d, new_p)
        u = step(_again(a, new_p), d)
        d = d * rho + u * u * (1 - rho)
        return update, a, d

    slots = {"accum": 0.0, "accum_update": 0.0}
    return optimizer(rule, slots, learning_rate=learning_rate, rho=rho, epsilon=epsilon)


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

    return optimizer(
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
        check("learning_rate", learning_rate, *POSITIVE)
    check("learning_rate_power", learning_rate_power, lambda x: x <= 0, "a number, 0 or below")
    check("initial_accumulator_value", initial_accumulator_value, *NOT_NEGATIVE)
    check("l1_regularization_strength", l1_regularization_strength, *NOT_NEGATIVE)
    check("l2_regularization_strength", l2_regularization_strength, *NOT_NEGATIVE)
    shrinkage = l2_shrinkage_regularization_strength
    check("l2_shrinkage_regularization_strength", shrinkage, *NOT_NEGATIVE)

    def rule(g, p, accum, linear, *, learning_rate, power, l1, l2, shrinkage):
        root, old_root = _root(accum + g * g, -power), _root(accum, -power)
        linear = linear + (g + 2 * shrinkage * p - (root - old_root) / learning_rate * p)
        n = _again(accum, linear) + g * g
        quadratic = _root(n, -power) / learning_rate + 2 * l2
        new_p = jnp.where(jnp.abs(linear) > l1, (l1 * jnp.sign(linear) - linear) / quadratic, 0)
        return new_p - p, n, linear

    return optimizer(
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
        return optimizer(centered_rule, slots, learning_rate=learning_rate, **hyper)
    slots = {"rms": 1.0, "momentum": 0.0}
    return optimizer(rule, slots, learning_rate=learning_rate, **hyper)


def _again(x, after):
    """x, read once more when `after` is known. Nothing is above infinity, but XLA does not know.

    On CPU it makes one loop per result, and copies what a later loop reads and an earlier one
    writes over. This says which comes first: a step without copies, 1.2 to 3 times faster.
    """
    return jnp.where(after > jnp.inf, after, x)


def _root(n, q):
    """n**q; TF1's kernel takes the square root for its default power."""
    if is_concrete(q):
        return jnp.sqrt(n) if q == 0.5 else jnp.power(n, q)
    return jnp.where(q == 0.5, jnp.sqrt(n), jnp.power(n, q))
