"""Average as PyTorch and libraries for PyTorch models do."""

import math

import jax.numpy as jnp

from emaopt._average.decay import Decay, pointwise
from emaopt._average.decays import (
    after,
    gamma as gamma_of,
    half_life,
    inverse_gamma,
    power as power_function,
)
from emaopt._tree.checks import check_flag, check_scalar

from ._common import (
    check_bounds,
    check_positive,
    check_shares,
    check_whole,
    each,
    named,
    ramp,
)


def torch(decay: float = 0.999) -> Decay:
    """Average as PyTorch's `AveragedModel` with `get_ema_avg_fn` or `get_ema_multi_avg_fn`.

    A copy at t = 1, then decay. PyTorch 2.15.0.

    Example:
        >>> [round(float(torch(0.5)(t)), 4) for t in (1, 2, 3)]
        [0.0, 0.5, 0.5]
    """
    check_shares(decay=decay)
    return named(after(1, decay), "torch", decay)


def torch_swa() -> Decay:
    """Average as PyTorch's `AveragedModel` does by default: the mean of all parameters (SWA).

    `emaopt.power(0)`. PyTorch 2.15.0.

    Example:
        >>> [round(float(torch_swa()(t)), 4) for t in (1, 2, 3)]
        [0.0, 0.5, 0.6667]
    """
    return named(power_function(0), "torch_swa")


def timm(
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_warmup: bool = False,
    warmup_gamma: float = 1.0,
    warmup_power: float = 2 / 3,
) -> Decay:
    """Average as timm's `ModelEmaV3`, called as its training script does: `update(model, step=t)`.

    timm 1.0.31. Called without a step, timm averages with `decay` from the first update.

    Args:
        decay: The decay, from 0 to 1.
        min_decay: The least decay with `use_warmup`.
        update_after_step: The average copies the parameters for this many updates and one more.
        use_warmup: Whether the decay is `1 - (1 + s / warmup_gamma)**-warmup_power`, s = 1, 2, ...
            since then, from min_decay to decay.
        warmup_gamma: Above 0.
        warmup_power: Above 0.

    Returns:
        A decay.

    Example:
        >>> [round(float(timm(use_warmup=True, warmup_power=1.0)(t)), 4) for t in (1, 2, 3)]
        [0.0, 0.5, 0.6667]
    """
    check_bounds(min_decay=min_decay, decay=decay)
    check_whole(0, update_after_step=update_after_step)
    check_positive(warmup_gamma=warmup_gamma, warmup_power=warmup_power)
    warm = inverse_gamma(warmup_gamma, warmup_power, min_decay, decay)
    check_flag("use_warmup", use_warmup)
    made = after(update_after_step + 1, warm if use_warmup else decay)
    given = decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power
    return named(made, "timm", *given)


def diffusers(
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_ema_warmup: bool = False,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
) -> Decay:
    """Average as the `EMAModel` of diffusers.

    The ramp is `(1 + s) / (10 + s)` of s = 1, 2, ..., from min_decay to decay. Without a ramp:
    min_decay = decay. diffusers 0.42.1.

    Args:
        decay: The largest decay, from 0 to 1.
        min_decay: The least decay, from 0 to `decay`.
        update_after_step: The average copies the parameters for this many updates and one more.
        use_ema_warmup: Whether the ramp is `1 - (1 + s / inv_gamma)**-power` instead.
        inv_gamma: Above 0.
        power: Above 0.

    Returns:
        A decay.

    Example:
        >>> [round(float(diffusers()(t)), 4) for t in (1, 2, 3)]
        [0.0, 0.1818, 0.25]
    """
    check_bounds(min_decay=min_decay, decay=decay)
    check_whole(0, update_after_step=update_after_step)
    check_positive(inv_gamma=inv_gamma, power=power)
    warm = inverse_gamma(inv_gamma, power, min_decay, decay)
    check_flag("use_ema_warmup", use_ema_warmup)
    made = after(update_after_step + 1, warm if use_ema_warmup else ramp(10, min_decay, decay))
    given = decay, min_decay, update_after_step, use_ema_warmup, inv_gamma, power
    return named(made, "diffusers", *given)


def ema_pytorch(
    beta: float = 0.9999,
    update_after_step: int = 100,
    update_every: int = 10,
    inv_gamma: float = 1.0,
    power: float = 2 / 3,
    min_value: float = 0.0,
) -> Decay:
    """Average as ema_pytorch's `EMA`.

    It takes a value at t = 1, 1 + update_every, ... The decay there is
    `1 - (1 + s / inv_gamma)**-power`, s = t - 1 - update_after_step. beta is the decay per value
    taken, so the average gets longer with update_every; `emaopt.every` keeps the length.
    ema-pytorch 0.8.3.

    Args:
        beta: The largest decay, from 0 to 1. With 1 the average stands still after the copies.
        update_after_step: The values up to t = update_after_step + 1 are copied.
        update_every: How often a value is taken, a whole number from 1 on.
        inv_gamma: Above 0.
        power: Above 0.
        min_value: The least decay, from 0 to `beta`.

    Returns:
        A decay.

    Example:
        >>> [round(float(ema_pytorch(0.6, 2, 2, power=1.0)(t)), 4) for t in (1, 2, 3, 4, 5, 6, 7)]
        [0.0, 1.0, 0.0, 1.0, 0.6, 1.0, 0.6]
    """
    check_bounds(min_value=min_value, beta=beta)
    check_whole(0, update_after_step=update_after_step)
    check_whole(1, update_every=update_every)
    check_positive(inv_gamma=inv_gamma, power=power)
    warm = inverse_gamma(inv_gamma, power, 1 if beta == 1 else min_value, beta)
    inner = after(update_after_step + 1, warm)
    taken = pointwise(lambda n: inner.rate((n - 1) * update_every + 1), "taken")
    given = beta, update_after_step, update_every, inv_gamma, power, min_value
    return named(each(update_every, taken), "ema_pytorch", *given)


def ema_pytorch_karras(
    sigma_rel: float | None = None, gamma: float | None = None, update_every: int = 100
) -> Decay:
    """Average as ema_pytorch's `KarrasEMA`: a power-function average, by its width or exponent.

    It takes a value at t = 1, 1 + update_every, ...: a copy, then `(n / (n + 1))**(gamma + 1)` at
    the n-th value. (One later than in the paper, `edm2`, which matters only in the first updates.)
    ema-pytorch 0.8.3.

    Differs: KarrasEMA's n counts all updates. So with update_every above 1 its average is wider
    than asked for, and with the default most of it is the first value.

    Args:
        sigma_rel: The relative width, above 0 and at most 1/sqrt(12).
        gamma: The exponent, in place of sigma_rel.
        update_every: How often a value is taken, a whole number from 1 on.

    Returns:
        A decay.

    Example:
        >>> karras = ema_pytorch_karras(gamma=0, update_every=2)
        >>> [round(float(karras(t)), 4) for t in (1, 2, 3, 4, 5)]
        [0.0, 1.0, 0.6667, 1.0, 0.75]
    """
    check_whole(1, update_every=update_every)
    if sigma_rel is not None and gamma is None:
        paper = power_function(gamma_of(sigma_rel))
    elif sigma_rel is None and gamma is not None:
        paper = power_function(gamma)
    else:
        raise ValueError(
            f"sigma_rel={sigma_rel} and gamma={gamma}: one follows from the other. Pass one."
        )
    over = lambda t, n: paper.over(t + 2, n)
    later = Decay(lambda t: over(t, 1), over, text="later")
    made = each(update_every, after(1, later))
    return named(made, "ema_pytorch_karras", sigma_rel, gamma, update_every)


def edm2(std: float) -> Decay:
    """Average as EDM2's `PowerFunctionEMA`, one of its stds: `((t - 1) / t)**(gamma + 1)`.

    gamma is `posthoc.gamma(std)`. To pass an exponent, use `emaopt.power(gamma)`. The decay is the
    same for every constant batch size. Formula of the paper, arXiv:2312.02696, equation 127.

    Example:
        >>> [round(float(edm2(12**-0.5)(t)), 4) for t in (1, 2, 3)]
        [0.0, 0.5, 0.6667]
    """
    widest = 12**-0.5
    wanted = f"a number above 0, at most 1/sqrt(12) = {widest:.4f}"
    check_scalar("std", std, lambda s: (s > 0) & (s <= widest), wanted)
    return named(power_function(gamma_of(std)), "edm2", std)


def edm2_traditional(
    halflife_Mimg: float = math.inf,
    rampup_ratio: float | None = 0.09,
    *,
    batch_size: int,
) -> Decay:
    """Average as EDM2's `TraditionalEMA`: a half-life in millions of images that starts short.

    `0.5**(1 / h)`, where h is the smaller of halflife_Mimg, converted to updates, and
    `rampup_ratio * t`. Formula of the paper, arXiv:2312.02696, and of Karras et al.,
    arXiv:2206.00364.

    Args:
        halflife_Mimg: The half-life in millions of images, above 0; infinite with the ramp alone.
        rampup_ratio: The half-life as a share of the updates so far, above 0; None for no ramp.
        batch_size: The images of an update, above 0.

    Returns:
        A decay.

    Example:
        >>> decay = edm2_traditional(2, 0.5, batch_size=10**6)
        >>> [round(float(decay(t)), 4) for t in (1, 2, 4, 100)]
        [0.25, 0.5, 0.7071, 0.7071]
    """
    check_positive(batch_size=batch_size)
    if rampup_ratio is None or halflife_Mimg != math.inf:
        check_positive(halflife_Mimg=halflife_Mimg)
    updates = halflife_Mimg * 1e6 / batch_size
    if rampup_ratio is None:
        made = half_life(updates)
    else:
        check_positive(rampup_ratio=rampup_ratio)
        made = pointwise(lambda t: _rate_of_rampup(t, updates, rampup_ratio), "rampup")
    given = halflife_Mimg, rampup_ratio
    return named(made, "edm2_traditional", *given, batch_size=batch_size)


def _rate_of_rampup(t, updates: float, rampup_ratio: float):
    half = jnp.minimum(updates, rampup_ratio * jnp.asarray(t, float))
    return -jnp.expm1(-math.log(2) / half)
