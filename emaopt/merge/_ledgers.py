"""Find the decays of the averages of a run: as the user says, or from their ledgers.

A ledger holds three moments of an average's weights. They follow from the decay, and of the decays
with one parameter, one at most has the moments of all snapshots.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from emaopt._average.decay import as_decay
from emaopt._average.decays import debiased, gamma, half_life, sigma_rel, warmup
from emaopt._average.profile import shares
from emaopt.posthoc._fit import Source, rates_of


TOLERANCE = 1e-3  # the least residual that anybody would notice

# of the command line, NAME:NUMBER; a power average is its gamma
_DECAYS: dict[str, Callable[[float], Source]] = {
    "sigma_rel": gamma,
    "gamma": float,
    "decay": as_decay,
    "half_life": half_life,
    "warmup": warmup,
    "debiased": debiased,
}


class NamedSource(NamedTuple):
    """Hold a recorded average and its name."""

    text: str
    decay: Source


class Moments(NamedTuple):
    """Hold a ledger: the weight of the initial values, mean age, and sum of squared weights."""

    initial: float
    age: float
    square: float


def parse(text: str) -> NamedSource:
    """Return a decay from the command line: `sigma_rel:0.05`, `half_life:1000`."""
    name, _, number = text.partition(":")
    try:
        return NamedSource(text, _DECAYS[name](float(number)))
    except (KeyError, ValueError) as error:
        why = f": {error}".rstrip(".") if name in _DECAYS else ""
        known = ", ".join(f"{name}:NUMBER" for name in _DECAYS)
        raise ValueError(f"{text!r} is no decay{why}. Pass one of {known}") from None


def recognize(steps: Sequence[int], ledgers: Sequence[Moments]) -> NamedSource | None:
    """Return the decay of one of four kinds that makes these ledgers, or `None`."""
    order = [i for i in np.argsort(steps) if steps[i] > 0]
    recorded = np.array([ledgers[i] for i in order]).reshape(-1, 3)
    steps = [int(steps[i]) for i in order]
    if not steps or not recorded[-1, 1] > 0:  # no value yet, or none but the newest
        return None

    def off(source: NamedSource) -> float:
        own = np.array(list(_moments(source.decay, steps)))
        return float(np.max(np.abs(own - recorded) / [1, *recorded[-1, 1:]]))

    found = [_fitted(kind, steps[-1], recorded[-1, 1]) for kind in _KINDS]
    best = min(found, key=lambda source: max(off(source), 1e-5))  # of equals, the first
    return best if off(best) < TOLERANCE else None


def _moments(decay: Source, steps: list[int]) -> Iterator[Moments]:
    """Return the ledger of a decay after each of these numbers of updates."""
    taken = rates_of(decay, steps[-1])
    initial, age, square = 1.0, 0.0, 1.0
    for a, b in zip([0, *steps], steps, strict=False):
        share = shares(taken[a:b])
        kept = share[0]
        initial *= kept
        age = kept * age + share @ np.arange(b - a, -1, -1)
        square = kept**2 * square + share[1:] @ share[1:]
        yield Moments(initial, age, square)


def _power(age: float, t: int) -> NamedSource:
    number = max(t / age - 2, -0.99)
    text = f"gamma:{round(number, 6) + 0.0:.6g}, sigma_rel {sigma_rel(number):.4g}"
    return NamedSource(text, number)


def _constant(
    age: float, t: int, name: str = "", wrap: Callable = lambda decay: decay
) -> NamedSource:
    number = math.log(2) / math.log1p(1 / age)  # of the decay age / (1 + age)
    number = min(number, 1e37)  # the search goes far, and of more the rate is 0 in float32
    return NamedSource(f"{name}half_life:{number:.6g}", wrap(half_life(number)))


# each from about the mean age that it should have after t updates
_KINDS = (
    _power,
    _constant,
    lambda age, t: _constant(age, t, "warmup of ", warmup),
    lambda age, t: _constant(age, t, "debiased ", debiased),
)


def _fitted(kind: Callable[[float, int], NamedSource], t: int, age: float) -> NamedSource:
    """Find the decay of a kind with this mean age after t updates, by the Illinois method."""

    def error(x: float) -> float:
        *_, moments = _moments(kind(math.exp(x), t).decay, [t])
        return math.log(max(moments.age, 1e-99) / age)

    low = math.log(age) - 0.01  # what is aimed at is never less than what is reached
    high, below = low + 0.1, error(low)
    while (above := error(high)) < 0 and high < low + 60:
        low, high, below = high, high + 2 * (high - low), above
    for _ in range(20 if below < 0 < above else 0):
        x = high - above * (high - low) / (above - below)
        y = error(x)
        if y * above < 0:
            low, below = high, above
        else:
            below /= 2
        high, above = x, y
        if abs(y) < 1e-7:
            break
    return kind(math.exp(high), t)
