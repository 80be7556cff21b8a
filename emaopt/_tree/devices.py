"""Put arrays on devices, and into the memory of a device or of the host."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .numbers import is_concrete
from .paths import Tree


def beside(params: Tree, x: jax.Array) -> jax.Array:
    """Return a scalar of a new state, placed on every device that the parameters are sharded over.

    If it stayed on one device, the first step would return it on all of them, and the second step
    would be compiled again. The parameters may be abstract.
    """
    for p in jax.tree.leaves(params):
        has_place = isinstance(p, (jax.Array, jax.ShapeDtypeStruct)) and is_concrete(p)
        sharding = p.sharding if has_place else None
        if isinstance(sharding, NamedSharding):
            return jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return x


def in_memory(x, space: Any = jax.memory.Space.Device):
    """Return a leaf in a memory: by default that of its devices, to compute with."""
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def stay(before, after):
    """Return a new leaf in the memory of the old one, which may be the memory of the host."""
    return in_memory(after, jax.typeof(before).memory_space)


def is_deleted(x: Any) -> bool:
    """Return whether a step that donates its arguments has taken over the memory of an array."""
    return isinstance(x, jax.Array) and is_concrete(x) and x.is_deleted()


def refuse_deleted(what: str, x: Any) -> None:
    """Raise if an array is deleted. The error begins with `what`: "params/w is a deleted array"."""
    if is_deleted(x):
        raise RuntimeError(
            f"{what}: a step that donates its arguments took over its memory. Pass what the step "
            "returned. If Ctrl-C came before that was assigned, resume from a checkpoint, and put "
            "`with emaopt.uninterrupted():` around the step."
        )
