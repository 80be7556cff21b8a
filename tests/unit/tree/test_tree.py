"""The tree conventions: absent leaves, names, widths, and what an error says of a mismatch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import emaopt
from emaopt._tree import checks, leaves, numbers, paths


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


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float8_e4m3fn", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
        ("complex64", "complex64"),
        ("int32", "float32"),
        ("bool", "float32"),
    ],
)
def test_state_is_float32_or_wider(dtype, wide):
    assert numbers.wide(jnp.dtype(dtype)) == jnp.dtype(wide)


@pytest.mark.parametrize(
    ("value", "inexact"),
    [
        (1.0, True),
        (np.float16(1), True),
        (jnp.ones((), jnp.bfloat16), True),
        (1j, True),
        (1, False),
        (True, False),
        (jax.random.key(0), False),
    ],
)
def test_what_can_be_averaged_is_inexact(value, inexact):
    assert numbers.is_inexact(value) is inexact


def test_a_traced_value_is_not_concrete():
    seen = []
    jax.jit(lambda x: seen.append(numbers.is_concrete(x)))(1.0)
    assert seen == [False]
    assert all(map(numbers.is_concrete, (1.0, np.ones(2), jnp.ones(2))))


def test_a_scalar_is_rounded_before_anything_is_computed_with_it():
    assert numbers.scalar(0.1, jnp.float32) == np.float32(0.1)
    assert numbers.scalar(0.999, jnp.bfloat16) == 1
    assert numbers.scalar(jnp.float32(0.1), jnp.float16).dtype == jnp.float16
    assert jax.jit(lambda x: numbers.scalar(x, jnp.float16))(0.1).dtype == jnp.float16


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
    ("leaf", "described"),
    [(jnp.zeros((2, 3)), "float32[2,3]"), (np.int8(1), "int8[]"), (2.0, "2.0")],
)
def test_a_leaf_is_described_by_dtype_and_shape(leaf, described):
    assert checks.describe(leaf) == described


def test_a_close_name_is_suggested_and_no_other():
    assert checks.did_you_mean("momentun", ["momentum", "rms"]) == " Did you mean 'momentum'?"
    assert checks.did_you_mean("accumulator", ["rms"]) == ""


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), jnp.float32(0.5), np.array([0.5, 1])])
def test_a_number_in_range_passes(value):
    checks.check("x", value, lambda x: x > 0, "a number above 0")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (-1.0, "-1.0"),
        (np.array([1, -1]), r"array\(\[ 1, -1\]\)"),
        (float("nan"), "nan"),
        ("1", "'1'"),
        (None, "None"),
        (jax.random.key(0), "Array"),
        (lambda t: t, "<function"),
    ],
)
def test_a_number_out_of_range_or_no_number_is_named_and_shown(value, found):
    with pytest.raises(
        ValueError, match=rf"(?s)^x={found}.*is out of range\. Pass a number above 0\."
    ):
        checks.check("x", value, lambda x: x > 0, "a number above 0")


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


def test_names_are_written_apart_or_not_at_all():
    deep = ("k",) * checks.DEEPEST
    paths_ = [("a", "b"), ("a.b",), ("a\nb", "["), deep]
    assert checks.written_names(paths_, range(4)) == ["a/b", "a.b", "a\nb/[", "/".join(deep)]
    with pytest.raises(ValueError, match=r"two leaves are named 'a\.b': 0 and 1.*a '\.' inside"):
        checks.written_names(paths_, range(4), separator=".")
    with pytest.raises(ValueError, match=r"257 levels deep, below 'k/k/k'; .* Flatten that part"):
        checks.written_names([(*deep, "k")], [0])


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
    assert checks.printable(name) == shown


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


def test_an_error_lists_a_few_names_of_many():
    many = {f"layer{i}": i for i in range(2000)}
    with pytest.raises(ValueError, match=r"only in first: layer0, layer1, .* and 1980 more\. Pass"):
        leaves.zip_leaves(first=many, second={})


def test_a_state_is_shown_by_dtypes_and_shapes():
    params = {"w": jnp.ones((2, 3)), "b": None}
    tx = optax.chain(emaopt.adam(), emaopt.ema(0.5, ledger=True))
    adam, average = tx.init(params)
    assert repr(adam) == (
        "OptimizerState(step=0, powers={beta1_power: 0.9, beta2_power: 0.999}, "
        "slots={m/b: None, m/w: float32[2,3], v/b: None, v/w: float32[2,3]})"
    )
    assert repr(average).startswith("EmaState(step=0, shadow={b: None, w: float32[2,3]}, ledger={")
    many = {f"layer{i:02}\n": jnp.ones(2) for i in range(12)}
    _, swapped = emaopt.swap(many, emaopt.ema(0.5).init(many))
    assert repr(swapped).startswith(r"SwappedEmaState(step=0, shadow={layer00\n: float32[2], ")
    assert r"layer07\n: float32[2], ... 4 more}" in repr(swapped)
    assert "step='global_step', shadow={b: None, w: 'w/Exp" in repr(emaopt.names(average))


def test_a_state_that_cannot_be_read_is_shown():
    state = emaopt.ema(0.5).init(jnp.ones(2))
    seen = []
    jax.jit(lambda s: seen.append(repr(s)))(state)
    assert seen == ["EmaState(step=int32[], shadow=float32[2])"]
    state.step.delete()
    assert repr(state) == "EmaState(step=int32[], shadow=float32[2])"
    assert repr(jax.eval_shape(lambda: emaopt.ema(0.5).init(jnp.ones(2)))) == seen[0]
