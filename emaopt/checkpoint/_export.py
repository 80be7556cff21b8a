"""Write the averages of a checkpoint alone, for serving."""

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from etils.epath import Path
from orbax.checkpoint import v1 as ocp

from emaopt._tree.checks import check_unique, did_you_mean, written_names
from emaopt._tree.numbers import bytes_of
from emaopt._tree.paths import KeyPath, Tree, few

from ._errors import MismatchError, saving
from ._items import checked, inventory, with_digests
from ._place import EXPORTED, STAMP, UNTOLD, is_in
from ._run import check_writable, locate
from ._shards import as_bytes, write_shards
from ._stored import Stored
from ._trees import named_leaves


Rename = Mapping[str, str] | Callable[[str], str]


def export_averages(
    source: Any,
    destination: Any,
    *,
    like: Tree = None,
    step: int | None = None,
    name: str | None = None,
    rest: Sequence[str] = (),
    rename: Rename | None = None,
    max_shard_size: int | str = "5GB",
    custom_metadata: dict[str, Any] | None = None,
) -> None:
    """Write the averages of a checkpoint alone: an Orbax checkpoint with the item `params`.

    A destination that ends in `.safetensors` becomes such a file, with names like `conv/kernel`.
    Its metadata say which step and which average it is, the version of emaopt, and a digest for
    each tensor, which `restore_averages` compares. More bytes than `max_shard_size` become several
    files and an index, in Hugging Face's layout: `model-00001-of-00002.safetensors` and
    `model.safetensors.index.json`. What is written becomes visible whole or not at all.

    Args:
        source: the absolute path of a run or of one checkpoint.
        destination: a path where nothing is.
        like: the parameters; by default the tree, shapes and dtypes of those in `source`.
        step: which checkpoint of a run; by default the newest that is finished.
        name: which average, if there are several.
        rest: what else of the checkpoint to write: `["batch_stats"]`. It becomes the item `rest`,
            or tensors like `batch_stats/bn/mean`.
        rename: only for `.safetensors`, the names of the tensors: a function of our name, or a dict
            from our name to theirs. Names that a dict lacks stay. `restore_averages` undoes it.
        max_shard_size: only for `.safetensors`, the most bytes of a file: `int`, or text such as
            `"5GB"` (10**9 bytes) or `"500MiB"`. A larger tensor has a file of its own.
        custom_metadata: what else the metadata are to hold. For Hugging Face's transformers, the
            framework whose names and layouts these are: `{"format": "pt"}`.

    Raises:
        FileExistsError: there is something at the destination.
        MismatchError: there is nothing of a name in `rest`, or several things.
        ValueError: two leaves would be written under one name, or an argument is out of range.
    """
    stored = Stored(locate(source, step))
    destination = Path(destination)
    if destination.exists():
        raise FileExistsError(f"destination={destination} exists. Remove it or pass another path.")
    if isinstance(rest, str):
        raise ValueError(f"rest={rest!r} is one string. Pass a list: [{rest!r}].")
    like = stored.params_like(name) if like is None else like
    if destination.suffix == ".safetensors":
        most = as_bytes(max_shard_size)
        texts = {"format": "flax", **_about(stored, name), **(custom_metadata or {})}
        _write_tensors(stored, destination, like, name, rest, rename, most, texts)
        return
    if rename is not None:
        raise ValueError("rename is of .safetensors. Leave it out, or pass such a destination.")
    check_writable("destination", destination)
    items = {"params": checked("params", stored.load_averages(like, name, False))}
    if rest:
        others = {key: stored.tree_below(_node_of(stored, key)) for key in rest}
        items["rest"] = checked("rest", others)
    items = with_digests(items)
    about = {**(custom_metadata or {}), **inventory(items)}
    with saving(f"destination={destination}"):
        ocp.save_checkpointables(destination, items, custom_metadata=about)


def _write_tensors(
    stored: Stored,
    destination: Path,
    like: Tree,
    name: str | None,
    rest: Sequence[str],
    rename: Rename | None,
    most: int,
    texts: dict[str, str],
) -> None:
    """Write averages and the rest as `.safetensors`: the values of one file at a time."""
    averaged = named_leaves(like)
    names = written_names(averaged, averaged.values())
    sources: dict[str, KeyPath] = dict(zip(names, averaged, strict=True))
    forms: dict[str, Any] = dict(zip(names, averaged.values(), strict=True))
    others: dict[str, KeyPath] = {}
    for key in rest:
        node = _node_of(stored, key)
        others |= {
            "/".join((key, *path[len(node) :])): at
            for path, at in stored.contents.index.items()
            if is_in(path, node)
        }
    stored_forms = stored.forms(others.values())
    forms |= {own: stored_forms[at] for own, at in others.items()}
    if strings := [own for own in others if isinstance(forms[own], str)]:
        raise ValueError(f"rest has text at {few(strings)}. Pass keys with arrays and numbers.")
    theirs = _renamed(rename, forms)

    def values(part: Sequence[str]) -> dict[str, np.ndarray]:
        leaves = {own: sources[own] for own in part if own in sources}
        read = stored.load_leaves(averaged, name, False, leaves.values())
        found = {own: read[leaf] for own, leaf in leaves.items()}
        more = stored.read(others[own] for own in part if own in others)
        found |= {own: more[others[own]] for own in part if own in others}
        return {own: np.asarray(value) for own, value in found.items()}

    sizes = {own: _bytes_of(form) for own, form in forms.items()}
    write_shards(destination, sizes, theirs, values, most, texts)


def _bytes_of(form: Any) -> int:
    form = form if hasattr(form, "dtype") else np.asarray(form)
    return bytes_of(form.shape, form.dtype)


def _renamed(rename: Rename | None, forms: dict[str, Any]) -> dict[str, str]:
    """Return the names of the tensors by our names."""
    if rename is None:
        return {own: own for own in forms}
    if isinstance(rename, Mapping):
        for own in rename:
            if own not in forms:
                raise ValueError(f"rename has {own!r}, which is no leaf.{did_you_mean(own, forms)}")
        theirs = {own: rename.get(own, own) for own in forms}
    else:
        theirs = {own: rename(own) for own in forms}
    for own, new in theirs.items():
        if not isinstance(new, str) or not new:
            raise ValueError(f"rename makes {new!r} of {own!r}, which is no name. Return a str.")
    check_unique(theirs.values(), forms.values())
    return theirs


def _about(stored: Stored, name: str | None) -> dict[str, str]:
    """Return what the metadata of an export say: step, average, version."""
    words = stored.about.get(STAMP)
    step = words[0] + words[1] * 2**32 if words else UNTOLD
    number = re.fullmatch(r"(?:.*_)?([0-9]+)", stored.path.name)
    told = {} if step == UNTOLD and not number else {"step": str(step)}
    if step == UNTOLD and number:
        told = {"step": str(int(number[1]))}
    nodes = ["/".join(average.at) for average in stored.contents.called(name)]
    return told | {"average": ", ".join(nodes), "emaopt_version": version("emaopt")}


def _node_of(stored: Stored, key: str) -> KeyPath:
    """Find the node that a key of the rest is: `batch_stats`, wherever it was saved."""
    contents = stored.contents
    nodes = {
        path[: i + 1]
        for path in contents.index
        for i, step in enumerate(path)
        if step == key and not is_in(path, contents.root) and path[0] not in EXPORTED
    }
    shortest = min(map(len, nodes), default=0)
    nodes = {node for node in nodes if len(node) == shortest}
    if len(nodes) != 1:
        beside = sorted({path[1] for path in contents.index if path[0] == "rest" and path[1:]})
        what = f"several: {few('/'.join(node) for node in sorted(nodes))}" if nodes else "nothing"
        raise MismatchError(
            f"rest has {key!r}, and checkpoint {stored.path} has {what} of that name. Beside "
            f"parameters and state it has {few(beside) or 'nothing'}."
        )
    return nodes.pop()
