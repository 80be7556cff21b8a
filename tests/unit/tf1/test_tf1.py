"""TF1's checkpoints: what TensorFlow 1.15.5 wrote goes on here, and is written as it wrote it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import bitwise
from folders import CHECKPOINTS as GOLDEN

import emaopt
from emaopt import adam, average_name, ema, momentum


tf = pytest.importorskip("tensorflow")

from emaopt import tf1  # noqa: E402


RUNS = json.loads((GOLDEN / "runs.json").read_text())
FILES = ".index", ".data-00000-of-00001"


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(GOLDEN / "runs.npz"))


def transformation(run):
    kind, hyper = RUNS["runs"][run]
    name = {"GradientDescent": "gradient_descent"}.get(kind, kind.lower())
    return optax.chain(getattr(emaopt, name)(**hyper), ema(emaopt.warmup(RUNS["decay"])))


def stored(path):
    """All variables of a checkpoint."""
    reader = tf.train.load_checkpoint(str(path))
    return {n: np.asarray(reader.get_tensor(n)) for n in reader.get_variable_to_shape_map()}


def assert_same(got, want):
    """The same trees, bit for bit, and of arrays of the same type."""
    bitwise(got, want)
    assert [type(x) for x in jax.tree.leaves(got)] == [type(x) for x in jax.tree.leaves(want)]


def assert_same_bytes(a, b):
    for ending in FILES:
        assert (
            pathlib.Path(f"{a}{ending}").read_bytes() == pathlib.Path(f"{b}{ending}").read_bytes()
        )


def ramp(tree):
    """Every leaf at values of its own."""
    leaves, treedef = jax.tree.flatten(tree)
    new = [
        (jnp.arange(x.size).reshape(x.shape) / 7 + i + 1).astype(x.dtype)
        for i, x in enumerate(leaves)
    ]
    return treedef.unflatten(new)


MLP = {"mlp": {"dense": {"bias": jnp.zeros(4), "kernel": jnp.zeros((3, 4))}}}
MLP_NAMES = emaopt.names(MLP)
forms = pytest.mark.parametrize("swapped", [False, True], ids=["saver", "swapping_saver"])
runs = pytest.mark.parametrize("run", RUNS["runs"])


def load_run(run, swapped):
    tx = transformation(run)
    prefix = GOLDEN / (run + "_swapped" * swapped) / "model.ckpt-20"
    return tx, prefix, tf1.load(prefix, MLP, tx.init(MLP), swapped=swapped)


@pytest.mark.many(1)
@forms
@runs
def test_a_run_goes_on_as_in_tf1(run, swapped, arrays):
    tx, prefix, carry = load_run(run, swapped)
    grads = jax.tree.map(lambda n: jnp.asarray(arrays[f"grad/{n}"][20:]), MLP_NAMES)
    carry, _ = jax.lax.scan(lambda c, g: (emaopt.apply_gradients(tx, g, *c), None), carry, grads)
    names = jax.tree.leaves((MLP_NAMES, emaopt.names(carry[1])))
    assert set(names) == set(stored(prefix))
    for name, got in zip(names, jax.tree.leaves(carry), strict=True):
        want = arrays[f"{prefix.parent.name}/{name}"]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@forms
@runs
def test_what_was_loaded_is_saved_as_the_files_that_tf1_wrote(run, swapped, tmp_path):
    _, prefix, (params, opt_state) = load_run(run, swapped)
    tf1.save(tmp_path / "model.ckpt-20", params, opt_state, swapped=swapped)
    assert_same_bytes(tmp_path / "model.ckpt-20", prefix)


def test_swapped_names_hold_the_averages():
    _, _, (params, _) = load_run("adam", True)
    in_file = stored(GOLDEN / "adam_swapped")
    bias = params["mlp"]["dense"]["bias"]
    assert np.array_equal(bias, in_file[average_name("mlp/dense/bias")])
    assert not np.array_equal(bias, in_file["mlp/dense/bias"])


W = {"w": jnp.zeros(3), "b": jnp.zeros(2)}
COUNTED = {"w": jnp.zeros(3), "n": jnp.array(4)}
ADAM = optax.chain(adam(), ema(0.9))
ABSTRACT = jax.eval_shape(lambda: (W, ADAM.init(W)))
STATES = {
    "average alone": (W, ema(0.9)),
    "no state": (W, optax.identity()),
    "masked": (W, optax.chain(optax.masked(adam(), {"w": True, "b": False}), ema(0.9))),
    "averaged in part": (W, optax.chain(adam(), optax.masked(ema(0.9), {"w": True, "b": False}))),
    "partition": (
        W,
        optax.partition(
            {"one": ADAM, "two": optax.chain(adam(), ema(0.5))}, {"w": "one", "b": "two"}
        ),
    ),
    "MultiSteps": (W, optax.MultiSteps(ADAM, 2).gradient_transformation()),
    "apply_if_finite": (W, optax.apply_if_finite(ADAM, 3)),
    "inject_hyperparams": (W, optax.inject_hyperparams(momentum)(0.1, 0.9)),
    "optimizer of optax": (W, optax.chain(optax.adam(0.1), ema(0.9))),
    "integers": (COUNTED, ema(0.9)),
    "one array": (W["w"], ADAM),
    "half": ({"w": jnp.zeros(3, jnp.float16)}, ADAM),
    "bfloat16": ({"w": jnp.zeros(3, jnp.bfloat16)}, ADAM),
    "narrow average": (W, ema(0.9, accumulator_dtype=jnp.bfloat16)),
    "list": ([jnp.zeros(3), {"w": jnp.zeros(2)}, None], ADAM),
}


@pytest.mark.many(8)
@pytest.mark.parametrize(
    ("state", "swapped"),
    [(s, False) for s in STATES]
    + [(s, True) for s in STATES if s not in ("no state", "inject_hyperparams")],
)
def test_saving_and_loading_keeps_every_bit(state, swapped, tmp_path):
    params, tx = STATES[state]
    opt_state = tx.init(params)
    saved = jax.tree.map(
        lambda x, name: x if name == "global_step" or x.dtype == bool else ramp(x),
        (params, opt_state),
        (emaopt.names(params), emaopt.names(opt_state)),
    )
    if state == "integers":
        saved[1].shadow["n"] = saved[0]["n"]
    how = {"swapped": swapped, "rename": {"": "w"} if state == "one array" else None}
    tf1.save(tmp_path / "x", *saved, **how)
    assert_same(tf1.load(tmp_path / "x", params, opt_state, **how), saved)


def test_the_average_of_an_integer_is_its_variable(tmp_path):
    tf1.save(tmp_path / "x", COUNTED, ema(0.9).init(COUNTED))
    assert set(stored(tmp_path / "x")) == {"w", average_name("w"), "n", "global_step"}


def test_numpy_arrays_and_numbers_stay_what_they_are(tmp_path):
    params = {"w": np.arange(3.0), "n": 2, "x": 0.1, "yes": True}
    tf1.save(tmp_path / "x", params, ())
    like = {"w": np.zeros(3), "n": 0, "x": 0.0, "yes": False}
    assert_same(tf1.load(tmp_path / "x", like, ()), (params, ()))


def test_leaves_are_loaded_where_the_given_ones_are(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    sharded = jax.NamedSharding(mesh, jax.P("x"))
    tf1.save(tmp_path / "x", {"w": jnp.arange(4.0)}, ())
    real = jax.device_put(jnp.zeros(4), sharded)
    for like in (real, jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharded)):
        loaded = tf1.load(tmp_path / "x", {"w": like}, ())[0]["w"]
        assert loaded.sharding == sharded
        assert np.array_equal(loaded, np.arange(4))


def test_abstract_trees_are_enough(tmp_path):
    saved = ramp(W), ADAM.init(W)
    tf1.save(tmp_path / "x", *saved)
    assert_same(tf1.load(tmp_path / "x", *ABSTRACT), saved)


def test_what_is_loaded_can_be_donated(tmp_path):
    _, _, carry = load_run("adam", False)
    steps = [carry[1][0].step, carry[1][1].step]
    assert steps[0].unsafe_buffer_pointer() != steps[1].unsafe_buffer_pointer()


# what one checkpoint each has


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened_and_handed_back_where_no_bit_is_lost(dtype, tmp_path):
    tx = optax.chain(momentum(0.02, 0.8), ema(0.9))
    like = {"w": jnp.zeros(3, dtype)}
    params, opt_state = tf1.load(GOLDEN / dtype, like, tx.init(like))
    in_tf1 = stored(GOLDEN / dtype)
    assert np.array_equal(params["w"], in_tf1["w"])
    for slot in (opt_state[0].slots["momentum"]["w"], opt_state[1].shadow["w"]):
        assert slot.dtype == jnp.float32
    assert np.array_equal(opt_state[0].slots["momentum"]["w"], in_tf1["w/Momentum"].astype(float))
    tf1.save(tmp_path / "same", params, opt_state)
    assert_same_bytes(tmp_path / "same", GOLDEN / dtype / "model.ckpt-3")
    trained = emaopt.apply_gradients(tx, {"w": jnp.full(3, 0.3, dtype)}, params, opt_state)
    tf1.save(tmp_path / "trained", *trained)
    dtypes = {name: str(x.dtype) for name, x in stored(tmp_path / "trained").items()}
    assert dtypes["w"] == dtype
    assert dtypes["w/Momentum"] == dtypes[average_name("w")] == "float32"
    assert_same(tf1.load(tmp_path / "trained", like, tx.init(like)), trained)


@pytest.mark.usefixtures("x64")
def test_float64_keeps_its_values(tmp_path):
    tx = optax.chain(momentum(0.02, 0.8), ema(0.5))
    like = {"w": jnp.zeros(3, jnp.float64)}
    tf1.save(tmp_path / "x", *tf1.load(GOLDEN / "float64", like, tx.init(like)))
    assert_same_bytes(tmp_path / "x", GOLDEN / "float64" / "model.ckpt-3")


def test_partitioned_variables_are_joined_with_their_slots(arrays):
    like = {"w": jnp.zeros((5, 3))}
    params, opt_state = tf1.load(GOLDEN / "partitioned", like, ADAM.init(like))
    assert np.array_equal(params["w"], arrays["partitioned/w"])
    assert np.all(np.asarray(opt_state[0].slots["m"]["w"]) != 0)


def test_a_run_without_averages_is_loaded(arrays):
    params, opt_state = tf1.load(GOLDEN / "no_average", {"w": W["w"]}, adam().init({"w": W["w"]}))
    assert np.array_equal(params["w"], arrays["no_average/w"])
    assert opt_state.step == 3


@pytest.mark.parametrize("name", ["slow", "{}/slow", lambda variable: f"{variable}/slow"])
def test_averages_of_another_name_are_found_and_saved(name, arrays, tmp_path):
    like = {"w": W["w"]}
    loaded = tf1.load(GOLDEN / "other_name", like, ADAM.init(like), average_name=name)
    assert np.array_equal(loaded[1][1].shadow["w"], arrays["other_name/average"])
    tf1.save(tmp_path / "x", *loaded, average_name=name)
    assert_same_bytes(tmp_path / "x", GOLDEN / "other_name" / "model.ckpt-3")


def test_of_several_averages_the_one_named_is_swapped(tmp_path):
    tx = optax.named_chain(("fast", ema(0.5)), ("slower", ema(0.9)))
    params, opt_state = ramp(W), tx.init(W)
    opt_state["slower"] = ema(0.9).init(jax.tree.map(jnp.negative, params))
    tf1.save(tmp_path / "x", params, opt_state, swapped=True, name="slower")
    in_file = stored(tmp_path / "x")
    assert np.array_equal(in_file["w"], opt_state["slower"].shadow["w"])
    assert np.array_equal(in_file[average_name("w")], opt_state["fast"].shadow["w"])
    assert np.array_equal(in_file[average_name("w") + "_1"], params["w"])
    loaded = tf1.load(tmp_path / "x", W, tx.init(W), swapped=True, name="slower")
    assert_same(loaded, (params, opt_state))


# names


class Layers(nn.Module):
    """The network of the golden checkpoint `layers`."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3)(x))
        x = nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False, name="depthwise")(x)
        x = nn.relu(x).reshape(len(x), -1)
        x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(2)(x)


class Stem(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3)(x))


class Slim(nn.Module):
    """The network of the golden checkpoint `slim`."""

    @nn.compact
    def __call__(self, x):
        x = Stem(name="Stem")(x)
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, name="Separable")(x))
        return nn.Dense(2)(x.reshape(len(x), -1))


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("folder", "module", "rename"),
    [
        (
            "layers",
            Layers(),
            [
                *tf1.TF_LAYERS,
                tf1.depthwise("depthwise/kernel$", "depthwise/kernel", 2),
                ("^", "net/"),
            ],
        ),
        (
            "slim",
            Slim(),
            [
                tf1.depthwise("Separable/kernel$", "Separable/depthwise_weights", 2),
                *tf1.SLIM,
                ("^", "Net/"),
            ],
        ),
    ],
    ids=["layers", "slim"],
)
def test_linen_takes_over_a_network(folder, module, rename, swapped, arrays, tmp_path):
    images = jnp.asarray(arrays["images"])
    variables = dict(module.init(jax.random.key(0), images))
    tx = optax.chain(momentum(0.02, 0.8), ema(0.5))
    like = variables, tx.init(variables["params"])
    loaded, opt_state = tf1.load(GOLDEN / folder, *like, rename=rename)
    logits = module.apply(loaded, images)
    np.testing.assert_allclose(logits, arrays[f"{folder}/logits"], rtol=1e-5, atol=1e-5)
    tf1.save(tmp_path / "x", loaded, opt_state, rename=rename)
    assert_same_bytes(tmp_path / "x", GOLDEN / folder / "model.ckpt-3")
    tf1.save(tmp_path / "y", loaded, opt_state, rename=rename, swapped=swapped)
    again = tf1.load(tmp_path / "y", *like, rename=rename, swapped=swapped)
    assert_same(again, (loaded, opt_state))


LINEN = {"Dense_0": {"kernel": jnp.ones(2)}, "Dense_1": {"kernel": jnp.ones(3)}}


@pytest.mark.parametrize(
    "rename",
    [
        {"Dense_0/kernel": "dense/kernel", "Dense_1/kernel": "dense_1/kernel"},
        {"Dense_0/kernel": "dense/kernel", "Dense_1/kernel": "dense_1/kernel"}.__getitem__,
        [("Dense", "dense"), (r"dense_0", "dense")],
        tf1.TF_LAYERS,
    ],
    ids=["dict", "function", "rules", "ready rules"],
)
def test_slots_and_averages_follow_their_parameter(rename, tmp_path):
    tf1.save(tmp_path / "x", LINEN, ADAM.init(LINEN), rename=rename)
    ends = "", "/Adam", "/Adam_1", "/ExponentialMovingAverage"
    assert set(stored(tmp_path / "x")) == {
        "beta1_power",
        "beta2_power",
        "global_step",
        *(layer + "/kernel" + end for layer in ("dense", "dense_1") for end in ends),
    }


def test_a_dict_names_the_variables_of_a_state_too(tmp_path):
    params = {"w": W["w"]}
    rename = {"w": "v", "w/Adam": "v/AdamG", "global_step": "train/step"}
    tf1.save(tmp_path / "x", params, adam().init(params), rename=rename)
    expected = {"v", "v/AdamG", "v/Adam_1", "train/step", "beta1_power", "beta2_power"}
    assert set(stored(tmp_path / "x")) == expected
    assert stored(tmp_path / "x")["train/step"].dtype == np.int64


@pytest.mark.parametrize(
    ("rules", "name", "expected"),
    [
        (tf1.TF_LAYERS, "params/BatchNorm_0/scale", "batch_normalization/gamma"),
        (tf1.TF_LAYERS, "BatchNorm_2/bias", "batch_normalization_2/beta"),
        (tf1.TF_LAYERS, "batch_stats/BatchNorm_1/mean", "batch_normalization_1/moving_mean"),
        (tf1.TF_LAYERS, "Block_0/Conv_10/bias", "Block_0/conv2d_10/bias"),
        (tf1.TF_LAYERS, "bn1/bias", "bn1/beta"),
        (tf1.TF_LAYERS, "bn1/var", "bn1/moving_variance"),
        (tf1.TF_LAYERS, "cabin/bias", "cabin/bias"),
        (tf1.SLIM, "Conv_0/kernel", "Conv/weights"),
        (tf1.SLIM, "Conv_1/bias", "Conv_1/biases"),
        (tf1.SLIM, "Dense_0/kernel", "fully_connected/weights"),
        (tf1.SLIM, "Mixed_5b/Branch_0/Conv_0/kernel", "Mixed_5b/Branch_0/weights"),
        (tf1.SLIM, "Mixed_5b/Branch_0/BatchNorm_0/bias", "Mixed_5b/Branch_0/BatchNorm/beta"),
    ],
)
def test_a_ready_rule_makes_the_name(rules, name, expected, tmp_path):
    tf1.save(tmp_path / "x", {name: jnp.zeros(1)}, (), rename=rules)
    assert set(stored(tmp_path / "x")) == {expected}


# the files


@pytest.mark.parametrize("ending", FILES)
def test_a_file_of_a_checkpoint_means_the_checkpoint(ending):
    path = GOLDEN / "adam" / f"model.ckpt-20{ending}"
    assert tf1.inspect(path) == tf1.inspect(GOLDEN / "adam")


def test_the_older_format_is_read(arrays):
    params, _ = tf1.load(GOLDEN / "version_1", {"w": W["w"]}, adam().init({"w": W["w"]}))
    assert np.array_equal(params["w"], arrays["version_1/w"])


def test_a_directory_means_its_newest_checkpoint(tmp_path):
    for step in (1, 2):
        tf1.save(tmp_path / "run" / f"model.ckpt-{step}", {"w": jnp.full(2, float(step))}, ())
    (w,) = jax.tree.leaves(tf1.load(tmp_path / "run", {"w": jnp.zeros(2)}, ()))
    assert np.array_equal(w, [2, 2])
    state = tf.train.get_checkpoint_state(str(tmp_path / "run"))
    assert [pathlib.Path(p).name for p in state.all_model_checkpoint_paths] == [
        "model.ckpt-1",
        "model.ckpt-2",
    ]


def test_a_relative_path_means_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("model.ckpt-1", "run/model.ckpt-1"):
        tf1.save(path, {"w": jnp.ones(2)}, ())
    (tmp_path / "run").rename(tmp_path / "moved")
    assert tf1.inspect("moved")[0].name == "w"
    for folder in (tmp_path, tmp_path / "moved"):
        assert (folder / "checkpoint").read_text().splitlines() == [
            'model_checkpoint_path: "model.ckpt-1"',
            'all_model_checkpoint_paths: "model.ckpt-1"',
        ]


def test_inspect_says_what_a_variable_is_and_becomes():
    bias = "mlp/dense/bias"
    assert tf1.inspect(GOLDEN / "rmsprop_centered")[:6] == [
        ("global_step", (), "int64", "global step", "opt_state: step"),
        (bias, (4,), "float32", "variable", f"params: {bias}"),
        (average_name(bias), (4,), "float32", f"average of {bias}", f"opt_state: shadow/{bias}"),
        (f"{bias}/RMSProp", (4,), "float32", f"slot rms of {bias}", f"opt_state: slots/rms/{bias}"),
        (f"{bias}/RMSProp_1", (4,), "float32", f"slot mg of {bias}", f"opt_state: slots/mg/{bias}"),
        (
            f"{bias}/RMSProp_2",
            (4,),
            "float32",
            f"slot momentum of {bias}",
            f"opt_state: slots/momentum/{bias}",
        ),
    ]
    rows = {row.name: row for row in tf1.inspect(GOLDEN / "rmsprop")}
    assert rows[f"{bias}/RMSProp_1"].role == f"slot momentum of {bias}"
    power, *_ = tf1.inspect(GOLDEN / "adam")
    assert power == ("beta1_power", (), "float32", "power", "opt_state: powers/beta1_power")


def test_a_scope_around_the_optimizer_is_named_by_a_dict_and_seen_by_inspect(tmp_path):
    opt_state = ADAM.init(W)
    scoped = {name: f"train/{name}" for name in jax.tree.leaves(emaopt.names(opt_state))}
    saved = ramp(W), opt_state
    tf1.save(tmp_path / "x", *saved, rename=scoped)
    assert_same(tf1.load(tmp_path / "x", W, opt_state, rename=scoped), saved)
    found = {v.name: (v.role, v.becomes) for v in tf1.inspect(tmp_path / "x")}
    assert found["train/w/Adam_1"] == ("slot v of w", "opt_state: slots/v/w")
    assert found[f"train/{average_name('w')}"] == ("average of w", "opt_state: shadow/w")
    assert found["train/beta1_power"] == ("power", "opt_state: powers/beta1_power")
    assert found["train/global_step"] == ("global step", "opt_state: step")
    assert found["w"] == ("variable", "params: w")


def test_powers_of_several_optimizers_are_told_apart_by_a_dict(tmp_path):
    tx = optax.partition({"w": adam(), "b": adam(beta1=0.5)}, {"w": "w", "b": "b"})
    swap = {"beta1_power": "beta1_power_1", "beta1_power_1": "beta1_power"}
    tf1.save(tmp_path / "x", W, tx.init(W), rename=swap)
    assert stored(tmp_path / "x")["beta1_power"] == np.float32(0.9)
    assert stored(tmp_path / "x")["beta1_power_1"] == np.float32(0.5)


# what is wrong


@pytest.mark.parametrize(
    ("path", "params", "tx", "how", "messages"),
    [
        (
            "adam",
            MLP,
            ema(0.9),
            {},
            [
                "nothing was loaded",
                "mlp/dense/bias/Adam is not used: slot m of mlp/dense/bias",
                "beta1_power is not used: power",
                "emaopt.tf1.load_partial",
            ],
        ),
        (
            "adam",
            {"mlp": {"Dense": MLP["mlp"]["dense"]}},
            ADAM,
            {},
            [
                "mlp/Dense/bias is missing; close: mlp/dense/bias",
                "mlp/Dense/kernel/Adam_1 is missing; close: mlp/dense/kernel/Adam_1",
                "mlp/dense/kernel is not used: variable",
            ],
        ),
        (
            "adam",
            LINEN,
            optax.identity(),
            {"rename": [("Dense_0", "mlp/dense")]},
            [
                "mlp/dense/kernel (Dense_0/kernel here) has shape (3, 4) in the checkpoint",
            ],
        ),
        (
            "no_average",
            {"w": jnp.zeros(3)},
            ADAM,
            {},
            ["w/ExponentialMovingAverage is missing"],
        ),
        (
            "float64",
            {"w": jnp.zeros(3)},
            optax.chain(momentum(0.1, 0.9), ema(0.5)),
            {},
            [
                "w is float64 in the checkpoint, float32 here; jax_enable_x64 makes float64",
                "w/Momentum is float64 in the checkpoint, float32 here",
            ],
        ),
        (
            "float16",
            {"w": jnp.zeros(3, jnp.bfloat16)},
            optax.identity(),
            {},
            ["w is float16 in the checkpoint, bfloat16 here"],
        ),
        (
            "no_average",
            {"w": jnp.zeros(3, jnp.int32)},
            optax.identity(),
            {},
            ["w is float32 in the checkpoint, int32 here"],
        ),
        (
            "adam",
            MLP,
            ema(0.9, accumulator_dtype=jnp.bfloat16),
            {},
            [f"{average_name('mlp/dense/bias')} would lose bits: it is float32 in the checkpoint"],
        ),
        (
            "parts_by_name",
            {"w": jnp.zeros((5, 3))},
            optax.identity(),
            {},
            ["w is cut into w/part_0, ..., saved without their places"],
        ),
        ("nowhere/model.ckpt-1", W, ADAM, {}, ["is not a checkpoint of TF1", "Pass the prefix"]),
        (".", W, ADAM, {}, ["no file 'checkpoint' that names its newest"]),
        (
            "adam/model.ckpt-21",
            W,
            ADAM,
            {},
            ["is not a checkpoint of TF1", "It has ['model.ckpt-20']."],
        ),
    ],
)
def test_what_cannot_be_loaded_is_named(path, params, tx, how, messages):
    with pytest.raises(ValueError, match=r"^(checkpoint|path=)") as caught:
        tf1.load(GOLDEN / path, params, tx.init(params), **how)
    for message in messages:
        assert message in str(caught.value)


SWAPPED = emaopt.swap(W, ema(0.9).init(W))[1]
UNEQUAL = (adam().init(W), ema(0.9).init(W)._replace(step=jnp.array(5)))
BOTH = optax.named_chain(("fast", ema(0.5)), ("slower", ema(0.9))).init(W)


@pytest.mark.parametrize(
    ("params", "opt_state", "how", "message"),
    [
        (W, (), {"rename": lambda name: "x"}, "b and w would both be x"),
        (W, (), {"rename": {"w": "b"}}, "b and w would both be b"),
        (W, adam().init(W), {"rename": {"w": "b/Adam"}}, "w and b/Adam would both be b/Adam"),
        (W, adam().init(W), {"rename": {"w/Adam": "w"}}, "w and w/Adam would both be w"),
        (W, adam().init(W), {"rename": {"w": "global_step"}}, "w and global_step would both be"),
        (W, (), {"rename": {"kernel": "x"}}, "rename has 'kernel', which is not a name here"),
        (LINEN, (), {"rename": {"Dense0/kernel": "x"}}, "Did you mean 'Dense_0/kernel'"),
        (W, (), {"rename": lambda name: None}, "'b' would be None in TF1"),
        (W["w"], (), {}, "named '' would be '' in TF1"),
        (W, ema(0.9).init(W), {"average_name": lambda name: ""}, "would be '' in TF1"),
        (W, (), {"rename": ["w"]}, "is not a dict, a function or a list of rules"),
        (W, (), {"rename": [("(", "x")]}, "is not a dict, a function or a list of rules"),
        (W, (), {"rename": [("w", r"\1")]}, "is not a dict, a function or a list of rules"),
        (W, (), {"rename": 3}, "is not a dict, a function or a list of rules"),
        (
            {"w": jnp.zeros((3, 3, 2, 8))},
            (),
            {"rename": [tf1.depthwise("w", "w")]},
            "w has shape (3, 3, 2, 8); its rule in rename makes (3, 3, 8, 1)",
        ),
        ({"key": jax.random.key(0)}, (), {}, "key is a random key"),
        (W, UNEQUAL, {}, "global_step is one variable in TF1: it cannot be 0 and 5"),
        (*ABSTRACT, {}, "w is abstract: float32[3]"),
        (W, SWAPPED, {}, "opt_state is swapped already"),
        (W, adam().init(W), {"swapped": True}, "is not an average of opt_state"),
        (W, ema(0.9).init(W), {"swapped": True, "name": "slow"}, "name='slow' is not an average"),
        (W, BOTH, {"swapped": True}, "several averages. Pass name=, one of: 'fast', 'slower'"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(
    params, opt_state, how, message, tmp_path
):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message has parentheses)
        tf1.save(tmp_path / "x", params, opt_state, **how)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    params = {"a": W["w"], "b": W["w"], "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=r"both be a\n  key is a random key"):
        tf1.save(tmp_path / "x", params, (), rename={"b": "a"})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is a directory. Pass a prefix, such as .*/model.ckpt-20"),
        ("run/", "is a directory"),
        ("model.ckpt-1.index", r"ends like a file of a checkpoint. Pass the prefix, .*ckpt-1\."),
        ("model.ckpt-1.meta", "ends like a file of a checkpoint"),
        ("model.ckpt-1.data-00000-of-00001", "ends like a file of a checkpoint"),
        ("lr=[0.1]/model.ckpt-1", "takes that for a pattern"),
        ("model*", "takes that for a pattern"),
        ("other/model.ckpt-1", "other/checkpoint is not the file in which TF1 names its newest"),
    ],
)
def test_where_a_checkpoint_cannot_be_written_it_is_said_before(path, message, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoint").write_text("precious")
    with pytest.raises(ValueError, match=message):
        tf1.save(f"{tmp_path}/{path}", W, ())
    assert [file.name for file in tmp_path.rglob("*")] == ["other", "checkpoint"]
    assert (tmp_path / "other/checkpoint").read_text() == "precious"


@pytest.mark.parametrize("path", ["lr=[0.1]/adam", "lr=[0.1]/adam/model.ckpt-20", "a*?/x[1]"])
def test_a_checkpoint_is_read_where_the_path_has_a_bracket(path, tmp_path):
    shutil.copytree(GOLDEN / "adam", tmp_path / "lr=[0.1]/adam")
    (tmp_path / "a*?").mkdir()
    for ending in FILES:
        shutil.copy(GOLDEN / f"adam/model.ckpt-20{ending}", f"{tmp_path}/a*?/x[1]{ending}")
    like = MLP, transformation("adam").init(MLP)
    assert_same(tf1.load(tmp_path / path, *like), tf1.load(GOLDEN / "adam", *like))


@pytest.mark.parametrize("file", ["model.ckpt-20.index", "checkpoint"])
def test_a_pipe_in_place_of_a_file_is_refused(file, tmp_path):
    os.mkfifo(tmp_path / file)
    path = tmp_path if file == "checkpoint" else tmp_path / "model.ckpt-20"
    with pytest.raises(ValueError, match=f"{file} is not a file"):
        tf1.inspect(path)


@pytest.mark.parametrize("path", [None, 3, b"model.ckpt-1"])
def test_what_is_no_path_is_named(path):
    params = {"w": jnp.ones(2)}
    for call in (tf1.inspect, lambda p: tf1.save(p, params, ()), lambda p: tf1.load(p, params, ())):
        with pytest.raises(ValueError, match=r"path=.* is no path\. Pass a str or a pathlib\.Path"):
            call(path)


def test_a_deleted_array_is_named_and_nothing_is_written(tmp_path):
    params = {"w": jnp.ones(2), "v": jnp.ones(2)}
    params["v"].delete()
    with pytest.raises(RuntimeError, match="what is saved as 'v' is a deleted array: a step"):
        tf1.save(tmp_path / "model.ckpt-1", params, ())
    assert not list(tmp_path.iterdir())


def test_a_step_beyond_int32_is_refused(tmp_path):
    tf1.save(
        tmp_path / "x", {"global_step": np.int64(2**31)} | W, ema(0.9).init(W)._replace(step=())
    )
    with pytest.raises(ValueError, match="global_step would lose bits: it is int64"):
        tf1.load(tmp_path / "x", W, ema(0.9).init(W))


def test_an_integer_does_not_become_a_float(tmp_path):
    tf1.save(tmp_path / "x", {"n": np.int16(3)}, ())
    with pytest.raises(ValueError, match="n is int16 in the checkpoint, float32 here"):
        tf1.load(tmp_path / "x", {"n": jnp.zeros(())}, ())


def flipped(data):
    written = bytearray(data.read_bytes())
    written[-1] ^= 1
    data.write_bytes(written)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            flipped,
            r"mlp/dense/kernel/ExponentialMovingAverage cannot be read.*Checksum does not match",
        ),
        (lambda data: os.truncate(data, 100), r"mlp.* cannot be read.*\(IndexError: Read less"),
        (pathlib.Path.unlink, r"global_step cannot be read.*\(OpError: .* No such file"),
    ],
)
def test_damaged_data_is_named_with_its_variable_and_the_cause(damage, message, tmp_path):
    shutil.copytree(GOLDEN / "adam", tmp_path / "run")
    data = tmp_path / "run" / "model.ckpt-20.data-00000-of-00001"
    data.chmod(0o644)
    damage(data)
    with pytest.raises(ValueError, match=f"^checkpoint .*/run/model.ckpt-20: {message}"):
        tf1.load(tmp_path / "run", MLP, transformation("adam").init(MLP))


@pytest.mark.slow
def test_a_full_disk_is_named_as_the_cause(tmp_path):
    """The limit on the size of a file stands for the disk: both fail in the same place."""
    code = f"""
import resource, signal
import numpy as np
from emaopt import tf1
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
tf1.save({str(tmp_path / "x")!r}, {{"w": np.ones(10000)}}, ())
"""
    # what measures coverage could not write its own file either
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"OSError: {tmp_path}/x cannot be written: ")
    assert last.endswith("; File too large")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_stays_and_its_average_starts_as_the_parameter():
    like = {"w": jnp.full(3, 7.0), "more": jnp.ones(2)}
    opt_state = ema(0.9).init(jax.tree.map(jnp.zeros_like, like))
    params, opt_state, skipped = tf1.load_partial(GOLDEN / "no_average", like, opt_state)
    assert np.array_equal(params["more"], like["more"])
    assert np.array_equal(params["w"], stored(GOLDEN / "no_average")["w"])
    assert_same(opt_state.shadow, params)
    assert opt_state.step == 3
    assert skipped == {
        "more": "more is missing",
        average_name("more"): f"{average_name('more')} is missing; the average starts as more",
        average_name("w"): f"{average_name('w')} is missing; the average starts as w",
        "beta1_power": "beta1_power is not used: power",
        "beta2_power": "beta2_power is not used: power",
        "w/Adam": "w/Adam is not used: slot m of w",
        "w/Adam_1": "w/Adam_1 is not used: slot v of w",
    }


@pytest.mark.parametrize("abstract", [False, True])
def test_an_average_that_starts_anew_is_as_init_makes_it_of_the_parameters(abstract):
    tx = optax.named_chain(
        ("pair", ema(0.9, accumulator_dtype=emaopt.compensated(jnp.bfloat16))),
        ("half", ema(0.9, accumulator_dtype=jnp.bfloat16)),
    )
    w = {"w": W["w"]}
    like = w, jax.tree.map(lambda x: jnp.full_like(x, 9), tx.init(w))
    if abstract:
        like = jax.eval_shape(lambda: like)
    params, opt_state, _ = tf1.load_partial(GOLDEN / "no_average", *like)
    started = {name: state._replace(step=jnp.array(3)) for name, state in tx.init(params).items()}
    assert_same(dict(opt_state), started)
    assert (
        params["w"].unsafe_buffer_pointer()
        != (tf1.load_partial(GOLDEN / "no_average", params, ema(0.9).init(params))[1])
        .shadow["w"]
        .unsafe_buffer_pointer()
    )


def test_an_average_that_the_checkpoint_has_is_loaded(arrays):
    like = {"w": W["w"]}
    tx = optax.named_chain(("slow", ema(0.9)), ("new", ema(0.5)))
    how = {"average_name": "slow"}
    params, opt_state, skipped = tf1.load_partial(GOLDEN / "other_name", like, tx.init(like), **how)
    assert np.array_equal(opt_state["slow"].shadow["w"], arrays["other_name/average"])
    assert np.array_equal(opt_state["new"].shadow["w"], params["w"])
    assert skipped["w/slow_1"] == (
        f"w/slow_1 ({average_name('w')}_1 here) is missing; the average starts as w"
    )


def test_what_is_skipped_must_not_be_abstract():
    params = {"w": W["w"], "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(ValueError, match="b is abstract and would stay so: b is missing"):
        tf1.load_partial(GOLDEN / "no_average", params, ())


# handed back to the graph that it is from


def original(path, **changed):
    """A checkpoint of a program: an int32 step, half a slot, and what emaopt does not hold."""
    values = {
        "w": np.float32([1, 2]),
        "w/Momentum": np.float16([0.5, 1]),
        "global_step": np.int32(7),
        "bn/moving_mean": np.float64([3, 4]),
        "vocabulary": np.array([b"a", b"bc"], object),
    }
    values |= changed
    tf.raw_ops.SaveV2(
        prefix=str(path),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=[tf.constant(value) for value in values.values()],
    )
    return path


def in_original(values):
    return {name: (x.dtype, x.shape, x.tolist()) for name, x in values.items()}


def test_what_is_handed_back_has_the_names_shapes_and_dtypes_of_the_original(tmp_path):
    like = original(tmp_path / "model.ckpt-7")
    params = {"w": jnp.zeros(2)}
    tx = momentum(0.5, 0.5)
    params, opt_state, _ = tf1.load_partial(like, params, tx.init(params))
    tf1.save(tmp_path / "same", params, opt_state, like=like)
    assert in_original(stored(tmp_path / "same")) == in_original(stored(like))
    params, opt_state = emaopt.apply_gradients(tx, {"w": jnp.full(2, 2.0)}, params, opt_state)
    tf1.save(tmp_path / "next", params, opt_state, like=like)
    assert in_original(stored(tmp_path / "next")) == in_original(
        stored(like)
        | {
            "w": np.asarray(params["w"]),
            "w/Momentum": np.float16([2.25, 2.5]),
            "global_step": np.int32(8),
        }
    )


def test_a_new_average_is_written_beside_what_the_original_has(tmp_path):
    like = original(tmp_path / "model.ckpt-7")
    tx = optax.chain(momentum(0.1, 0.9), ema(0.9))
    params = {"w": jnp.zeros(2)}
    tf1.save(tmp_path / "x", params, tx.init(params), like=tmp_path / "model.ckpt-7")
    assert stored(tmp_path / "x").keys() - stored(like).keys() == {average_name("w")}


@pytest.mark.parametrize(
    ("params", "changed", "message"),
    [
        ({"weights": W["b"]}, {}, "weights is not in like="),
        ({"ww": W["b"]}, {}, "close: w"),
        ({"w": W["w"]}, {}, "w has shape (3,) here, (2,) in "),
        ({"w": W["b"] + 0.1}, {"w": np.float16([1, 2])}, "w would lose bits: it is float32 here"),
    ],
)
def test_what_cannot_be_handed_back_is_named(params, changed, message, tmp_path):
    like = original(tmp_path / "model.ckpt-7", **changed)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message has parentheses)
        tf1.save(tmp_path / "x", params, (), like=like)
    assert message in str(caught.value)
    assert "nothing was written" in str(caught.value)
    assert not list(tmp_path.glob("x*"))
