"""Leaves of several trees side by side, absent ones among them, and by their key paths."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import emaopt
from emaopt._tree import leaves


def test_leaves_side_by_side_may_be_absent_in_any_tree():
    rows, treedef = leaves.zip_leaves(a={"x": 1, "y": None}, b={"x": None, "y": 2})
    assert rows == [(1, None), (None, 2)]
    assert treedef.unflatten(["p", "q"]) == {"x": "p", "y": "q"}


def test_a_tree_beside_a_leaf_of_the_first_tree_is_given_whole():
    assert leaves.zip_leaves(a={"x": 1}, b={"x": {"deep": 2}})[0] == [(1, {"deep": 2})]


def test_tree_map_is_absent_where_the_first_tree_is():
    got = leaves.tree_map(lambda a, b: (a, b), a={"x": 1, "y": None}, b={"x": None, "y": 2})
    assert got == {"x": (1, None), "y": None}


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"x": 1}, "only in first: y."),
        ({"x": 1, "y": 2, "z": {"w": 3}}, "only in second: z/w."),
        ({"x": 1, "z": 2}, "only in first: y; only in second: z."),
        ([1, 2], "only in first: x, y; only in second: 0, 1."),
    ],
)
def test_a_mismatch_names_the_leaves_on_either_side(other, found):
    with pytest.raises(ValueError, match="second does not have the tree structure") as error:
        leaves.zip_leaves(first={"x": 1, "y": 2}, second=other)
    assert f"first: {found} Pass first and second" in str(error.value)


def test_a_mismatch_of_containers_with_the_same_names_says_which():
    with pytest.raises(ValueError, match=r"second does.*Expected tuple, got \[1, 2\]\. Pass"):
        leaves.zip_leaves(first=(1, 2), second=[1, 2])


@pytest.mark.parametrize("update", [None, np.zeros((), jax.dtypes.float0)])
def test_no_update_is_the_same_array(update):
    p = jnp.float32(-0.0)
    assert leaves.apply_update(p, update) is p


def test_a_key_is_not_updated():
    key = jax.random.key(0)
    assert leaves.apply_update(key, jnp.uint32(1)) is key


def test_an_update_is_rounded_as_optax_rounds_it():
    p, u = jnp.bfloat16(1), jnp.bfloat16(0.007)
    got = leaves.apply_update(p, u)
    assert got.dtype == jnp.bfloat16
    assert got == optax.apply_updates(p, u) == 1.0078125


def test_leaves_by_path_and_back():
    tree = {"conv": {"kernel": 1.0, "bias": None}, "scales": [2.0]}
    found = leaves.by_path(tree)
    assert found == {("conv", "bias"): None, ("conv", "kernel"): 1.0, ("scales", "0"): 2.0}
    assert leaves.leaves(tree) == [None, 1.0, 2.0]
    assert leaves.from_paths(tree, found) == tree
    doubled = {path: x and 2 * x for path, x in reversed(found.items())}
    assert leaves.from_paths(tree, doubled) == {
        "conv": {"kernel": 2.0, "bias": None},
        "scales": [4.0],
    }


@jax.tree_util.register_pytree_with_keys_class
class Alike:
    """A node whose two children have the same key."""

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.DictKey("a"), 1), (jax.tree_util.GetAttrKey("a"), 2)], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls()


def test_a_leaf_is_not_lost_under_the_path_of_another():
    with pytest.raises(ValueError, match=r"two leaves have the key path \('x', 'a'\)\. Rename"):
        leaves.by_path({"x": Alike()})


def test_map_leaves_makes_several_trees_at_once():
    seen = []

    def both(name, a, b):
        seen.append(name)
        return (a, b), None if a is None else name

    first, second = leaves.map_leaves(both, 2, a={"x": 1, "y": None}, b={"x": None, "y": 2})
    assert seen == ["x", "y"]
    assert first == {"x": (1, None), "y": (None, 2)}
    assert second == {"x": "x", "y": None}
    assert leaves.map_leaves(both, 2, a={}, b={}) == ({}, {})
    assert leaves.map_leaves(print, 0, a={}) == ()


def test_an_error_lists_a_few_names_of_many():
    many = {f"layer{i}": i for i in range(2000)}
    with pytest.raises(ValueError, match=r"only in first: layer0, layer1, .* and 1980 more\. Pass"):
        leaves.zip_leaves(first=many, second={})


@pytest.mark.parametrize(
    "step",
    [
        lambda p, u: emaopt.apply_gradients(optax.sgd(1.0), u, p, optax.sgd(1.0).init(p)),
        lambda p, u: emaopt.ema(0.5).update(u, emaopt.ema(0.5).init(p), p),
    ],
    ids=["apply_gradients", "ema"],
)
@pytest.mark.parametrize("shape", [(3,), (3, 2), (1,)])
def test_an_update_of_another_shape_is_named(step, shape):
    params = {"a": jnp.ones(1), "b": jnp.ones(2)}
    message = rf"updates has shape {re.escape(str(shape))} at leaf 'b' where params has \(2,\)"
    with pytest.raises(ValueError, match=message):
        step(params, {"a": jnp.ones(1), "b": jnp.ones(shape)})
