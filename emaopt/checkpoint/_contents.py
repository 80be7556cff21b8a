"""Find what lies where in a checkpoint: averages, parameters, the rest, by the names of leaves.

A leaf is one key path, the item first: `("opt_state", "1", "shadow", "conv", "kernel")`. Where
averages were saved swapped with the parameters, the swap is undone here, and nowhere else.
"""

from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

from emaopt._tree.paths import KeyPath, called, few, logical

from ._errors import MismatchError
from ._place import (
    DIGESTS,
    EXPORTED,
    FIELDS,
    LEDGER,
    NOW,
    RESIDUE,
    REST,
    ROWS,
    SHADOW,
    STEP,
    SWAPPED,
    THEN,
    Average,
    Place,
    is_in,
    leaves_of,
    shared_start,
)
from ._roots import candidates_for, rank, root_beside


class Contents:
    """Find what lies where in a checkpoint.

    Args:
        paths: the key path of every leaf, as it is on disk.
        checkpoint: the path of the checkpoint, for errors.
    """

    def __init__(self, paths: Iterable[KeyPath], checkpoint: Any = ""):
        self.checkpoint = checkpoint
        # by the path without a box's `value`, the path on disk
        self.index: dict[KeyPath, KeyPath] = {logical(path): path for path in paths}

    @cached_property
    def averages(self) -> dict[KeyPath, Average]:
        """Return every average, by the path of its node."""
        return {node: self._average(node) for node in self._shadows}

    @cached_property
    def root(self) -> KeyPath:
        """Return the node that the parameters are in."""
        roots = set(self._roots.values())
        if not roots:
            named = [p[: i + 1] for p in self.index for i, key in enumerate(p) if key == "params"]
            return min(named, key=lambda path: (len(path), path), default=("",))
        shared = shared_start(roots)
        if shared[:1] == ("params",):
            return ("params",)
        # of several networks below `params`, one may be averaged; the others are parameters too
        below = [i for i, key in enumerate(shared) if key == "params"]
        return shared[: below[-1] + 1] if below else shared

    @cached_property
    def stored_params(self) -> dict[KeyPath, KeyPath]:
        """Return the leaves of `params` by name, as they lie on disk: averages, if swapped."""
        start = len(self.root)
        return {
            path[start:]: at
            for path, at in self.index.items()
            if is_in(path, self.root)
            and path[0] != DIGESTS
            and not any(is_in(path, state) for state in self._states)
        }

    @cached_property
    def params(self) -> dict[KeyPath, KeyPath]:
        """Return the raw parameters by name. A swap is undone."""
        return self.stored_params | self._swapped

    def below(self, node: KeyPath) -> dict[KeyPath, KeyPath]:
        """Return the leaves below a node by name. If these are the parameters, a swap is undone."""
        if self.averages and node == self.root:
            return self.params
        return {path[len(node) :]: at for path, at in self.index.items() if is_in(path, node)}

    @cached_property
    def marks(self) -> set[KeyPath]:
        """Return the leaves that say of an average that it is swapped."""
        return {self.index[(*node, SWAPPED)] for node in self._shadows if self._is_swapped(node)}

    @property
    def is_snapshot(self) -> bool:
        """Return whether averages are stored, and no parameters."""
        return bool(self.averages) and not self.stored_params

    @cached_property
    def evaluated(self) -> dict[KeyPath, KeyPath]:
        """Return the leaves to evaluate, by name: the stored parameters, or else the averages."""
        averaged = {x: at for average in self.averages.values() for x, at in average.leaves.items()}
        return self.stored_params or averaged

    def called(self, name: str | None) -> list[Average]:
        """Find the averages that a name means.

        Args:
            name: what `emaopt.averages` calls it, or any keys of its path, side by side and in
                order. `None`: the average that is swapped, or all if none is.

        Raises:
            MismatchError: there is no average, or none of that name.
        """
        found = list(self.averages.values())
        if not found and (
            name is not None or {path[0] for path in self.index} - {REST} != EXPORTED
        ):
            has = sorted({"/".join(filter(None, path[:2])) for path in self.index})
            raise MismatchError(
                f"checkpoint {self.checkpoint} holds no average. It has {few(has)}. Save the "
                "opt_state of a chain with emaopt.ema in it."
            )
        if name is None:
            return [average for average in found if average.swapped] or found
        start = len(shared_start(self.averages))
        below = {node[start:]: node for node in self.averages}
        nodes = [below[path] for path in called(name, below)] or called(name, self.averages)
        if not nodes and name == "ema" and len(found) == 1:  # what an average alone is called
            return found
        if not nodes:
            raise MismatchError(
                f"name={name!r} is no average of checkpoint {self.checkpoint}. Pass what tells "
                f"them apart in: {', '.join('/'.join(node) for node in self.averages)}."
            )
        return [self.averages[node] for node in nodes]

    def places(self, names: Collection[KeyPath], name: str | None) -> dict[KeyPath, Place]:
        """Find the average of each named leaf, or its parameter where it has none.

        Args:
            names: leaves, by their path below the parameters, or below a part of them.
            name: which average, see `called`.

        Returns:
            Where each leaf is; those that are found nowhere are left out.
        """
        chosen = self.called(name)
        if self.is_snapshot:
            known = [(average, leaves_of(average, names)) for average in chosen]
            held = {x: [(a, own[x]) for a, own in known if x in own] for x in names}
            return {x: self.place(*_only(self, x, pairs)) for x, pairs in held.items() if pairs}
        root = self._root_of(names, chosen)
        places = {}
        for leaf in names:
            path = self._unwrapped((*root, *leaf))
            at, own = self.index.get(path), self._name(path)
            param = at if own is None else self.params.get(own)
            if own is not None and (held := [(a, own) for a in chosen if own in a.leaves]):
                places[leaf] = self.place(*_only(self, leaf, held))
            elif param is not None:
                places[leaf] = Place(param, None, param)
        return places

    def place(self, average: Average, name: KeyPath) -> Place:
        """Return where the parts of one leaf of an average are."""
        value, then = average.leaves[name], average.rested.get(name)
        now = average.scalars[f"{ROWS}/{NOW}"] if then else None
        return Place(value, average.residues.get(name), self.params.get(name, value), now, then)

    def role(self, path: KeyPath) -> str:
        """Say what a leaf is: `average of w`, `slot m of w`, `global step`, `rest`."""
        path = logical(path)
        if path[0] == DIGESTS:
            return f"digests of {path[-1]}"
        for node, average in self.averages.items():
            if not is_in(path, node):
                continue
            field, *own = path[len(node) :]
            leaf = "/".join(self._named(node, tuple(own)))
            of_leaf = {SHADOW: "raw parameter" if average.swapped else "average", RESIDUE: RESIDUE}
            of_all = {STEP: "global step", SWAPPED: "mark of a swap", LEDGER: LEDGER, ROWS: ROWS}
            if field in of_leaf:
                return f"{of_leaf[field]} of {leaf}"
            if field in of_all:
                return of_all[field]
        name = self._name(path)
        if name is not None:
            return f"average of {'/'.join(name)}" if name in self._swapped else "variable"
        if path[-1] == STEP:
            return "global step"
        if path[-2:-1] == ("powers",):
            return "power"
        for i in range(2, len(path)):
            if path[i:] in self._slot_names:
                return f"slot {path[i - 1]} of {'/'.join(path[i:])}"
        return "rest"

    # ---- how it is found -----------------------------------------------------------------------

    @cached_property
    def _shadows(self) -> dict[KeyPath, list[KeyPath]]:
        """Return the node of every average, and the leaves of its shadow, as named there."""
        stepped = {path[:i] for path in self.index for i, key in enumerate(path) if key == STEP}
        leaves: dict[KeyPath, list[KeyPath]] = {}
        for path in self.index:
            nodes = (path[:i] for i, key in enumerate(path) if key == SHADOW)
            node = next((node for node in nodes if node in stepped), None)  # the outermost one
            if node is not None:
                leaves.setdefault(node, []).append(path[len(node) + 1 :])
        strange = {p[:i] for p in self.index for i, key in enumerate(p) if key not in FIELDS}
        nodes = sorted(node for node in leaves if node not in strange)
        # parameters may be called `shadow` and `step` as well
        nodes = [node for node in nodes if "params" not in node] or nodes
        return {node: leaves[node] for node in nodes}

    @cached_property
    def _below(self) -> dict[KeyPath, list[KeyPath]]:
        """Return the leaves right below a node."""
        found: dict[KeyPath, list[KeyPath]] = {}
        for path in self.index:
            found.setdefault(path[:-1], []).append(path)
        return found

    @cached_property
    def _slot_names(self) -> set[KeyPath]:
        """Return the names that slots may have: those of parameters and of averaged leaves."""
        return set(self.stored_params).union(*self._shadows.values())

    @cached_property
    def _roots(self) -> dict[KeyPath, KeyPath]:
        """For every average, the node that holds its parameters."""
        known = self.index, self._shadows
        return {node: root_beside(node, own, *known) for node, own in self._shadows.items()}

    @cached_property
    def _states(self) -> set[KeyPath]:
        """Return the nodes that hold an optimizer's state, and so no parameters."""
        return {node[: len(shared_start([node, root])) + 1] for node, root in self._roots.items()}

    @cached_property
    def _swapped(self) -> dict[KeyPath, KeyPath]:
        """Return the raw parameters that lie in a shadow, by name."""
        return {
            self._named(node, own): self.index[(*node, SHADOW, *own)]
            for node, leaves in self._shadows.items()
            if self._is_swapped(node)
            for own in leaves
        }

    def _unwrapped(self, path: KeyPath) -> KeyPath:
        """Return the path of the one array in a wrapper, such as haliax's; else the path itself."""
        inside = self._below.get(path, [])
        return inside[0] if path not in self.index and len(inside) == 1 else path

    def _average(self, node: KeyPath) -> Average:
        swapped = self._is_swapped(node)
        leaves, residues, rested = {}, {}, {}
        for own in self._shadows[node]:
            name = self._named(node, own)
            in_shadow = self.index[(*node, SHADOW, *own)]
            at = self.stored_params.get(name) if swapped else in_shadow
            if at is None:  # in the shadow is the raw parameter: the average is lost
                continue
            leaves[name] = at
            if (*node, RESIDUE, *own) in self.index:
                residues[name] = self.index[(*node, RESIDUE, *own)]
            if (*node, ROWS, THEN, *own) in self.index and not swapped:
                rested[name] = self.index[(*node, ROWS, THEN, *own)]
        scalars = {
            "/".join(path[len(node) :]): at
            for path, at in self.index.items()
            if is_in(path, node)
            and (path[len(node)] in (STEP, LEDGER) or path[len(node) :] == (ROWS, NOW))
        }
        return Average(node, swapped, leaves, residues, scalars, rested)

    def _is_swapped(self, node: KeyPath) -> bool:
        return (*node, SWAPPED) in self.index

    def _named(self, node: KeyPath, own: KeyPath) -> KeyPath:
        """Return the name that a leaf of an average has among all parameters."""
        return (*self._roots[node][len(self.root) :], *own)

    def _name(self, path: KeyPath) -> KeyPath | None:
        """Return the name of a parameter, by its path."""
        name = path[len(self.root) :]
        return name if is_in(path, self.root) and name in self.stored_params else None

    def _root_of(self, names: Collection[KeyPath], chosen: list[Average]) -> KeyPath:
        """Find the node that names of leaves start at: that of the parameters, or a part of it.

        Raises:
            MismatchError: several parts have such leaves, and nothing tells them apart.
        """
        candidates = candidates_for(names, self.index, self._shadows)
        if not candidates or self.root in candidates:
            return self.root
        averaged = {self._roots[average.at] for average in chosen}.intersection(candidates)
        ranks = {root: rank(root, self._shadows)[:-1] for root in candidates}
        first = ranks[candidates[0]]
        parts = sorted(averaged) or [root for root in candidates if ranks[root] == first]
        if len(parts) > 1:
            raise MismatchError(
                f"like is a part of the parameters of checkpoint {self.checkpoint}, and several "
                f"parts have such leaves: {few('/'.join(part) for part in parts)}. Pass the whole."
            )
        return parts[0]


def _only(
    contents: Contents, leaf: KeyPath, held: list[tuple[Average, KeyPath]]
) -> tuple[Average, KeyPath]:
    """Return the one average of a leaf, and what it calls the leaf."""
    if len(held) > 1:
        raise MismatchError(
            f"name is missing: checkpoint {contents.checkpoint} has several averages of "
            f"{'/'.join(leaf)!r}. Pass name=, what tells them apart in: "
            f"{', '.join('/'.join(average.at) for average, _ in held)}."
        )
    return held[0]
