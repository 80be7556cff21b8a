"""Least squares between profiles, in float64.

From one snapshot to the next, an average is what it took on the way plus a share of what it was.
So between two snapshots the profiles of all later ones are multiples of a single function per
decay, and a few coordinates per interval, in an orthonormal basis, stand for any number of updates.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from emaopt._average.profile import rates, shares
from emaopt._tree.checks import check


Average = float | Callable[[Any], Any]  # the gamma of a power average, or a decay
# what float32 snapshots do not tell apart; factors that hang on less would only multiply noise
NOISE = 1e-7
# of an interval: the coordinates of what each average took, what each kept of all before
Block = tuple[np.ndarray, np.ndarray]


def fit(
    snapshots: list[tuple[Any, Average]],
    at: Any,
    target: Any,
    normalize: bool = True,
    threshold: float = math.inf,
) -> tuple[np.ndarray, float]:
    """The factors of snapshots, each a step and an average, and the residual that they leave."""
    pairs = [*snapshots, (at, _target(target, at, normalize))]
    kinds = {_key(x): x for _, x in pairs}
    discrete = any(not isinstance(x, float) for x in kinds.values())
    check("at", at, *_UPDATES[discrete])
    check("steps", sorted({step for step, _ in snapshots}), *_UPDATES[discrete])
    knots, last = np.unique([step for step, _ in pairs], return_inverse=True)
    blocks = (_by_updates if discrete else _by_functions)(knots, list(kinds.values()))
    kind = np.array([list(kinds).index(_key(x)) for _, x in pairs])
    # an average holds of an interval what it took there, times what all later ones kept of it
    rows, kept = [], np.zeros(len(pairs))
    for k, (took, keeps) in reversed(list(enumerate(blocks))):
        kept[last == k] = 1
        rows.append(took[:, kind] * kept)
        kept *= keeps[kind]
    profiles = np.concatenate(rows)
    sizes = np.linalg.norm(profiles, axis=0)
    profiles /= sizes
    profiles, wanted = profiles[:, :-1], profiles[:, -1]
    factors = _least_squares(profiles, wanted) * sizes[-1] / sizes[:-1]
    if normalize:
        factors /= factors.sum() or 1
    made = profiles @ (factors * sizes[:-1] / sizes[-1])
    error = float(np.linalg.norm(made - wanted))
    if not error <= threshold:
        raise ValueError(
            f"target is out of reach: residual {error:.3g} is above threshold={threshold:g}. "
            "Record more snapshots or a second average; pass a target between the averages "
            "recorded, or at= the step of a snapshot."
        )
    return factors, error


def _least_squares(columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """By QR and corrected seminormal equations, which keep the digits of the smallest factors."""
    newest_first = columns[:, ::-1]
    triangle = _triangle(newest_first)
    if len(triangle) < columns.shape[1] or np.abs(triangle.diagonal()).min() < NOISE:
        return np.linalg.lstsq(columns, wanted, rcond=NOISE)[0]
    factors = np.zeros(columns.shape[1])
    for _ in range(2):
        gradient = newest_first.T @ (wanted - newest_first @ factors)
        factors += np.linalg.solve(triangle, np.linalg.solve(triangle.T, gradient))
    return factors[::-1]


def _triangle(columns: np.ndarray) -> np.ndarray:
    """The R of the QR: coordinates of the columns in a basis of as many."""
    return np.asarray(np.linalg.qr(columns, mode="r"))


def _by_functions(knots: np.ndarray, gammas: list[float]) -> Iterable[Block]:
    """Power averages as functions of time: the coordinates are a root of their Gram matrix."""
    if min(gammas) <= -0.5:
        raise ValueError(
            f"gammas or target is {min(gammas)}: the square of that profile has no integral. Pass "
            f"more than -0.5, or emaopt.power({min(gammas)}), which has a weight for each update."
        )
    powers = np.array(gammas) + 1
    for a, b in zip([0.0, *knots], knots, strict=False):
        log = math.log(a / b) if a else -math.inf
        sums = np.add.outer(powers, powers) - 1
        gram = np.multiply.outer(powers, powers) / sums * -np.expm1(sums * log) / b
        sizes = np.sqrt(gram.diagonal())
        values, vectors = np.linalg.eigh(gram / sizes / sizes[:, None])
        yield np.sqrt(values.clip(0))[:, None] * vectors.T * sizes, np.exp(powers * log)


def _by_updates(knots: np.ndarray, kinds: list[Any]) -> Iterable[Block]:
    """Any averages, with a weight for each update: the coordinates are the R of their QR."""
    knots = knots.astype(int)
    given = [x if isinstance(x, np.ndarray) else rates_of(x, knots[-1]) for x in kinds]
    for a, b in zip([-1, *knots], knots, strict=False):
        took, keeps = [], []
        for x, each in zip(kinds, given, strict=True):
            if isinstance(x, np.ndarray):
                share, keep = np.zeros(b - a), 1.0
                here = each[a + 1 : b + 1]
                share[: len(here)] = here
            elif a < 0:
                share, keep = shares(each[:b]), 0.0
            else:
                share = shares(each[a:b])
                share, keep = share[1:], share[0]
            took.append(share)
            keeps.append(keep)
        yield _triangle(np.stack(took, axis=1)), np.array(keeps)


def profile_of(average: Any, at: int) -> np.ndarray:
    """A gamma or a decay as the weights of each update; weights as they are."""
    return average if isinstance(average, np.ndarray) else shares(rates_of(average, at))


def rates_of(average: Average, t: int) -> np.ndarray:
    """What each update takes: of a decay in its own precision, of a gamma in float64."""
    if callable(average):
        return rates(average, int(t))
    with np.errstate(divide="ignore"):
        return -np.expm1((average + 1) * np.log1p(-1 / np.arange(1, t + 1)))


_UPDATES = {
    True: (lambda t: (t >= 0) & (t % 1 == 0), "whole numbers of updates, from 0"),
    False: (lambda t: (t > 0) & np.isfinite(t), "numbers of updates, above 0"),
}


def snapshots_of(steps: Any, gammas: Any) -> list[tuple[Any, Average]]:
    """The step and the average of each snapshot."""
    steps = np.ravel(steps).tolist()
    averages = list(gammas) if isinstance(gammas, Iterable) else [gammas]
    averages = [x if callable(x) else _number("gammas", x) for x in averages]
    if not steps or not averages:
        raise ValueError("steps or gammas is empty. Pass one of each at least.")
    if len(set(steps)) == len(steps) and len(set(map(_key, averages))) == len(averages):
        return [(step, x) for step in steps for x in averages]
    if len(steps) != len(averages):
        raise ValueError(
            f"steps has {len(steps)} entries and gammas {len(averages)}, with repeats. Pass each "
            "step and each average once, or both for every snapshot."
        )
    return list(zip(steps, averages, strict=True))


def _key(average: Any) -> Any:
    """What tells averages apart: the gamma, or being another object."""
    return average if isinstance(average, float) else id(average)


def _target(target: Any, at: Any, normalize: bool) -> Any:
    """A gamma, a decay, or weights that fit."""
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
    check(name, gamma, lambda g: (g > -1) & (g < math.inf), "numbers above -1, or decays")
    return float(gamma)
