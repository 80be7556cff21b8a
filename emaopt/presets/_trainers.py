"""Average as training libraries and callbacks for PyTorch do."""

import math

import jax.numpy as jnp

from emaopt._average.decay import Decay, call, pointwise
from emaopt._average.decays import after, half_life, power
from emaopt._tree.calls import show
from emaopt._tree.checks import NOT_NEGATIVE, check_scalar

from ._common import check_positive, check_shares, check_whole, each, named


def lightning(
    decay: float = 0.999,
    update_every_n_steps: int = 1,
    update_starting_at_step: int | None = None,
) -> Decay:
    """Average as Lightning's `EMAWeightAveraging`.

    It takes a value at t = 1, 1 + update_every_n_steps, ...: a copy, then `decay`. The decay is per
    value taken, so the average gets longer with update_every_n_steps; `emaopt.every` keeps the
    length. For the default of its base class `WeightAveraging` use `torch_swa`. Lightning 2.6.6.

    Args:
        decay: The decay, from 0 to 1.
        update_every_n_steps: How often a value is taken, a whole number from 1 on.
        update_starting_at_step: Up to this t the average is the initial parameters.

    Returns:
        A decay.

    Example:
        >>> [round(float(lightning(0.9, 2)(t)), 4) for t in (1, 2, 3, 4, 5)]
        [0.0, 1.0, 0.9, 1.0, 0.9]
    """
    check_shares(decay=decay)
    check_whole(1, update_every_n_steps=update_every_n_steps)
    start = update_starting_at_step or 0
    check_whole(0, update_starting_at_step=start)
    first = math.ceil(start / update_every_n_steps) * update_every_n_steps
    made = _waiting(first, each(update_every_n_steps, after(1, decay)))
    return named(made, "lightning", decay, update_every_n_steps, update_starting_at_step)


def composer(
    half_life: str | None = "1000ba",
    smoothing: float | None = None,
    ema_start: str = "0.0dur",
    update_interval: str | None = None,
) -> Decay:
    """Average as composer's `EMA`, with its times in batches ("1000ba").

    The average is a copy at the first t from ema_start on. Then it takes a value at each t that
    update_interval divides. The half-life is in batches, whatever update_interval. composer 0.32.1.

    Args:
        half_life: The half-life, such as "1000ba". None if `smoothing` is given.
        smoothing: The decay of each value that is taken, from 0 to 1.
        ema_start: When the average starts, such as "500ba". Before, it is the initial parameters.
        update_interval: How often a value is taken, such as "10ba"; by default at every update.

    Returns:
        A decay.

    Example:
        >>> [round(float(composer("2ba", update_interval="2ba")(t)), 4) for t in (1, 2, 3, 4)]
        [0.0, 0.5, 1.0, 0.5]
    """
    if (half_life is None) == (smoothing is None):
        raise ValueError(
            f"half_life={half_life!r} and smoothing={smoothing!r}: one follows from the other. "
            "Pass one, and None for the other."
        )
    start = _batches("ema_start", ema_start, 0)
    interval = 1 if update_interval is None else _batches("update_interval", update_interval, 1)
    if smoothing is None:
        kept = 2.0 ** (-interval / _batches("half_life", half_life, 1))
    else:
        check_shares(smoothing=smoothing)
        kept = smoothing
    first = max(start, 1)
    made = _waiting(first - 1, _on_multiples(first, interval, kept))
    return named(made, "composer", half_life, smoothing, ema_start, update_interval)


def nemo(decay: float, every_n_steps: int = 1) -> Decay:
    """Average as NeMo's callback `EMA`.

    It takes a value at t = 1, 1 + every_n_steps, ... The decay is per value taken, so the average
    gets longer with every_n_steps; `emaopt.every` keeps the length. NeMo 3.0.0.

    Example:
        >>> [round(float(nemo(0.9, 2)(t)), 4) for t in (1, 2, 3, 4)]
        [0.9, 1.0, 0.9, 1.0]
    """
    check_shares(decay=decay)
    check_whole(1, every_n_steps=every_n_steps)
    return named(each(every_n_steps, after(0, decay)), "nemo", decay, every_n_steps)


def mmengine(
    ema_type: str = "ExponentialMovingAverage",
    begin_iter: int = 0,
    momentum: float = 0.0002,
    interval: int = 1,
    gamma: int = 100,
) -> Decay:
    """Average as mmengine's `EMAHook`.

    The average copies the parameters up to t = max(begin_iter, 1), and takes a value every
    `interval` updates from there on. mmengine 0.10.7.

    Args:
        ema_type: "ExponentialMovingAverage", with the decay `1 - momentum`;
            "StochasticWeightAverage", the mean of the values taken; or "MomentumAnnealingEMA", with
            the rate `gamma / (gamma + s)`, s the updates since the last copy, and at least
            momentum.
        begin_iter: When the average starts, a whole number from 0 on.
        momentum: The rate, from 0 to 1.
        interval: How often a value is taken, a whole number from 1 on.
        gamma: The constant of "MomentumAnnealingEMA", above 0.

    Returns:
        A decay.

    Example:
        >>> annealing = mmengine("MomentumAnnealingEMA", gamma=1)
        >>> [round(float(annealing(t)), 4) for t in (1, 2, 3, 4)]
        [0.0, 0.5, 0.6667, 0.75]
    """
    check_shares(momentum=momentum)
    check_whole(0, begin_iter=begin_iter)
    check_whole(1, interval=interval)
    check_positive(gamma=gamma)

    def annealing(n):
        steps = (n - 1) * interval
        return jnp.maximum(momentum, gamma / (gamma + jnp.asarray(steps, float)))

    kinds = {
        "ExponentialMovingAverage": after(1, 1 - momentum),
        "StochasticWeightAverage": power(0),
        "MomentumAnnealingEMA": pointwise(annealing, call("annealing", momentum, gamma)),
    }
    if not isinstance(ema_type, str) or ema_type not in kinds:
        raise ValueError(f"ema_type={ema_type!r} is not known. Pass one of: {', '.join(kinds)}.")
    made = after(max(begin_iter, 1) - 1, each(interval, kinds[ema_type]))
    return named(made, "mmengine", ema_type, begin_iter, momentum, interval, gamma)


def torchtitan(
    decay: float | None = None,
    half_life_fraction: float = 0.05,
    start_step: int = 0,
    step_bias: int = 0,
    update_every_n_steps: int = 1,
) -> Decay:
    """Average as torchtitan's `EMA`: with a half-life that is a share of the training so far.

    It takes a value at t = start_step + update_every_n_steps, and so on. The decay of the n-th is
    `2**(-1 / (half_life_fraction * (n + step_bias)))`. That is scale-free: close to
    `emaopt.power(ln(2) / half_life_fraction - 1)`. Formula of its documentation, in no release yet:
    pytorch/torchtitan#3985.

    Args:
        decay: A constant decay in place of the formula, from 0 to 1.
        half_life_fraction: The half-life as a share of the values taken so far, above 0.
        start_step: Up to this t the average is the initial parameters.
        step_bias: The number that is added to n, a whole number from 0 on.
        update_every_n_steps: How often a value is taken, a whole number from 1 on.

    Returns:
        A decay.

    Example:
        >>> [round(float(torchtitan(half_life_fraction=0.5)(t)), 4) for t in (1, 2, 4)]
        [0.25, 0.5, 0.7071]
    """
    check_positive(half_life_fraction=half_life_fraction)
    check_whole(0, start_step=start_step, step_bias=step_bias)
    check_whole(1, update_every_n_steps=update_every_n_steps)
    if decay is not None:
        check_shares(decay=decay)
        of_values = after(0, decay)
    else:

        def rate(n):
            half = half_life_fraction * (jnp.asarray(n, float) + step_bias)
            return -jnp.expm1(-math.log(2) / half)

        of_values = pointwise(rate, call("fraction", half_life_fraction, step_bias))
    wait = start_step + update_every_n_steps - 1
    made = _waiting(wait, each(update_every_n_steps, of_values))
    given = decay, half_life_fraction, start_step, step_bias, update_every_n_steps
    return named(made, "torchtitan", *given)


def bema(
    update_freq: int = 400,
    ema_power: float = 0.5,
    lag: int = 10,
    update_after: int = 0,
    multiplier: float = 1.0,
    min_ema_multiplier: float = 0.0,
) -> Decay:
    """Average as BEMA does before it corrects the bias, in TRL's `BEMACallback`.

    It takes a value every update_freq updates from update_after on, with the rate
    `(lag + multiplier * t)**-ema_power`. For the paper's average, which takes every value, pass
    update_freq=1. Block and Zhang, arXiv:2508.00180. TRL 1.16.0.

    BEMA evaluates `average + alpha * (params - start)`, with
    `alpha = (lag + multiplier * t)**-bias_power`. `start` are the parameters after update_after,
    which a second average keeps, `ema(after(update_after, 1.0))`: see docs/peers.md.

    Args:
        update_freq: How often a value is taken, a whole number from 1 on.
        ema_power: The exponent of the rate, from 0 on.
        lag: The number that is added to t, a whole number from 1 on.
        update_after: The average copies the parameters at this t. Before, it is the initial ones.
        multiplier: Above 0.
        min_ema_multiplier: The least rate, from 0 to 1.

    Returns:
        A decay.

    Example:
        >>> decay = bema(update_freq=2, lag=7, update_after=1, multiplier=3)
        >>> [round(float(decay(t)), 4) for t in (1, 2, 3, 4, 5)]
        [0.0, 1.0, 0.75, 1.0, 0.7868]
    """
    check_whole(1, update_freq=update_freq, lag=lag)
    check_whole(0, update_after=update_after)
    check_positive(multiplier=multiplier)
    check_scalar("ema_power", ema_power, *NOT_NEGATIVE)
    check_shares(min_ema_multiplier=min_ema_multiplier)

    def rate(n):
        t = update_after + n * update_freq
        since = lag + multiplier * jnp.asarray(t, float)
        return jnp.maximum(since**-ema_power, min_ema_multiplier)

    of_values = pointwise(rate, call("bema_rate", lag, ema_power))
    made = _waiting(update_freq - 1, each(update_freq, of_values))
    if update_after > 0:
        made = _waiting(update_after - 1, after(1, made))
    given = update_freq, ema_power, lag, update_after, multiplier, min_ema_multiplier
    return named(made, "bema", *given)


def _waiting(start: int, decay: Decay) -> Decay:
    """Return a decay that changes nothing for `start` updates. Then `decay` starts at t = 1."""

    def rate(t):
        return jnp.where(t <= start, 0, decay.rate(jnp.maximum(t - start, 1)))

    def over(t, n):
        own = jnp.maximum(t - start, 1)
        return jnp.where(t <= start, 0, decay.over(own, jnp.minimum(n, own)))

    return Decay(rate, over, decay.exact, call("waiting", start, decay))


def _on_multiples(first: int, interval: int, kept: float) -> Decay:
    """Return a decay that copies at t = 1, and then is `kept` at multiples of `interval`.

    `first`: the number of the update at t = 1.
    """
    log = half_life(-math.log(2) / math.log(kept)) if 0 < kept < 1 else after(0, kept)

    def over(t, n):
        now, before = (t + first - 1) // interval, (t - n + first - 1) // interval
        taken = jnp.where(now > before, log.over(jnp.maximum(now, 1), now - before), 0)
        return jnp.where(t <= n, 1, taken)

    return Decay(lambda t: over(t, 1), over, text=f"multiples({show(log)})")


def _batches(name: str, text: str | None, least: int) -> int:
    """Return the number of batches in a time string such as "1000ba"."""
    if text in ("0.0dur", "0dur", "0ba", "0ep") and least == 0:
        return 0
    number = text.removesuffix("ba") if isinstance(text, str) else ""
    if text == number or not number.isdecimal() or int(number) < least:
        raise ValueError(
            f"{name}={text!r} is not a number of batches from {least} on. Pass one, such as "
            "'1000ba'; a preset does not know how many batches an epoch has."
        )
    return int(number)
