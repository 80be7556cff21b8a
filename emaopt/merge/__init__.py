"""Merge the checkpoints of a run into another average, after training::

    run = Run.open("/run")                                # what the averages are, their ledgers say
    run.write("/out", target=posthoc.gamma(0.15))

Everything but the averages (leaves of `params` that have none, integers) is the newest
checkpoint's.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from etils.epath import Path
from orbax.checkpoint import v1 as ocp

from emaopt._tree.checks import check_unique, did_you_mean
from emaopt._tree.numbers import is_inexact
from emaopt._tree.paths import KeyPath, called, key_paths
from emaopt.checkpoint._items import inventory, with_digests
from emaopt.checkpoint._leaf import parts
from emaopt.checkpoint._place import Place
from emaopt.checkpoint._run import finished_steps, pick
from emaopt.checkpoint._stored import Stored
from emaopt.checkpoint._trees import logical
from emaopt.posthoc import THRESHOLD
from emaopt.posthoc._fit import Source, fit, profile_of
from emaopt.posthoc._sum import Sum

from ._ledgers import Moments, NamedSource, recognize


try:
    from tqdm import tqdm
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        'emaopt.merge needs tqdm: pip install "emaopt[posthoc]"', name="tqdm"
    ) from None


BYTES_AT_ONCE = 2**25  # of a snapshot, read
NEGLIGIBLE = 1e-9  # a factor beside the largest one: less than float32 resolves


@dataclass(frozen=True)
class Run:
    """Read the averages in the checkpoints of a run.

    Attributes:
        path: The newest checkpoint.
        newest: The same, as it is stored.
        sources: What each average was, by the path of its node.
        names: What to call each average, by the path of its node.
        snapshots: Every average in every checkpoint.
        steps: The updates of the checkpoints.
        at: The updates of the newest one.
        groups: The leaves that are averaged, by the snapshots that hold them.
    """

    path: Path
    newest: Stored
    sources: dict[KeyPath, NamedSource]
    names: dict[KeyPath, str]
    snapshots: list["_Snapshot"]
    steps: list[int]
    at: int
    groups: dict[tuple[int, ...], list[KeyPath]]

    @classmethod
    def open(
        cls,
        run: Any,
        at: int | None = None,
        sources: dict[str, Source | NamedSource] | None = None,
    ) -> "Run":
        """Find the averages in the checkpoints of a run. No parameter is read.

        Args:
            run: The directory of the run.
            at: The step of the last checkpoint that is used; by default the newest.
            sources: The averages to use, by name, and what each was: a decay, or a gamma. By
                default all are used, and their ledgers say what they were
                (`ema(..., ledger=True)`).

        Raises:
            ValueError: There is no average, or nothing says what it was.
            FileNotFoundError: There is no such checkpoint.
        """
        found = finished_steps(Path(run))
        path = pick(found, at, run)
        steps = sorted(step for step in found if at is None or step <= at)
        stored = {step: Stored(found[step]) for step in steps}
        everything = {step: list(_snapshots(stored[step])) for step in steps}
        newest = stored[steps[-1]]
        used = _sources([s for each in everything.values() for s in each], sources)
        names = _names(used)
        snapshots: list[_Snapshot] = []
        for each in everything.values():
            here = [s for s in each if s.node in used]
            if len({s.updates for s in here}) > 1:
                counts = ", ".join(f"{names[s.node]} {s.updates}" for s in here)
                raise ValueError(
                    f"the averages in {here[0].stored.path} count different updates: {counts}. "
                    "Pass a source for those that go together"
                )
            snapshots += here
        averaged = {leaf for s in everything[steps[-1]] for leaf in s.places}
        groups = _groups(newest, averaged, snapshots)
        updates = sorted({s.updates for s in snapshots})
        return cls(path, newest, used, names, snapshots, updates, snapshots[-1].updates, groups)

    def residual(self, target: Source | np.ndarray) -> float:
        """Return the predicted error of the worst leaf, see `emaopt.posthoc.residual`."""
        return max(error for _, error in self._fits(target, np.inf).values())

    def write(
        self,
        destination: Any,
        target: Source | np.ndarray,
        threshold: float = THRESHOLD,
        note: str = "",
    ) -> float:
        """Write a checkpoint of Orbax with the item `params`: the target's average. The residual.

        With digests, as `emaopt.checkpoint.export_averages` writes it. In memory are the parameters
        once, and at a time 32 MB of a snapshot, or its largest leaf, and their sum in float64.
        """
        destination = Path(destination)
        if destination.exists():
            raise FileExistsError(f"{destination} exists. Remove it or pass another path")
        fits = self._fits(target, threshold)
        residual = max(error for _, error in fits.values())
        like = self.newest.params_like()
        names = [logical(path) for path in key_paths(like)]
        wanted = dict(zip(names, jax.tree.leaves(like), strict=True))
        in_params = self.newest.contents.evaluated
        others = {in_params[name]: name for name in self.others()}
        values = {others[at]: x for at, x in self.newest.read(others).items()}
        check_unique(["/".join(name) for name in names], wanted.values())
        total = sum(
            wanted[leaf].nbytes * np.count_nonzero(factors)
            for held, (factors, _) in fits.items()
            for leaf in self.groups[held]
        )
        # on a terminal only, if it takes more than 2 seconds
        with tqdm(
            total=total, desc="adding up", unit="B", unit_scale=True, delay=2, disable=None
        ) as bar:
            for held, (factors, _) in fits.items():
                snapshots = [self.snapshots[i] for i in held]
                for part in parts({x: wanted[x].nbytes for x in self.groups[held]}, BYTES_AT_ONCE):
                    values |= _added_up(snapshots, factors, {x: wanted[x] for x in part}, bar)
        params = jax.tree.unflatten(jax.tree.structure(like), [values[name] for name in names])
        items = with_digests({"params": params})
        about = {"target": note, "updates": self.at, "residual": residual}
        metadata = inventory(items) | {"merged": about}
        ocp.save_checkpointables(destination, items, custom_metadata=metadata)
        return residual

    def others(self) -> list[KeyPath]:
        """Return the leaves of `params` that are not averaged."""
        averaged = {leaf for leaves in self.groups.values() for leaf in leaves}
        return [leaf for leaf in self.newest.contents.evaluated if leaf not in averaged]

    def _fits(
        self, target: Source | np.ndarray, threshold: float
    ) -> dict[tuple[int, ...], tuple[np.ndarray, float]]:
        """Return the factors and the residual of each group of leaves."""
        wanted = profile_of(target, self.at)
        pairs = [(s.updates, self.sources[s.node].decay) for s in self.snapshots]
        fits = {}
        for held in self.groups:
            factors, error = fit([pairs[i] for i in held], self.at, wanted, threshold=threshold)
            factors[np.abs(factors) < NEGLIGIBLE * np.abs(factors).max()] = 0
            fits[held] = factors, error
        return fits


class _Snapshot(NamedTuple):
    """Hold one average of one checkpoint; `places`: where its leaves are."""

    stored: Stored
    node: KeyPath
    updates: int
    moments: Moments | None
    places: dict[KeyPath, Place]


def _snapshots(stored: Stored) -> Iterator[_Snapshot]:
    """Return the averages in a checkpoint."""
    averages = stored.contents.averages
    scalars = {
        node: [average.scalars[name] for name in _SCALARS if name in average.scalars]
        for node, average in averages.items()
    }
    values = stored.read(path for each in scalars.values() for path in each)
    for node, average in averages.items():
        updates, *ledger = (values[path].item() for path in scalars[node])
        leaves = {
            name: stored.contents.place(average, name)
            for name, at in average.leaves.items()
            if hasattr(stored.leaf(at), "dtype") and is_inexact(stored.leaf(at))
        }
        yield _Snapshot(stored, node, updates, Moments(*ledger) if ledger else None, leaves)


_SCALARS = ["step", *(f"ledger/{field}" for field in Moments._fields)]


def _added_up(
    snapshots: list[_Snapshot], factors: np.ndarray, like: dict[KeyPath, np.ndarray], bar: tqdm
) -> dict[KeyPath, np.ndarray]:
    """Return some leaves of the sum, in the dtypes of `like`."""
    total = None
    for snapshot, factor in zip(snapshots, factors.tolist(), strict=True):
        if factor:
            read = snapshot.stored.averages({leaf: snapshot.places[leaf] for leaf in like})
            wide = lambda value, x: value.astype(np.result_type(value, x), copy=False)
            tree = {"/".join(leaf): wide(read.pop(leaf), x) for leaf, x in like.items()}
            total = total or Sum(tree)
            total.add(f"{snapshot.stored.path}", tree, factor)
            del tree  # before the next is read
            bar.update(sum(x.nbytes for x in like.values()))
    summed = total.tree() if total else {}
    return {leaf: summed["/".join(leaf)].astype(x.dtype, copy=False) for leaf, x in like.items()}


def _groups(
    newest: Stored, averaged: set[KeyPath], snapshots: list[_Snapshot]
) -> dict[tuple[int, ...], list[KeyPath]]:
    """Return the leaves that are averaged, by the snapshots that hold them."""
    if lost := averaged - newest.contents.evaluated.keys():
        raise ValueError(f"{newest.path} has no parameters for the averages of {_all(lost)}")
    groups: dict[tuple[int, ...], list[KeyPath]] = {}
    for leaf in sorted(averaged):
        held = tuple(i for i, s in enumerate(snapshots) if leaf in s.places)
        groups.setdefault(held, []).append(leaf)
    if nowhere := groups.get(()):
        raise ValueError(f"no source is an average of {_all(nowhere)}. Pass one that is")
    return groups


def _all(leaves: Iterable[KeyPath]) -> str:
    return ", ".join(sorted("/".join(leaf) for leaf in leaves))


def _names(nodes: Iterable[KeyPath]) -> dict[KeyPath, str]:
    """Return a short name for each average: the part of its path that differs from the others."""
    nodes = list(nodes)
    shared = set.intersection(*map(set, nodes)) if nodes else set()
    own = {node: [key for key in node if key not in shared] or node[-1:] for node in nodes}
    return {
        n: "ema" if keys[-1] in ("", "opt_state") else "/".join(keys) for n, keys in own.items()
    }


def _sources(
    snapshots: list[_Snapshot], given: dict[str, Source | NamedSource] | None
) -> dict[KeyPath, NamedSource]:
    """Return the decay of each average."""
    by_node: dict[KeyPath, list[_Snapshot]] = {}
    for snapshot in snapshots:
        by_node.setdefault(snapshot.node, []).append(snapshot)
    names = _names(by_node)
    by_name = {name: node for node, name in names.items()}
    sources = {}
    for name, source in (given or {}).items():
        meant = called(name, list(by_node))
        if name not in by_name and len(meant) != 1:
            raise ValueError(
                f"{name!r} is {'no' if not meant else 'more than one'} average."
                f"{did_you_mean(name, by_name)} Pass one of {', '.join(by_name)}"
            )
        if not isinstance(source, NamedSource):
            source = NamedSource("a decay" if callable(source) else f"gamma:{source:.6g}", source)
        sources[by_name.get(name) or meant[0]] = source
    if given:
        return sources
    for node, each in by_node.items():
        ledgers = [s.moments for s in each if s.moments]
        found = recognize([s.updates for s in each], ledgers) if len(ledgers) == len(each) else None
        if found is None:
            why = "has a ledger that fits no simple decay" if ledgers else "has no ledger"
            raise ValueError(
                f"average {names[node]} {why}. Say what it was: --source "
                f"{names[node]}=half_life:1000, or in Python Run.open(..., sources=...)"
            )
        sources[node] = found
    if not sources:
        raise ValueError("the checkpoints hold no average. Save the state of a chain with ema")
    return sources
