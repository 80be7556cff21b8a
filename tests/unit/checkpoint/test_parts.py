"""Parts of arrays: their digests, and what is read of a file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath import Path
from orbax.checkpoint import v1 as ocp
from safetensors.flax import save_file

from emaopt.checkpoint._digest import digest_of_block, digests
from emaopt.checkpoint._item import Item, LeafError, _into_memory
from emaopt.checkpoint._safetensors import read_header


@pytest.mark.many(4)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "complex64", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)])
def test_digests_of_blocks_add_up_to_that_of_the_array(dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(jnp.dtype(dtype))
    cuts = [(0, 2), (2, shape[-1])] if shape else []
    parts = [(array[..., a:b], [*[0] * (len(shape) - 1), a]) for a, b in cuts] or [(array, [])]
    total = sum(digest_of_block(part, start, shape) for part, start in parts)
    assert total % 2**32 == int(np.asarray(digests([array]))[0])


def test_a_part_of_a_tensor_is_read(tmp_path):
    values = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.bfloat16(3)}
    save_file(values, tmp_path / "x.safetensors")
    path = Path(tmp_path / "x.safetensors")
    found = read_header(path).tensors
    part = found["a"].part((slice(1, 3), slice(2, 4)))
    np.testing.assert_array_equal(part, [[6, 7], [10, 11]])
    assert found["b"].part(()) == 3


def test_an_array_is_read_to_where_jax_leaves_it(tmp_path):
    """Of TensorStore's own arrays, which begin 16 bytes after a page, JAX on CPU makes a copy."""
    want = {f"w{i}": np.full((300, 70 + i), i, np.float32) for i in range(8)}
    ocp.save(tmp_path / "1", want, checkpointable_name="params")
    item = Item(Path(tmp_path / "1" / "params"))
    opened = item.open((name,) for name in want)
    for name, value in want.items():
        values, writing = _into_memory(opened[name,])
        writing.result()
        np.testing.assert_array_equal(values, value)
        assert jax.device_put(values).unsafe_buffer_pointer() == values.ctypes.data
        part, writing = _into_memory(opened[name,][100:200, 5:9])
        writing.result()
        np.testing.assert_array_equal(part, value[100:200, 5:9])


def test_an_array_is_opened_by_its_path(tmp_path):
    ocp.save(tmp_path / "1", {"w": np.arange(6.0)}, checkpointable_name="params")
    item = Item(Path(tmp_path / "1" / "params"))
    assert item.open([("w",)])[("w",)][2:4].read().result().tolist() == [2.0, 3.0]
    with pytest.raises(LeafError, match=r"^v$"):
        item.open([("v",)])
