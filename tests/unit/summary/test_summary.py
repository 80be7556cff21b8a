"""`emaopt.summary`: what the scalars say, and what TensorBoard reads back of a file."""

import functools
import sys
from importlib.util import find_spec

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import emaopt
from emaopt import summary


PARAMS = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]]), "n": jnp.array([7])}
GRADS = {"a": jnp.array([0.0, 3.0]), "b": jnp.array([[4.0]]), "n": None}
RATE = emaopt.exponential_decay(0.5, decay_steps=1, decay_rate=0.5)
DECAY = emaopt.warmup(0.9)
FLOATS = {"a": True, "b": True, "n": False}

if find_spec("tensorboardX"):
    import eventfile

needs_writer = pytest.mark.skipif(find_spec("tensorboardX") is None, reason="needs tensorboardX")
needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")


def trained(tx, updates=1, params=PARAMS, grads=GRADS):
    opt_state = tx.init(params)
    for _ in range(updates):
        params, opt_state = emaopt.apply_gradients(tx, grads, params, opt_state)
    return params, opt_state


def on_floats(optimizer):
    return optax.masked(optimizer, FLOATS)


def floating(*trees):
    return [{name: tree[name] for name in ("a", "b")} for tree in trees]


def told(*args, **kwargs):
    return {tag: float(x) for tag, x in summary.scalars(*args, **kwargs).items()}


def test_the_state_tells_its_step_norms_and_distance():
    tx = optax.chain(on_floats(emaopt.momentum(0.0, 0.9)), emaopt.ema(0.5))
    _, opt_state = trained(tx)
    moved = {**PARAMS, "a": jnp.array([3.0, 6.0]), "b": jnp.array([[12.0]])}
    assert told(moved, opt_state) == {
        "global_step": 1,
        "params/norm": pytest.approx(189**0.5),
        "slots/momentum": 5,
        "average/distance": 10,
    }


def test_slots_of_several_optimizers_count_together():
    kinds = {"a": "x", "b": "y", "n": "z"}
    each = {"x": emaopt.momentum(0.1, 0.9), "y": emaopt.momentum(0.1, 0.9), "z": optax.identity()}
    assert told(*trained(optax.partition(each, kinds)))["slots/momentum"] == 5


def test_several_averages_have_their_names():
    tx = optax.named_chain(
        ("fast", emaopt.ema(0.5, ledger=True)), ("slow", emaopt.ema(0.75)), ("none", optax.sgd(0.1))
    )
    found = told(*trained(tx, 2), decay={"slow": 0.75})
    ledger = {f"average/fast/{x}" for x in ("effective_window", "mean_age")}
    assert ledger <= found.keys()
    assert found["average/fast/initial_weight"] == 0.25
    assert {tag for tag in found if tag.startswith("average/slow")} == {
        "average/slow/distance",
        "average/slow/decay",
    }


def test_a_leaf_without_an_average_is_at_no_distance():
    tx = optax.masked(emaopt.ema(0.5), {"a": True, "b": False, "n": False})
    moved = {"a": PARAMS["a"] + 2, "b": PARAMS["b"] + 100, "n": PARAMS["n"]}
    assert told(moved, tx.init(PARAMS))["average/distance"] == pytest.approx(8**0.5)


def test_the_distance_is_not_rounded_to_the_dtype_of_the_parameters():
    params = {"w": jnp.ones(1, jnp.bfloat16)}
    state = emaopt.ema(0.5).init(params)._replace(shadow={"w": jnp.array([1 + 2.0**-12])})
    assert told(params, state)["average/distance"] == 2.0**-12


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_learning_rate_and_decay_are_those_of_the_last_update(updates):
    tx = optax.chain(on_floats(emaopt.gradient_descent(RATE)), emaopt.ema(DECAY))
    before, after = trained(tx, updates - 1), trained(tx, updates)
    found = told(*after, learning_rate=RATE, decay=DECAY)
    rate = (before[0]["b"] - after[0]["b"]) / GRADS["b"]
    assert found["learning_rate"] == pytest.approx(rate.item())
    old, new = (emaopt.average(*each)["b"] for each in (before, after))
    kept = (new - after[0]["b"]) / (old - after[0]["b"])
    assert found["average/decay"] == pytest.approx(kept.item(), rel=1e-5)


def test_before_the_first_update_learning_rate_and_decay_are_those_of_the_first():
    start = (
        PARAMS,
        optax.chain(on_floats(emaopt.gradient_descent(RATE)), emaopt.ema(DECAY)).init(PARAMS),
    )
    found = told(*start, learning_rate=RATE, decay=DECAY)
    assert (found["learning_rate"], found["average/decay"]) == (0.5, pytest.approx(2 / 11))


def test_numbers_are_passed_through_and_absent_ones_left_out():
    found = told(
        *trained(emaopt.ema(0.5)), learning_rate=0.1, decay=0.5, loss=jnp.array(2), accuracy=None
    )
    assert found["learning_rate"] == pytest.approx(0.1)
    assert (found["average/decay"], found["loss"]) == (0.5, 2)
    assert "accuracy" not in found


def sum_to(norm):
    return {"a": jnp.array([0.6, 0.0]) * norm, "b": jnp.array([[0.8]]) * norm, "n": None}


@pytest.mark.many(1)
@pytest.mark.parametrize(
    "clip",
    [
        emaopt.clip_by_global_norm(49.0),
        emaopt.clip_by_norm(39.2),
        emaopt.clip_by_average_norm(39.2),
        emaopt.clip_by_value(-39.2, 39.2),
        optax.clip_by_global_norm(49.0),
        optax.clip(39.2),
    ],
    ids=["global_norm", "norm", "average_norm", "value", "optax_global_norm", "optax_value"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_counts_as_clipped_if_more_than_rounding_changed_it(clip, dtype):
    of = lambda grads: told(*trained(emaopt.ema(0.5)), grads=grads, clip=clip)
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    for norm in 5, 15, 38, 48.5:  # 49 * (1 / 49) is not 1
        found = of(cast(sum_to(norm)))
        assert found["gradients/clipped"] == 0
        assert found["gradients/clipped_norm"] == pytest.approx(found["gradients/norm"], rel=1e-6)
    found = of(cast(sum_to(51.5)))
    assert found["gradients/clipped"] == 1
    assert found["gradients/clipped_norm"] < 0.99 * found["gradients/norm"]


def test_what_optax_keeps_is_told_under_its_own_name():
    tx = optax.chain(
        optax.monitor({"gradients/norm": emaopt.global_norm}),
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=RATE),
        emaopt.ema(0.5),
    )
    found = told(*trained(tx, 2, *floating(PARAMS, GRADS)))
    assert found["gradients/norm"] == 5
    assert found["learning_rate"] == pytest.approx(0.25)


def test_hyperparameters_of_one_name_are_told_by_place():
    scale = optax.inject_hyperparams(optax.scale)
    tx = optax.chain(scale(step_size=2.0), scale(step_size=3.0), emaopt.ema(0.5))
    found = told(*trained(tx, 1, *floating(PARAMS, GRADS)))
    assert (found["0/step_size"], found["1/step_size"]) == (2, 3)


@pytest.mark.slow
def test_scalars_are_pure_compile_once_and_follow_the_mesh():
    tx = optax.chain(on_floats(emaopt.adam(RATE)), emaopt.ema(DECAY, ledger=True))
    mesh = Mesh(np.array(jax.devices()), "x")
    params = {"a": jnp.arange(16.0), "b": jnp.ones(8), "n": jnp.array([7])}
    sharded = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    sharded["a"] = jax.device_put(params["a"], NamedSharding(mesh, PartitionSpec("x")))
    clip = emaopt.clip_by_global_norm(1.0)

    @compiling.jit
    def step(params, opt_state):
        grads = {"a": params["a"], "b": params["b"], "n": None}
        params, opt_state = emaopt.apply_gradients(tx, grads, params, opt_state)
        known = {"grads": grads, "clip": clip, "learning_rate": RATE, "decay": DECAY}
        return params, opt_state, summary.scalars(params, opt_state, **known)

    found = []
    for each in params, sharded:
        each, opt_state, _ = step(each, tx.init(each))
        compiled = compiling.compilations(step)
        found.append(step(each, opt_state)[2])
        assert compiling.compilations(step) == compiled
    assert {x.shape for x in found[0].values()} == {()}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *found)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"clip": optax.clip(1.0)},
            "clip is given without grads. Pass grads=, the gradients before",
        ),
        ({"loss": jnp.ones(3)}, r"loss is float32\[3\], no scalar. Pass a number, such as a mean"),
        ({"loss": "low"}, "loss is 'low', no scalar"),
        ({"key": jax.random.key(0)}, r"key is key<fry>\[\], no scalar"),
        ({"learning_rate": jnp.ones(1)}, r"learning_rate is float32\[1\], no scalar"),
        (
            {"decay": {"1": 0.9, "fsat": 0.5}},
            "decay has 'fsat', which is not an average. Pass keys of",
        ),
        ({"decay": 1.5}, "decay=1.5 is out of range"),
    ],
)
def test_what_is_wrong_is_told_with_the_fix(wrong, said):
    tx = optax.chain(optax.sgd(0.1), emaopt.ema(0.5))
    with pytest.raises(ValueError, match=said):
        summary.scalars(*trained(tx), **wrong)


def test_a_state_without_a_step_is_told():
    with pytest.raises(ValueError, match="opt_state has no step"):
        summary.scalars(PARAMS, optax.sgd(0.1).init(PARAMS))


def test_without_tensorboardx_the_writer_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "emaopt\[tensorboard\]"'):
        summary.writer(tmp_path)


@needs_writer
def test_scalars_are_written_under_their_tags_and_steps(tmp_path):
    opt_state = trained(emaopt.ema(0.5))[1]
    params = emaopt.average(PARAMS, opt_state)
    with summary.writer(tmp_path) as log:
        log.write(summary.scalars(params, opt_state, loss=jnp.array(0.5)))
        log.write({"accuracy/raw": 0.25, "right": np.True_, "seen": 3}, step=20)
    assert eventfile.values(tmp_path) == {
        "params/norm": [(1, pytest.approx(47.25**0.5))],
        "average/distance": [(1, 0.0)],
        "loss": [(1, 0.5)],
        "accuracy/raw": [(20, 0.25)],
        "right": [(20, 1.0)],
        "seen": [(20, 3.0)],
    }


@needs_writer
def test_of_several_steps_the_means_are_written_at_the_last_one(tmp_path):
    rows = [{"global_step": jnp.array(i), "clipped": jnp.array(i % 2)} for i in range(5, 9)]
    with summary.writer(tmp_path) as log:
        log.write(iter([*rows, {"global_step": 9, "clipped": 1.0, "late": 2.0}]))
    assert eventfile.values(tmp_path) == {"clipped": [(9, pytest.approx(0.6))], "late": [(9, 2.0)]}


@needs_writer
def test_what_is_written_is_fetched_in_one_transfer_and_nothing_else_is(tmp_path, monkeypatch):
    fetched = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(x) or fetch(x))
    monkeypatch.setattr(jax.Array, "__float__", None, raising=False)
    params, opt_state = trained(emaopt.ema(0.5))
    rows = [summary.scalars(params, opt_state, loss=jnp.array(i)) for i in range(3)]
    assert not fetched
    with summary.writer(tmp_path) as log:
        log.write(rows)
        assert len(fetched) == 1
        log.histograms(params, opt_state)
        assert len(fetched) == 2


@pytest.mark.slow
@needs_writer
def test_histograms_count_every_floating_point_array_by_its_name(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float32)
    params = {"w": jnp.asarray(x), "n": jnp.arange(3), "scale": jnp.array(2.0)}
    _, opt_state = trained(emaopt.ema(0.5), 3, params, jax.tree.map(jnp.zeros_like, params))
    with summary.writer(tmp_path) as log:
        log.histograms(params, opt_state)
    found = eventfile.values(tmp_path)
    assert found.keys() == {"w", "w/ExponentialMovingAverage"}
    ((step, counted),) = found["w"]
    assert (step, counted.num, counted.min, counted.max) == (3, x.size, x.min(), x.max())
    assert counted.sum == pytest.approx(x.sum(dtype=float), rel=1e-5)
    assert counted.sum_squares == pytest.approx(np.sum(x**2, dtype=float), rel=1e-5)
    limits = np.array(counted.bucket_limit)
    np.testing.assert_allclose(limits, np.linspace(x.min(), x.max(), 51)[1:], atol=1e-6)
    assert limits[-1] == x.max()
    inside = [np.sum(x <= limit + 1e-6) for limit in limits]
    np.testing.assert_array_equal(np.cumsum(counted.bucket), inside)


@needs_writer
@pytest.mark.parametrize(
    ("values", "least", "most", "number"),
    [
        ([np.nan, 1.0, np.inf, 3.0, -np.inf], 1.0, 3.0, 2),
        ([2.0, 2.0, 2.0, 2.0, 2.0], 2.0, 2.0, 5),
        ([np.nan, np.nan, np.inf, np.inf, -np.inf], 0.0, 0.0, 0),
    ],
)
def test_a_histogram_is_of_the_finite_elements(values, least, most, number, tmp_path):
    with summary.writer(tmp_path) as log:
        log.histograms({"w": jnp.array(values)}, emaopt.EmaState(jnp.array(7), {}), step=4)
    ((step, counted),) = eventfile.values(tmp_path)["w"]
    assert (step, counted.min, counted.max, counted.num) == (4, least, most, number)
    assert sum(counted.bucket) == number
    assert np.all(np.isfinite(counted.bucket_limit))


def drawn(tmp_path, function, *args):
    with summary.writer(tmp_path) as log:
        log.graph(function, *args)
    return eventfile.graph(tmp_path)


def shapes(node):
    return [[d.size for d in shape.dim] for shape in node.attr["_output_shapes"].list.shape]


@needs_writer
def test_the_graph_has_a_node_for_each_equation_in_its_scopes(tmp_path):
    @jax.jit
    def function(params, *batch):
        with jax.named_scope("layer"):
            y = params["w"] @ batch[0]
            y = y + y
        return {"loss": jnp.sum(jnp.sin(y) * 2 + jnp.sin(batch[1])), "same": batch[0]}

    args = {"w": jnp.ones((2, 3))}, jnp.ones(3), jnp.ones(2)
    nodes = drawn(tmp_path, function, *args)
    assert {name: (node.op, list(node.input)) for name, node in nodes.items()} == {
        "arguments/params/w": ("argument", []),
        "arguments/batch/0": ("argument", []),
        "arguments/batch/1": ("argument", []),
        "layer/dot_general": ("dot_general", ["arguments/params/w", "arguments/batch/0"]),
        "layer/add": ("add", ["layer/dot_general"]),
        "sin": ("sin", ["layer/add"]),
        "mul": ("mul", ["sin"]),
        "sin_1": ("sin", ["arguments/batch/1"]),
        "add": ("add", ["mul", "sin_1"]),
        "reduce_sum": ("reduce_sum", ["add"]),
        "results/loss": ("result", ["reduce_sum"]),
        "results/same": ("result", ["arguments/batch/0"]),
    }
    assert shapes(nodes["arguments/params/w"]) == [[2, 3]]
    assert shapes(nodes["layer/dot_general"]) == [[2]]
    assert nodes["reduce_sum"].attr["dtype"].s == b"float32"


@needs_writer
def test_a_function_that_is_called_is_a_scope_and_a_branch_is_one_node(tmp_path):
    inner = jax.jit(lambda x, y: (x * y, x))

    def function(x):
        x, y = inner(*inner(x, np.float32(3)))
        total, _ = jax.lax.scan(lambda c, each: (c + jnp.cos(each), None), jnp.max(y), x)
        split = jax.lax.top_k(x, 1)
        return jax.lax.cond(total > 0, jnp.sin, jnp.cos, total), 1.0, split[1]

    nodes = drawn(tmp_path, function, jax.ShapeDtypeStruct((2,), jnp.float32))
    of = lambda name: list(nodes[name].input)
    first, second = [name for name in nodes if name.endswith("/mul")]
    assert first.split("/")[0] + "_1" == second.split("/")[0]
    assert of(first) == ["arguments/x"]
    assert of(second) == [first, "arguments/x"]
    assert of("scan/cos") == [second]
    assert of("scan/add") == ["reduce_max", "scan/cos"]
    assert of("reduce_max") == [first]
    assert nodes["cond"].op == "cond"
    assert "scan/add" in of("cond")
    assert of("results/0") == ["cond"]
    assert of("results/1") == []
    assert of("results/2") == ["top_k:1"]
    assert shapes(nodes["top_k"]) == [[1], [1]]


@needs_writer
def test_a_loop_is_one_node_and_a_call_beside_another_result_is_a_scope(tmp_path):
    function = lambda x: (jax.lax.while_loop(lambda c: c < 9, lambda c: c * 2, x), call(x), x)
    call = jax.jit(lambda x: x * x)
    nodes = drawn(tmp_path, function, 1.0)
    assert nodes["while"].op == "while"
    assert list(nodes["results/0"].input) == ["while"]

    nodes = drawn(tmp_path / "call", lambda x: (call(x), x), 1.0)
    assert list(nodes["results/0"].input) == ["lambda/mul"]
    assert list(nodes["results/1"].input) == ["arguments/x"]


@needs_writer
def test_an_array_that_is_closed_over_is_a_constant(tmp_path):
    table = jnp.arange(2.0)
    nodes = drawn(tmp_path, jax.jit(lambda x: x + table), jnp.ones(2))
    assert nodes["constant"].op == "constant"
    assert list(nodes["add"].input) == ["arguments/x", "constant"]


@needs_writer
def test_the_graph_of_a_training_step_has_the_scopes_of_its_model(tmp_path):
    def loss(params, x):
        with jax.named_scope("layer"):
            return jnp.sum(jax.nn.relu(params * x) ** 2)

    tx = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(0.5))
    params = jnp.ones(3)
    step = emaopt.minimize(loss, tx)
    nodes = drawn(tmp_path, step, params, tx.init(params), jnp.ones(3))
    scopes = {name.split("/")[0] for name in nodes if "/" in name}
    assert {"jvp.layer", "transpose.jvp.layer", "arguments", "results"} <= scopes
    assert not any(set(name) & set("()<> ") for name in nodes)
    assert {"arguments/opt_state/1/shadow", "results/1/1/shadow"} <= nodes.keys()


@needs_writer
def test_a_text_is_written(tmp_path):
    with summary.writer(tmp_path) as log:
        log.text("about", "lr = *0.1*", step=2)
    (((step, tensor),),) = eventfile.values(tmp_path).values()
    assert (step, list(tensor.string_val)) == (2, [b"lr = *0.1*"])


@needs_writer
def test_an_error_closes_the_file_with_all_that_was_written(tmp_path):
    def stop(log):
        log.write({"loss": 1.0}, step=1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), summary.writer(tmp_path) as log:
        stop(log)
    assert eventfile.values(tmp_path) == {"loss": [(1, 1.0)]}


@needs_writer
def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with summary.writer(tmp_path) as log:
        log.write({"loss": 1.0}, step=1)
        log.graph(jnp.sin, 1.0)
    assert not list(tmp_path.iterdir())


@needs_writer
@pytest.mark.parametrize(
    ("scalars", "said"),
    [
        ({"loss": 1.0}, "step is missing, and scalars has no 'global_step'. Pass step="),
        ([], "step is missing"),
        ({"global_step": 1, "loss": [1.0]}, r"loss is \[1.0\], no scalar"),
    ],
)
def test_what_cannot_be_written_is_told_and_not_written(scalars, said, tmp_path):
    with summary.writer(tmp_path) as log, pytest.raises(ValueError, match=said):
        log.write(scalars)
    assert not eventfile.values(tmp_path)


@needs_writer
@needs_tensorboard
def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    params, opt_state = trained(emaopt.ema(0.5), 2)
    for purge_step, values in (None, (0.0, 1.0, 2.0, 3.0)), (3, (20.0, 30.0)):
        with summary.writer(tmp_path, purge_step=purge_step) as log:
            for step, value in enumerate(values, purge_step or 1):
                log.write({"loss": value}, step=step)
    with summary.writer(tmp_path) as log:
        log.histograms(params, opt_state)
        log.text("about", "hello")
        log.graph(lambda x: jnp.sin(x), 1.0)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    scalars = [(event.step, event.value) for event in read.Scalars("loss")]
    assert scalars == [(1, 0.0), (2, 1.0), (3, 20.0), (4, 30.0)]
    (counted,) = read.Histograms("b/ExponentialMovingAverage")
    assert (counted.step, sum(counted.histogram_value.bucket)) == (2, 1)
    (about,) = read.Tensors("about/text_summary")
    assert tensor_util.make_ndarray(about.tensor_proto).tolist() == [b"hello"]
    assert [node.op for node in read.Graph().node] == ["argument", "sin", "result"]
