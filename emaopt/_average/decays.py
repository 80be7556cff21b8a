"""Functions of the step.

A *schedule* gives a learning rate and sees the number of updates before this one: 0, 1, ...
A *decay* gives the share of an average that one update keeps and sees the number of updates
with this one: t = 1, 2, ... What the average computes with is `rate = 1 - decay`, and near 1 the
subtraction is where float32 loses everything: `1 - (1 - 1/t)` is 19 % off at t = 1e7. So a decay
of emaopt's own is a `Decay`: a function of t that is made from its rate. Any other function
`t -> decay` will do too, and a number is a constant decay.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from emaopt._tree.checks import POSITIVE, SHARE, check_scalar, whole
from emaopt._tree.numbers import is_concrete, scalar


@dataclasses.dataclass(frozen=True)
class Decay:
    """A decay made from its rate: `decay(t) = 1 - rate(t)`.

    `rate(t)` is what one update takes from the new value. `over(t, n)` is what n updates in a row
    take, the last of them at t: 1 - decay(t) * ... * decay(t-n+1).

    >>> mean = Decay(lambda t: 1 / t, lambda t, n: n / t)
    >>> mean(4)
    0.75
    """

    rate: Callable[[Any], Any]
    over: Callable[[Any, Any], Any]
    exact: bool = True  # False: `over` takes the decay for constant over the n updates

    def __call__(self, t: Any) -> Any:
        check_scalar("t", t, lambda t: t >= 1, _COUNTED)
        return 1 - self.rate(t)


DecayLike = float | jax.Array | Callable[[Any], Any]

_COUNTED = (
    "the number of updates with this one, 1 or more. Optax's schedules count from 0: a decay in "
    'optax.inject_hyperparams needs static_args="decay". To start later: emaopt.after(n, decay)'
)


def as_decay(decay: DecayLike) -> Decay:
    """What an average computes with.

    A number or a function of the user's is TF1's float32 arithmetic, rate = 1 - float32(decay).
    """
    if isinstance(decay, Decay):
        return decay
    if callable(decay):
        _check_function(decay)
        return pointwise(lambda t: 1 - jnp.asarray(decay(t)).astype(jnp.float32))
    _check_number(decay)
    rate = 1 - scalar(decay, jnp.float32)
    return Decay(lambda t: rate, lambda t, n: _power(jnp.log1p(-rate), n))


def warmup(decay: DecayLike) -> Decay:
    """TF1's `num_updates`: a decay that starts low, `min(decay, (1 + t) / (10 + t))`.

    In TF1's float32 arithmetic. The first update of a run, t = 1, keeps 2/11.

    >>> [round(float(warmup(0.3)(t)), 4) for t in (1, 2, 3, 4)]
    [0.1818, 0.25, 0.3, 0.3]
    """
    inner = as_decay(decay)

    # 1 - min(a, b) is max(1 - a, 1 - b), also after rounding, so TF1's number comes out
    def rate(t):
        n = jnp.asarray(t).astype(jnp.float32)
        return jnp.maximum(_float(inner.rate(t)), _float(1 - (1 + n) / (10 + n)))

    return pointwise(rate)


def debiased(decay: DecayLike) -> Decay:
    """Adam's and TF1's zero-debiasing as a decay: the average forgets where it started.

    `rate(t) = (1 - decay) / (1 - decay**t)`: the same numbers as an average that starts at zero
    and is divided by `1 - decay**t`. The first update keeps nothing.

    `decay` is a number below 1 or a decay whose product over all updates is known (`half_life`,
    `power`, `every`, `after`); the product of a ramp or of a function is not.

    >>> [round(float(debiased(0.5)(t)), 4) for t in (1, 2, 3)]
    [0.0, 0.3333, 0.4286]
    """
    inner = _own(decay)
    if not inner.exact:
        raise ValueError(
            "decay is a function or a ramp, and debiased needs the product of all decays so far. "
            "Pass a number; a ramp needs no debiasing."
        )
    if not callable(decay):
        check_scalar("decay", decay, lambda d: d < 1, "a number from 0 to below 1")

    def over(t, n):
        t = jnp.maximum(t, n)
        total = inner.over(t, t)  # 0 before `every` has taken its first value
        return inner.over(t, n) / jnp.where(total > 0, total, 1)

    return Decay(lambda t: over(t, 1), over)


def power(gamma: float) -> Decay:
    """The power-function average of EDM2: update t keeps `((t - 1) / t)**(gamma + 1)`.

    The weight of a past value grows as its step to the power `gamma`: the average gets longer as
    training does. `power(0)` is the plain mean of all values (Polyak averaging, SWA). The first
    update keeps nothing. Karras et al., arXiv:2312.02696.

    >>> [round(float(power(0)(t)), 4) for t in (1, 2, 3, 4)]
    [0.0, 0.5, 0.6667, 0.75]
    """
    check_scalar("gamma", gamma, lambda g: g > -1, "a number above -1")

    def over(t, n):
        t, n = _float(t), _float(n)
        return _power((_float(gamma) + 1) * jnp.log1p(-n / jnp.maximum(t, n)), 1)

    return Decay(lambda t: over(t, 1), over)


def inverse_gamma(
    inv_gamma: float = 1.0, power: float = 2 / 3, minimum: float = 0.0, maximum: float = 0.9999
) -> Decay:
    """The warm-up of diffusion models: `1 - (1 + t / inv_gamma)**-power`, from minimum to maximum.

    `power=2/3` reaches 0.999 at 31.6 thousand updates, `power=3/4` at 10 thousand. Crowson's
    k-diffusion; diffusers' `use_ema_warmup`, timm's `use_warmup`.

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
        free = jnp.exp(-_float(power) * jnp.log1p(_float(t) / _float(inv_gamma)))
        return jnp.clip(free, _float(1 - maximum), _float(1 - minimum))

    return pointwise(rate)


def half_life(updates: float) -> Decay:
    """The decay `0.5**(1 / updates)`: after so many updates a value counts half.

    Of a half-life in samples or tokens, `half_life(samples / samples_per_update)`; an update of
    `optax.MultiSteps` has the samples of all its batches. The average is then as long for every
    batch size and accumulation, and `every` keeps its length.

    >>> float(half_life(1)(7)), round(float(half_life(2)(7)) ** 2, 4)
    (0.5, 0.5)
    """
    check_scalar("updates", updates, *POSITIVE)
    log = -math.log(2) / updates
    return Decay(lambda t: _power(log, 1), lambda t, n: _power(log, n))


def every(n: int, decay: DecayLike) -> Decay:
    """An average that takes a value every n updates and keeps its length.

    `decay(t) = 1` except at t = n, 2n, ..., where it is the decay over n updates: `decay**n` for a
    constant, `((t - n) / t)**(gamma + 1)` for `power`.

    >>> [round(float(every(2, 0.9)(t)), 4) for t in (1, 2, 3, 4)]
    [1.0, 0.81, 1.0, 0.81]
    """
    check_scalar("n", n, *whole(1))
    if is_concrete(n):
        n = int(n)  # a float would be rounded beside a large t
        if n == 1:
            return as_decay(decay)
    inner = _own(decay)

    def over(t, k):
        last, first = t // n * n, (t - k) // n * n
        return jnp.where(last > first, inner.over(jnp.maximum(last, 1), last - first), 0)

    return Decay(lambda t: over(t, 1), over, inner.exact)


def after(start: int, decay: DecayLike) -> Decay:
    """Copies for the first `start` updates; then `decay`, whose own t begins at 1.

    `after(start, power(0))` is SWA: the mean of everything that comes after `start`.

    >>> [round(float(after(2, power(0))(t)), 4) for t in (1, 2, 3, 4, 5)]
    [0.0, 0.0, 0.0, 0.5, 0.6667]
    """
    check_scalar("start", start, *whole(0))
    inner = _own(decay)
    copy = lambda t, now: jnp.where(t <= start, 1, now)
    own = lambda t, n: jnp.maximum(t - start, n)
    return Decay(
        lambda t: copy(t, inner.rate(own(t, 1))),
        lambda t, n: copy(t - n + 1, inner.over(own(t, n), n)),
        inner.exact,
    )


def _own(decay: DecayLike) -> Decay:
    """The decay inside one of emaopt's own: a number is what the user wrote, not its float32."""
    if callable(decay) or not is_concrete(decay):
        return as_decay(decay)
    _check_number(decay)
    kept = float(decay)
    rate, log = 1 - kept, math.log(kept) if kept else -math.inf
    return Decay(lambda t: _float(rate), lambda t, n: _power(log, n))


def pointwise(rate: Callable) -> Decay:
    """A decay of which only the rates are known, not their product over many updates."""
    return Decay(rate, lambda t, n: _power(jnp.log1p(-rate(t)), n), exact=False)


def _power(log, n):
    """1 - exp(log)**n, without the subtraction."""
    return -jnp.expm1(_float(n) * _float(log))


def _float(x):
    """In JAX's own precision: float32, or float64 where the user enabled it."""
    return jnp.asarray(x).astype(float)


def _check_number(decay: Any) -> None:
    check_scalar("decay", decay, *SHARE)
    dtype = jnp.dtype(getattr(decay, "dtype", jnp.float32))
    rounded = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    if rounded and is_concrete(decay) and decay == 1:
        raise ValueError(
            f"decay={decay} has dtype {dtype}, in which 0.9999 is 1: the average would never move. "
            "Pass a Python number; in optax.inject_hyperparams, hyperparam_dtype=jnp.float32."
        )


def _check_function(decay: Callable) -> None:
    """Try a function of the user's at small and large t, and under a trace."""
    try:
        value = jax.eval_shape(decay, jax.ShapeDtypeStruct((), jnp.int32))
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            "decay is a function that looks at the value of t in Python, so it cannot be jitted. "
            "Use jax.numpy: jnp.where(t < ..., a, b) instead of `if`."
        ) from error
    except TypeError as error:
        raise ValueError(
            f"decay={decay!r} is a function that does not make a number of t. Pass a number or a "
            "function of t; call those of emaopt first: warmup(0.999)."
        ) from error
    if getattr(value, "shape", None) != ():
        raise ValueError(f"decay(t) is {value}, not a scalar. Return a number from 0 to 1.")
    for t in (1, 2, 3, 10, 100, 1000, 10**4, 10**5, 10**6):
        with jax.ensure_compile_time_eval():
            value = decay(jnp.int32(t))
        if not is_concrete(value):
            return
        if not 0 <= float(value) <= 1:
            raise ValueError(f"decay(t) is {float(value)} at t={t}. Return a number from 0 to 1.")


def gamma(sigma_rel: float) -> float:
    """The exponent of the power average whose profile has this relative standard deviation.

    The root of `sigma_rel**2 = (gamma + 1) / ((gamma + 2)**2 * (gamma + 3))`, for sigma_rel above 0
    and at most 1/sqrt(12), the plain mean's. Karras et al., arXiv:2312.02696.

    >>> round(gamma(0.05), 4), round(gamma(0.10), 4)
    (16.9722, 6.9372)
    """
    bound = 12**-0.5
    fine = lambda s: (s > 0) & (s <= bound * (1 + 1e-15))
    check_scalar(
        "sigma_rel", sigma_rel, fine, f"a number above 0, at most 1/sqrt(12) = {bound:.4f}"
    )
    s, v = float(sigma_rel), 1.0
    # with v = sigma_rel * (gamma + 2), v**3 + s*v**2 - v + s = 0; Newton from above the top root
    while (lower := v - (v**3 + s * v**2 - v + s) / (3 * v**2 + 2 * s * v - 1)) < v:
        v = lower
    return max(v / s - 2, 0.0)


def sigma_rel(gamma: float) -> float:
    """The relative standard deviation of the profile of a power average.

    `sqrt((gamma + 1) / ((gamma + 2)**2 * (gamma + 3)))`: the width of its weights, as a share of
    the training so far. Karras et al., arXiv:2312.02696.

    >>> round(18 * sigma_rel(1) ** 2, 12)
    1.0
    """
    check_scalar("gamma", gamma, lambda g: (g > -1) & (g < math.inf), "a number above -1")
    g = float(gamma)
    return math.sqrt((g + 1) / (g + 3)) / (g + 2)
