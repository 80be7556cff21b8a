"""Writes posthoc.json, to 50 digits and from the closed inner products of power profiles.

pip install mpmath && python tests/golden/make_posthoc.py
"""

import json
from pathlib import Path

import mpmath as mp


mp.mp.dps = 50


def gamma(sigma_rel):
    s = mp.mpf(sigma_rel)
    roots = mp.polyroots([1, 7, 16 - s**-2, 12 - s**-2], maxsteps=500, extraprec=200)
    return max(mp.re(root) for root in roots)


def product(a, b):
    """The integral of two profiles, each (gamma + 1) t**gamma / T**(gamma + 1) up to its own T."""
    (ga, ta), (gb, tb) = a, b
    t = mp.mpf(min(ta, tb))
    common = (ga + 1) * (gb + 1) / (ga + gb + 1) * t ** (ga + gb + 1)
    return common / (mp.mpf(ta) ** (ga + 1) * mp.mpf(tb) ** (gb + 1))


def case(last, every, at, target, recorded=("0.05", "0.10")):
    averages = [(gamma(s), t) for t in range(every, last + 1, every) for s in recorded]
    wanted = (gamma(target), at)
    gram = mp.matrix([[product(a, b) for b in averages] for a in averages])
    toward = mp.matrix([product(a, wanted) for a in averages])
    square = product(wanted, wanted)

    def residual(x):
        return mp.sqrt(1 - (2 * (x.T * toward)[0] - (x.T * gram * x)[0]) / square)

    free = mp.lu_solve(gram, toward)
    normalized = free / mp.fsum(free)
    numbers = {"free": free, "normalized": normalized}
    return {
        "steps": list(range(every, last + 1, every)),
        "recorded": [float(s) for s in recorded],
        "at": at,
        "target": float(target),
        **{name: [float(x) for x in xs] for name, xs in numbers.items()},
        **{f"{name} residual": float(residual(xs)) for name, xs in numbers.items()},
    }


sigmas = ("0.001", "0.01", "0.05", "0.075", "0.1", "0.15", "0.2", "0.25", "0.28")
golden = {
    "gamma": {s: float(gamma(s)) for s in sigmas},
    "cases": [
        case(1000, 250, 1000, "0.15"),
        case(1024, 64, 1024, "0.075"),
        case(1024, 64, 1000, "0.15"),
        case(8192, 128, 8192, "0.12"),
    ],
}
Path(__file__).with_name("posthoc.json").write_text(json.dumps(golden) + "\n")
