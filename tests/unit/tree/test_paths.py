"""The names of leaves, and what `name=` means."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from emaopt._tree import paths


def test_only_the_key_of_a_variables_own_value_is_left_out_of_its_name():
    state = nnx.State({"value": nnx.Param(jnp.zeros(1)), "raw": {"value": jnp.zeros(1)}})
    assert paths.leaf_names(state) == ["raw/value", "value"]


class Unnamed:
    """A key of a kind that JAX does not know."""

    def __str__(self):
        return "[?]"


def test_a_step_of_a_path_is_its_key_position_or_field():
    keys = jax.tree_util
    steps = (keys.DictKey("a"), keys.SequenceKey(1), keys.GetAttrKey("b"), Unnamed())
    assert [*map(paths.key_name, steps)] == ["a", "1", "b", "[?]"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("conv/kernel [0]", "conv/kernel [0]"),
        ("größe/日本", "größe/日本"),
        ("\x1b[31mred\x07\nb\tc\0", r"\x1b[31mred\x07\nb\tc\x00"),
        ("\u202eright to left\x9b", r"\u202eright to left\x9b"),
        ("\udce9", r"\udce9"),
    ],
)
def test_an_unprintable_character_is_escaped(name, shown):
    assert paths.printable(name) == shown


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("1", [0]),  # the path that is the name goes before those that have it
        ("fast", [1, 2]),
        ("gen/fast", [1]),
        ("gen", [1]),
        ("disc", [2, 3]),
        ("x/1", [4]),  # the wrapper's own field between
        ("inner_state/1", [4]),
        ("fast/gen", []),
        ("fas", []),
        ("disc/fast/slow", []),
        ("", []),
    ],
)
def test_a_name_means_the_paths_that_have_its_steps_in_this_order(name, meant):
    there = [
        ("1",),
        ("gen", "fast"),
        ("disc", "fast"),
        ("disc", "slow"),
        ("inner_states", "x", "inner_state", "1"),
    ]
    assert paths.called(name, there) == [there[i] for i in meant]
