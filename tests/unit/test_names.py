"""Names: of parameters in any container, of TF1's variables in any state, of what to restore."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.linen import LogicallyPartitioned, Partitioned

import emaopt
from emaopt import (
    average_name,
    ema,
    global_step,
    matching,
    moving_average,
    names,
    slot,
    slot_names,
    variables_to_restore,
)
from emaopt._tree.paths import leaf_names


class Pair(NamedTuple):
    first: float
    value: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: float
    blocks: list


@jax.tree_util.register_pytree_node_class
class Opaque:
    """A node that does not say what its children are called."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Network(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Linear(2, 3, rngs=rngs)
        self.value = nnx.Param(jnp.zeros(2))
        self.drop = nnx.Dropout(0.5, rngs=rngs)


NETWORK = ["conv/bias", "conv/kernel", "value"]


def flat(tree):
    """The names in flattening order; the tree of names must have the structure of the tree."""
    named = names(tree)
    assert jax.tree.structure(named) == jax.tree.structure(tree)
    return jax.tree.leaves(named)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"conv": {"kernel": 1.0, "bias": 2.0}}, ["conv/bias", "conv/kernel"]),
        (FrozenDict({"params": {"w": 1.0}}), ["params/w"]),
        ([1.0, {"w": 2.0}, (3.0,)], ["0", "1/w", "2/0"]),
        (Pair(1.0, Pair(2.0, 3.0)), ["first", "value/first", "value/value"]),
        (Layer(1.0, [2.0, {"x": 3.0}]), ["weight", "blocks/0", "blocks/1/x"]),
        ({"a": Opaque(1.0, [2.0])}, ["a/0", "a/1/0"]),
        ({"value": 1.0, "a": {"value": 2.0}}, ["a/value", "value"]),
        ({1: 1.0, 2: 2.0}, ["1", "2"]),
        (nnx.state(Network(), nnx.Param), NETWORK),
        (nnx.to_pure_dict(nnx.state(Network(), nnx.Param)), NETWORK),
        (nnx.state(Network()), [*NETWORK[:2], "drop/rngs/count", "drop/rngs/key", "value"]),
        ({"a": 1.0, "b": None, "c": optax.MaskedNode()}, ["a"]),
        (1.0, [""]),
        (None, []),
        ({}, []),
    ],
)
def test_a_leaf_is_named_by_its_path(tree, expected):
    assert flat(tree) == expected


def test_an_absent_leaf_has_no_name():
    assert names({"a": None, "b": 1.0}) == {"a": None, "b": "b"}


def test_an_equinox_module_is_named_by_its_fields():
    model = eqx.filter(eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0)), eqx.is_array)
    layers = ["layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias"]
    assert flat(model) == layers
    assert flat(ema(0.5).init(model).shadow) == layers


@pytest.mark.parametrize("rest", [{}, {"absent": None}, {"state": ema(0.5).init(jnp.zeros(2))}])
def test_colliding_names_are_an_error_that_shows_both_leaves(rest):
    tree = {"a": {"b": jnp.zeros((2, 3))}, "a/b": np.int32(4), **rest}
    with pytest.raises(ValueError, match=r"'a/b': float32\[2,3\] and int32\[\]\. Rename"):
        names(tree)
    with pytest.raises(ValueError, match="two leaves are named 'a/b'"):
        matching("a")(tree)


PARAMS = {"b": jnp.zeros(1), "w": jnp.zeros(2)}
SLOTS = {
    "gradient_descent": (emaopt.gradient_descent(0.1), {}),
    "momentum": (emaopt.momentum(0.1, 0.9), {"momentum": "Momentum"}),
    "adagrad": (emaopt.adagrad(0.1), {"accumulator": "Adagrad"}),
    "adadelta": (emaopt.adadelta(), {"accum": "Adadelta", "accum_update": "Adadelta_1"}),
    "adam": (emaopt.adam(), {"m": "Adam", "v": "Adam_1"}),
    "ftrl": (emaopt.ftrl(0.1), {"accum": "Ftrl", "linear": "Ftrl_1"}),
    "rmsprop": (emaopt.rmsprop(0.1), {"rms": "RMSProp", "momentum": "RMSProp_1"}),
    "rmsprop_centered": (
        emaopt.rmsprop(0.1, centered=True),
        {"rms": "RMSProp", "mg": "RMSProp_1", "momentum": "RMSProp_2"},
    ),
}


@pytest.mark.parametrize("name", SLOTS)
def test_slots_have_tf1s_variable_names(name):
    tx, slots = SLOTS[name]
    # jit sorts the slots; their names must not follow
    for state in (tx.init(PARAMS), jax.jit(tx.init)(PARAMS)):
        named = names(state)
        assert named.step == "global_step"
        assert named.slots == {s: {k: f"{k}/{v}" for k in PARAMS} for s, v in slots.items()}
        powers = ("beta1_power", "beta2_power") if name == "adam" else ()
        assert named.powers == {power: power for power in powers}
        assert slot_names(state) == sorted(slots)


def test_an_average_has_tf1s_variable_name():
    state = ema(0.9).init(PARAMS | {"absent": None})
    average = {k: f"{k}/ExponentialMovingAverage" for k in PARAMS}
    assert names(state) == emaopt.EmaState("global_step", average | {"absent": None})
    swapped = emaopt.swap(PARAMS, ema(0.9).init(PARAMS))[1]
    assert names(swapped).shadow == average


ADAM = ["global_step", "beta1_power", "beta2_power", "b/Adam", "w/Adam", "b/Adam_1", "w/Adam_1"]
EMA = ["global_step", "b/ExponentialMovingAverage", "w/ExponentialMovingAverage"]


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.chain(emaopt.clip_by_norm(1.0), emaopt.adam(), ema(0.9)), [*ADAM, *EMA]),
        (optax.named_chain(("rule", emaopt.adam()), ("slow", ema(0.9))), [*ADAM, *EMA]),
        (
            optax.MultiSteps(optax.chain(emaopt.adam(), ema(0.9)), 2),
            ["mini_step", "gradient_step", *ADAM, *EMA, "acc_grads/b", "acc_grads/w"],
        ),
        (
            optax.masked(emaopt.adam(), {"b": False, "w": True}),
            ["global_step", "beta1_power", "beta2_power", "w/Adam", "w/Adam_1"],
        ),
        (
            optax.partition(
                {"x": emaopt.adagrad(0.1), "y": emaopt.momentum(0.1, 0.9)}, {"b": "x", "w": "y"}
            ),
            ["global_step", "b/Adagrad", "global_step", "w/Momentum"],
        ),
        (
            optax.apply_if_finite(emaopt.adam(), 1),
            ["notfinite_count", "last_finite", "total_notfinite", *ADAM],
        ),
        (
            optax.inject_hyperparams(emaopt.adagrad)(0.1),
            [
                "count",
                "hyperparams/initial_accumulator_value",
                "hyperparams/learning_rate",
                "global_step",
                "b/Adagrad",
                "w/Adagrad",
            ],
        ),
        (
            optax.chain(optax.trace(0.9), ema(0.9)),
            ["0/trace/b", "0/trace/w", *EMA],
        ),
        # TensorFlow 1.15's own names of two of each
        (
            optax.chain(emaopt.adam(), emaopt.adam()),
            [
                *ADAM,
                "global_step",
                "beta1_power_1",
                "beta2_power_1",
                "b/Adam_2",
                "w/Adam_2",
                "b/Adam_3",
                "w/Adam_3",
            ],
        ),
        (
            optax.named_chain(("fast", ema(0.9)), ("slow", ema(0.99))),
            [
                *EMA,
                "global_step",
                "b/ExponentialMovingAverage_1",
                "w/ExponentialMovingAverage_1",
            ],
        ),
    ],
    ids=lambda x: None if isinstance(x, list) else "",
)
def test_states_inside_of_optaxs_have_tf1s_variable_names(tx, expected):
    assert flat(tx.init(PARAMS)) == expected


def test_an_nnx_optimizer_has_tf1s_variable_names():
    tx = optax.chain(emaopt.momentum(0.1, 0.9), ema(0.9))
    state = nnx.Optimizer(Network(), tx, wrt=nnx.Param).opt_state
    assert jax.tree.leaves(names(state)) == [
        "global_step",
        *(f"{name}/Momentum" for name in NETWORK),
        "global_step",
        *(f"{name}/ExponentialMovingAverage" for name in NETWORK),
    ]
    assert slot_names(state) == ["momentum"]
    assert global_step(state) == 0


def test_average_name_needs_no_average():
    assert average_name("conv/kernel") == "conv/kernel/ExponentialMovingAverage"


@pytest.mark.parametrize("centered", [False, True])
def test_a_slot_is_a_tree_like_the_parameters(centered):
    tx = optax.chain(emaopt.clip_by_norm(1.0), emaopt.rmsprop(0.1, centered=centered), ema(0.9))
    state = optax.MultiSteps(tx, 2).init(PARAMS)
    assert slot_names(state) == (["mg"] if centered else []) + ["momentum", "rms"]
    got = slot(state, "rms")
    jax.tree.map(np.testing.assert_array_equal, got, {"b": np.ones(1), "w": np.ones(2)})


def test_slots_of_two_optimizers_are_listed_once():
    state = optax.chain(emaopt.rmsprop(0.1), emaopt.momentum(0.1, 0.9)).init(PARAMS)
    assert slot_names(state) == ["momentum", "rms"]
    assert slot_names(emaopt.gradient_descent(0.1).init(PARAMS)) == []


def test_global_step_is_the_optimizers_else_the_averages():
    tx = optax.chain(ema(0.9), emaopt.gradient_descent(0.1))
    average, optimizer = tx.init(PARAMS)
    optimizer = optimizer._replace(step=jnp.int32(7))
    assert global_step((average, optimizer)) == 7
    assert global_step({"any": average._replace(step=jnp.int32(3))}) == 3
    assert global_step(average).dtype == jnp.int32


TOY = {"v1": jnp.float32(1), "v2": jnp.float32(2), "step": jnp.int32(0)}
V1, V2, V3, STEP = (f"{name}/ExponentialMovingAverage" for name in ("v1", "v2", "v3", "step"))


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, {"step": "step", V1: "v1", V2: "v2", V3: V3}),
        (["step"], {STEP: "step", "v1": "v1", V1: V1, "v2": "v2", V3: V3}),
        (["v2"], {"step": "step", "v1": "v1", V1: V1, V2: "v2", V3: V3}),
        (iter(["v1"]), {"step": "step", V1: "v1", "v2": "v2", V3: V3}),
    ],
)
def test_variables_to_restore_are_tf1s(chosen, expected):
    state = moving_average(0.9).init({"v1": TOY["v1"], "v3": jnp.float32(3)})
    assert variables_to_restore(TOY, state, chosen) == expected


def test_variables_to_restore_hold_the_slots_and_the_global_step_of_an_optimizer():
    state = optax.chain(emaopt.momentum(0.1, 0.9), ema(0.9)).init({"v1": TOY["v1"]})
    assert variables_to_restore(TOY, state) == {
        V1: "v1",
        V2: "v2",
        "step": "step",
        "global_step": "global_step",
        "v1/Momentum": "v1/Momentum",
    }
    assert variables_to_restore(TOY | {"global_step": 7})["global_step"] == "global_step"


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("kernel$", {"conv/kernel"}),
        ("^conv/", {"conv/kernel", "conv/bias"}),
        ("r", {"conv/kernel", "norm/scale"}),
        ("", {"conv/kernel", "conv/bias", "norm/scale"}),
    ],
)
def test_matching_is_a_mask_of_the_names_in_which_the_pattern_is_found(pattern, chosen):
    tree = {"conv": {"kernel": 1.0, "bias": 2.0}, "norm": {"scale": 3.0}, "absent": None}
    mask = matching(pattern)(tree)
    assert mask["absent"] is None
    assert dict(zip(flat(tree), jax.tree.leaves(mask), strict=True)) == {
        name: name in chosen for name in ("conv/bias", "conv/kernel", "norm/scale")
    }


@pytest.mark.parametrize(
    "tree",
    [
        {"conv": {"kernel": 1.0, "bias": 2.0}},
        {"conv": Partitioned(1.0, ("a",)), "bias": None},
        {f"layer{i}": 1.0 for i in range(9)},
    ],
)
def test_a_mask_that_is_true_nowhere_is_an_error_that_shows_names(tree):
    first = flat(tree)[0]
    with pytest.raises(ValueError, match=rf"pattern='karnel' is found in no .*: '{first}'"):
        matching("karnel")(tree)
    assert matching(first)(tree)


@pytest.mark.parametrize("absent", [None, optax.MaskedNode()])
def test_a_pattern_of_what_is_masked_out_or_absent_is_no_mistake(absent):
    tree = {"conv": {"kernel": absent, "bias": 2.0}}
    mask = matching("kernel$")(tree)
    assert mask["conv"]["bias"] is False
    assert jax.tree.leaves(mask) == [False]
    assert matching("kernel$")({}) == {}
    # one label of optax.partition sees the leaves of the others masked out
    tx = optax.masked(optax.masked(optax.trace(0.9), matching("^w$")), matching("^b$"))
    assert jax.tree.leaves(tx.init(PARAMS)) == []


@dataclasses.dataclass
class Box:
    """What a framework puts around one array; each class below is registered in another way."""

    child: Any

    def tree_flatten(self):
        return (self.child,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class Nameless(Box):
    """As haliax registers its NamedArray: without a name for the array."""


class Array(Box):
    """A class with the attributes of an array."""

    shape = property(lambda self: self.child.shape)
    dtype = property(lambda self: self.child.dtype)


class Unboxed(Box):
    """A class with the method of Linen's boxes."""

    def unbox(self):
        return self.child


class Module(Box):
    """A module with one array."""


class Scale(Module):
    """A module of a framework, with one array of that name."""


class Alone(Box):
    """Anything else with one child."""


for kind, field in ((Array, "data"), (Unboxed, "data"), (Scale, "value"), (Alone, "data")):
    jax.tree_util.register_pytree_with_keys(
        kind,
        lambda box, field=field: ([(jax.tree_util.GetAttrKey(field), box.child)], None),
        lambda _, children, kind=kind: kind(*children),
    )


class Embedding(eqx.Module):
    value: jax.Array


@pytest.mark.many(9)
@pytest.mark.parametrize(
    ("node", "name"),
    [
        (Partitioned(1.0, ("a",)), "w"),
        (LogicallyPartitioned(1.0, ("a",)), "w"),
        (LogicallyPartitioned(Partitioned(1.0, ("a",)), ("a",)), "w"),
        (nnx.Param(jnp.zeros(2)), "w"),
        (nnx.BatchStat(jax.ShapeDtypeStruct((2,), jnp.float32)), "w"),
        (Nameless(1.0), "w"),
        (Array(1.0), "w"),
        (Unboxed(1.0), "w"),
        (Alone(1.0), "w/data"),
        (Scale(1.0), "w/value"),
        (Embedding(jnp.zeros(2)), "w/value"),
        (eqx.nn.Embedding(2, 3, key=jax.random.key(0)), "w/weight"),
        (Partitioned({"a": 1.0}, ("a",)), "w/value/a"),
        (Nameless([1.0]), "w/0/0"),
        ({"value": 1.0}, "w/value"),
        (FrozenDict({"value": 1.0}), "w/value"),
        (nnx.State({"value": nnx.Param(1.0)}), "w/value"),
        ([1.0], "w/0"),
        (emaopt.pack({"a": jnp.zeros(2)}), None),
    ],
)
def test_a_name_sees_through_what_stands_for_one_array(node, name):
    if name is None:  # packed: names are refused, but its array keeps its own
        assert leaf_names({"w": node})[0].startswith("w/float32_")
        return
    assert flat({"w": node}) == [name]
    assert jax.tree.leaves(matching(f"^{name}$")({"w": node, "b": 2.0})) == [False, True]
    assert leaf_names({"w": node}) == [name]


@pytest.mark.parametrize("box", [lambda x: Partitioned(x, ("a",)), Nameless, nnx.Param])
def test_boxed_parameters_are_masked_averaged_and_named_as_bare_ones(box):
    bare = {"norm": {"scale": jnp.ones(2)}, "dense": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    boxed = {layer: {k: box(x) for k, x in leaves.items()} for layer, leaves in bare.items()}
    boxed["norm"]["scale"] = bare["norm"]["scale"]  # as in Linen, some are not boxed
    tx = optax.chain(
        optax.masked(optax.add_decayed_weights(1.0), matching("kernel$")),
        emaopt.momentum(0.5, 0.9),
        optax.masked(ema(0.5), matching("kernel$|scale$")),
    )

    def train(params):
        grads = jax.tree.map(jnp.zeros_like, params)
        return emaopt.apply_gradients(tx, grads, params, tx.init(params))

    (p, s), (q, t) = train(bare), train(boxed)
    np.testing.assert_array_equal(jax.tree.leaves(p), jax.tree.leaves(q))
    assert jax.tree.leaves(names(s)) == jax.tree.leaves(names(t))
    averaged = emaopt.average(q, t)
    assert jax.tree.structure(averaged) == jax.tree.structure(q)
    np.testing.assert_array_equal(jax.tree.leaves(emaopt.average(p, s)), jax.tree.leaves(averaged))
    np.testing.assert_array_equal(averaged["norm"]["scale"], [1.0, 1.0])
    assert jax.tree.leaves(averaged["dense"]["kernel"])[0][0] == 0.75  # of 1 and 0.5
    # either form of the parameters goes with either form of the state
    np.testing.assert_array_equal(
        jax.tree.leaves(emaopt.average(p, t)), jax.tree.leaves(emaopt.average(q, s))
    )


def test_matching_is_a_mask_for_optax():
    tx = optax.masked(ema(0.5), matching("^w$"))
    state = tx.init(PARAMS)
    assert jax.tree.leaves(names(state)) == ["global_step", "w/ExponentialMovingAverage"]


def test_variables_to_restore_hold_the_step_of_an_average_unless_params_has_one():
    params = {"v1": 1.0, "v2": 2.0}
    state = moving_average(0.9).init({"v1": 1.0, "v3": 3.0})
    assert variables_to_restore(params, state) == {
        V1: "v1",
        V2: "v2",
        V3: V3,
        "global_step": "global_step",
    }
    assert "global_step" not in variables_to_restore(params | {"step": 7}, state)
    averaged = variables_to_restore(params, state, ["global_step"])
    assert averaged["global_step/ExponentialMovingAverage"] == "global_step"
