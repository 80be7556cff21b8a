"""Write the averages of a checkpoint alone, for serving."""

import os
from typing import Any

import jax
import numpy as np
from etils.epath import Path
from orbax.checkpoint import v1 as ocp

from emaopt._tree.checks import written_names
from emaopt._tree.paths import Tree

from ._errors import saving
from ._items import checked, inventory, with_digests
from ._run import check_writable, locate
from ._stored import Stored
from ._trees import named_leaves


def export_averages(
    source: Any,
    destination: Any,
    *,
    like: Tree = None,
    step: int | None = None,
    name: str | None = None,
) -> None:
    """Write the averages of a checkpoint alone: an Orbax checkpoint with the item `params`.

    A destination that ends in `.safetensors` becomes such a file, with names like `conv/kernel`.

    Args:
        source: the absolute path of a run or of one checkpoint.
        destination: a path where nothing is.
        like: the parameters; by default the tree, shapes and dtypes of those in `source`.
        step: which checkpoint of a run; by default the newest that is finished.
        name: which average, if there are several.

    Raises:
        FileExistsError: there is something at the destination.
        ValueError: two leaves would be written under one name.
    """
    stored = Stored(locate(source, step))
    destination = Path(destination)
    if destination.exists():
        raise FileExistsError(f"destination={destination} exists. Remove it or pass another path.")
    if destination.suffix != ".safetensors":
        check_writable("destination", destination)
    like = stored.params_like(name) if like is None else like
    if destination.suffix != ".safetensors":
        averaged = checked("params", stored.load_averages(like, name, False))
        items = with_digests({"params": averaged})
        with saving(f"destination={destination}"):
            ocp.save_checkpointables(destination, items, custom_metadata=inventory(items))
        return
    try:
        from safetensors.numpy import save_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"destination={destination} needs the package safetensors: pip install safetensors"
        ) from error
    leaves = named_leaves(like)
    names = written_names(leaves, leaves.values())
    averaged = jax.tree.leaves(stored.load_averages(like, name, False))
    arrays = {n: np.asarray(x) for n, x in zip(names, averaged, strict=True)}
    # a file that is cut off must not look like one that is whole
    temporary = Path(f"{destination}.tmp{os.getpid()}")
    try:
        with saving(f"destination={destination}"):
            save_file(arrays, temporary)
            temporary.rename(destination)
    finally:
        temporary.unlink(missing_ok=True)
