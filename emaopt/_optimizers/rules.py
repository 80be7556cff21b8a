"""Compute TF1's seven optimizers: a rule for one leaf each, in the order of TF1's kernel.

A rule is `rule(g, p, *slots, **hyper) -> (update, *new_slots)`. `g` is the gradient, `p` the
parameter, and the update is what `optax.apply_updates` adds to it. The order of operations is that
of TF1's CPU kernels, so that the numbers are TF1's too.

The learning rate of every optimizer is a number or a schedule, a function of the number of updates
before this one (0, 1, ...). Hyper-parameters may be traced (`optax.inject_hyperparams`, `jax.vmap`
over learning rates); then their range is not checked.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from emaopt._tree.calls import shows_its_call
from emaopt._tree.checks import NOT_NEGATIVE, POSITIVE, check, check_flag, check_scalar

from .builder import optimizer
from .learning_rate import LearningRate
from .numerics import after, root, sqrt


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


@shows_its_call
def gradient_descent(learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
    """Return TF1's `GradientDescentOptimizer`: `p -= g * lr`. It keeps no slots.

    Complex parameters are updated as in Optax, `p -= g * lr` without a conjugate. For a real loss
    `jax.grad` returns the conjugate of the direction in which the loss grows, so pass
    `jax.tree.map(jnp.conj, grads)`. `emaopt.minimize` does that itself.

    Args:
        learning_rate: a finite number, or a schedule of the number of updates before this one.

    Example:
        >>> tx, p = gradient_descent(0.5), jnp.array([1.0])
        >>> tx.update(jnp.array([4.0]), tx.init(p), p)[0]
        Array([-2.], dtype=float32)
    """

    def rule(g, p, *, learning_rate):
        return (-(g * learning_rate),)

    return optimizer(rule, {}, linear=True, learning_rate=learning_rate)


@shows_its_call
def momentum(
    learning_rate: LearningRate, momentum: ArrayLike, use_nesterov: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Return TF1's `MomentumOptimizer`: `a = a * momentum + g; p -= a * lr`.

    With `use_nesterov`: `p -= g * lr + a * momentum * lr`. The learning rate is outside the
    accumulator, so that a change of it acts on the whole velocity at once. Slot: `momentum`, from
    0. Complex parameters as in `gradient_descent`. Qian 1999; Sutskever et al. 2013.

    Args:
        learning_rate: a finite number, or a schedule of the number of updates before this one.
        momentum: a finite number, usually 0.9.
        use_nesterov: whether to step from where the velocity leads.

    Returns:
        A transformation for `optax.chain`. Its state is an `OptimizerState`.

    Raises:
        ValueError: a number is not finite, or `momentum` is a decay of an average.

    Example:
        >>> tx, p = momentum(1.0, 0.5), jnp.array([0.0])
        >>> u1, state = tx.update(jnp.array([2.0]), tx.init(p), p)
        >>> tx.update(jnp.array([2.0]), state, p)[0]
        Array([-3.], dtype=float32)
    """
    check_flag("use_nesterov", use_nesterov)

    def rule(g, p, a, *, learning_rate, momentum):
        a = a * momentum + g
        if use_nesterov:
            return -(g * learning_rate + a * momentum * learning_rate), a
        return -(a * learning_rate), a

    hyper: dict[str, Any] = {"learning_rate": learning_rate, "momentum": momentum}
    return optimizer(rule, {"momentum": 0.0}, linear=True, **hyper)


@shows_its_call
def adagrad(
    learning_rate: LearningRate, initial_accumulator_value: ArrayLike = 0.1
) -> optax.GradientTransformationExtraArgs:
    """Return TF1's `AdagradOptimizer`: `a += g * g; p -= g * lr / sqrt(a)`.

    It has no epsilon: the start value of the accumulator keeps the root away from 0. Slot:
    `accumulator`. Duchi et al. 2011.

    Args:
        learning_rate: a finite number, or a schedule of the number of updates before this one.
        initial_accumulator_value: where the accumulator starts, above 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> tx, p = adagrad(1.0, initial_accumulator_value=16.0), jnp.array([0.0])
        >>> tx.update(jnp.array([3.0]), tx.init(p), p)[0]  # -3 / sqrt(16 + 9)
        Array([-0.6], dtype=float32)
    """
    check_scalar("initial_accumulator_value", initial_accumulator_value, *POSITIVE)

    def rule(g, p, a, *, learning_rate):
        a = a + g * g
        return -(g * learning_rate * jax.lax.rsqrt(a)), a

    slots = {"accumulator": initial_accumulator_value}
    return optimizer(rule, slots, learning_rate=learning_rate)


@shows_its_call
def adadelta(
    learning_rate: LearningRate = 0.001, rho: ArrayLike = 0.95, epsilon: ArrayLike = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Return TF1's `AdadeltaOptimizer`, with TF1's default learning rate of 0.001.

    `a = a * rho + g * g * (1 - rho)`, `u = sqrt(d + epsilon) / sqrt(a + epsilon) * g`,
    `p -= u * lr`, `d = d * rho + u * u * (1 - rho)`. The accumulated update `d` does not contain
    the learning rate. Slots: `accum` and `accum_update`, from 0. Zeiler, arXiv:1212.5701.

    Args:
        learning_rate: a finite number, or a schedule of the number of updates before this one.
        rho: the share of both accumulators that an update keeps, from 0 to 1.
        epsilon: above 0. The size of the first updates depends on it.

    Returns:
        A transformation for `optax.chain`. Its state is an `OptimizerState`.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> tx, p = adadelta(1.0, rho=0.0, epsilon=9.0), jnp.array([0.0])
        >>> tx.update(jnp.array([4.0]), tx.init(p), p)[0]  # -sqrt(9) / sqrt(16 + 9) * 4
        Array([-2.4], dtype=float32)
    """
    check("epsilon", epsilon, *POSITIVE)

    def rule(g, p, a, d, *, learning_rate, rho, epsilon):
        def step(a, d):
            return jnp.sqrt(d + epsilon) * jax.lax.rsqrt(a + epsilon) * g

        a = a * rho + g * g * (1 - rho)
        update = -(step(a, d) * learning_rate)
        # TF1's kernel would go on with `u`. Here `u` is computed once more for `d`, after the new
        # parameter. XLA's CPU backend makes one loop for each result. Without this order it copies
        # `d`, because the loop of the parameter reads what the loop of `d` overwrites.
        new_p = update if p is None else p + update
        d = after(new_p, d)
        u = step(after(new_p, a), d)
        d = d * rho + u * u * (1 - rho)
        return update, a, d

    slots = {"accum": 0.0, "accum_update": 0.0}
    return optimizer(rule, slots, learning_rate=learning_rate, rho=rho, epsilon=epsilon)


@shows_its_call
def adam(
    learning_rate: LearningRate = 0.001,
    beta1: ArrayLike = 0.9,
    beta2: ArrayLike = 0.999,
    epsilon: ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Return TF1's `AdamOptimizer`.

    `m += (g - m) * (1 - beta1)`, `v += (g * g - v) * (1 - beta2)`,
    `p -= m * alpha / (sqrt(v) + epsilon)` with
    `alpha = lr * sqrt(1 - beta2_power) / (1 - beta1_power)`. So epsilon is the paper's "epsilon
    hat": it is not scaled by the bias correction. The powers are variables that start at beta1
    and beta2 and are multiplied after each update. Slots: `m` and `v`, from 0. Kingma and Ba,
    arXiv:1412.6980.

    Args:
        learning_rate: a finite number, or a schedule of the number of updates before this one.
        beta1: the share of the mean `m` that an update keeps, from 0 to below 1 in float32.
        beta2: the share of the square `v` that an update keeps, from 0 to below 1 in float32.
        epsilon: 0 or above. With 0, a gradient that was always zero gives 0 / 0.

    Returns:
        A transformation for `optax.chain`. Its state is an `OptimizerState`.

    Raises:
        ValueError: a number is out of range, or a beta is stored in 16 bits, where 0.999 is 1
            (`optax.inject_hyperparams` without `hyperparam_dtype=jnp.float32`).

    Example:
        >>> tx, p = adam(0.5, epsilon=0.0), jnp.array([0.0])
        >>> round(float(tx.update(jnp.array([-7.0]), tx.init(p), p)[0][0]), 4)  # of length lr
        0.5
    """

    def rule(g, p, m, v, *, learning_rate, beta1, beta2, epsilon, beta1_power, beta2_power):
        alpha = learning_rate * jnp.sqrt(1 - beta2_power) / (1 - beta1_power)
        m = m + (g - m) * (1 - beta1)
        v = v + (g * g - v) * (1 - beta2)
        return -(m * alpha / (sqrt(v) + epsilon)), m, v

    hyper: dict[str, Any] = {"learning_rate": learning_rate, "epsilon": epsilon}
    powers = {"beta1_power": beta1, "beta2_power": beta2}
    slots = {"m": 0.0, "v": 0.0}
    return optimizer(rule, slots, powers, beta1=beta1, beta2=beta2, **hyper)


@shows_its_call
def ftrl(
    learning_rate: LearningRate,
    learning_rate_power: ArrayLike = -0.5,
    initial_accumulator_value: ArrayLike = 0.1,
    l1_regularization_strength: ArrayLike = 0.0,
    l2_regularization_strength: ArrayLike = 0.0,
    l2_shrinkage_regularization_strength: ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Return TF1's `FtrlOptimizer`. Its L1 regularization makes parameters exactly zero.

    With `q = -learning_rate_power` and `n = accum + g * g`:
    `linear += g + 2 * shrinkage * p - (n**q - accum**q) / lr * p`, `accum = n`, and the new
    parameter is `(l1 * sign(linear) - linear) / (n**q / lr + 2 * l2)` where `|linear| > l1`, else
    exactly 0. The parameter is computed anew from `linear`: its initial value is soon forgotten,
    and a zero first gradient sets it to 0. Slots: `accum` and `linear` (from 0). McMahan et al.
    2013.

    Args:
        learning_rate: a number above 0, or a schedule of the number of updates before this one.
        learning_rate_power: 0 or below; -0.5 is the root, and fastest.
        initial_accumulator_value: where `accum` starts, 0 or above.
        l1_regularization_strength: 0 or above. A parameter is 0 while `|linear|` is not above it.
        l2_regularization_strength: 0 or above. TF1 counts it twice.
        l2_shrinkage_regularization_strength: 0 or above. It changes `linear` but not `accum`.

    Returns:
        A transformation for `optax.chain`. Its update needs the parameters.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> tx, p = ftrl(1.0, initial_accumulator_value=0.0), jnp.array([0.0, 5.0])
        >>> optax.apply_updates(p, tx.update(jnp.array([4.0, 0.0]), tx.init(p), p)[0])
        Array([-1.,  0.], dtype=float32)
    """
    if not callable(learning_rate):
        check("learning_rate", learning_rate, *POSITIVE)
    check("learning_rate_power", learning_rate_power, lambda x: x <= 0, "a number, 0 or below")
    check_scalar("initial_accumulator_value", initial_accumulator_value, *NOT_NEGATIVE)
    check("l1_regularization_strength", l1_regularization_strength, *NOT_NEGATIVE)
    check("l2_regularization_strength", l2_regularization_strength, *NOT_NEGATIVE)
    shrinkage = l2_shrinkage_regularization_strength
    check("l2_shrinkage_regularization_strength", shrinkage, *NOT_NEGATIVE)

    def rule(g, p, accum, linear, *, learning_rate, power, l1, l2, shrinkage):
        new_root, old_root = root(accum + g * g, -power), root(accum, -power)
        linear = linear + (g + 2 * shrinkage * p - (new_root - old_root) / learning_rate * p)
        # TF1's kernel would go on with `new_root`. Here it is computed once more, after `linear`.
        # XLA's CPU backend makes one loop for each result. Without this order it copies `accum`,
        # because the loop of `linear` reads what the loop of `accum` overwrites.
        accum = after(linear, accum) + g * g
        quadratic = root(accum, -power) / learning_rate + 2 * l2
        # Divided only where it is used: an accumulator and a gradient of zero make 0 / 0 elsewhere.
        kept = jnp.abs(linear) > l1
        new_p = (l1 * jnp.sign(linear) - linear) / jnp.where(kept, quadratic, 1)
        return jnp.where(kept, new_p, 0) - p, accum, linear

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


@shows_its_call
def rmsprop(
    learning_rate: LearningRate,
    decay: ArrayLike = 0.9,
    momentum: ArrayLike = 0.0,
    epsilon: ArrayLike = 1e-10,
    centered: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Return TF1's `RMSPropOptimizer`.

    `rms += (g * g - rms) * (1 - decay)`, `mom = mom * momentum + g * lr / sqrt(rms + epsilon)`,
    `p -= mom`. With `centered`: `mg += (g - mg) * (1 - decay)` and `rms - mg * mg + epsilon` under
    the root. Epsilon is inside the root and the learning rate inside the momentum. Slots: `rms`
    (from 1) and `momentum`, with `mg` between them if centered. Tieleman and Hinton 2012.

    Args:
        learning_rate: a finite number, or a schedule of the number of updates before this one.
        decay: the share of `rms` (and `mg`) that an update keeps, from 0 to 1.
        momentum: a finite number; 0 is no momentum, but keeps its slot.
        epsilon: 0 or above.
        centered: whether to subtract the square of the mean gradient.

    Returns:
        A transformation for `optax.chain`. Its state is an `OptimizerState`.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> tx, p = rmsprop(1.0, decay=0.0, epsilon=9.0), jnp.array([0.0])
        >>> tx.update(jnp.array([4.0]), tx.init(p), p)[0]  # -4 / sqrt(16 + 9)
        Array([-0.8], dtype=float32)
    """
    check_flag("centered", centered)

    def rule(g, p, rms, mom, *, learning_rate, decay, momentum, epsilon):
        rms = rms + (g * g - rms) * (1 - decay)
        mom = mom * momentum + g * learning_rate / sqrt(rms + epsilon)
        return -mom, rms, mom

    def centered_rule(g, p, rms, mg, mom, *, learning_rate, decay, momentum, epsilon):
        rms = rms + (g * g - rms) * (1 - decay)
        mg = mg + (g - mg) * (1 - decay)
        mom = mom * momentum + g * learning_rate / sqrt(rms - mg * mg + epsilon)
        return -mom, rms, mg, mom

    hyper: dict[str, Any] = {"decay": decay, "momentum": momentum, "epsilon": epsilon}
    if centered:
        slots = {"rms": 1.0, "mg": 0.0, "momentum": 0.0}
        return optimizer(centered_rule, slots, learning_rate=learning_rate, **hyper)
    slots = {"rms": 1.0, "momentum": 0.0}
    return optimizer(rule, slots, learning_rate=learning_rate, **hyper)
