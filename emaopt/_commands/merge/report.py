"""Print and draw what is predicted of targets."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from emaopt import posthoc
from emaopt._average.decays import gamma, sigma_rel
from emaopt._extras import require
from emaopt.merge import Plan, Run
from emaopt.posthoc._fit import profile_of

from .target import Target, part_of, spacing


GRID = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.28)
CLOSE = posthoc.THRESHOLD  # below it, a predicted error is hardly seen
MOST = 256  # checkpoints that are thought of: of more, least squares would take seconds
SHARES = (0.01, 0.03, 0.1, 0.3)  # of the updates so far: half-lives and windows


@dataclass
class Report:
    """Print lines at once, or JSON in the end."""

    as_json: bool
    about: dict[str, Any] = field(default_factory=dict)

    def tell(self, about: dict[str, Any], *lines: str) -> None:
        """Note something, and print lines about it."""
        self.about |= about
        if not self.as_json:
            print("\n".join(lines), flush=True)

    def end(self) -> None:
        """Print what is printed in the end."""
        if self.as_json:
            print(json.dumps(self.about, indent=1))


def predicted(plan: Plan) -> str:
    """Return what is known of a sum before it is made."""
    if plan.noise is None:
        return f"predicted error {plan.residual:.2g}"
    error = f", predicted error {plan.residual:.2g}" if plan.residual else ""
    return f"{len(plan.parts[0].terms)} checkpoints, {noise(plan)}{error}"


def needed(run: Run, target: Target) -> str:
    """Return how often averages would have to be saved for a small predicted error."""
    if run.is_plain:
        return (
            "Of plain parameters ask for --mean, --linear, --one-minus-sqrt, --cosine or --factors"
        )
    weights = profile_of(target.of(run), run.at)
    for times in (2, 4, 8):
        every = run.at // (times * len(run.steps))
        if every < 1 or times * len(run.steps) > MOST:
            break
        then = _saved_every(every, run).residual(weights)
        if then <= CLOSE:
            return f"With averages that are saved every {every} updates it would be {then:.2g}"
    return "More checkpoints, or a second average, would make it smaller"


def _saved_every(updates: int, run: Run) -> Run:
    """Return a run as if its averages had been saved so often. Nothing can be read from it."""
    last = [snapshot for snapshot in run.snapshots if snapshot.updates == run.at]
    steps = reversed(range(run.at, 0, -updates))
    snapshots = [snapshot._replace(updates=step) for step in steps for snapshot in last]
    return replace(run, snapshots=snapshots)


def noise(plan: Plan) -> str:
    """Return how much of the noise of one checkpoint is left in the mean of several."""
    return f"{plan.noise:.3g} of the noise of one checkpoint remains"


def list_targets(run: Run, threshold: float, report: Report) -> None:
    """Print the targets of all lengths, with what is predicted of each."""
    rows = [_row(run, target, threshold) for target in _targets(run)]
    wide = max((len(row["target"]) for row in rows), default=6)
    last = "noise that remains" if run.is_plain else "predicted error"
    lines = [f"{'target':{wide}}  {'mean age':>10}  {last}"]
    for row in rows:
        value = row["noise"] if run.is_plain else row["residual"]
        mark = note(row["residual"], threshold)
        lines.append(
            f"{row['target']:{wide}}  {row['mean_age']:>10.6g}  {value:>{len(last)}.2g}{mark}"
        )
    end = (
        "Mean age: in updates. Noise: of one checkpoint, in squares."
        if run.is_plain
        else f"Roughly: above {CLOSE:g}. Out of reach: above --threshold {threshold:g}."
    )
    report.tell({"targets": rows}, *lines, "", end)


def note(error: float, threshold: float) -> str:
    """Return what is to be said of a predicted error."""
    if error > threshold:
        return "  out of reach"
    return "  roughly" if error > CLOSE else ""


def _targets(run: Run) -> list[Target]:
    """Return targets of all lengths; windows begin at checkpoints."""
    if run.is_plain:
        count = len(run.steps)
        lengths = sorted({*(2**i for i in range(1, count.bit_length())), count} - {1})
        shapes = ("mean", "one_minus_sqrt", "cosine")
        return [Target(name, None, n) for name in shapes for n in lengths if n <= count]
    grid = spacing(run, run.at)
    windows = sorted({part_of(run, share) for share in SHARES})
    lives = sorted({max(1, round(run.at * share)) for share in SHARES})
    return [
        *(Target("sigma_rel", value) for value in GRID),
        *(Target("half_life", value) for value in lives),
        *(Target("mean", n) for n in windows),
        *(
            Target("one_minus_sqrt", n) for n in windows if n >= 4 * grid
        ),  # of two steps, it is none
    ]


def _row(run: Run, target: Target, threshold: float) -> dict[str, Any]:
    weights = profile_of(target.of(run), run.at)
    plan = run.plan(weights, np.inf)
    return {
        "target": target.text,
        "mean_age": float(weights @ np.arange(run.at, -1, -1)),
        "residual": plan.residual,
        "noise": plan.noise,
        "within": plan.residual <= threshold,
    }


def draw(run: Run, threshold: float, file: Path) -> None:
    """Draw the predicted error over sigma_rel, and where the recorded averages are."""
    pictures = require("matplotlib.figure", "posthoc")

    longest = sigma_rel(0)
    lengths = np.geomspace(0.005, longest, 60)
    errors = [run.residual(profile_of(gamma(s), run.at)) for s in lengths]
    figure = pictures.Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.loglog(lengths, np.maximum(errors, 1e-6), lw=2)
    axes.axhline(threshold, color="0.5", ls="--", lw=1)
    axes.annotate("threshold", (lengths[0], threshold), (0, 3), textcoords="offset points")
    for name, source in run.sources.items():
        if isinstance(source.decay, float) and source.decay >= 0:
            at = sigma_rel(source.decay), 0.98
            axes.axvline(at[0], color="0.8", lw=1, zorder=0)
            across = {"rotation": 90, "ha": "right", "va": "top", "color": "0.4"}
            axes.text(*at, name, transform=axes.get_xaxis_transform(), **across)
    ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, longest]
    axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="sigma_rel of the target", ylabel="predicted relative error")
    axes.set_title(f"{len(run.steps)} checkpoints, up to update {run.at}", fontsize="medium")
    figure.savefig(file)
