"""Compute one number per leaf that any flipped bit changes.

`digest = sum of mix(word + position * 0x9E3779B9)` over the 32-bit words, modulo 2**32, with the
finalizer of MurmurHash3 for `mix`. The sum does not depend on order, so not on sharding either:
each device reads its own shard once and one scalar per leaf is added up. `mix` is a bijection, so
a change of one word always changes the sum; any other goes unseen with a probability of 2**-32.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._tree.devices import in_memory


ELEMENTS_AT_ONCE = 2**22  # of an array on the host, copied to a device
# Elements that a CPU mixes at once. From 2**12, XLA of jax 0.10 starts threads for each block.
BLOCK = 2**10
LARGE = 2**16  # elements of an array that is worth a loop over blocks
COLLECTIVES_AT_ONCE = 8  # sharded leaves whose digests are computed at the same time, on CPU


def digests(leaves: Sequence[Any]) -> jax.Array | np.ndarray:
    """Return the digest of each of n leaves, and of these n numbers themselves: uint32 [n + 1].

    On the devices of the leaves; on the host if there are none, or not the same for all.
    """
    each = in_turn(_digest_of, leaves)
    places = {frozenset(x.sharding.device_set) for x in leaves if isinstance(x, jax.Array)}
    if len(places) == 1:
        return with_own_digest(each)
    return np.asarray(with_own_digest([np.asarray(digest) for digest in each]))


def in_turn(reduce: Callable[..., Any], leaves: Iterable[Any], *arguments: Any) -> list[Any]:
    """Return what a function makes of each leaf, which may be sharded.

    A sum over a sharded leaf is a collective. With some 80 of them in flight, XLA on CPU ends the
    process, because its few threads wait for each other. So every few of them are waited for.
    """
    results = []
    for i, leaf in enumerate(leaves):
        results.append(reduce(leaf, *arguments))
        if i % COLLECTIVES_AT_ONCE == 0 and any(map(_is_on_several_cpus, jax.tree.leaves(leaf))):
            jax.block_until_ready(results[-1])
    return results


def _is_on_several_cpus(leaf: Any) -> bool:
    devices = leaf.sharding.device_set if isinstance(leaf, jax.Array) else ()
    return len(devices) > 1 and next(iter(devices)).platform == "cpu"


def _digest_of(leaf: Any) -> Any:
    """Return the digest of a leaf, which may be a number or a string."""
    if not isinstance(leaf, jax.Array):
        return _digest_in_parts(leaf)
    x = _hashable(leaf)
    is_large = LARGE < x.size < 2**31  # positions in it are int32
    devices = leaf.sharding.device_set
    if is_large and len(devices) == 1 and next(iter(devices)).platform == "cpu":
        return _digest_in_blocks(x, BLOCK)
    return _digest(x)


def is_record(recorded: np.ndarray, size: int) -> bool:
    """Tell whether numbers are what `digests` returned of n leaves, uint32 [n + 1]."""
    if recorded.shape != (size + 1,) or recorded.dtype != np.uint32:
        return False
    return np.array_equal(with_own_digest(recorded[:-1]), recorded)


@jax.jit
def with_own_digest(each: Any) -> jax.Array:
    """Return some digests, followed by their own digest."""
    each = jnp.asarray(each)
    return jnp.append(each, _digest(each))


def _hashable(leaf: Any) -> Any:
    """Return a leaf as an array that jit takes without losing a bit."""
    if isinstance(leaf, jax.Array):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else in_memory(leaf)
    x = np.frombuffer(leaf.encode(), np.uint8) if isinstance(leaf, str) else np.asarray(leaf)
    if x.dtype.itemsize < 8:
        return x
    # JAX would cut 64-bit host values to 32 bits
    return np.ascontiguousarray(x)[..., None].view(np.uint32)


def _digest_in_parts(leaf: Any) -> np.ndarray:
    """Return the digest of a leaf on the host. A part of it is copied at a time."""
    x = _hashable(leaf).reshape(-1)
    parts = [
        int(_digest(x[start : start + ELEMENTS_AT_ONCE], np.uint32(start % 2**32)))
        for start in range(0, max(x.size, 1), ELEMENTS_AT_ONCE)
    ]
    return np.asarray(sum(parts) % 2**32, np.uint32)


@jax.jit
def _digest(x, start=0) -> jax.Array:
    return jnp.sum(_mixed(x, start), dtype=jnp.uint32)


def _mixed(x, start) -> jax.Array:
    """Return what each word of an array adds to its digest; the first one is at `start`."""
    words = _words(x)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        step = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * np.uint32(size % 2**32) + step
    return _mix(words + (position + start) * np.uint32(0x9E3779B9))


@partial(jax.jit, static_argnums=1)
def _digest_in_blocks(x: jax.Array, size: int) -> jax.Array:
    """Return the digest of a large array on a CPU.

    XLA on CPU does not mix and add up in one pass: it stores the mixed words of the whole array, in
    memory that it gets from the system. So all blocks are added to one block of sums, word by word,
    which is one pass at the speed of memory. A sum over each block would be a second pass.
    """
    flat = x.reshape(-1)
    whole, words = x.size // size, _words(flat[:1]).size

    def mixed(start: Any, elements: int) -> jax.Array:
        block = jax.lax.dynamic_slice(flat, (start,), (elements,))
        return _mixed(block, jnp.asarray(start).astype(jnp.uint32) * np.uint32(words))

    sums = jnp.zeros_like(mixed(0, size))
    sums = jax.lax.fori_loop(0, whole, lambda i, sums: sums + mixed(i * size, size), sums)
    total = jnp.sum(sums, dtype=jnp.uint32)
    rest = x.size - whole * size
    return total + jnp.sum(mixed(whole * size, rest), dtype=jnp.uint32) if rest else total


def _words(x) -> jax.Array:
    """Return the bits of an array as uint32."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize < 4):
        return x.astype(jnp.int32).view(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def digest_of_block(block: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """Return what a block adds to the digest of its array, modulo 2**32.

    Args:
        block: a part of the array, on the host.
        start: the position of its first element.
        shape: that of the whole array.
    """
    strides = np.ones(len(shape), np.uint64)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * np.uint64(shape[axis])
    first = int(np.asarray(start, np.uint64) @ strides) if len(shape) else 0
    of_axes = tuple(strides.astype(np.uint32))
    return int(_digest_at(_hashable(block), np.uint32(first % 2**32), of_axes))


@jax.jit
def _digest_at(x: jax.Array, first: jax.Array, strides: tuple[jax.Array, ...]) -> jax.Array:
    """Return the digest of words that are not all next to each other."""
    words = _words(x)
    own = words.shape[len(strides) :]  # of an element: two words of 64 bits, or of complex numbers
    position = jnp.full(words.shape, first, jnp.uint32)
    for axis, stride in enumerate(strides):
        step = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position + step * stride
    for axis, size in enumerate(own, len(strides)):
        step = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * np.uint32(size) + step
    return jnp.sum(_mix(words + position * np.uint32(0x9E3779B9)), dtype=jnp.uint32)
