"""Offload averages to the memory of the host."""

import contextlib

import jax
import jax.numpy as jnp

from emaopt._tree.numbers import is_concrete, is_inexact
from emaopt._tree.paths import State

from .match import choose, is_average


def on_host(opt_state: State) -> State:
    """Offload the averages of a state to the memory of the host (memory kind "pinned_host").

    Each shard moves to the host of its device. Between updates the device holds nothing of it. An
    update copies the average to the devices, computes there, and copies it back. That is too slow
    for every step. So call `jax.jit(moving_average(every(n, decay)).update)(params, state, step)`
    after every n steps. The call returns at once, and the devices compute the update between two
    steps. `average` returns arrays on the devices.

    Args:
        opt_state: a state with averages anywhere in it. Not traced: call this outside of `jit`.

    Returns:
        The same state; shadows and residues are on the host.

    Raises:
        ValueError: the state is traced or abstract, or the backend keeps no arrays on the host. CPU
            does from jax 0.10.2 on.

    Example:
        >>> import emaopt
        >>> state = on_host(emaopt.moving_average(0.5).init(jnp.array([0.0])))
        >>> state.shadow.sharding.memory_kind
        'pinned_host'
    """
    choose(opt_state, None)
    # by jit, as an update moves it back: a backend that cannot do that fails here already
    to_host = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Host))

    def move(node):
        if not is_average(node):
            return node
        to = lambda tree: jax.tree.map(lambda x: _moved(x, to_host), tree)
        shadow, residue = to(node.shadow), to(node.residue)
        # An uncommitted scalar would be committed by the first update, and the second update would
        # be compiled again.
        put = lambda x: jax.device_put(x, jnp.asarray(x).sharding)
        step, ledger = jax.tree.map(put, (node.step, node.ledger))
        return node._replace(step=step, shadow=shadow, residue=residue, ledger=ledger)

    return jax.tree.map(move, opt_state, is_leaf=is_average)


def _moved(x, to_host):
    """Return a leaf on the host. Integers and keys stay: XLA keeps no keys there."""
    if not is_inexact(x):
        return x
    if not is_concrete(x) or isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(
            "opt_state is traced or abstract, and on_host moves arrays. Call it on what jit "
            "returns: on_host(jax.jit(tx.init)(params))."
        )
    moved = None
    with contextlib.suppress(ValueError, jax.errors.JaxRuntimeError):
        moved = to_host(x)
    if moved is None or moved.sharding.memory_kind != "pinned_host":
        device = next(iter(jnp.asarray(x).sharding.addressable_devices))
        kinds = ", ".join(sorted(memory.kind for memory in device.addressable_memories()))
        raise ValueError(
            f"opt_state cannot be on the host: the {device.platform} backend of jax "
            f"{jax.__version__} keeps no array in memory 'pinned_host', of its memories {kinds}. "
            "Leave the averages on the devices, in 2 bytes with "
            "accumulator_dtype=emaopt.stochastic(), or update jax."
        )
    return moved
