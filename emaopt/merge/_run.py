"""Open the checkpoints of a run, and find the factors with which they add up to what is wanted."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from etils.epath import Path

from emaopt._average.decay import as_decay
from emaopt._tree.numbers import is_inexact
from emaopt._tree.paths import KeyPath
from emaopt.checkpoint._run import pick
from emaopt.checkpoint._stored import Stored
from emaopt.posthoc._fit import Source, fit, profile_of

from ._averages import Recorded, averages_in, recognized, short_names, told
from ._find import ORBAX, StoredTree, check_same, checkpoints, is_checkpoint, newest, plain_tree
from ._ledgers import NamedSource
from ._orbax import OrbaxTree
from ._plan import Plan
from ._sum import Part, Term


# up to here a merge has nearly the loss of its target (docs/averaging.md); above it, the sum is
# another average than the one that was asked for
THRESHOLD = 0.5
NEGLIGIBLE = 1e-9  # a factor beside the largest one: less than float32 resolves
PLAIN = "parameters"  # what the plain parameters are called among the sources


class Snapshot(NamedTuple):
    """Hold an average, or the plain parameters, in one checkpoint.

    `updates`: how many had been made. `source`: what it is called.
    """

    tree: StoredTree
    updates: int
    source: str


@dataclass(frozen=True)
class Run:
    """Read the checkpoints of a run.

    Attributes:
        path: The newest checkpoint.
        base: The same: the structure, the dtypes and all that is not averaged come from there.
        sources: What the averages were that are used, by name. Plain parameters are the average of
            decay 0, `parameters`.
        snapshots: Every one of them in every checkpoint.
        left_out: A line for each average that is not used, because nothing says what it was.
    """

    path: Path
    base: StoredTree
    sources: dict[str, NamedSource]
    snapshots: list[Snapshot]
    left_out: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """Return after how many updates there are checkpoints."""
        return sorted({snapshot.updates for snapshot in self.snapshots})

    @property
    def at(self) -> int:
        """Return the updates of the newest checkpoint."""
        return self.snapshots[-1].updates

    @property
    def is_plain(self) -> bool:
        """Tell whether plain parameters are added up, and no averages."""
        return list(self.sources) == [PLAIN]

    @classmethod
    def open(
        cls,
        run: Any,
        at: int | None = None,
        sources: dict[str, Source | NamedSource] | None = None,
        params: str | None = None,
    ) -> "Run":
        """Find what can be added up in the checkpoints of a run. No parameter is read.

        These are the averages, if the ledger of one says what it was, or if you do with `sources`.
        Otherwise they are the plain parameters: of any run of Orbax, whatever library saved it, of
        `.safetensors` files, or of TF1.

        Args:
            run: The directory of the run, absolute.
            at: The step of the last checkpoint that is used; by default the newest.
            sources: The averages to use, by name, and what each was: a decay, or a gamma. By
                default all are used whose ledgers say what they were (`ema(..., ledger=True)`).
            params: Use the plain parameters although there are averages. The text says where they
                lie in each checkpoint, such as `params` or `state/params`.

        Raises:
            ValueError: The parameters are nowhere, or in several places; or the checkpoints are of
                different trees.
            FileNotFoundError: There is no such checkpoint.
        """
        found = checkpoints(Path(run))
        if not found.steps and is_checkpoint(Path(run)):
            raise ValueError(
                f"{run} is one checkpoint. Pass the run that it is of, or several checkpoints"
            )
        path = pick(found.steps, at, run)
        steps = {s: found.steps[s] for s in sorted(found.steps) if at is None or s <= at}
        left_out: list[str] = []
        if found.format == ORBAX and params is None:
            stored = [Stored(each) for each in steps.values()]
            snapshots, named, left_out = _averages(stored, sources or {})
            if snapshots:
                return cls(path, _base(stored[-1]), named, snapshots, left_out)
        elif sources:
            raise ValueError(
                f"sources={list(sources)} are averages, and plain parameters are asked for, or "
                f"{path} holds no averages. Leave one out"
            )
        trees = {s: plain_tree(found.format, each, params) for s, each in steps.items()}
        check_same(trees.values())
        plain = [Snapshot(tree, step, PLAIN) for step, tree in trees.items()]
        decay = NamedSource("as they are", as_decay(0.0))
        return cls(path, plain[-1].tree, {PLAIN: decay}, plain, left_out)

    def until(self, updates: int) -> "Run":
        """Return the run as it was after so many updates."""
        kept = [snapshot for snapshot in self.snapshots if snapshot.updates <= updates]
        tree = kept[-1].tree
        base = _base(tree.stored) if isinstance(tree, OrbaxTree) and not self.is_plain else tree
        return dataclasses.replace(self, snapshots=kept, base=base, path=base.path)

    def residual(self, target: Source | np.ndarray) -> float:
        """Return the predicted error, see `emaopt.posthoc.residual`: that of the worst leaf."""
        return self.plan(target, np.inf).residual

    def plan(
        self, target: Source | np.ndarray, threshold: float = THRESHOLD, note: str = ""
    ) -> Plan:
        """Find the factors of a target. No parameter is read.

        Args:
            target: A gamma, a decay, or the weights of the initial parameters and of each update,
                [at + 1], such as `posthoc.anneal(..., at=run.at, on=run.steps)`.
            threshold: The largest predicted error. What is above `posthoc.THRESHOLD`, 0.15, is near
                the target and not the same; see `Plan.residual`.
            note: What the metadata of the new checkpoint says of the target.

        Returns:
            What will be added up. `Plan.write` does it.

        Raises:
            ValueError: The predicted error is above the threshold, or a leaf is in no source.
        """
        wanted = target if self.is_plain else profile_of(target, self.at)
        parts, errors, noise = [], [0.0], None
        for held, leaves in self._groups().items():
            snapshots = [self.snapshots[i] for i in held]
            factors, error = self._fit(snapshots, wanted, threshold)
            errors.append(error)
            pairs = zip(snapshots, factors.tolist(), strict=True)
            parts.append(Part(leaves, [Term(s.tree, factor) for s, factor in pairs if factor]))
            noise = float(factors @ factors) if self.is_plain else None
        about = {"target": note, "updates": self.at, "residual": max(errors), "noise": noise}
        return Plan(self.base, parts, max(errors), noise, {"merged": about})

    def _fit(
        self, snapshots: list[Snapshot], wanted: Any, threshold: float
    ) -> tuple[np.ndarray, float]:
        """Return the factor of each snapshot, and the predicted error."""
        steps = [snapshot.updates for snapshot in snapshots]
        if self.is_plain and isinstance(wanted, np.ndarray) and _stands_on(wanted, steps, self.at):
            return wanted[steps], 0.0
        pairs = [(s.updates, self.sources[s.source].decay) for s in snapshots]
        factors, error = fit(pairs, self.at, wanted, threshold=threshold)
        factors[np.abs(factors) < NEGLIGIBLE * np.abs(factors).max()] = 0
        return factors, error

    def _groups(self) -> dict[tuple[int, ...], list[KeyPath]]:
        """Return the leaves that are summed, by the snapshots that hold them."""
        newest_ = [s for s in self.snapshots if s.updates == self.at]
        averaged = {
            name
            for snapshot in newest_
            for name, leaf in snapshot.tree.leaves.items()
            if hasattr(leaf, "dtype") and is_inexact(leaf)
        }
        groups: dict[tuple[int, ...], list[KeyPath]] = {}
        for name in sorted(averaged):
            held = tuple(i for i, s in enumerate(self.snapshots) if name in s.tree.leaves)
            groups.setdefault(held, []).append(name)
        return groups


def _stands_on(weights: np.ndarray, steps: list[int], at: int) -> bool:
    """Tell whether only the checkpoints have a weight, so that these are the factors."""
    fits = weights.shape == (at + 1,)
    return fits and np.count_nonzero(weights) == np.count_nonzero(weights[steps])


def soup(
    checkpoints: Sequence[Any],
    weights: Sequence[float] | None = None,
    at: int | None = None,
    params: str | None = None,
) -> Plan:
    """Return the sum of checkpoints of several runs: a model soup. No parameter is read.

    It takes the plain parameters of each checkpoint. Of one that `emaopt.checkpoint` saved it takes
    the item `params`, which holds the averages. Wortsman et al., arXiv:2203.05482.

    Args:
        checkpoints: Paths, absolute, of checkpoints of Orbax or TF1, or of `.safetensors` files; a
            run means its newest checkpoint.
        weights: The factor of each, whose sum is 1; by default all are equal.
        at: Of runs, the step.
        params: Where the parameters lie in each checkpoint, such as `params`. Of one that
            `emaopt.checkpoint` saved, these are the plain ones.

    Raises:
        ValueError: The weights do not fit, or the checkpoints are of different trees.
        FileNotFoundError: There is no such checkpoint.

    Example:
        >>> soup(["/runs/1", "/runs/2"]).write("/soup")  # doctest: +SKIP
    """
    count = len(checkpoints)
    factors = [1 / count] * count if weights is None else [float(weight) for weight in weights]
    total = sum(factors)
    if len(factors) != count or not abs(total - 1) < 1e-6:
        raise ValueError(
            f"weights={factors} are {len(factors)} numbers with the sum {total:g}, for {count} "
            "checkpoints. Pass a weight for each, with the sum 1"
        )
    opened = [_served(*newest(Path(each), at), params) for each in checkpoints]
    trees, base = [tree for tree, _ in opened], opened[-1][1]
    check_same(trees)
    leaves = [n for n, leaf in base.leaves.items() if hasattr(leaf, "dtype") and is_inexact(leaf)]
    terms = [Term(tree, factor) for tree, factor in zip(trees, factors, strict=True) if factor]
    noise = float(np.square(factors).sum())
    about = {"runs": [str(each) for each in checkpoints], "weights": factors}
    return Plan(base, [Part(leaves, terms)], 0.0, noise, {"merged": about})


def _served(format_: str, path: Path, params: str | None) -> tuple[StoredTree, StoredTree]:
    """Open what a checkpoint is evaluated with, and the parameters that it is to be like."""
    if format_ == ORBAX and params is None:
        stored = Stored(path)
        if stored.contents.averages:
            base = _base(stored)
            return OrbaxTree(stored, base.tree, stored.contents.places(base.leaves, None)), base
    tree = plain_tree(format_, path, params)
    return tree, tree


def _base(stored: Stored) -> OrbaxTree:
    """Open the parameters of a checkpoint with averages, as the last step left them."""
    paths = stored.contents.params or stored.contents.evaluated
    return OrbaxTree.plain(stored, stored.params_like(), paths)


def _averages(
    stored: list[Stored], given: dict[str, Source | NamedSource]
) -> tuple[list[Snapshot], dict[str, NamedSource], list[str]]:
    """Return the averages of a run that are used, what they were, and lines about the others.

    Raises:
        ValueError: Averages in one checkpoint count different updates, or a leaf is in none.
    """
    by_checkpoint = [averages_in(each) for each in stored]
    recorded = [average for each in by_checkpoint for average in each]
    names = short_names(dict.fromkeys(average.node for average in recorded))
    sources, left_out = (told(names, given), []) if given else recognized(recorded, names)
    snapshots: list[Snapshot] = []
    for each in by_checkpoint:
        here = [average for average in each if average.node in sources]
        if len({average.updates for average in here}) > 1:
            counts = ", ".join(f"{names[a.node]} {a.updates}" for a in here)
            raise ValueError(
                f"the averages in {here[0].tree.path} count different updates: {counts}. "
                "Pass a source for those that go together"
            )
        snapshots += [Snapshot(a.tree, a.updates, names[a.node]) for a in here]
    if snapshots:
        _check_held(stored[-1], by_checkpoint[-1], set(sources))
    return snapshots, {names[node]: source for node, source in sources.items()}, left_out


def _check_held(newest_: Stored, recorded: list[Recorded], used: set[KeyPath]) -> None:
    """Raise unless each leaf that is averaged is so by a source, and is a parameter."""
    averaged = {name for average in recorded for name in average.tree.leaves}
    held = {name for a in recorded if a.node in used for name in a.tree.leaves}
    if lost := averaged - newest_.contents.evaluated.keys():
        raise ValueError(f"{newest_.path} has no parameters for the averages of {_all(lost)}")
    if nowhere := averaged - held:
        raise ValueError(f"no source is an average of {_all(nowhere)}. Pass one that is")


def _all(leaves: Iterable[KeyPath]) -> str:
    return ", ".join(sorted("/".join(leaf) for leaf in leaves))
