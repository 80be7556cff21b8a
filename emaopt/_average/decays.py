"""Make the decays of emaopt. Each is a function of t = 1, 2, ...: the updates with this one.

They compose: `every(10, after(1000, power(7)))`. See `emaopt._average.decay` for what a decay is.
"""

import math

import jax.numpy as jnp

from emaopt._tree.checks import FINITE, POSITIVE, SHARE, Range, check_scalar, whole
from emaopt._tree.numbers import is_concrete

from .decay import (
    LOG_OF_ZERO,
    Decay,
    DecayLike,
    as_decay,
    as_inner,
    call,
    number,
    pointwise,
    together,
)


# a longer half-life has a rate below the smallest normal float32, which is flushed to 0
_LONGEST = 5e37
_HALF_LIFE = Range(
    lambda x: POSITIVE.holds(x) & (x <= _LONGEST), f"a number above 0, at most {_LONGEST:g}"
)
_GAMMA = Range(lambda x: (x > -1) & FINITE.holds(x), "a number above -1")


def warmup(decay: DecayLike) -> Decay:
    """Let a decay start low: `min(decay, (1 + t) / (10 + t))`, as TF1's `num_updates` does.

    It is computed in float32, as in TF1. The first update of a run, t = 1, keeps 2/11 of the
    initial value. Before the ramp reaches `decay` it is close to `power(8)`: the average is over
    about the last tenth of the updates.

    Args:
        decay: The decay that the ramp leads to: a number from 0 to 1, or a function of t.

    Example:
        >>> [round(float(warmup(0.3)(t)), 4) for t in (1, 2, 3, 4)]
        [0.1818, 0.25, 0.3, 0.3]
    """
    inner = as_decay(decay)

    # 1 - min(a, b) is max(1 - a, 1 - b), also after rounding, so TF1's number comes out
    def rate(t):
        n = jnp.asarray(t).astype(jnp.float32)
        return jnp.maximum(number(inner.rate(t)), number(1 - (1 + n) / (10 + n)))

    return pointwise(rate, call("warmup", inner))


def debiased(decay: DecayLike) -> Decay:
    """Remove the bias towards the start: zero-debiasing as in Adam and TF1, as a decay.

    `rate(t) = (1 - decay) / (1 - decay**t)`. These are the numbers of an average that starts at
    zero and is divided by `1 - decay**t`. The first update keeps nothing of the initial value.

    Args:
        decay: A number from 0 to below 1, or a decay whose product over all updates is known:
            `half_life`, `power`, `every`, `after`. The product of a ramp or of a function is not
            known; these raise a ValueError.

    Example:
        >>> [round(float(debiased(0.5)(t)), 4) for t in (1, 2, 3)]
        [0.0, 0.3333, 0.4286]
    """
    inner = as_inner(decay)
    if not inner.exact:
        raise ValueError(
            "decay is a function or a ramp, and debiased needs the product of all decays so far. "
            "Pass a number; a ramp needs no debiasing."
        )
    if not callable(decay):
        check_scalar("decay", decay, lambda d: d < 1, "a number from 0 to below 1")

    def over(t, n):
        t = jnp.maximum(t, n)
        total = inner.over(t, t)
        # 0 before `every` has taken its first value; 0 / 1 then
        return inner.over(t, n) / jnp.where(total > 0, total, 1)

    return Decay(lambda t: over(t, 1), over, text=call("debiased", inner))


def power(gamma: float) -> Decay:
    """Average with a power function as the profile, as in EDM2: scale-free, for any run length.

    Update t keeps `((t - 1) / t)**(gamma + 1)`. The weight of a past value grows as its step to the
    power `gamma`, so the average grows longer with the training. The first update keeps nothing of
    the initial value.
    Karras et al., arXiv:2312.02696.

    Args:
        gamma: A number above -1. `power(0)` is the plain mean of all values (Polyak averaging,
            SWA). `power(posthoc.gamma(0.1))` has a relative width of 10 %.

    Example:
        >>> [round(float(power(0)(t)), 4) for t in (1, 2, 3, 4)]
        [0.0, 0.5, 0.6667, 0.75]
    """
    check_scalar("gamma", gamma, *_GAMMA)
    # in float64: float32(-1 + 1e-9) + 1 is 0, and 0 * log(0) NaN
    exponent = float(gamma) + 1 if is_concrete(gamma) else number(gamma) + 1

    def over(t, n):
        t, n = number(t), number(n)
        share = n / jnp.maximum(t, n)
        partly = share < 1  # else all that there is: log1p(-1) is -infinity
        log = number(exponent) * jnp.log1p(-jnp.where(partly, share, 0))
        return jnp.where(partly, together(log, 1), 1)

    return Decay(lambda t: over(t, 1), over, text=call("power", gamma))


def inverse_gamma(
    inv_gamma: float = 1.0, power: float = 2 / 3, minimum: float = 0.0, maximum: float = 0.9999
) -> Decay:
    """Warm up as diffusion models do: `1 - (1 + t / inv_gamma)**-power`, between two bounds.

    Crowson's k-diffusion; diffusers' `use_ema_warmup`, timm's `use_warmup`.

    Args:
        inv_gamma: The number of updates on which the ramp is measured, above 0.
        power: The exponent, above 0. With 2/3 the decay is 0.999 after 31.6 thousand updates, with
            3/4 after 10 thousand.
        minimum: The least decay, from 0 to 1.
        maximum: The largest decay, from `minimum` to 1.

    Returns:
        A decay.

    Example:
        >>> [round(float(inverse_gamma(power=1.0)(t)), 4) for t in (1, 2, 3)]
        [0.5, 0.6667, 0.75]
    """
    check_scalar("inv_gamma", inv_gamma, *POSITIVE)
    check_scalar("power", power, *POSITIVE)
    check_scalar("minimum", minimum, *SHARE)
    check_scalar("maximum", maximum, *SHARE)
    if is_concrete(minimum) and is_concrete(maximum) and minimum > maximum:
        raise ValueError(f"minimum={minimum} is above maximum={maximum}. Swap them.")

    def rate(t):
        free = jnp.exp(-number(power) * jnp.log1p(number(t) / number(inv_gamma)))
        return jnp.clip(free, number(1 - maximum), number(1 - minimum))

    return pointwise(rate, call("inverse_gamma", inv_gamma, power, minimum, maximum))


def half_life(updates: float) -> Decay:
    """Average with a half-life: after so many updates a value counts half, `0.5**(1 / updates)`.

    A half-life in samples or tokens has two forms. With batches of one size:
    `half_life(samples / samples_per_update)`; an update of `optax.MultiSteps` has the samples of
    all its batches. With batches of changing size: `half_life(samples)` and
    `update(..., advance=samples_of_this_update)`.

    Args:
        updates: The half-life in updates, above 0.

    Example:
        >>> float(half_life(1)(7)), round(float(half_life(2)(7)) ** 2, 4)
        (0.5, 0.5)
    """
    check_scalar("updates", updates, *_HALF_LIFE)
    log = -math.log(2) / updates
    if is_concrete(log):
        log = max(float(log), LOG_OF_ZERO)
    return Decay(
        lambda t: together(log, 1), lambda t, n: together(log, n), text=call("half_life", updates)
    )


def every(n: int, decay: DecayLike) -> Decay:
    """Average only every n-th update, and keep the length of the average.

    `decay(t) = 1` except at t = n, 2n, ... There it is the decay over n updates: `decay**n` for a
    constant, `((t - n) / t)**(gamma + 1)` for `power`. A ramp or a function is treated as constant
    over the n updates.

    Args:
        n: A whole number from 1 on. With `update(..., advance=...)` it is in units of that clock:
            the average is due when t passes a multiple of n.
        decay: The decay of one update: a number from 0 to 1, or a function of t.

    Example:
        >>> [round(float(every(2, 0.9)(t)), 4) for t in (1, 2, 3, 4)]
        [1.0, 0.81, 1.0, 0.81]
    """
    check_scalar("n", n, *whole(1))
    if is_concrete(n):
        n = int(n)  # a float would be rounded beside a large t
        if n == 1:
            return as_decay(decay)
    inner = as_inner(decay)

    def over(t, k):
        last, first = t // n * n, (t - k) // n * n
        return jnp.where(last > first, inner.over(jnp.maximum(last, 1), last - first), 0)

    return Decay(lambda t: over(t, 1), over, inner.exact, call("every", n, inner))


def after(start: int, decay: DecayLike) -> Decay:
    """Start to average later: copy the parameters for `start` updates, then use `decay` from t = 1.

    `after(start, power(0))` is SWA: the mean of everything that comes after `start`.

    Args:
        start: A whole number of updates from 0 on.
        decay: A number from 0 to 1, or a function of t.

    Example:
        >>> [round(float(after(2, power(0))(t)), 4) for t in (1, 2, 3, 4, 5)]
        [0.0, 0.0, 0.0, 0.5, 0.6667]
    """
    check_scalar("start", start, *whole(0))
    if is_concrete(start):
        start = int(start)
    inner = as_inner(decay)
    own = lambda t, n: jnp.maximum(t - start, n)

    def rate(t):
        return jnp.where(t <= start, 1, inner.rate(own(t, 1)))

    def over(t, n):
        return jnp.where(t - n + 1 <= start, 1, inner.over(own(t, n), n))

    return Decay(rate, over, inner.exact, call("after", start, inner))


def gamma(sigma_rel: float) -> float:
    """Return the exponent `gamma` of the power average with this relative width.

    It is the root of `sigma_rel**2 = (gamma + 1) / ((gamma + 2)**2 * (gamma + 3))`. Karras et al.,
    arXiv:2312.02696.

    Args:
        sigma_rel: The standard deviation of the profile as a share of the training so far: above 0
            and at most 1/sqrt(12), the plain mean's.

    Example:
        >>> round(gamma(0.05), 4), round(gamma(0.10), 4)
        (16.9722, 6.9372)
    """
    bound = 12**-0.5
    # the last digit of 12**-0.5 may be computed in another way
    fine = lambda s: (s > 0) & (s <= bound * (1 + 1e-15))
    wanted = f"a number above 0, at most 1/sqrt(12) = {bound:.4f}"
    check_scalar("sigma_rel", sigma_rel, fine, wanted)
    s, v = float(sigma_rel), 1.0
    # With v = sigma_rel * (gamma + 2) the equation is v**3 + s*v**2 - v + s = 0. Newton's method
    # from above falls to its largest root, and stops when it falls no further.
    while True:
        value = v**3 + s * v**2 - v + s
        slope = 3 * v**2 + 2 * s * v - 1
        lower = v - value / slope
        if lower >= v:
            return max(v / s - 2, 0.0)
        v = lower


def sigma_rel(gamma: float) -> float:
    """Return the relative width of the profile of a power average.

    `sqrt((gamma + 1) / ((gamma + 2)**2 * (gamma + 3)))`: its standard deviation as a share of the
    training so far. Karras et al., arXiv:2312.02696.

    Args:
        gamma: The exponent, a number above -1.

    Example:
        >>> round(18 * sigma_rel(1) ** 2, 12)
        1.0
    """
    check_scalar("gamma", gamma, *_GAMMA)
    g = float(gamma)
    return math.sqrt((g + 1) / (g + 3)) / (g + 2)


# What `ema()` is: `benchmarks/default.py` says what widths from 0.03 to 0.25 cost.
SCALE_FREE = power(gamma(0.10))
