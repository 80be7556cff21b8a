"""Refuse an Orbax context that casts what it saves.

`ocp.Context().array.saving.storage_options.dtype` has Orbax cast all arrays, steps and digests too.
What is read back is then not what was saved.
"""

import contextvars
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from emaopt._tree.paths import Tree, key_name


def check_context(checkpointer: ocp.training.Checkpointer, items: dict[str, Tree]) -> None:
    """Raise if Orbax would cast a leaf.

    Raises:
        ValueError: it would. It names the leaf and both dtypes.
    """
    saving = _context(checkpointer).array.saving
    if not _storage_dtype(saving.storage_options) and not saving.scoped_storage_options_creator:
        return
    for item, tree in items.items():
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            dtype = _dtype_on_disk(saving, keys, leaf)
            if dtype is not None and jnp.result_type(leaf) != dtype:
                name = "/".join((item, *map(key_name, keys)))
                raise ValueError(
                    f"checkpointer would cast {name!r} from {jnp.result_type(leaf)} to {dtype}, as "
                    "Orbax's context says (array.saving: storage_options.dtype), and the state "
                    "could not be resumed. Leave it out of the context. To save averages in 16 "
                    "bits, call checkpoint.snapshot(checkpointer, step, opt_state, jnp.bfloat16)."
                )


def _context(checkpointer: ocp.training.Checkpointer) -> ocp.Context:
    """Return the context that Orbax saves in: the one around the call, or the checkpointer's own.

    Orbax has no function that tells. The first is the value of a context variable of Python, the
    second an attribute of the checkpointer.
    """
    around = contextvars.copy_context().values()
    own = vars(checkpointer).values()
    found = [x for x in (*around, *own) if isinstance(x, ocp.Context)]
    return found[0] if found else ocp.Context()


def _dtype_on_disk(saving: Any, keys: Any, leaf: Any) -> Any:
    """Return the dtype that Orbax would cast a leaf to, or `None`."""
    if isinstance(leaf, str):
        return None
    create = saving.scoped_storage_options_creator
    own = _storage_dtype(create(keys, leaf)) if create else None
    return own or _storage_dtype(saving.storage_options)


def _storage_dtype(options: Any) -> Any:
    if options is None or options.dtype is None:
        return None
    return jnp.dtype(options.dtype)
