"""The averages of other libraries: a decay for each, under that library's argument names.

`emaopt.ema(presets.diffusers(use_ema_warmup=True))` gives diffusers' averages, update by update. A
preset is a decay like any other: t = 1 is the library's first averaging call, after the first
optimizer step, and what a library does beside averaging (overwriting, copying buffers) is not part
of it. Where a library does not do what it documents, the preset does what is documented: "Differs"
in its docstring, and docs/peers.md. In bfloat16 nearly all differ: at a decay near 1 their averages
stand still. Those of 16-bit parameters are float32 here.
"""

import math

import jax.numpy as jnp

from emaopt._average.decays import (
    Decay,
    after,
    as_decay,
    debiased,
    gamma as gamma_of,
    half_life,
    inverse_gamma,
    pointwise,
    power as power_function,
    warmup,
)
from emaopt._tree.checks import POSITIVE, SHARE, check_scalar, whole


def tf1(decay: float, num_updates: bool = False, zero_debias: bool = False) -> Decay:
    """TensorFlow 1's `tf.train.ExponentialMovingAverage`, in its float32 arithmetic.

    `decay`; with `num_updates` (in TF1 a count: here whether it is given, and counts the updates
    with this one) `min(decay, (1 + t) / (10 + t))`; with `zero_debias`, which TF1 has for tensors
    only, `(decay - decay**t) / (1 - decay**t)`. TensorFlow 1.15.5.

    Differs: TF1 takes both options together, and then divides by `1 - d**t` with only the newest d.

    >>> round(float(tf1(0.999, num_updates=True)(1)) * 11, 4)
    2.0
    """
    _shares(decay=decay)
    if not zero_debias:
        return warmup(decay) if num_updates else as_decay(decay)
    if num_updates:
        raise ValueError(
            "zero_debias=True with num_updates=True: the ramp already forgets where it started. "
            "Leave one of them out."
        )
    return debiased(decay)


def tfa(average_decay: float = 0.99, start_step: int = 0, dynamic_decay: bool = False) -> Decay:
    """TensorFlow Addons' `MovingAverage`.

    Copies for the first start_step updates. Then `average_decay`, or with `dynamic_decay`
    `min(average_decay, (1 + n) / (10 + n))` of n = 0, 1, ..., the updates before this one since
    start_step: it begins with 1/10 where TF1 begins with 2/11. TensorFlow Addons 0.23.0.

    Differs: it reads num_updates once, in its constructor; `tf1(decay, num_updates=True)` has a
    count that moves.

    >>> round(float(tfa(dynamic_decay=True)(1)), 4)
    0.1
    """
    _shares(average_decay=average_decay)
    _whole(0, start_step=start_step)
    return after(start_step, _ramp(9, 0, average_decay) if dynamic_decay else average_decay)


def tfa_swa(start_averaging: int = 0, average_period: int = 10) -> Decay:
    """TensorFlow Addons' `SWA`: the mean of a snapshot every average_period updates.

    The first snapshot is taken at t = start_averaging + 1. TensorFlow Addons 0.23.0.

    Differs: before the first snapshot, its average is zero; here, a copy of the parameters.

    >>> [round(float(tfa_swa(1, 2)(t)), 4) for t in (1, 2, 3, 4, 5, 6)]
    [0.0, 0.0, 1.0, 0.5, 1.0, 0.6667]
    """
    _whole(0, start_averaging=start_averaging)
    _whole(1, average_period=average_period)
    return after(start_averaging, _each(average_period, power_function(0)))


def keras(ema_momentum: float = 0.99) -> Decay:
    """Keras' optimizers with `use_ema=True`: a copy at t = 1, then ema_momentum. Keras 3.15.1.

    Differs: with gradient_accumulation_steps, Keras averages after every micro-step, also those
    that leave the parameters as they were. Here `optax.MultiSteps` goes around the whole chain.

    >>> [round(float(keras(0.5)(t)), 4) for t in (1, 2, 3)]
    [0.0, 0.5, 0.5]
    """
    _shares(ema_momentum=ema_momentum)
    return after(1, ema_momentum)


def torch(decay: float = 0.999) -> Decay:
    """PyTorch's `AveragedModel` with `get_ema_avg_fn(decay)` or `get_ema_multi_avg_fn(decay)`.

    A copy at t = 1, then decay. PyTorch 2.15.0.

    >>> [round(float(torch(0.5)(t)), 4) for t in (1, 2, 3)]
    [0.0, 0.5, 0.5]
    """
    _shares(decay=decay)
    return after(1, decay)


def torch_swa() -> Decay:
    """PyTorch's `AveragedModel` as it is by default: the mean of all parameters. PyTorch 2.15.0.

    `emaopt.power(0)`.

    >>> [round(float(torch_swa()(t)), 4) for t in (1, 2, 3)]
    [0.0, 0.5, 0.6667]
    """
    return power_function(0)


def timm(
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_warmup: bool = False,
    warmup_gamma: float = 1.0,
    warmup_power: float = 2 / 3,
) -> Decay:
    """Timm's `ModelEmaV3`, called as its training script does: `update(model, step=t)`.

    Copies for the first update_after_step + 1 updates. Then `decay`, or with `use_warmup`
    `1 - (1 + s / warmup_gamma)**-warmup_power`, s = 1, 2, ..., from min_decay to decay. timm
    1.0.31. Called without a step, timm averages with `decay` from the first update.

    >>> [round(float(timm(use_warmup=True, warmup_power=1.0)(t)), 4) for t in (1, 2, 3)]
    [0.0, 0.5, 0.6667]
    """
    _bounds(min_decay=min_decay, decay=decay)
    _whole(0, update_after_step=update_after_step)
    _positive(warmup_gamma=warmup_gamma, warmup_power=warmup_power)
    ramp = inverse_gamma(warmup_gamma, warmup_power, min_decay, decay)
    return after(update_after_step + 1, ramp if use_warmup else decay)


def diffusers(
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_ema_warmup: bool = False,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
) -> Decay:
    """The `EMAModel` of diffusers.

    Copies for the first update_after_step + 1 updates. Then, of s = 1, 2, ...,
    `(1 + s) / (10 + s)`, or with `use_ema_warmup` `1 - (1 + s / inv_gamma)**-power`, from min_decay
    to decay. Without a ramp: min_decay = decay. diffusers 0.42.1.

    >>> [round(float(diffusers()(t)), 4) for t in (1, 2, 3)]
    [0.0, 0.1818, 0.25]
    """
    _bounds(min_decay=min_decay, decay=decay)
    _whole(0, update_after_step=update_after_step)
    _positive(inv_gamma=inv_gamma, power=power)
    warm = inverse_gamma(inv_gamma, power, min_decay, decay)
    return after(update_after_step + 1, warm if use_ema_warmup else _ramp(10, min_decay, decay))


def ema_pytorch(
    beta: float = 0.9999,
    update_after_step: int = 100,
    update_every: int = 10,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
    min_value: float = 0.0,
) -> Decay:
    """ema_pytorch's `EMA`.

    It takes a value at t = 1, 1 + update_every, ...: a copy up to t = update_after_step + 1; then
    `1 - (1 + s / inv_gamma)**-power`, s = t - 1 - update_after_step, from min_value to beta. beta
    is of the values taken, so the average gets longer with update_every; `emaopt.every` keeps the
    length. beta = 1 stands still after the copies. ema-pytorch 0.8.3.

    >>> [round(float(ema_pytorch(0.6, 2, 2, power=1.0)(t)), 4) for t in (1, 2, 3, 4, 5, 6, 7)]
    [0.0, 1.0, 0.0, 1.0, 0.6, 1.0, 0.6]
    """
    _bounds(min_value=min_value, beta=beta)
    _whole(0, update_after_step=update_after_step)
    _whole(1, update_every=update_every)
    _positive(inv_gamma=inv_gamma, power=power)
    warm = inverse_gamma(inv_gamma, power, 1 if beta == 1 else min_value, beta)
    inner = after(update_after_step + 1, warm)
    return _each(update_every, pointwise(lambda taken: inner.rate((taken - 1) * update_every + 1)))


def ema_pytorch_karras(
    sigma_rel: float | None = None, gamma: float | None = None, update_every: int = 100
) -> Decay:
    """ema_pytorch's `KarrasEMA`: a power-function average, given by its width or its exponent.

    It takes a value at t = 1, 1 + update_every, ...: a copy, then `(n / (n + 1))**(gamma + 1)` at
    the n-th value. (One later than in the paper, `edm2`, which matters only in the first updates.)
    ema-pytorch 0.8.3.

    Differs: its n counts all updates, so that with update_every above 1 the average is wider than
    asked for, and with the default most of it is the first value.

    >>> [round(float(ema_pytorch_karras(gamma=0, update_every=2)(t)), 4) for t in (1, 2, 3, 4, 5)]
    [0.0, 1.0, 0.6667, 1.0, 0.75]
    """
    _whole(1, update_every=update_every)
    if sigma_rel is not None and gamma is None:
        paper = power_function(gamma_of(sigma_rel))
    elif sigma_rel is None and gamma is not None:
        paper = power_function(gamma)
    else:
        raise ValueError(
            f"sigma_rel={sigma_rel} and gamma={gamma}: one follows from the other. Pass one."
        )
    over = lambda t, n: paper.over(t + 2, n)
    return _each(update_every, after(1, Decay(lambda t: over(t, 1), over)))


def edm2(std: float) -> Decay:
    """EDM2's `PowerFunctionEMA`, one of its stds: `((t - 1) / t)**(gamma + 1)`.

    gamma is `posthoc.gamma(std)`; for an exponent, `emaopt.power(gamma)`. The same for every batch
    size that does not change. Formula of the paper, arXiv:2312.02696, equation 127.

    >>> [round(float(edm2(12**-0.5)(t)), 4) for t in (1, 2, 3)]
    [0.0, 0.5, 0.6667]
    """
    check_scalar(
        "std", std, lambda s: 0 < s <= 12**-0.5, "a number above 0, at most 1/sqrt(12) = 0.2887"
    )
    return power_function(gamma_of(std))


def edm2_traditional(
    halflife_Mimg: float = math.inf,  # noqa: N803
    rampup_ratio: float | None = 0.09,
    *,
    batch_size: int,
) -> Decay:
    """EDM2's `TraditionalEMA`: a half-life, in millions of images, that begins short.

    `0.5**(1 / h)`, h the smaller of halflife_Mimg, in updates of batch_size images, and of
    `rampup_ratio * t`; without a ramp for rampup_ratio = None. Formula of the paper,
    arXiv:2312.02696, and of Karras et al., arXiv:2206.00364.

    >>> [round(float(edm2_traditional(2, 0.5, batch_size=10**6)(t)), 4) for t in (1, 2, 4, 100)]
    [0.25, 0.5, 0.7071, 0.7071]
    """
    _positive(batch_size=batch_size)
    if rampup_ratio is None or halflife_Mimg != math.inf:
        _positive(halflife_Mimg=halflife_Mimg)
    updates = halflife_Mimg * 1e6 / batch_size
    if rampup_ratio is None:
        return half_life(updates)
    _positive(rampup_ratio=rampup_ratio)
    half = lambda t: jnp.minimum(updates, rampup_ratio * jnp.asarray(t, float))
    return pointwise(lambda t: -jnp.expm1(-math.log(2) / half(t)))


def optax(step_size: float) -> Decay:
    """Optax's `incremental_update(params, average, step_size)`: `1 - step_size`. Optax 0.2.8.

    >>> float(optax(0.25)(1))
    0.75
    """
    _shares(step_size=step_size)
    return after(0, 1 - step_size)  # a bare number would be float32


def nnx(decay: float) -> Decay:
    """Flax' `nnx.EMA`: decay, from the first update. Flax 0.12.8.

    >>> float(nnx(0.75)(1))
    0.75
    """
    _shares(decay=decay)
    return after(0, decay)


def _each(period: int, decay: Decay) -> Decay:
    """`decay` of the values at t = 1, 1 + period, ..., which it counts; the others pass by."""
    taken = lambda t: (t + period - 1) // period

    def over(t, n):
        now, before = taken(t), taken(t - n)
        return jnp.where(now > before, decay.over(now, jnp.maximum(now - before, 1)), 0)

    return Decay(lambda t: over(t, 1), over, decay.exact)


def _ramp(offset: int, minimum: float, maximum: float) -> Decay:
    """`1 - 9 / (offset + t)` from minimum to maximum: TF1's ramp, but with its rate exact."""
    rate = lambda t: 9 / (offset + jnp.asarray(t, float))
    return pointwise(lambda t: jnp.clip(rate(t), 1 - maximum, 1 - minimum))


def _shares(**arguments: float) -> None:
    for name, value in arguments.items():
        check_scalar(name, value, *SHARE)


def _bounds(**arguments: float) -> None:
    _shares(**arguments)
    (low, minimum), (high, maximum) = arguments.items()
    if minimum > maximum:
        raise ValueError(f"{low}={minimum} is above {high}={maximum}. Swap them.")


def _positive(**arguments: float) -> None:
    for name, value in arguments.items():
        check_scalar(name, value, *POSITIVE)


def _whole(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        check_scalar(name, value, *whole(least))
