"""Help the presets: check arguments under the library's names, and make two kinds of decays."""

import dataclasses

import jax.numpy as jnp

from emaopt._average.decay import Decay, call, pointwise
from emaopt._tree.checks import POSITIVE, SHARE, check_scalar, whole


def named(decay: Decay, name: str, *arguments: object, **keywords: object) -> Decay:
    """Return the decay with the call of a preset as its `repr`."""
    return dataclasses.replace(decay, text=call(f"presets.{name}", *arguments, **keywords))


def each(period: int, decay: Decay) -> Decay:
    """Apply `decay` to the values at t = 1, 1 + period, ... only, and count just those."""
    taken = lambda t: (t - 1) // period + 1

    def over(t, n):
        now, before = taken(t), taken(t - n)
        return jnp.where(now > before, decay.over(now, jnp.maximum(now - before, 1)), 0)

    return Decay(lambda t: over(t, 1), over, decay.exact, call("each", period, decay))


def ramp(offset: int, minimum: float, maximum: float) -> Decay:
    """Return `1 - 9 / (offset + t)` between two bounds: TF1's ramp, but with its rate exact."""

    def rate(t):
        return jnp.clip(9 / (offset + jnp.asarray(t, float)), 1 - maximum, 1 - minimum)

    return pointwise(rate, call("ramp", offset, minimum, maximum))


def check_shares(**arguments: float) -> None:
    """Raise unless each argument is a number from 0 to 1."""
    for name, value in arguments.items():
        check_scalar(name, value, *SHARE)


def check_bounds(**arguments: float) -> None:
    """Raise unless two arguments are from 0 to 1, and the first is not above the second."""
    check_shares(**arguments)
    (low, minimum), (high, maximum) = arguments.items()
    if minimum > maximum:
        raise ValueError(f"{low}={minimum} is above {high}={maximum}. Swap them.")


def check_positive(**arguments: float) -> None:
    """Raise unless each argument is a number above 0."""
    for name, value in arguments.items():
        check_scalar(name, value, *POSITIVE)


def check_whole(least: int, **arguments: int) -> None:
    """Raise unless each argument is a whole number, at least as large as `least`."""
    for name, value in arguments.items():
        check_scalar(name, value, *whole(least))
