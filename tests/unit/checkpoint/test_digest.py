"""The digest of a leaf: what changes it, and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import EVERY_KIND

from emaopt.checkpoint._digest import BLOCK, _digest_in_blocks, digest_of_block, digests


@pytest.mark.parametrize(
    "name", [n for n, leaf in EVERY_KIND.items() if isinstance(leaf, jax.Array)]
)
def test_every_flipped_bit_changes_the_digest(name):
    leaf = EVERY_KIND[name]
    raw = jax.random.key_data(leaf) if name == "key" else leaf
    host = np.asarray(raw)
    want = np.asarray(digests([leaf]))[0]
    bits = 1 if name == "bool" else 8
    for byte in range(host.nbytes):
        for bit in range(bits):
            flipped = host.copy()
            flipped.reshape(-1).view(np.uint8)[byte] ^= 1 << bit
            assert np.asarray(digests([jnp.asarray(flipped)]))[0] != want


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [2**22, 3])
def test_the_digest_is_that_of_the_value_wherever_it_is(at_once, monkeypatch):
    monkeypatch.setattr("emaopt.checkpoint._digest.ELEMENTS_AT_ONCE", at_once)
    on_device = [EVERY_KIND[n] for n in ("float32", "bfloat16", "int8", "complex64")]
    assert np.array_equal(digests(list(map(np.asarray, on_device))), digests(on_device))
    mesh = jax.make_mesh((4,), ("x",))
    for spec in ("x", None):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(spec))
        sharded = jax.device_put(EVERY_KIND["float32"], sharding)
        assert np.array_equal(digests([sharded]), digests([EVERY_KIND["float32"]]))
        mixed = [sharded, jnp.ones(3), 7]  # on four devices, on one, on none
        assert np.array_equal(digests(mixed), digests([EVERY_KIND["float32"], jnp.ones(3), 7]))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "complex64"])
@pytest.mark.parametrize("size", [12, 13])
def test_the_digest_in_blocks_is_that_of_the_whole(name, size, monkeypatch):
    leaf = jnp.resize(EVERY_KIND[name], (size,))
    leaf = leaf.reshape(3, 4) if size == 12 else leaf
    want = digests([leaf])
    monkeypatch.setattr("emaopt.checkpoint._digest.BLOCK", 4)
    monkeypatch.setattr("emaopt.checkpoint._digest.LARGE", 4)
    assert np.array_equal(digests([leaf]), want)


def test_the_digest_of_a_large_array_takes_little_memory():
    compiled = _digest_in_blocks.lower(jnp.zeros((2048, 1024)), BLOCK).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**16


def test_the_digest_sees_a_swap_of_two_elements():
    a, b = digests([jnp.asarray([1.0, 2.0])]), digests([jnp.asarray([2.0, 1.0])])
    assert a[0] != b[0]


@pytest.mark.many(4)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "complex64", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)])
def test_digests_of_blocks_add_up_to_that_of_the_array(dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(jnp.dtype(dtype))
    cuts = [(0, 2), (2, shape[-1])] if shape else []
    parts = [(array[..., a:b], [*[0] * (len(shape) - 1), a]) for a, b in cuts] or [(array, [])]
    total = sum(digest_of_block(part, start, shape) for part, start in parts)
    assert total % 2**32 == int(np.asarray(digests([array]))[0])
