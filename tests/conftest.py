"""JAX at its strictest, on eight CPU devices.

The environment is set before jax is imported: the number of devices is read only once.
"""

import os


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest


jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision, for this test only."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Mark most cases of a test with `many` cases as slow.

    The others are a diagonal through the parameters, in which each value stands once. Of a long
    diagonal, `many(n)` keeps n cases.
    """
    cases = {}
    for item in items:
        if item.get_closest_marker("many"):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for members in cases.values():
        seen = {axis: {} for axis in members[0].callspec.params}
        rows = [
            {axis: seen[axis].setdefault(id(x), len(seen[axis])) for axis, x in params.items()}
            for params in (item.callspec.params for item in members)
        ]
        longest = max(seen, key=lambda axis: len(seen[axis]))
        diagonal = [
            item
            for item, row in zip(members, rows, strict=True)
            if all(row[axis] == row[longest] % len(values) for axis, values in seen.items())
        ]
        (keep,) = members[0].get_closest_marker("many").args or (len(diagonal),)
        fast = diagonal[:: -(-len(diagonal) // keep)]
        for item in members:
            if item not in fast:
                item.add_marker(pytest.mark.slow)
