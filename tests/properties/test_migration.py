"""docs/migration.md: every line runs, and gives what TensorFlow 1.15.5 gives.

The document is one program; each of its tables has the columns TF1, here and note.
"""

import ast
import importlib.util
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from folders import DOCS

import emaopt


TEXT = (DOCS / "migration.md").read_text()
MODULES = {"tf1": "tensorflow", "tensorboard": "tensorboardX"}
# what the FileWriter of TensorFlow 1.15.5 wrote for the scalar loss = 0.5 at step 7
EVENTS = bytes.fromhex(
    "1800000000000000a37f4b22090000c087fdbfda411a0d627261696e2e4576656e743a32716d83191a000000000000"
    "00129bd82d0940f2fd87fdbfda4110072a0d0a0b0a046c6f7373150000003f65cfe4ac"
)


class Row(NamedTuple):
    tf1: str
    code: str
    note: str

    @property
    def missing(self):
        """Whether the row needs an extra that is not installed."""
        extra = re.search(r"extra `(\w+)`", self.note)
        return bool(extra) and importlib.util.find_spec(MODULES[extra[1]]) is None


def rows():
    lines = [line for line in TEXT.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    spans = lambda cell: "\n".join(re.findall(r"`([^`]+)`", cell))
    return [Row(tf1, spans(code), note) for tf1, code, note in cells]


ROWS = rows()
CODE = {row.tf1: row for row in ROWS if row.code}
RUN = {tf1: row for tf1, row in CODE.items() if not row.missing}


def execute(code, space):
    """Run statements; the value of the last one if it is an expression."""
    *first, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        first, last = [*first, last], None
    exec(compile(ast.Module(first, []), "migration.md", "exec"), space)
    return last and eval(compile(ast.Expression(last.value), "migration.md", "eval"), space)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each row gives, or the error that it raises, by its TF1 cell."""
    path = tmp_path_factory.mktemp("migration")
    (path / "events.tf1").write_bytes(EVENTS)
    space, found = {"path": path}, {}
    execute(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1], space)
    for row in RUN.values():
        try:
            found[row.tf1] = execute(row.code, space)
        except Exception as error:
            found[row.tf1] = error
    space["checkpointer"].close()
    return found, space


def value_of(results, tf1):
    found = results[0][tf1]
    if isinstance(found, Exception):
        raise found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tf1", RUN)
def test_the_line_runs(tf1, results):
    value_of(results, tf1)


def test_what_has_no_line_says_why():
    without = [row for row in ROWS if not row.code]
    assert without
    for row in without:
        assert re.fullmatch(r"[A-Z].{20,}\.", row.note), row


def test_no_row_is_twice_or_malformed():
    assert len(CODE) == sum(bool(row.code) for row in ROWS)
    assert len(ROWS) == sum(line.startswith("| ") for line in TEXT.splitlines()) - TEXT.count(
        "|---|---|"
    )


TRAINING_API = """
AdadeltaOptimizer AdagradDAOptimizer AdagradOptimizer AdamOptimizer FtrlOptimizer
GradientDescentOptimizer MomentumOptimizer ProximalAdagradOptimizer
ProximalGradientDescentOptimizer RMSPropOptimizer SyncReplicasOptimizer
minimize compute_gradients apply_gradients get_slot get_slot_names variables use_locking
GATE_NONE GATE_OP GATE_GRAPH tf.gradients grad_ys tf.stop_gradient AggregationMethod
ADD_N EXPERIMENTAL_TREE EXPERIMENTAL_ACCUMULATE_N
clip_by_value clip_by_norm clip_by_average_norm clip_by_global_norm use_norm tf.global_norm
exponential_decay natural_exp_decay inverse_time_decay piecewise_constant polynomial_decay
cosine_decay cosine_decay_restarts linear_cosine_decay noisy_linear_cosine_decay
ExponentialMovingAverage num_updates zero_debias ema.apply ema.average average_name
variables_to_restore moving_average_variables MovingAverageOptimizer sequential_update
swapping_saver tf.train.Saver max_to_keep saver.save saver.restore latest_checkpoint
tf.group get_or_create_global_step create_global_step get_global_step tf.train.global_step
FileWriter tf.summary.scalar add_summary summary_iterator add_graph write_graph
piecewise_constant_decay
load_variable load_checkpoint init_from_checkpoint warm_start get_checkpoint_state checkpoint_exists
CheckpointManager MonitoredTrainingSession Supervisor Scaffold SessionManager
NanTensorHook SessionRunHook StopAtStepHook Server ClusterSpec replica_device_setter
shuffle_batch string_input_producer
Coordinator should_stop request_stop start_queue_runners QueueRunner add_queue_runner
IndexedSlices embedding_lookup LazyAdamOptimizer
tf.tuple add_run_metadata add_session_log flush close
"""


@pytest.mark.parametrize("name", re.findall(r"\S+", TRAINING_API))
def test_the_name_is_in_the_table(name):
    assert any(re.search(rf"\b{name}\b", row.tf1 + row.note) for row in ROWS)


STEPS = 0, 9, 10, 11, 20, 25, 45
# TensorFlow 1.15.5's learning rate at these steps
RATES = {
    "`exponential_decay(0.1, step, 10, 0.5)`": [
        *(0.1, 0.05358867, 0.05, 0.04665165, 0.025, 0.01767767, 0.004419418)
    ],
    "`exponential_decay(0.1, step, 10, 0.5, staircase=True)`": [
        *(0.1, 0.1, 0.05, 0.05, 0.025, 0.025, 0.00625)
    ],
    "`natural_exp_decay(0.1, step, 10, 0.5)`": [
        *(0.1, 0.06376281, 0.06065307, 0.05769498, 0.03678795, 0.02865048, 0.01053992)
    ],
    "`inverse_time_decay(0.1, step, 10, 0.5)`": [
        *(0.1, 0.06896552, 0.06666667, 0.06451613, 0.05, 0.04444445, 0.03076923)
    ],
    "`piecewise_constant(step, [10, 20], [0.1, 0.05, 0.005])`": [
        *(0.1, 0.1, 0.1, 0.05, 0.05, 0.005, 0.005)
    ],
    "`polynomial_decay(0.1, step, 20, 0.001, power=2.0)`": [
        *(0.1, 0.0309475, 0.02575, 0.0210475, 0.001, 0.001, 0.001)
    ],
    "`polynomial_decay(0.1, step, 20, 0.001, power=2.0, cycle=True)`": [
        *(0.1, 0.0309475, 0.02575, 0.0210475, 0.001, 0.01492187, 0.0071875)
    ],
    "`cosine_decay(0.1, step, 20, alpha=0.1)`": [
        *(0.1, 0.06203955, 0.055, 0.04796045, 0.01, 0.01, 0.01)
    ],
    "`cosine_decay_restarts(0.1, step, 10, t_mul=2.0, m_mul=0.5)`": [
        *(0.1, 0.00244717, 0.05, 0.04969221, 0.025, 0.007322331, 0.01728354)
    ],
    "`linear_cosine_decay(0.1, step, 20)`": [
        *(0.1001, 0.03190195, 0.0251, 0.01908023, 0.0001, 0.0001, 0.0001)
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("tf1", RATES)
def test_the_rate_is_that_of_tf1(tf1, results):
    schedule = value_of(results, tf1)
    with jax.numpy_dtype_promotion("standard"):  # Optax's schedules mix integers and floats
        got = [schedule(jnp.int32(step)) for step in STEPS]
    np.testing.assert_allclose(got, RATES[tf1], rtol=1e-5, atol=1e-6 * 0.1)


A, B = jnp.array([[0.3, -0.4], [0.0, 1.2]]), jnp.array([2.0])
CLIPPED = {
    "`tf.clip_by_value(g, -0.1, 0.2)`": ([[0.2, -0.1], [0, 0.2]], [0.2]),
    "`tf.clip_by_norm(g, 0.3)`": ([[0.069230765, -0.092307694], [0, 0.27692306]], [0.3]),
    "`tf.clip_by_average_norm(g, 0.05)`": (
        [[0.046153843, -0.06153846], [0, 0.18461537]],
        [0.05],
    ),
    "`tf.clip_by_global_norm(grads, 0.3)`": (
        [[0.03772996, -0.05030662], [0, 0.15091985]],
        [0.2515331],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("tf1", CLIPPED)
def test_the_gradients_are_clipped_as_in_tf1(tf1, results):
    got = value_of(results, tf1).update((A, B), optax.EmptyState())[0]
    for g, want in zip(got, CLIPPED[tf1], strict=True):
        np.testing.assert_allclose(g, want, rtol=1e-6)


@pytest.mark.slow
def test_proximal_gradient_descent_is_that_of_tf1(results):
    tx = value_of(
        results, "`ProximalGradientDescentOptimizer(0.1, l1_regularization_strength=0.5)`"
    )
    w = jnp.array([1.0, -0.02, -0.5])
    updates, _ = tx.update(jnp.array([0.5, 0.1, -1.0]), tx.init(w), w)
    np.testing.assert_allclose(optax.apply_updates(w, updates), [0.9, 0, -0.35], rtol=1e-6)


NAMES, AVERAGE = ["hidden/kernel", "output/kernel"], "ExponentialMovingAverage"
EQUAL = {
    "`opt.get_slot_names()`": ["m", "v"],
    "`ema.average_name(kernel)`": f"hidden/kernel/{AVERAGE}",
    "`ema.variables_to_restore()`": {f"{n}/{AVERAGE}": n for n in NAMES},
    '`tf.train.ExponentialMovingAverage(0.99, name="slow")`': [f"{n}/slow" for n in NAMES],
    "`tf.train.global_step(sess, tensor)`": 2,
    "`saver.save(sess, path, global_step)`": True,
    "`tf.train.latest_checkpoint(path)`": 3,
    "`tf.train.get_checkpoint_state(path)`": [3],
    "`tf.train.list_variables(path)`": [
        "beta1_power",
        "beta2_power",
        "global_step",
        *(f"{n}{suffix}" for n in NAMES for suffix in ("", "/Adam", "/Adam_1", f"/{AVERAGE}")),
    ],
    "`tf.train.summary_iterator(file)`": [(7, "loss", 0.5)],
}


@pytest.mark.slow
@pytest.mark.parametrize("tf1", [tf1 for tf1 in EQUAL if not CODE[tf1].missing])
def test_the_value_is_that_of_tf1(tf1, results):
    assert value_of(results, tf1) == EQUAL[tf1]


@pytest.mark.slow
def test_the_variables_of_the_optimizer_have_their_names_in_tf1(results):
    names = value_of(results, "`opt.variables()`")
    slots = [f"{n}/Adam{suffix}" for n in NAMES for suffix in ("", "_1")]
    assert set(jax.tree.leaves(names)) == {"beta1_power", "beta2_power", "global_step", *slots}


@pytest.mark.slow
def test_a_mask_is_a_list_of_variables(results):
    grads = value_of(results, "`opt.compute_gradients(loss, var_list=[kernel])`")
    assert grads["output"]["kernel"] is None
    assert grads["hidden"]["kernel"].shape == (2, 3)
    state = value_of(results, "`ema.apply([kernel])`").init(results[1]["params"])
    assert [x.shape for x in jax.tree.leaves(emaopt.averages(state)["ema"].shadow)] == [(2, 3)]


@pytest.mark.slow
def test_incoming_gradients_two_ways(results):
    both = "`tf.gradients(ys, xs, grad_ys)`", "`opt.compute_gradients(y, grad_loss=g)`"
    a, b = (execute(CODE[tf1].code, results[1]) for tf1 in both)
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.slow
def test_a_stopped_gradient_is_a_constant(results):
    space = results[1]
    assert np.array_equal(value_of(results, "`tf.stop_gradient(w)`"), space["batches"][0][0])
    unconnected = value_of(results, "`tf.gradients(loss, xs, unconnected_gradients=ZERO)`")
    assert np.array_equal(unconnected, np.zeros((2, 3)))


@pytest.mark.slow
def test_the_average_of_a_tensor_starts_at_zero(results):
    space = results[1]
    value_of(results, "`ema.apply([loss])`")
    start = space["mean"].init(0.0)
    assert float(space["mean"].update(2.0, start).shadow) == np.float32(0.01999998)


@pytest.mark.slow
def test_a_batch_lies_on_all_devices(results):
    x, _ = value_of(results, "`SyncReplicasOptimizer`")
    assert len(x.sharding.device_set) == jax.device_count() > 1
