"""Run `emaopt merge`: print and draw what it found."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from emaopt._average.decays import gamma, half_life, sigma_rel
from emaopt._extras import require
from emaopt.merge import Run
from emaopt.merge._ledgers import parse
from emaopt.posthoc import one_minus_sqrt, window
from emaopt.posthoc._fit import profile_of

from .paths import absolute


# the options that say what is wanted, and the weights that they stand for
TARGETS: dict[str, Callable[[Run, Any], Any]] = {
    "sigma_rel": lambda run, value: gamma(value),
    "gamma": lambda run, value: value,
    "half_life": lambda run, value: half_life(value),
    "window": lambda run, n: window(n, run.at),
    "linear": lambda run, n: window(n, run.at),
    "one_minus_sqrt": lambda run, n: one_minus_sqrt(n, run.at, _spacing(run, n)),
}
GRID = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.28)
SHARES = (0.01, 0.03, 0.1, 0.3)  # of the updates so far: half-lives and windows


def command(
    run: str,
    destination: str | None,
    at: int | None,
    source: list[str],
    threshold: float,
    plot: Path | None,
    as_json: bool,
    **targets: float | None,
) -> None:
    """Write the average that is wanted; if none is, print which ones are within reach."""
    wanted = {name: value for name, value in targets.items() if value is not None}
    if bool(wanted) != bool(destination):
        raise ValueError(
            "OUT is missing" if wanted else "a target is missing, such as --sigma-rel 0.15"
        )
    if destination and absolute(destination).exists():
        raise FileExistsError(f"{destination} exists. Pass another OUT")
    given = dict(_named(text) for text in source)
    recorded = Run.open(absolute(run), at, given)
    if plot:
        _draw(recorded, threshold, plot)
    about = {
        "run": str(absolute(run)),
        "at": recorded.at,
        "checkpoints": len(recorded.steps),
        "averages": {recorded.names[n]: source.text for n, source in recorded.sources.items()},
        "threshold": threshold,
    }
    if not wanted:
        rows = [row for option in _options(recorded) if (row := _row(recorded, *option))]
        about["targets"] = [{**row, "within": row["residual"] <= threshold} for row in rows]
    else:
        ((name, value),) = wanted.items()
        option = f"{_flag(name)} {value:g}"
        target = profile_of(TARGETS[name](recorded, value), recorded.at)
        residual = recorded.write(absolute(str(destination)), target, threshold, option)
        about |= {"target": option, "residual": residual, "destination": destination}
        about["others"] = ["/".join(leaf) for leaf in recorded.others()]
    print(json.dumps(about, indent=1) if as_json else "\n".join(_text(about)))


def _named(text: str) -> tuple[str, Any]:
    name, separator, decay = text.partition("=")
    if not (name and separator):
        raise ValueError(f"--source {text!r} has no name. Pass NAME=DECAY, as in fast=gamma:6.94")
    return name, parse(decay)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _spacing(run: Run, n: int) -> int:
    """Return the widest grid over the last n updates that has a line at every checkpoint."""
    return math.gcd(n, *(run.at - step for step in run.steps if step > run.at - n))


def _options(run: Run) -> list[tuple[str, float]]:
    """Return targets of all lengths. Windows begin at checkpoints."""
    grid = _spacing(run, run.at)
    windows = sorted({max(1, round(run.at * share / grid)) * grid for share in SHARES})
    lives = sorted({max(1, round(run.at * share)) for share in SHARES})
    return [
        *(("sigma_rel", value) for value in GRID),
        *(("half_life", value) for value in lives),
        *(("window", n) for n in windows),
        *(("one_minus_sqrt", n) for n in windows if n >= 4 * grid),  # of two steps, it is none
    ]


def _row(run: Run, name: str, value: float) -> dict[str, Any]:
    weights = profile_of(TARGETS[name](run, value), run.at)
    return {
        "target": f"{_flag(name)} {value:g}",
        "mean_age": float(weights @ np.arange(run.at, -1, -1)),
        "residual": run.residual(weights),
    }


def _text(about: dict[str, Any]) -> list[str]:
    averages = about["averages"]
    width = max(map(len, averages))
    lines = [
        f"{about['checkpoints']} checkpoints, up to update {about['at']}, with the averages",
        *(f"  {name:{width}}  {text}" for name, text in averages.items()),
        "",
    ]
    if "targets" in about:
        wide = max(len(row["target"]) for row in about["targets"])
        lines.append(f"{'target':{wide}}  {'mean age':>10}  predicted error")
        for row in about["targets"]:
            note = "" if row["within"] else "  out of reach"
            numbers = f"{row['mean_age']:>10.6g}  {row['residual']:>15.2g}"
            lines.append(f"{row['target']:{wide}}  {numbers}{note}")
        lines += ["", f"Out of reach is what is above --threshold {about['threshold']:g}."]
        return lines
    lines.append(
        f"{about['destination']}: {about['target']} after {about['at']} updates, predicted error "
        f"{about['residual']:.2g}"
    )
    if others := about["others"]:
        named = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        lines.append(f"As in the newest checkpoint, being no averages: {named}")
    return lines


def _draw(run: Run, threshold: float, file: Path) -> None:
    """Draw the predicted error over sigma_rel, and mark the recorded averages."""
    pictures = require("matplotlib.figure", "posthoc")

    longest = sigma_rel(0)
    lengths = np.geomspace(0.005, longest, 60)
    errors = [run.residual(profile_of(gamma(s), run.at)) for s in lengths]
    figure = pictures.Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.loglog(lengths, np.maximum(errors, 1e-6), lw=2)
    axes.axhline(threshold, color="0.5", ls="--", lw=1)
    axes.annotate("threshold", (lengths[0], threshold), (0, 3), textcoords="offset points")
    for node, source in run.sources.items():
        if isinstance(source.decay, float) and source.decay >= 0:
            at = sigma_rel(source.decay), 0.98
            axes.axvline(at[0], color="0.8", lw=1, zorder=0)
            across = {"rotation": 90, "ha": "right", "va": "top", "color": "0.4"}
            axes.text(*at, run.names[node], transform=axes.get_xaxis_transform(), **across)
    ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, longest]
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="sigma_rel of the target", ylabel="predicted relative error")
    axes.set_title(f"{len(run.steps)} checkpoints, up to update {run.at}", fontsize="medium")
    figure.savefig(file)
