"""What went wrong with averages in other libraries: each has a test, here or where it belongs."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import bitwise
from flax import nnx
from folders import TESTS
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


# Orbax looks for the sharding itself where plain Orbax code gives none
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")

# what went wrong, and who holds that it does not here
ELSEWHERE = {
    "bfloat16 averages at decay 0.999 do not move: optax, kauldron, nnx.EMA, Keras": [
        "test_guarantees.py::test_the_average_of_bfloat16_parameters_moves_at_decay_999",
        "test_presets.py::test_in_bfloat16_the_library_stands_still_and_the_preset_does_not",
    ],
    "frozen weights shrink: the form d * e + (1 - d) * w has another fixed point": [
        "test_guarantees.py::test_the_average_of_a_constant_is_bitwise_that_constant",
    ],
    "float32 stalls late in training": [
        "test_rounding.py::test_rounded_to_nearest_a_small_gap_is_never_closed",
        "test_rounding.py::test_compensated_loses_nothing",
        "test_meters.py::test_stalled_is_the_share_that_rounding_held",
    ],
    "1 - d has lost its digits": ["test_decays.py::test_the_effective_rate_is_right_at_any_t"],
    "every micro-step of an accumulation counts: Keras, F5-TTS, rectified-flow, flow_grpo": [
        "test_guarantees.py::test_accumulated_gradients_do_not_count_twice",
        "test_presets.py::test_keras_counts_micro_steps_and_multi_steps_around_the_chain_does_not",
    ],
    "overwriting on every micro-step: Keras": [
        "test_feedback.py::test_only_steps_that_were_made_count"
    ],
    "averages begin at zero: Keras resumed, TFA's SWA, axlearn, init2winit": [
        "test_guarantees.py::test_a_run_resumed_without_averages_does_not_start_them_at_zero",
        "test_presets.py::test_keras_resumed_without_averages_starts_from_zero",
        "test_presets.py::test_swa_of_tensorflow_addons_is_zero_where_the_preset_has_the_parameters",
    ],
    "swapping by sums loses digits: TFA, Keras": [
        "test_ema.py::test_swap_loses_nothing_where_sums_would",
        "test_guarantees.py::test_swapping_twice_gives_the_same_bits",
    ],
    "the interval changes the length: ema_pytorch's Karras, OneTrainer, composer": [
        "test_presets.py::test_karras_is_as_wide_as_asked_for_whatever_update_every",
        "test_guarantees.py::test_the_length_does_not_depend_on_the_interval_or_the_start",
    ],
    "snapshots later than the target, factors that do not add up to one: ema_pytorch": [
        "test_posthoc.py::test_factors_add_up_to_one_unless_told_otherwise",
    ],
    "the state changes its dtype at the first update and cannot be scanned: kauldron": [
        "test_guarantees.py::test_no_dtype_of_the_state_changes_after_init",
    ],
    "parameters and state cannot be donated together: kauldron, flax, liesel": [
        "test_guarantees.py::test_parameters_and_state_can_be_donated_together",
        "test_guarantees.py::test_init_copies_every_leaf",
    ],
    "the place in the chain matters and nothing says so: kauldron": [
        "test_guarantees.py::test_before_the_chain_ema_averages_the_wrong_point",
    ],
    "skipped steps count, or one NaN is for ever: optax, ultralytics": [
        "test_guarantees.py::test_outside_apply_if_finite_the_average_ticks_on_a_skipped_step",
        "test_guarantees.py::test_a_step_that_is_not_finite_leaves_no_trace",
        "test_healing.py::test_a_poisoned_leaf_starts_again_from_the_parameters_and_is_counted",
    ],
    "a decay with a Python branch fails only when it is traced: levanter": [
        "test_guarantees.py::test_a_decay_that_branches_in_python_is_refused_at_once",
    ],
    "the decay taken for the rate: levanter": [
        "test_decays.py::test_a_decay_is_called_for_what_it_keeps",
    ],
    "the ramp is frozen at the step of its construction: TFA": [
        "test_ema.py::test_in_a_chain_the_average_is_that_of_the_definition",
    ],
    "a changing decay debiased by its newest value: TF1": [
        "test_presets.py::test_tf1_debiases_a_ramp_to_something_that_is_no_average",
    ],
    "variables without an average are looked for under its name: TF1": [
        "test_checkpoint.py::test_sources_show_what_is_read",
    ],
    "resuming loses averages, or trains on them: Samudra, ace, Latte, YOLOX, FastVideo": [
        "test_guarantees.py::test_a_resumed_run_is_bitwise_the_uninterrupted_one",
        "test_guarantees.py::test_a_missing_shadow_is_an_error",
        "test_guarantees.py::test_a_swapped_checkpoint_is_not_taken_for_a_plain_one",
    ],
    "the swap for evaluation is not undone: waifu-diffusion, Open-Sora-Plan, Self-Forcing": [
        "test_guarantees.py::test_an_evaluation_that_fails_changes_nothing",
        "test_ema.py::test_a_swapped_state_cannot_be_trained_on_or_averaged_from",
        "test_frameworks.py::test_evaluation_leaves_the_run_and_its_next_step_as_they_are",
    ],
    "raw parameters evaluated by mistake": [
        "test_frameworks.py::test_evaluation_reads_nothing_of_the_raw_parameters",
    ],
    "batch statistics of other weights: addons, timm, ema-pytorch, PyTorch, swa": [
        "test_statistics.py::"
        "test_averaged_weights_lose_their_accuracy_and_recalibration_restores_it",
        "test_frameworks.py::test_the_averages_are_evaluated_with_statistics_of_each_kind",
    ],
    "sharded parameters, averages that are not: Lightning, fairscale, PyTorch, DeepSpeed": [
        "test_sharding.py::test_states_are_made_where_their_parameters_are",
        "test_guarantees.py::test_averaging_is_local_to_every_device",
        "test_checkpoint.py::test_restored_onto_another_mesh",
    ],
    "the cost of a step: WeatherGenerator, diffusers, ema-pytorch, PyTorch": [
        "test_structure.py::test_a_step_is_in_place_and_touches_no_more_memory_than_by_hand",
    ],
    "a second tree though averaging is off: marin": [
        "test_guarantees.py::test_an_average_that_is_off_costs_no_bytes",
    ],
    "the decay means another thing with another batch size: pycls, yolov5, mmcv": [
        "test_units.py::test_so_many_samples_later_a_value_counts_half",
    ],
    "raw and averaged parameters evaluated together: mmpretrain, mmdetection": [
        "test_several.py::test_all_averages_are_evaluated_at_once",
    ],
    "averages restored by name, without the optimizer: TensorFlow, automl, Orbax, Keras": [
        "test_checkpoint.py::test_the_averages_of_any_checkpoint",
        "test_checkpoint.py::test_only_the_averages_are_read",
    ],
    "lookahead does not fit into a chain: optax": [
        "test_feedback.py::test_lookahead_is_an_overwrite_of_an_average_of_every_kth_value",
    ],
    "the mean of a window, exactly: icefall": [
        "test_posthoc.py::test_a_window_of_cumulative_means_is_exact",
    ],
}


@pytest.mark.slow
def test_every_test_named_above_is_there():
    there = {
        f"{path.name}::{node.name}"
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert {name for tests in ELSEWHERE.values() for name in tests} <= there


# Keras: average * mask + parameter * (1 - mask) is NaN on either side of the mask


def test_a_poisoned_average_reaches_the_parameters_at_no_step_but_the_overwrite():
    tx = optax.chain(optax.sgd(0.5), emaopt.overwrite(3, emaopt.ema(0.9)))
    params = jnp.array([1.0, 2.0])
    opt_state = tx.init(params)
    (first, mean) = opt_state
    opt_state = first, mean._replace(shadow=jnp.array([jnp.nan, 2.0]))
    step = jax.jit(tx.update)
    for expected in ([0.5, 1.5], [0.0, 1.0]):
        updates, opt_state = step(jnp.ones(2), opt_state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params, expected)
    updates, _ = step(jnp.ones(2), opt_state, params)
    assert np.isnan(optax.apply_updates(params, updates)).tolist() == [True, False]


# ultralytics: after one NaN, no checkpoint for the rest of the run


@pytest.mark.slow
def test_a_run_that_is_not_finite_is_saved_and_its_averages_are_the_last_good_ones(tmp_path):
    tx = optax.chain(optax.sgd(0.5), emaopt.heal(emaopt.ema(0.5)))
    params = {"w": jnp.array([4.0, 8.0])}
    opt_state = tx.init(params)
    for gradient in (4.0, jnp.nan):
        grads = {"w": jnp.full(2, gradient)}
        params, opt_state = emaopt.apply_gradients(tx, grads, params, opt_state)
    assert np.isnan(params["w"]).all()
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        assert checkpoint.save(checkpointer, 2, params, opt_state)
        resumed = checkpoint.resume(checkpointer, params, opt_state)[:2]
    bitwise(resumed, (params, opt_state))
    averages = checkpoint.restore_averages(tmp_path, params)
    np.testing.assert_array_equal(averages["w"], [3.0, 7.0])


# optax: schedule_free's sum of weights in bfloat16 stands still after 312 steps


def test_the_mean_of_bfloat16_parameters_goes_on_after_a_thousand_steps():
    values = jnp.linspace(0, 1, 1000, dtype=jnp.bfloat16)
    mean = emaopt.moving_average(emaopt.power(0))
    state, _ = jax.lax.scan(lambda s, x: (mean.update(x, s), None), mean.init(values[0]), values)
    np.testing.assert_allclose(state.shadow, np.asarray(values, np.float64).mean(), rtol=1e-5)


# nnx.EMA: keys of dropout cannot be multiplied, counters are truncated


@pytest.mark.slow
def test_the_keys_counters_and_statistics_of_an_nnx_model_are_averaged_or_carried():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(2, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.seen = nnx.Variable(jnp.int32(3))

    model = Model(nnx.Rngs(0))
    mean = emaopt.moving_average(0.5)
    first = jax.tree.map(jnp.copy, nnx.state(model))
    state = mean.init(first)
    model.norm(jnp.array([[2.0, 6.0], [4.0, 8.0]]))
    model.dropout(jnp.ones(2))
    model.seen[...] += 7
    model.dense.kernel[...] += 1
    newest = nnx.state(model)
    got = jax.jit(mean.update)(newest, state).shadow

    half = lambda a, b: (a[...] + b[...]) / 2
    for layer, leaf in (("dense", "kernel"), ("norm", "mean"), ("norm", "var")):
        expected = half(first[layer][leaf], newest[layer][leaf])
        np.testing.assert_allclose(got[layer][leaf][...], expected, rtol=1e-6)
    assert got["seen"][...] == 10
    rngs, expected = got["dropout"]["rngs"], newest["dropout"]["rngs"]
    assert rngs["key"][...] == expected["key"][...]
    assert rngs["count"][...] == expected["count"][...] == 1


# diffusers: averages of adapters alone


@pytest.mark.slow
def test_the_average_of_adapters_costs_nothing_for_what_is_frozen():
    model = nnx.LoRA(8, 2, 8, base_module=nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    tx = optax.chain(optax.sgd(0.5), emaopt.ema(0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.LoRAParam)))
    averaged = emaopt.average(model, optimizer)
    np.testing.assert_allclose(averaged.lora_a[...], model.lora_a[...] + 0.25, rtol=1e-6)
    np.testing.assert_array_equal(averaged.base_module.kernel, model.base_module.kernel)
    (state,) = emaopt.averages(optimizer).values()
    assert sum(x.size for x in jax.tree.leaves(state.shadow)) == 8 * 2 + 2 * 8


# optax: averages under pmap


def test_under_pmap_every_device_has_the_same_average():
    tx = optax.chain(optax.sgd(1.0), emaopt.ema(0.5))

    def step(params, opt_state, x):
        grads = jax.lax.pmean(x, "devices")
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jnp.full((2, 1), 8.0)
    opt_state = jax.pmap(tx.init)(params)
    parallel = jax.pmap(step, axis_name="devices", donate_argnums=(0, 1))
    for _ in range(2):
        params, opt_state = parallel(params, opt_state, jnp.array([[3.0], [5.0]]))
    averages = emaopt.average(params, opt_state)
    np.testing.assert_array_equal(averages, [[3.0], [3.0]])  # of 8, 4 and 0
    assert averages.sharding.is_equivalent_to(params.sharding, 2)
