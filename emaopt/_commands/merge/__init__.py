"""Run `emaopt merge`: find what is within reach, print it, and write what is asked for."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from emaopt._commands.paths import absolute, check_new, load_tensorflow, say
from emaopt._extras import require
from emaopt._tree.paths import few
from emaopt.checkpoint._run import finished_steps
from emaopt.checkpoint._stored import Stored
from emaopt.merge import Plan, Run, soup
from emaopt.merge._find import TF1, checkpoints, newest
from emaopt.merge._ledgers import parse

from .report import CLOSE, Report, draw, list_targets, needed, noise, note, predicted
from .target import DECAYS, Target, target_of


_MMAP_THRESHOLD = -3  # glibc's number of what `mallopt` sets
tqdm = require("tqdm", "posthoc").tqdm  # at once: not when everything is added up


def command(
    paths: list[str],
    at: int | None,
    source: list[str],
    params: str | None,
    weights: list[float] | None,
    threshold: float,
    curve: bool,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge checkpoints; without a target, print what is within reach.

    Args:
        paths: One run, or several; then where the result goes, if there is a target.
        at: The step of the newest checkpoint that is used.
        source: What averages were, as `NAME=DECAY`.
        params: Where the plain parameters lie.
        weights: Of several runs.
        threshold: The largest predicted error.
        curve: Whether to merge at every checkpoint.
        plot: Where to draw the predicted errors.
        as_json: Whether to print JSON.
        options: The target, and which checkpoints: `Target`.
    """
    _give_back_memory()
    target = target_of(**options)
    report = Report(as_json)
    if len(paths) > 2 or weights is not None:
        _soup(paths, at, params, weights, target, report)
        return
    destination = absolute(paths[1]) if len(paths) == 2 else None
    if not curve:
        if (target is not None) != (destination is not None):
            raise ValueError(
                "OUT is missing" if target else "a target is missing, such as --mean --last 8"
            )
        if destination:
            check_new(destination)
    elif target is None or target.name in DECAYS:
        raise ValueError("--curve needs a window that slides, such as --mean --last 8")
    where = absolute(paths[0])
    found = checkpoints(where)
    if found.steps and found.format == TF1:
        load_tensorflow()
    run = Run.open(where, at, dict(_named(text) for text in source), params)
    for line in run.left_out:
        say(line)
    if plot:
        draw(run, threshold, plot)
    if target is None:
        _introduce(run, threshold, report)
        list_targets(run, threshold, report)
    elif curve:
        _curve(run, target, threshold, destination, report)
    else:
        _one(run, target, threshold, destination, report)
    report.end()


def _one(run: Run, target: Target, threshold: float, destination: Any, report: Report) -> None:
    """Merge at the newest checkpoint, if the target is within reach."""
    plan = run.plan(target.of(run), np.inf, target.text)
    advice = needed(run, target) if plan.residual > min(CLOSE, threshold) else ""
    if plan.residual > threshold:
        raise ValueError(
            f"{target.text} is out of reach: its predicted error {plan.residual:.2g} is above "
            f"--threshold {threshold:g}. {advice}"
        )
    _introduce(run, threshold, report)
    about = {"target": target.text, "residual": plan.residual, "noise": plan.noise}
    lines = [f"The sum comes near the target, and is not the same. {advice}."] if advice else []
    report.tell(about, f"{target.text}: {predicted(plan)}", *lines)
    _merge(plan, destination, report)


def _give_back_memory() -> None:
    """Let the C library give back at once what is freed, where that can be said.

    Otherwise glibc keeps some of what each thread of TensorStore has freed: more than 100 MB.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


def _soup(
    paths: list[str],
    at: int | None,
    params: str | None,
    weights: list[float] | None,
    target: Target | None,
    report: Report,
) -> None:
    """Merge checkpoints of several runs."""
    if target is not None:
        raise ValueError(
            f"{target.text} is for the checkpoints of one run, and several are given. Pass "
            "--weights, or leave it out for equal ones"
        )
    if len(paths) < 3:
        raise ValueError("--weights is for several runs. Pass RUN RUN OUT")
    *runs, out = map(absolute, paths)
    check_new(out)
    if any(newest(run, at)[0] == TF1 for run in runs):
        load_tensorflow()
    plan = soup(runs, weights, at, params)
    terms = [term for part in plan.parts for term in part.terms]
    about = {"runs": [str(term.tree.path) for term in terms], "noise": plan.noise}
    about |= {"weights": [term.factor for term in terms]}
    lines = [f"  {term.factor:<8.4g}  {term.tree.path}" for term in terms]
    report.tell(about, f"{len(terms)} checkpoints", *lines, "", noise(plan))
    _merge(plan, out, report)
    report.end()


def _introduce(run: Run, threshold: float, report: Report) -> None:
    """Print what there is."""
    about = {"run": str(run.path.parent), "at": run.at, "checkpoints": len(run.steps)}
    if run.is_plain:
        report.tell(
            about | {"plain": True, "threshold": threshold},
            f"{len(run.steps)} checkpoints of plain parameters, at the steps "
            f"{run.steps[0]} to {run.at}",
            "",
        )
        return
    averages = {name: source.text for name, source in run.sources.items()}
    width = max(map(len, averages))
    report.tell(
        about | {"averages": averages, "threshold": threshold},
        f"{len(run.steps)} checkpoints, up to update {run.at}, with the averages",
        *(f"  {name:{width}}  {text}" for name, text in averages.items()),
        "",
    )


def _merge(plan: Plan, destination: Any, report: Report) -> None:
    """Write what is planned, and say what was copied."""
    with _bar(plan.nbytes) as progress:
        plan.write(destination, progress)
    others = ["/".join(name) for name in plan.others]
    lines = [f"{destination}: written"]
    if others:
        lines.append(f"As in {plan.base.path}, being no averages: {few(others)}")
    report.tell({"destination": str(destination), "others": others}, *lines)


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], Any]]:
    """Show how far the work is, on a terminal, if it takes more than 2 seconds."""
    with tqdm(
        total=total, desc="adding up", unit="B", unit_scale=True, delay=2, disable=None
    ) as bar:
        yield bar.update


def _curve(run: Run, target: Target, threshold: float, destination: Any, report: Report) -> None:
    """Merge at every checkpoint that has the whole window before it."""
    if not any(target.fits(run.until(step)) for step in run.steps):
        raise ValueError(
            f"{target.text} is longer than the run, or shorter than from one checkpoint to the "
            f"next; they are at the steps {few(map(str, run.steps))}. Pass another window"
        )
    _introduce(run, threshold, report)
    rows = []
    there = finished_steps(destination) if destination else {}
    for step in run.steps:
        then = run.until(step)
        if not target.fits(then):
            continue
        plan = then.plan(target.of(then), np.inf, target.text)
        row = {"at": step, "residual": plan.residual, "noise": plan.noise}
        rows.append(row | {"within": plan.residual <= threshold})
        report.tell({}, f"{step:>10}  {predicted(plan)}{note(plan.residual, threshold)}")
        if not destination or not rows[-1]["within"]:
            continue
        if step in there:
            _check_written(there[step], plan)
            continue
        check_new(destination / str(step))
        with _bar(plan.nbytes) as progress:
            plan.write(destination / str(step), progress)
    end = [f"{destination}: written, a checkpoint for each step"] if destination else []
    report.tell(
        {
            "target": target.text,
            "curve": rows,
            "destination": str(destination) if destination else None,
        },
        *end,
    )


def _check_written(path: Any, plan: Plan) -> None:
    """Raise unless a checkpoint is what an interrupted command of the same kind wrote."""
    if Stored(path).custom_metadata.get("merged") != plan.about["merged"]:
        raise FileExistsError(f"{path} exists, and is another one. Pass another OUT")


def _named(text: str) -> tuple[str, Any]:
    name, separator, decay = text.partition("=")
    if not (name and separator):
        raise ValueError(f"--source {text!r} has no name. Pass NAME=DECAY, as in fast=gamma:6.94")
    return name, parse(decay)
