"""Find the averages in the checkpoints of a run, and what they were."""

from collections.abc import Iterable
from typing import NamedTuple

from emaopt._tree.checks import did_you_mean
from emaopt._tree.numbers import is_inexact
from emaopt._tree.paths import KeyPath, called
from emaopt.checkpoint._stored import Stored
from emaopt.posthoc._fit import Source

from ._ledgers import Moments, NamedSource, recognize
from ._orbax import OrbaxTree


class Recorded(NamedTuple):
    """Hold where an average is in a checkpoint, and after how many updates it was saved."""

    node: KeyPath
    updates: int
    moments: Moments | None
    tree: OrbaxTree


_SCALARS = ["step", *(f"ledger/{field}" for field in Moments._fields)]


def averages_in(stored: Stored) -> list[Recorded]:
    """Return the averages in a checkpoint."""
    averages = stored.contents.averages
    scalars = {
        node: [average.scalars[name] for name in _SCALARS if name in average.scalars]
        for node, average in averages.items()
    }
    values = stored.read(path for each in scalars.values() for path in each)
    found = []
    for node, average in averages.items():
        updates, *ledger = (values[path].item() for path in scalars[node])
        places = {
            name: stored.contents.place(average, name)
            for name, at in average.leaves.items()
            if hasattr(stored.leaf(at), "dtype") and is_inexact(stored.leaf(at))
        }
        moments = Moments(*ledger) if ledger else None
        found.append(Recorded(node, updates, moments, OrbaxTree(stored, None, places)))
    return found


def short_names(nodes: Iterable[KeyPath]) -> dict[KeyPath, str]:
    """Return what to call each average: what its path does not share with all the others."""
    nodes = list(nodes)
    shared = set.intersection(*map(set, nodes)) if nodes else set()
    own = {node: [key for key in node if key not in shared] or node[-1:] for node in nodes}
    return {
        n: "ema" if keys[-1] in ("", "opt_state") else "/".join(keys) for n, keys in own.items()
    }


def told(
    names: dict[KeyPath, str], given: dict[str, Source | NamedSource]
) -> dict[KeyPath, NamedSource]:
    """Return what the averages were that somebody names.

    Raises:
        ValueError: A name is that of no average, or of several.
    """
    by_name = {name: node for node, name in names.items()}
    sources = {}
    for name, source in given.items():
        meant = called(name, list(names))
        if name not in by_name and len(meant) != 1:
            raise ValueError(
                f"{name!r} is {'no' if not meant else 'more than one'} average."
                f"{did_you_mean(name, by_name)} Pass one of {', '.join(by_name)}"
            )
        if not isinstance(source, NamedSource):
            source = NamedSource("a decay" if callable(source) else f"gamma:{source:.6g}", source)
        sources[by_name.get(name) or meant[0]] = source
    return sources


def recognized(
    recorded: list[Recorded], names: dict[KeyPath, str]
) -> tuple[dict[KeyPath, NamedSource], list[str]]:
    """Return what the averages were by their ledgers, and a line for each that is left out."""
    sources, left_out = {}, []
    for node, name in names.items():
        own = [each for each in recorded if each.node == node]
        ledgers = [each.moments for each in own if each.moments]
        known = len(ledgers) == len(own)
        found = recognize([each.updates for each in own], ledgers) if known else None
        if found is not None:
            sources[node] = found
            continue
        why = "a ledger that fits no simple decay" if ledgers else "no ledger"
        left_out.append(
            f"average {name} has {why} and is left out. Say what it was: --source "
            f"{name}=half_life:1000, or in Python Run.open(..., sources=...)"
        )
    return sources, left_out
