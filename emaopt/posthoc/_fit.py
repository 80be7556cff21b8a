"""Find the factors of snapshots: least squares between profiles, in float64.

From one snapshot to the next, an average is what it took on the way plus a share of what it was.
So between two snapshot steps, every later profile of one source is the same curve times a constant.
Each interval is therefore represented by a few coordinates in an orthonormal basis, as many as
there are sources, however many updates it has.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from emaopt._average.profile import rates, shares
from emaopt._tree.checks import Range, check


Source = float | Callable[[Any], Any]  # an average: the gamma of a power average, or a decay
Profile = Source | np.ndarray  # or the weights themselves, as a target may be
# Snapshots are float32. Factors that hang on smaller differences would only multiply their noise.
NOISE = 1e-7


class Block(NamedTuple):
    """Hold what each source does in the interval between two snapshot steps.

    `taken`: float64 [coordinates, sources], the values that it took there. `kept`: float64
    [sources], the share that it kept of everything before.
    """

    taken: np.ndarray
    kept: np.ndarray


def fit(
    snapshots: list[tuple[Any, Source]],
    at: Any,
    target: Any,
    normalize: bool = True,
    threshold: float = math.inf,
) -> tuple[np.ndarray, float]:
    """Return the factors of snapshots, each a step and a source, and the residual they leave."""
    wanted = _target(target, at, normalize)
    profiles: list[tuple[Any, Profile]] = [*snapshots, (at, wanted)]
    distinct = {_key(profile): profile for _, profile in profiles}
    has_weights = any(not isinstance(profile, float) for profile in distinct.values())
    steps_wanted = _WHOLE_STEPS if has_weights else _REAL_STEPS
    check("at", at, *steps_wanted)
    check("steps", sorted({step for step, _ in snapshots}), *steps_wanted)

    columns = _coordinates(profiles, distinct, has_weights)
    sizes = np.linalg.norm(columns, axis=0)
    columns = columns / sizes
    # as multiples of unit columns, and back
    relative = sizes[:-1] / sizes[-1]
    factors = _least_squares(columns[:, :-1], columns[:, -1]) / relative
    if normalize:
        factors /= factors.sum() or 1
    made = columns[:, :-1] @ (factors * relative)
    error = float(np.linalg.norm(made - columns[:, -1]))
    if not error <= threshold:
        raise ValueError(
            f"target is out of reach: residual {error:.3g} is above threshold={threshold:g}. "
            "Record more snapshots or a second average; pass a target between the averages "
            "recorded, or at= the step of a snapshot."
        )
    return factors, error


def _coordinates(
    profiles: list[tuple[Any, Profile]], distinct: dict[Any, Profile], has_weights: bool
) -> np.ndarray:
    """Return the profiles as columns, [coordinates of all intervals, profiles]."""
    steps = [step for step, _ in profiles]
    knots, last_interval = np.unique(steps, return_inverse=True)
    sources = list(distinct.values())
    keys = list(distinct)
    source_of = np.array([keys.index(_key(profile)) for _, profile in profiles])
    if has_weights:
        blocks = list(_blocks_of_weights(knots, sources))
    else:
        blocks = list(_blocks_of_functions(knots, [float(gamma) for gamma in keys]))
    # Backwards: of an interval, a profile holds what its source took there, times what the source
    # kept of that in all later intervals up to the profile's own step.
    rows, kept_since = [], np.zeros(len(profiles))
    for interval in reversed(range(len(blocks))):
        taken, kept = blocks[interval]
        kept_since[last_interval == interval] = 1
        rows.append(taken[:, source_of] * kept_since)
        kept_since *= kept[source_of]
    return np.concatenate(rows)


def _least_squares(columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the factors with which columns add up to a vector, as nearly as they can.

    By the triangle R of the QR and two steps of the corrected seminormal equations. Solving with a
    Gram matrix would square the condition, and lose the digits of the smallest factors.
    """
    newest_first = columns[:, ::-1]
    triangle = _triangle(newest_first)
    columns_depend_on_one_another = (
        len(triangle) < columns.shape[1] or np.abs(triangle.diagonal()).min() < NOISE
    )
    if columns_depend_on_one_another:
        return np.linalg.lstsq(columns, wanted, rcond=NOISE)[0]
    factors = np.zeros(columns.shape[1])
    for _ in range(2):  # the second step corrects the rounding of the first
        gradient = newest_first.T @ (wanted - newest_first @ factors)
        half_solved = np.linalg.solve(triangle.T, gradient)
        factors += np.linalg.solve(triangle, half_solved)
    return factors[::-1]


def _triangle(columns: np.ndarray) -> np.ndarray:
    """Return the R of the QR: the coordinates of the columns in a basis of as many vectors."""
    return np.asarray(np.linalg.qr(columns, mode="r"))


def _blocks_of_functions(knots: np.ndarray, gammas: list[float]) -> Iterator[Block]:
    """Yield the blocks of power averages, as functions of time, by a root of their Gram matrix."""
    if min(gammas) <= -0.5:
        raise ValueError(
            f"gammas or target is {min(gammas)}: the square of that profile has no integral. Pass "
            f"more than -0.5, or emaopt.power({min(gammas)}), which has a weight for each update."
        )
    # at time b, source i has taken p_i * t**(p_i - 1) / b**p_i at time t, with p_i = gamma_i + 1
    powers = np.array(gammas) + 1
    products, sums = np.multiply.outer(powers, powers), np.add.outer(powers, powers) - 1
    for begin, end in zip([0.0, *knots], knots, strict=False):
        log = math.log(begin / end) if begin else -math.inf
        gram = products / sums * -np.expm1(sums * log) / end  # integrals from begin to end
        sizes = np.sqrt(gram.diagonal())
        values, vectors = np.linalg.eigh(gram / sizes / sizes[:, None])
        root = np.sqrt(values.clip(0))[:, None] * vectors.T
        yield Block(taken=root * sizes, kept=np.exp(powers * log))


def _blocks_of_weights(knots: np.ndarray, sources: list[Profile]) -> Iterator[Block]:
    """Yield the blocks of any profiles, with a weight for each update, by the R of their QR."""
    knots = knots.astype(int)
    given = [x if isinstance(x, np.ndarray) else rates_of(x, knots[-1]) for x in sources]
    for begin, end in zip([-1, *knots], knots, strict=False):
        taken, kept = [], []
        for source, numbers in zip(sources, given, strict=True):
            if isinstance(source, np.ndarray):  # weights: already what is left in the end
                here = numbers[begin + 1 : end + 1]
                share = np.zeros(end - begin)
                share[: len(here)] = here
                taken.append(share)
                kept.append(1.0)
            elif begin < 0:  # the initial value, too, is taken in the first interval
                taken.append(shares(numbers[:end]))
                kept.append(0.0)
            else:
                share = shares(numbers[begin:end])
                taken.append(share[1:])
                kept.append(share[0])
        yield Block(_triangle(np.stack(taken, axis=1)), np.array(kept))


def profile_of(source: Profile, at: int) -> np.ndarray:
    """Return the weights of each update, of a gamma or of a decay; weights as they are."""
    if isinstance(source, np.ndarray):
        return source
    return shares(rates_of(source, at))


def rates_of(source: Source, t: int) -> np.ndarray:
    """Return what each update takes: of a decay in its own precision, of a gamma in float64."""
    if callable(source):
        return rates(source, int(t))
    with np.errstate(divide="ignore"):  # the first update takes all: log(0)
        logs = np.log1p(-1 / np.arange(1, t + 1))
    return -np.expm1((source + 1) * logs)


_WHOLE_STEPS = Range(lambda t: (t >= 0) & (t % 1 == 0), "whole numbers of updates, from 0")
_REAL_STEPS = Range(lambda t: (t > 0) & np.isfinite(t), "numbers of updates, above 0")
_GAMMAS = Range(lambda g: (g > -1) & (g < math.inf), "numbers above -1, or decays")


def snapshots_of(steps: Any, gammas: Any) -> list[tuple[Any, Source]]:
    """Return the step and the source of each snapshot."""
    steps = np.ravel(steps).tolist()
    given = list(gammas) if isinstance(gammas, Iterable) else [gammas]
    sources = [x if callable(x) else _number("gammas", x) for x in given]
    if not steps or not sources:
        raise ValueError("steps or gammas is empty. Pass one of each at least.")
    no_repeats = len(set(steps)) == len(steps) and len(set(map(_key, sources))) == len(sources)
    if no_repeats:
        return [(step, source) for step in steps for source in sources]
    if len(steps) != len(sources):
        raise ValueError(
            f"steps has {len(steps)} entries and gammas {len(sources)}, with repeats. Pass each "
            "step and each average once, or both for every snapshot."
        )
    return list(zip(steps, sources, strict=True))


def _key(profile: Profile) -> Any:
    """Return what tells profiles apart: the gamma, or being another object."""
    return profile if isinstance(profile, float) else id(profile)


def _target(target: Any, at: Any, normalize: bool) -> Profile:
    """Return the target as a gamma, a decay, or weights that fit."""
    if callable(target):
        return target
    if np.ndim(target) == 0:
        return _number("target", target)
    target = np.asarray(target, np.float64)
    if target.shape != (at + 1,) or not np.isfinite(target).all() or not target.any():
        raise ValueError(
            f"target has shape {target.shape}, or is not finite, or all 0. Pass a weight for the "
            f"initial parameters and for each of the at={at} updates, in one array."
        )
    if normalize and not math.isclose(target.sum(), 1, rel_tol=1e-6):
        raise ValueError(
            f"target sums up to {target.sum():.6g}. Pass weights that sum up to 1, or "
            "normalize=False."
        )
    return target


def _number(name: str, gamma: Any) -> float:
    check(name, gamma, *_GAMMAS)
    return float(gamma)
