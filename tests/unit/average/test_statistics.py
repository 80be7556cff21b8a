"""Batch statistics for averaged parameters: averaged, copied, recalibrated."""

import functools

import batchnorm
import compiling
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import bitwise, close
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import emaopt


@pytest.mark.slow
@pytest.mark.parametrize("framework", batchnorm.MODELS)
def test_averaged_weights_lose_their_accuracy_and_recalibration_restores_it(framework):
    model = batchnorm.MODELS[framework]
    trained = batchnorm.train(
        model, seeds=2, learning_rate=0.5, weight_decay=0.02, epochs=15, start=3
    )
    accuracy = batchnorm.accuracies(model, trained)
    raw, copied, averaged, recalibrated = (np.mean(x) for x in accuracy.values())
    # over 160 runs: 0.52, 0.22, 0.21 and 0.89 in the mean, 0.75, 0.59, 0.58 and 0.82 at the worst
    assert copied < 0.6
    assert recalibrated > 0.8
    assert recalibrated > raw + 0.05
    assert recalibrated > max(copied, averaged) + 0.2


# one layer and the next, by hand


LAYERS = {"a": {"mean": 4, "var": 4}, "b": {"mean": 3, "var": 3}}
BATCHES = np.random.default_rng(0).normal(2.0, 3.0, (7, 16, 5)).astype(np.float32)
WEIGHTS = {
    "a": np.random.default_rng(1).normal(0.0, 0.5, (5, 4)).astype(np.float32),
    "b": np.random.default_rng(2).normal(0.0, 0.5, (4, 3)).astype(np.float32),
}


def left_by_training():
    return {
        layer: {name: jnp.full(n, 0.3 + i) for i, (name, n) in enumerate(leaves.items())}
        for layer, leaves in LAYERS.items()
    }


@functools.cache
def linen_forward(a=0.9, b=0.99, frozen=None):
    momenta = {"a": a, "b": b}

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            for layer, momentum in momenta.items():
                x = x @ WEIGHTS[layer]
                norm = linen.BatchNorm(layer == frozen, momentum=momentum, name=layer)
                x = linen.relu(norm(x))
            return x

    scale = {layer: {"scale": jnp.ones(n["mean"])} for layer, n in LAYERS.items()}
    bias = {layer: {"bias": jnp.zeros(n["mean"])} for layer, n in LAYERS.items()}
    params = {layer: scale[layer] | bias[layer] for layer in LAYERS}

    def forward(statistics, batch):
        variables = {"params": params, "batch_stats": statistics}
        return Network().apply(variables, batch, mutable=["batch_stats"])[1]["batch_stats"]

    return compiling.jit(forward)


def by_hand(statistics=None):
    """The means over the batches in float64; of frozen layers, their statistics are given."""
    x, found = BATCHES.astype(np.float64), {}
    for layer, weights in WEIGHTS.items():
        x = x @ weights
        mean, var = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
        found[layer] = {"mean": mean.mean((0, 1)), "var": var.mean((0, 1))}
        if statistics and layer in statistics:
            found[layer] = jax.tree.map(np.asarray, statistics[layer])
            mean, var = found[layer]["mean"], found[layer]["var"]
        x = np.maximum((x - mean) / np.sqrt(var + 1e-5), 0)
    return found


@pytest.mark.many(1)
@pytest.mark.parametrize(
    ("momentum", "rtol"), [(0.0, 2e-6), (0.9, 3e-6), (0.99, 6e-6), (0.999, 6e-5)]
)
def test_recalibrated_statistics_are_the_means_over_the_batches(momentum, rtol):
    # 1 - momentum in float32 is what limits it
    forward = linen_forward(0.9, momentum)
    got = emaopt.recalibrate(forward, left_by_training(), iter(BATCHES))
    close(got, by_hand(), rtol)
    assert compiling.compilations(forward) == 1


def test_they_are_the_statistics_of_pytorchs_update_bn():
    # torch 2.15.0: update_bn(BATCHES, Sequential(Linear, BatchNorm1d, ReLU, Linear, BatchNorm1d)),
    # without biases; its running variance is the unbiased one
    wanted = {
        "a": {
            "mean": [1.0374584197998047, 0.9755080938339233, -1.4733471870422363, 0.11105677485466],
            "var": [4.21804666519165, 2.2429566383361816, 3.2988007068634033, 5.56236457824707],
        },
        "b": {
            "mean": [-0.6459518671035767, 0.6265879273414612, 0.14975005388259888],
            "var": [0.5039539337158203, 0.3170948624610901, 0.12043263018131256],
        },
    }
    forward = linen_forward(0.9, 0.9)
    got = emaopt.recalibrate(forward, left_by_training(), BATCHES)
    for layer, leaves in wanted.items():
        np.testing.assert_allclose(got[layer]["mean"], leaves["mean"], rtol=5e-6)
        np.testing.assert_allclose(got[layer]["var"] * 16 / 15, leaves["var"], rtol=5e-6)


@pytest.mark.slow
def test_a_large_statistic_does_not_hide_the_momentum():
    batches = 1e3 * BATCHES
    forward = jax.jit(lambda old, batch: 0.99 * old + (1 - 0.99) * jnp.var(batch, axis=0))
    got = emaopt.recalibrate(forward, jnp.ones(5), batches)
    np.testing.assert_allclose(got, batches.var(1).mean(0), rtol=6e-6)


def test_what_training_left_does_not_matter():
    forward = linen_forward()
    poisoned = jax.tree.map(lambda x: x * jnp.nan, left_by_training())
    one, other = (emaopt.recalibrate(forward, s, BATCHES) for s in (left_by_training(), poisoned))
    bitwise(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["a", "b"])
def test_frozen_layers_are_kept_and_used_as_they_are(frozen):
    statistics = left_by_training()
    got = emaopt.recalibrate(linen_forward(frozen=frozen), statistics, BATCHES)
    np.testing.assert_array_equal(got[frozen]["var"], statistics[frozen]["var"])
    close(got, by_hand({frozen: statistics[frozen]}), 6e-6)


def test_a_momentum_of_one_keeps_what_is_there():
    got = emaopt.recalibrate(linen_forward(1.0, 0.9), left_by_training(), BATCHES)
    expected = by_hand() | {"a": left_by_training()["a"]}
    close(got, expected, 3e-6)


def test_nothing_of_the_callers_is_donated_or_changed():
    forward = linen_forward(1.0, 0.9)
    donating = jax.jit(forward.__wrapped__, donate_argnums=0)
    statistics = left_by_training()
    got = emaopt.recalibrate(donating, statistics, BATCHES)
    bitwise(got, emaopt.recalibrate(forward, statistics, BATCHES))
    # donating a buffer twice is an error
    jax.jit(lambda *both: both, donate_argnums=(0, 1))(got, statistics)


@pytest.mark.slow
def test_an_nnx_model_out_of_jit_is_left_alone():
    class Network(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=nnx.Rngs(0))

    network = Network()
    graphdef, params, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)

    def forward(statistics, batch):
        merged = nnx.merge(graphdef, params, statistics)
        merged.norm(batch)
        return nnx.state(merged, nnx.BatchStat)

    got = emaopt.recalibrate(forward, statistics, BATCHES)
    nnx.update(network, got)
    np.testing.assert_allclose(network.norm.mean[...], BATCHES.mean((0, 1)), rtol=3e-6)
    np.testing.assert_allclose(network.norm.var[...], BATCHES.var(1).mean(0), rtol=3e-6)


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_an_equinox_state_and_its_integers(mode):
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(5, "batch", mode=mode)
    norms = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    forward = jax.jit(lambda state, batch: norms(batch, state)[1])
    once = forward(state, BATCHES[0])
    flag, mean, var = jax.tree.leaves(emaopt.recalibrate(forward, once, BATCHES))
    assert flag == jax.tree.leaves(forward(once, BATCHES[0]))[0]
    np.testing.assert_allclose(mean, BATCHES.mean((0, 1)), rtol=6e-6)
    np.testing.assert_allclose(var, BATCHES.var(1).mean(0), rtol=6e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_statistics_stay_where_they_are_and_forward_is_compiled_once(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    statistics = {"mean": place(jnp.zeros(16), P("x")), "steps": place(jnp.int32(3), P())}
    batches = np.random.default_rng(0).normal(size=(3, 4, 16)).astype(np.float32)

    @compiling.jit
    def forward(old, batch):
        mean = 0.9 * old["mean"] + (1 - 0.9) * jnp.mean(batch, axis=0)
        return {"mean": mean, "steps": old["steps"] + 1}

    got = emaopt.recalibrate(forward, statistics, [place(x, P(None, "x")) for x in batches])
    assert compiling.compilations(forward) == 1
    assert got["mean"].sharding.is_equivalent_to(statistics["mean"].sharding, 1)
    assert got["steps"] == 4
    np.testing.assert_allclose(got["mean"], batches.mean((0, 1)), rtol=2e-6, atol=1e-7)


@pytest.mark.slow
def test_complex_and_double_statistics(x64):
    batches = np.random.default_rng(0).normal(size=(3, 4, 2))
    batches = jnp.asarray(batches + 1j * batches[::-1])
    forward = lambda old, batch: {
        "complex": 0.999 * old["complex"] + (1 - 0.999) * jnp.mean(batch, axis=0),
        "double": 0.999 * old["double"] + (1 - 0.999) * jnp.mean(batch.real, axis=0),
    }
    got = emaopt.recalibrate(
        forward, {"complex": jnp.zeros(2, complex), "double": jnp.zeros(2)}, batches
    )
    np.testing.assert_allclose(got["complex"], batches.mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(got["double"], batches.real.mean((0, 1)), rtol=1e-12)


# the other two policies


@pytest.mark.slow
def test_statistics_are_averaged_beside_the_parameters():
    mean = emaopt.moving_average(emaopt.power(0))
    forward = linen_forward(0.0, 0.0)
    update = jax.jit(lambda statistics, state: mean.update(statistics, state))
    statistics = left_by_training()
    state = mean.init(statistics)
    for batch in BATCHES:
        statistics = forward(statistics, batch)
        state = update(statistics, state)
    close(state.shadow, by_hand(), 2e-6)


VARIABLES = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.zeros(2)}}


def variables_after(average, steps=3):
    """One tree of parameters and statistics; the update of a statistic is new - old."""
    tx = optax.chain(optax.masked(optax.sgd(0.5), {"params": True, "batch_stats": False}), average)
    variables, opt_state = VARIABLES, tx.init(VARIABLES)
    for t in range(steps):
        updates = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.full(2, 2.0**t)}}
        updates, opt_state = tx.update(updates, opt_state, variables)
        variables = optax.apply_updates(variables, updates)
    return variables, emaopt.average(variables, opt_state)


def test_parameters_and_statistics_in_one_tree_are_averaged_together():
    variables, average = variables_after(emaopt.ema(emaopt.power(0)))
    np.testing.assert_array_equal(variables["params"]["w"], -0.5)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 7.0)
    np.testing.assert_allclose(average["params"]["w"], 0.0, atol=1e-7)
    np.testing.assert_allclose(average["batch_stats"]["mean"], (1 + 3 + 7) / 3, rtol=1e-6)


def test_a_mask_copies_the_newest_statistics():
    masked = optax.masked(emaopt.ema(emaopt.power(0)), emaopt.matching("^params/"))
    variables, average = variables_after(masked)
    np.testing.assert_array_equal(average["batch_stats"]["mean"], variables["batch_stats"]["mean"])
    np.testing.assert_allclose(average["params"]["w"], 0.0, atol=1e-7)


def test_each_collection_has_an_average_of_its_own():
    own = {"params": emaopt.ema(emaopt.power(0)), "batch_stats": emaopt.ema(0.5)}
    _, average = variables_after(optax.partition(own, {name: name for name in own}))
    np.testing.assert_allclose(average["params"]["w"], 0.0, atol=1e-7)
    np.testing.assert_array_equal(average["batch_stats"]["mean"], 0.5 * 7 + 0.25 * 3 + 0.125)


# what is refused


ONE = {"mean": jnp.zeros(2), "none": None}
X = jnp.ones((3, 4, 2))


def running(old, batch, **more):
    return {"mean": 0.5 * old["mean"] + 0.5 * jnp.mean(batch, axis=0), "none": None} | more


def refused(forward=running, statistics=ONE, batches=X):
    return lambda: emaopt.recalibrate(forward, statistics, batches)


def moved(f):
    return refused(lambda old, batch: running(old, batch) | {"mean": f(old["mean"], batch)})


REFUSED = {
    "no batch": (refused(batches=[]), "batches is empty"),
    "integers": (refused(statistics={"n": jnp.int32(1)}), "statistics has no floating-point leaf"),
    "halves": (
        refused(statistics={"mean": jnp.zeros(2, jnp.bfloat16), "none": None}),
        "statistics is bfloat16 at leaf 'mean'",
    ),
    "evaluation": (refused(lambda old, batch: old), "forward changes no floating-point leaf"),
    "structure": (
        refused(lambda old, batch: (batch, running(old, batch))),
        "forward returns the leaves 0, 1/mean, 1/none where statistics has mean, none",
    ),
    "nothing": (refused(lambda old, batch: {}), "forward returns the leaves of nothing"),
    "shape": (
        moved(lambda old, batch: old[:1]),
        r"forward\(statistics, batch\) has shape \(1,\) at leaf 'mean'",
    ),
    "counter": (moved(lambda old, batch: old + 1), "not a running average at leaf 'mean'"),
    "sum": (moved(lambda old, batch: old + batch[0]), "not a running average at leaf 'mean'"),
    "overshoot": (moved(lambda old, batch: -0.5 * old + 1), "not a running average at leaf 'mean'"),
    "growth": (moved(lambda old, batch: 1.5 * old + 1), "not a running average at leaf 'mean'"),
    "curved": (
        moved(lambda old, batch: 0.9 * old + 0.1 / jnp.sqrt(old**2 + 1)),
        "not a running average at leaf 'mean'",
    ),
    "not finite": (refused(batches=X / 0), "not finite at leaf 'mean'"),
    "not finite later": (refused(batches=[X[0], X[1] / 0]), "not finite at leaf 'mean'"),
}


@pytest.mark.many(7)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_running_average_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_statistics_that_the_forward_pass_uses_are_refused():
    networks = [eqx.nn.make_with_state(eqx.nn.BatchNorm)(5, "batch", mode="ema") for _ in "ab"]
    norms, states = zip(*networks, strict=True)

    def forward(states, batch):
        x, new = batch, []
        for norm, state in zip(norms, states, strict=True):
            over = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            x, state = over(jax.nn.relu(x), state)
            new.append(state)
        return tuple(new)

    states = forward(states, BATCHES[0])
    with pytest.raises(ValueError, match="statistics is not a running average at leaf '1/"):
        emaopt.recalibrate(jax.jit(forward), states, BATCHES)


def test_recalibrate_inside_jit_is_an_error():
    with pytest.raises(ValueError, match="forward returns traced values"):
        jax.jit(lambda statistics: emaopt.recalibrate(running, statistics, X))(ONE)
