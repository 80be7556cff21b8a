"""Read a checkpoint on disk, by key path: what it holds, and its leaves, verified.

A leaf is one path, the item first: `("opt_state", "1", "shadow", "conv", "kernel")`; a checkpoint
without items is the one item "". What lies where, `contents` says.
"""

from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from emaopt._files import read_json
from emaopt._tree.checks import check_array
from emaopt._tree.paths import KeyPath, Tree, logical, printable

from ._contents import Contents
from ._errors import DamagedError, MismatchError, cause, missing, shortened, unreadable
from ._item import Item, LeafError
from ._leaf import HOST, Target, are_floating, differs, is_key, like_leaf, target_of
from ._place import DIGESTS, SHADOW, STAMP, UNTOLD, Place, by_item, evaluated
from ._run import FINISHED, METADATA, is_finished
from ._trees import leaves_by_path, merged, named_leaves
from ._verify import verify


class Stored:
    """Read one checkpoint.

    `items`: its trees, by name; what is no tree (JSON, a data iterator) is not among them.

    Args:
        path: the directory of the checkpoint.

    Raises:
        DamagedError: a file that says what is in it is missing or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.custom_metadata: dict[str, Any] = {}
        self.about: dict[str, Any] = {}  # what `save` and `export_averages` say in it
        try:
            self.items = self._read_items()
        except Exception as error:
            raise DamagedError(
                f"checkpoint {path}: what is in it cannot be read, a file is damaged, cut off or "
                f"missing. {cause(error)} Use another step."
            ) from error
        self._check_stamp()

    @cached_property
    def contents(self) -> Contents:
        """Return what lies where: averages, parameters, and the rest."""
        return Contents(self.paths(), self.path)

    def paths(self) -> list[KeyPath]:
        """Return every leaf of the checkpoint."""
        return [(name, *path) for name, item in self.items.items() for path in item]

    def saved(self) -> list[KeyPath]:
        """Return every leaf but the digests."""
        return [path for path in self.paths() if path[0] != DIGESTS]

    def leaf(self, path: KeyPath) -> Any:
        """Return a leaf without its value: an abstract array, or an empty number or string.

        For who looks at all leaves: the first call reads the metadata of the whole item.
        """
        return self.forms((path[0], *own) for own in self.items[path[0]])[path]

    def forms(self, paths: Iterable[KeyPath]) -> dict[KeyPath, Any]:
        """Return some leaves without their values, see `leaf`; faster than one by one."""
        found: dict[KeyPath, Any] = {}
        for name, own in by_item(paths).items():
            with_forms = self._trying(name, lambda n=name, o=own: self.items[n].forms(o))
            found |= {(name, *path): form for path, form in with_forms.items()}
        return found

    def load(self, like: dict[str, Tree]) -> dict[str, Tree]:
        """Load whole items, each in the structure of its template.

        Raises:
            MismatchError: names, shapes or dtypes differ; all problems at once, before anything is
                read.
        """
        lacking = [name for name in like if name not in self.items]
        wanted = {name: leaves_by_path(tree) for name, tree in like.items() if name in self.items}
        lost = [(n, *p) for n, leaves in wanted.items() for p in leaves if p not in self.items[n]]
        others = [(n, *p) for n, leaves in wanted.items() for p in self.items[n] if p not in leaves]
        leaves = {
            (name, *path): leaf
            for name, own in wanted.items()
            for path, leaf in own.items()
            if path in self.items[name]
        }
        forms = self.forms(leaves)
        wrong = [differs("/".join(path), leaf, forms[path]) for path, leaf in leaves.items()]
        self.refuse(
            [
                f"there is no item {name!r}, only {', '.join(sorted(self.items))}"
                for name in lacking
            ],
            missing(lost, self.paths()),
            wrong,
            [
                f"{printable('/'.join(path))} is stored, but not in what was passed"
                for path in others
            ],
        )
        values = self._read({path: target_of(leaf, forms[path]) for path, leaf in leaves.items()})
        result = {}
        for name, tree in like.items():
            own = [
                self._like(values[(name, *path)], leaf, (name, *path))
                for path, leaf in wanted[name].items()
            ]
            result[name] = jax.tree.unflatten(jax.tree.structure(tree), own)
        return result

    def load_averages(self, like: Tree, name: str | None, cast: bool) -> Tree:
        """Load the averages, in structure, dtypes and shardings of `like`; see `load_leaves`."""
        wanted = named_leaves(like)
        values = self.load_leaves(wanted, name, cast)
        return jax.tree.unflatten(jax.tree.structure(like), [values[leaf] for leaf in wanted])

    def load_leaves(
        self,
        wanted: dict[KeyPath, Any],
        name: str | None,
        cast: bool,
        part: Collection[KeyPath] | None = None,
    ) -> dict[KeyPath, Any]:
        """Load the averages of some parameters, each in the dtype and sharding of its template.

        Args:
            wanted: by the name of a parameter, its template, real or abstract.
            name: which average, see `Contents.called`.
            cast: whether another dtype than those of parameter and average is fine. In a snapshot,
                where the parameters are not stored, any floating-point dtype is.
            part: those that are read, if not all. All are checked.

        Raises:
            MismatchError: names, shapes or dtypes differ; all problems at once, before anything is
                read.
        """
        if not wanted:
            raise ValueError("like has no leaves. Pass the parameters, real or abstract.")
        for leaf_name, leaf in wanted.items():
            check_array("/".join(leaf_name), leaf, "like")
        contents = self.contents
        places = contents.places(wanted, name)
        forms = self.forms({path for place in places.values() for path in place if path})
        wrong = []
        for leaf_name, place in places.items():
            leaf = wanted[leaf_name]
            free = cast or (contents.is_snapshot and are_floating(leaf, forms[place.path]))
            also = leaf if free else forms[place.param]
            wrong.append(differs("/".join(place.path), leaf, forms[place.path], also))
        lost = [leaf_name for leaf_name in wanted if leaf_name not in places]
        above = [] if places else self._above(wanted)
        self.refuse(
            missing(lost, [logical(path[1:]) for path in self.paths()] if lost else []),
            wrong,
            [f"pass that part alone, like[{key!r}]" for key in above],
        )
        read = {x: (places[x], wanted[x]) for x in (wanted if part is None else part)}
        averaged = self._averages(read, forms)
        return {x: self._like(averaged[x], wanted[x], places[x].path) for x in read}

    def averages(self, places: dict[Any, Place], like: dict[Any, Any] | None = None) -> dict:
        """Read some averages: the values that were evaluated, a residue included.

        To where the template of the same key is in `like`; without one, to the host.
        """
        forms = self.forms({path for place in places.values() for path in place if path})
        like = like or {}
        wanted = {key: (place, like.get(key)) for key, place in places.items()}
        return self._averages(wanted, forms)

    def params_like(self, name: str | None = None) -> Tree:
        """Return the stored parameters as empty NumPy arrays: the default for `like`.

        Of a snapshot, which has none, what is averaged, in the dtypes of the averages. `name`:
        which average of a snapshot; by default what any of them averages.
        """
        contents = self.contents
        chosen = contents.called(name)  # there must be an average
        at = contents.params
        tree = None
        if contents.is_snapshot:
            at = {own: path for average in chosen for own, path in average.leaves.items()}
            for average in chosen:
                tree = merged(tree, self.tree_of((*average.at, SHADOW)))
        else:
            tree = self.tree_of(contents.root)
        forms = self.forms(at.values())
        leaves = [forms[at[logical(path)]] for path in leaves_by_path(tree)]
        empty = [np.empty(x.shape, x.dtype) if hasattr(x, "dtype") else x for x in leaves]
        return jax.tree.unflatten(jax.tree.structure(tree), empty)

    def tree_below(self, node: KeyPath) -> Tree:
        """Read all leaves below a node to the host, as the tree that they are."""
        tree = self.tree_of(node)
        paths = [(*node, *path) for path in leaves_by_path(tree)]
        values = self.read(paths)
        return jax.tree.unflatten(jax.tree.structure(tree), [values[path] for path in paths])

    def tree_of(self, path: KeyPath) -> Tree:
        """Return the tree below a node. Its leaves are names."""
        tree = self.items[path[0]].tree
        for key in path[1:]:
            tree = tree[int(key) if isinstance(tree, list) else key]
        return tree

    def fetch(self, wanted: dict[Any, tuple[KeyPath, Any]]) -> dict[Any, Any]:
        """Read some leaves, given by where each is and what it is to be like."""
        forms = self.forms(at for at, _ in wanted.values())
        values = self._read({at: target_of(leaf, forms[at]) for at, leaf in wanted.values()})
        return {key: self._like(values[at], leaf, at) for key, (at, leaf) in wanted.items()}

    def read(self, paths: Iterable[KeyPath]) -> dict[KeyPath, Any]:
        """Read some leaves to the host, verified."""
        return self._read(dict.fromkeys(paths, HOST))

    # ---- reading and verifying -----------------------------------------------------------------

    def _read_items(self) -> dict[str, Item]:
        if not is_finished(self.path) or (self.path / METADATA).exists():
            return {"": Item(self.path)}
        about = read_json(self.path / FINISHED)
        self.custom_metadata = about.get("custom_metadata") or {}
        self.about = self.custom_metadata.get("emaopt") or {}
        handlers = about.get("item_handlers")
        handlers = handlers if isinstance(handlers, dict) else {}
        trees = {name for name, handler in handlers.items() if "ree" in str(handler)}
        trees |= {name for name, handler in handlers.items() if "Standard" in str(handler)}
        there = {path.name for path in self.path.iterdir() if (path / METADATA).exists()}
        found = {name: Item(self.path / name) for name in sorted(there)}
        # a manager may have saved what `items` returns as one tree
        inside = {path[0] for item in found.values() for path in item if path}
        trees |= set(self.about.get("items", ())) - inside
        if lost := sorted(trees - there):
            gone = [name for name in lost if not (self.path / name).exists()]
            what = "are missing" if gone else f"have no file {METADATA}"
            raise ValueError(f"The items {gone or lost} {what}.")
        if not there:
            raise ValueError("There is no item that is a tree.")
        return found

    def _check_stamp(self) -> None:
        """Raise if the digests are of another save than the checkpoint, or it is of another step.

        Items of two steps in one directory are what an interrupted copy leaves.
        """
        recorded = self.about.get(STAMP)
        if DIGESTS not in self.items or (recorded is None and (STAMP,) not in self.items[DIGESTS]):
            return
        if not self.about:  # the manager that wrote it takes no metadata
            return
        stamp = None
        if (STAMP,) in self.items[DIGESTS]:
            stamp = [int(word) for word in self._trying_one(DIGESTS, (STAMP,))]
        if stamp != recorded:
            raise DamagedError(
                f"checkpoint {self.path}: its items are of different saves, as an interrupted copy "
                "leaves them, or were cast when they were saved. Use another step."
            )
        step = stamp[0] + stamp[1] * 2**32 if stamp else 0
        if step != UNTOLD and _number(self.path.name) not in (None, step):
            raise DamagedError(
                f"checkpoint {self.path} was saved as step {step}. Rename the directory to {step}, "
                "or to a name that is no number."
            )

    def _trying(self, name: str, read: Any) -> Any:
        """Return the result of reading, or raise one line with checkpoint, leaf and cause."""
        try:
            return read()
        except LeafError as error:
            raise unreadable(self.path, (name, *error.path), error) from error

    def _trying_one(self, name: str, path: KeyPath) -> Any:
        return self._trying(name, lambda: self.items[name].read({path: HOST}))[path]

    def _read(self, targets: dict[KeyPath, Target]) -> dict[KeyPath, Any]:
        """Read some leaves, verified; the others are not read."""
        values: dict[KeyPath, Any] = {}
        for name, own in by_item(targets).items():
            wanted = {path: targets[(name, *path)] for path in own}
            read = self._trying(name, lambda n=name, w=wanted: self.items[n].read(w))
            if (name,) in self.items.get(DIGESTS, ()):
                recorded = self._trying_one(DIGESTS, (name,))
                what = f"checkpoint {self.path}: "
                verify(what, name, recorded, self.items[name].paths, read)
            values |= {(name, *path): value for path, value in read.items()}
        return values

    def _averages(self, wanted: dict[Any, tuple[Place, Any]], forms: dict) -> dict[Any, Any]:
        """Return averages where their templates are, with residues added and rows up to date."""
        targets: dict[KeyPath, Target] = {}
        for place, leaf in wanted.values():
            if place.then is not None:
                targets |= dict.fromkeys([path for path in place if path is not None], HOST)
                continue
            for path in (place.path, place.residue):
                if path is not None:
                    targets[path] = target_of(leaf, forms[path])
        values = self._read(targets)
        return {key: evaluated(place, values) for key, (place, _) in wanted.items()}

    def _like(self, value: Any, leaf: Any, path: KeyPath) -> Any:
        impl = self.items[path[0]].key_impl(path[1:]) if is_key(leaf) else None
        try:
            return like_leaf(value, leaf, "/".join(path), impl)
        except ValueError as error:
            raise MismatchError(f"checkpoint {self.path}: {error}") from None

    # ---- what does not fit ---------------------------------------------------------------------

    def _above(self, wanted: Collection[KeyPath]) -> list[str]:
        """Return the keys below which `like` has the leaves of the checkpoint, as Linen does."""
        below = {path[:1]: [p[1:] for p in wanted if p[:1] == path[:1]] for path in wanted}
        if len(below) > 8:  # variables are in few collections
            return []
        known = self.contents.evaluated.keys()
        return [key[0] for key, names in below.items() if key and known >= set(names)]

    def refuse(self, *kinds: list[str]) -> None:
        """Raise if there is any problem, with some of each kind."""
        kinds = tuple([problem for problem in kind if problem] for kind in kinds)
        problems = [problem for kind in kinds for problem in shortened(kind)]
        if problems:
            raise MismatchError(
                f"checkpoint {self.path} does not hold what was asked for; nothing was read.\n  "
                + "\n  ".join(problems)
                + "\nPass trees like those that were saved."
            )


def _number(name: str) -> int | None:
    """Return the step that a directory is named after."""
    return int(name) if name.isascii() and name.isdigit() else None
