"""One item on disk: its arrays, opened and read."""

import jax
import numpy as np
import pytest
from etils.epath import Path
from orbax.checkpoint import v1 as ocp

from emaopt.checkpoint._item import Item, LeafError, _into_memory


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


@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_place_in_a_cloud_is_an_address(ocdbt, run):
    item = Item(Path(run / "3" / "params"))
    item.directory, item._ocdbt = "gs://bucket/run/3/params", ocdbt
    base = "gs://bucket/run/3/params/"
    inside = {"driver": "ocdbt", "base": base, "path": "a.b/"}
    assert item._kvstore(("a", "b")) == (inside if ocdbt else f"{base}a.b/")
