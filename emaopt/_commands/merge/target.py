"""Turn the options of `emaopt merge` into a target."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from emaopt._average.decays import gamma, half_life
from emaopt._tree.paths import few
from emaopt.merge import Run
from emaopt.posthoc import anneal, window


# of a learning rate, by the share of its decay that is over
SHAPES: dict[str, Callable[[Any], Any]] = {
    "mean": lambda x: 1 - x,
    "linear": lambda x: 1 - x,
    "one_minus_sqrt": lambda x: 1 - np.sqrt(x),
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}
DECAYS: dict[str, Callable[[float], Any]] = {
    "sigma_rel": gamma,
    "gamma": float,
    "half_life": half_life,
}


@dataclass(frozen=True)
class Target:
    """Hold the target that the command line asks for.

    `name` and `value`: a decay or a shape, and its number; of a shape that is the number of the
    last updates (int), or their share of all so far (float). `last`, `every`: which checkpoints.
    """

    name: str
    value: Any = None
    last: int | None = None
    every: int | None = None

    @property
    def text(self) -> str:
        """Return the options of the command line."""
        more = [(n, x) for n, x in (("last", self.last), ("every", self.every)) if x is not None]
        return " ".join([f"{_flag(self.name)}{_number(self)}", *(f"--{n} {x}" for n, x in more)])

    def of(self, run: Run) -> Any:
        """Return the target as `Run.plan` takes it."""
        if self.name in DECAYS:
            return DECAYS[self.name](self.value)
        if run.is_plain:
            steps = self.steps(run)
            factors = self.value if self.name == "factors" else SHAPES[self.name]
            return anneal(factors, run.at, on=steps)
        if self.name == "factors":
            return anneal(self.value, run.at, self.every or spacing(run, run.at))
        n = self.updates(run)
        if self.name in ("mean", "linear"):
            return window(n, run.at)
        every = self.every or spacing(run, n)
        return anneal(SHAPES[self.name](np.arange(0, n, every) / n), run.at, every)

    def steps(self, run: Run) -> list[int]:
        """Return the plain checkpoints that are added up."""
        chosen = self._chosen(run)
        last = len(self.value) + 1 if self.name == "factors" else self.last
        if len(chosen) < max(2, last or 0):
            raise ValueError(
                f"{self.text} needs {max(2, last or 0)} checkpoints, and there are {len(chosen)}, "
                f"at the steps {few(map(str, chosen))}. Pass a larger number, or fewer factors"
            )
        return chosen[-last:] if last else chosen

    def _chosen(self, run: Run) -> list[int]:
        """Return the plain checkpoints that are far enough apart, and in the window."""
        chosen: list[int] = []
        for step in reversed(run.steps):
            if not chosen or chosen[0] - step >= (self.every or 1):
                chosen.insert(0, step)
        if self.name == "factors" or self.value is None:
            return chosen
        return [step for step in chosen if step > run.at - self.updates(run)]

    def updates(self, run: Run) -> int:
        """Return how many of the last updates a decay takes."""
        if isinstance(self.value, float):
            return part_of(run, self.value)
        if self.value is not None:
            return self.value
        before = run.steps[: -self.last] if self.last else []
        return run.at - (before[-1] if before else 0)

    def fits(self, run: Run) -> bool:
        """Tell whether there are checkpoints for the whole of it."""
        if self.name == "factors" or self.last:
            return len(run.steps) >= (self.last or len(self.value) + 1)
        if isinstance(self.value, float):
            return not run.is_plain or len(self._chosen(run)) > 1
        gaps = np.diff(run.steps)
        first = run.steps[0] - (min(gaps) if len(gaps) else 0) if run.is_plain else 0
        return self.value is None or run.at - self.value >= first


def target_of(
    window: float | None, last: int | None, every: int | None, **given: Any
) -> Target | None:
    """Return what the options mean, `None` if nothing is wanted."""
    wanted = {name: value for name, value in given.items() if value is not None}
    if not wanted:
        return Target("mean", window, last, every) if window or last or every else None
    ((name, value),) = wanted.items()
    if name in DECAYS or name == "factors":
        if window or last:
            raise ValueError(
                f"{_flag(name)} says itself how long it is. Leave out --window, --last"
            )
        return Target(name, value, None, every)
    target = Target(name, window if value == "all" else value, last, every)
    if window and value != "all":
        raise ValueError(f"{target.text} is a window already. Leave out --window")
    return target


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _number(target: Target) -> str:
    """Return the number of a target as the command line has it, after a space."""
    value = target.value
    if value is None:
        return ""
    if isinstance(value, list):
        return " " + ",".join(f"{x:g}" for x in value)
    is_share = isinstance(value, float) and target.name in SHAPES
    return f" {100 * value:g}%" if is_share else f" {value:g}"


def part_of(run: Run, share: float) -> int:
    """Return a share of the updates so far, as a number of whole stretches between checkpoints."""
    grid = spacing(run, run.at)
    return max(1, round(run.at * share / grid)) * grid


def spacing(run: Run, n: int) -> int:
    """Return the widest grid over the last n updates that has a line at every checkpoint."""
    return math.gcd(n, *(run.at - step for step in run.steps if step > run.at - n))
