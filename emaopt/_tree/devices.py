"""Where an array lies: on which devices, in which memory."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .numbers import is_concrete
from .paths import Tree


def beside(params: Tree, x: jax.Array) -> jax.Array:
    """A scalar of a new state, on every device that the parameters are sharded over.

    Left on one device, it would come back from the first step on all of them, and the second step
    would be compiled again.
    """
    for p in jax.tree.leaves(params):
        sharding = p.sharding if isinstance(p, jax.Array) and is_concrete(p) else None
        if isinstance(sharding, NamedSharding):
            return jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return x


def in_memory(x, space: Any = jax.memory.Space.Device):
    """A leaf in that memory: of its devices, to compute with, or of the host."""
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def stay(before, after):
    """A leaf computed from one that may be in the memory of the host, where that one is."""
    return in_memory(after, jax.typeof(before).memory_space)
