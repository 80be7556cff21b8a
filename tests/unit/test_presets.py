"""Presets against the libraries: their recorded averages, and where installed, they themselves.

pip install -r tests/peers.txt && pytest tests/unit/test_presets.py
"""

import importlib.util
import inspect
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import make_peers
import numpy as np
import optax
import pytest
from folders import DOCS, TESTS
from recorded import CASES, DEFECTS, RECORDED, UPDATES, VALUES, averages, preset

import emaopt
from emaopt import presets


PRESETS = {
    name: value
    for name, value in vars(presets).items()
    if inspect.isfunction(value)
    and value.__module__.startswith(presets.__name__)
    and not name.startswith("_")
}
PEERS = ("diffusers", "ema_pytorch", "flax", "keras", "timm", "torch")


def title(case):
    return "-".join([case["name"], *(f"{k}={v}" for k, v in case["arguments"].items())])


def assert_close(ours, theirs, rtol):
    """Beside the largest number of all."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max())


def assert_same(case):
    """From the first snapshot on: before it, SWA has no average."""
    begin = case["arguments"].get("start_averaging", 0)
    ours, theirs = averages(preset(case), VALUES), make_peers.averages(case)
    assert_close(ours[begin:], theirs[begin:], 1e-6)


@pytest.mark.many(3)
@pytest.mark.parametrize("case", CASES, ids=title)
def test_a_preset_gives_the_averages_of_its_library(case):
    assert_same(case)


# ema_pytorch computes its decays in float32
@pytest.mark.many(3)
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["dtype"] == "float64" and case["name"] != "ema_pytorch"],
    ids=title,
)
def test_a_preset_has_the_rates_of_its_library_in_double_precision(case, x64):
    assert_close(averages(preset(case), VALUES, float), make_peers.averages(case), 1e-13)


def test_every_preset_is_compared_and_everything_is_recorded():
    settings = lambda records: [(record["name"], record["arguments"]) for record in records]
    assert settings(CASES) == make_peers.CASES
    assert settings(DEFECTS.values()) == make_peers.DEFECTS
    assert settings(RECORDED["outputs"]) == make_peers.OUTPUTS
    assert {case["name"] for case in CASES} == set(PRESETS)


@pytest.mark.many(2)
@pytest.mark.parametrize("case", CASES, ids=title)
def test_a_preset_is_shown_as_a_call_that_makes_it(case):
    shown = repr(preset(case))
    assert shown.startswith(f"presets.{case['name']}(")
    again = eval(shown, {"presets": presets, "inf": np.inf})
    assert repr(again) == shown
    t = jnp.arange(1, 40)
    np.testing.assert_array_equal(jax.vmap(again.rate)(t), jax.vmap(preset(case).rate)(t))


@pytest.mark.slow
@pytest.mark.parametrize("case", RECORDED["outputs"], ids=title)
def test_bema_is_an_average_a_start_and_one_line(case):
    given = dict(case["arguments"])
    lag, power = given.get("lag", 10), given.pop("bias_power", 0.2)
    first = given.get("update_after", 0)
    average = averages(presets.bema(**given), VALUES)
    start = averages(emaopt.after(first, 1.0), VALUES)
    t = np.arange(1, UPDATES + 1)
    alpha = (lag + t) ** -power
    ours = average + alpha[:, None] * (VALUES[1:] - start)
    fired = (t > first) & ((t - first) % given["update_freq"] == 0)
    assert fired.sum() >= 29
    assert_close(ours[fired], make_peers.averages(case)[fired], 1e-6)


@pytest.mark.slow
def test_the_half_life_of_torchtitan_is_a_power():
    weights = [
        emaopt.profile(decay, 5000)
        for decay in (presets.torchtitan(), emaopt.power(np.log(2) / 0.05 - 1))
    ]
    assert np.abs(weights[0] - weights[1]).sum() < 1e-3


@pytest.mark.parametrize("name", RECORDED["signatures"])
def test_a_preset_has_the_argument_names_and_defaults_of_its_library(name):
    theirs = RECORDED["signatures"][name]
    for argument in inspect.signature(PRESETS[name]).parameters.values():
        default = "" if argument.default is argument.empty else argument.default
        assert argument.name in theirs
        # TF1's num_updates is a variable or None; the preset's, whether there is one
        assert default == (theirs[argument.name] if argument.name != "num_updates" else False)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_the_version_that_it_was_compared_with(name):
    library = make_peers.library(name)
    formulas = {"edm2": "arXiv:2312.02696", "torchtitan": "pytorch/torchtitan#3985"}
    version = formulas.get(library) or RECORDED["versions"][library]
    assert version in PRESETS[name].__doc__


@pytest.mark.many(2)
@pytest.mark.parametrize("case", {case["name"]: case for case in CASES}.values(), ids=title)
def test_what_a_preset_takes_over_several_updates_is_the_product_of_its_decays(case):
    decay = preset(case)
    t = jnp.arange(1, UPDATES + 1)
    rates = np.asarray(jax.vmap(decay.rate)(t), np.float64)
    for n in (1, 3, 40) if decay.exact else (1,):
        kept = [np.prod(1 - rates[max(last - n, 0) : last]) for last in range(1, UPDATES + 1)]
        over = jax.vmap(lambda last, n=n: decay.over(last, jnp.minimum(n, last)))(t)
        np.testing.assert_allclose(over, 1 - np.array(kept), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: presets.tf1(1.1), r"decay=1\.1 is out of range\. Pass a number from 0 to 1"),
        (lambda: presets.tf1(0.9, 1000), "num_updates=1000 is neither True nor False"),
        (lambda: presets.tf1(0.9, zero_debias="no"), "zero_debias='no' is neither True"),
        (lambda: presets.tfa(dynamic_decay=1), "dynamic_decay=1 is neither"),
        (lambda: presets.timm(use_warmup="False"), "use_warmup='False' is neither"),
        (lambda: presets.diffusers(use_ema_warmup=None), "use_ema_warmup=None is neither"),
        (lambda: presets.mmengine([0.9]), r"ema_type=\[0\.9\] is not known"),
        (lambda: presets.tf1(0.9, True, True), "zero_debias=True with num_updates=True"),
        (lambda: presets.tfa(-0.1), r"average_decay=-0\.1"),
        (lambda: presets.tfa(start_step=-1), "start_step=-1 .* whole number from 0 to"),
        (lambda: presets.tfa_swa(-1), "start_averaging=-1"),
        (lambda: presets.tfa_swa(0, 0), "average_period=0 .* whole number from 1 to"),
        (lambda: presets.keras(2), "ema_momentum=2"),
        (lambda: presets.torch([0.9]), r"decay=\[0\.9\]"),
        (lambda: presets.timm(min_decay=-1), "min_decay=-1"),
        (lambda: presets.timm(0.5, 0.6), r"min_decay=0\.6 is above decay=0\.5"),
        (lambda: presets.timm(update_after_step=0.5), r"update_after_step=0\.5"),
        (lambda: presets.timm(warmup_gamma=0), "warmup_gamma=0 .* a number above 0"),
        (lambda: presets.timm(warmup_power=-1), "warmup_power=-1"),
        (lambda: presets.diffusers(1.5), r"decay=1\.5"),
        (lambda: presets.diffusers(0.5, 0.6), r"min_decay=0\.6 is above decay=0\.5"),
        (lambda: presets.diffusers(update_after_step=-1), "update_after_step=-1"),
        (lambda: presets.diffusers(inv_gamma=0), "inv_gamma=0"),
        (lambda: presets.diffusers(power=0), "power=0"),
        (lambda: presets.ema_pytorch("0.9"), "beta='0.9'"),
        (lambda: presets.ema_pytorch(0.5, min_value=0.6), r"min_value=0\.6 is above beta=0\.5"),
        (lambda: presets.ema_pytorch(update_after_step=-1), "update_after_step=-1"),
        (lambda: presets.ema_pytorch(update_every=0), "update_every=0"),
        (lambda: presets.ema_pytorch(inv_gamma=-1), "inv_gamma=-1"),
        (lambda: presets.ema_pytorch(power=0), "power=0"),
        (lambda: presets.ema_pytorch_karras(), "sigma_rel=None and gamma=None.* Pass one"),
        (lambda: presets.ema_pytorch_karras(0.1, 7.0), r"sigma_rel=0\.1 and gamma=7\.0"),
        (lambda: presets.ema_pytorch_karras(0.3), r"sigma_rel=0\.3"),
        (lambda: presets.ema_pytorch_karras(gamma=-1), "gamma=-1"),
        (lambda: presets.ema_pytorch_karras(0.1, update_every=1.5), r"update_every=1\.5"),
        (lambda: presets.edm2(0.3), r"std=0\.3 .* at most 1/sqrt\(12\)"),
        (lambda: presets.edm2_traditional(0, batch_size=1), "halflife_Mimg=0"),
        (lambda: presets.edm2_traditional(1, 0, batch_size=1), "rampup_ratio=0"),
        (lambda: presets.edm2_traditional(batch_size=0), "batch_size=0"),
        (lambda: presets.lightning(decay=2), "decay=2 is out of range"),
        (lambda: presets.lightning(0.9, 0), "update_every_n_steps=0"),
        (lambda: presets.lightning(0.9, 1, -1), "update_starting_at_step=-1"),
        (lambda: presets.composer("10ba", 0.9), "half_life='10ba' and smoothing=0.9: one follows"),
        (lambda: presets.composer(None), "half_life=None and smoothing=None: one follows"),
        (lambda: presets.composer("1ep"), "half_life='1ep' is not a number of batches from 1 on"),
        (lambda: presets.composer("0ba"), "half_life='0ba' is not a number of batches from 1 on"),
        (
            lambda: presets.composer(ema_start="0.1dur"),
            "ema_start='0.1dur' .* 'n?1000ba'; a preset",
        ),
        (lambda: presets.composer(update_interval=3), "update_interval=3 is not a number of"),
        (lambda: presets.composer(None, 1.5, update_interval="1ba"), r"smoothing=1\.5"),
        (lambda: presets.nemo(-1), "decay=-1"),
        (lambda: presets.nemo(0.9, 0), "every_n_steps=0"),
        (lambda: presets.mmengine("EMA"), "ema_type='EMA' is not known. Pass one of: Exponential"),
        (lambda: presets.mmengine(momentum=2), "momentum=2"),
        (lambda: presets.mmengine(begin_iter=-1), "begin_iter=-1"),
        (lambda: presets.mmengine(interval=0), "interval=0"),
        (lambda: presets.mmengine(gamma=0), "gamma=0"),
        (lambda: presets.torchtitan(decay=2), "decay=2"),
        (lambda: presets.torchtitan(half_life_fraction=0), "half_life_fraction=0"),
        (lambda: presets.torchtitan(start_step=-1), "start_step=-1"),
        (lambda: presets.torchtitan(step_bias=0.5), r"step_bias=0\.5"),
        (lambda: presets.torchtitan(update_every_n_steps=0), "update_every_n_steps=0"),
        (lambda: presets.bema(0), "update_freq=0"),
        (lambda: presets.bema(ema_power=-1), "ema_power=-1"),
        (lambda: presets.bema(lag=0), "lag=0"),
        (lambda: presets.bema(update_after=-1), "update_after=-1"),
        (lambda: presets.bema(multiplier=0), "multiplier=0"),
        (lambda: presets.bema(min_ema_multiplier=2), "min_ema_multiplier=2"),
        (lambda: presets.optax(-0.1), r"step_size=-0\.1"),
        (lambda: presets.nnx(1.1), r"decay=1\.1"),
    ],
)
def test_an_argument_out_of_range_is_named_as_the_library_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def constant(decay):
    return emaopt.after(0, decay)


def karras_as_it_is(sigma_rel, update_every):
    """A value every so many updates, weighted as if every update had one."""
    gamma = emaopt.posthoc.gamma(sigma_rel)
    rate = lambda t: jnp.where(t == 1, 1, -jnp.expm1((gamma + 1) * jnp.log(t / (t + 1))))
    return emaopt.Decay(
        lambda t: jnp.where((t - 1) % update_every == 0, rate(jnp.asarray(t, float)), 0), rate
    )


# what the library does, as a decay; and the preset, which does what is documented
INSTEAD = {
    "tfa_reads_num_updates_once": (constant(0.1), presets.tf1(0.9, num_updates=True)),
    "timm_without_step": (constant(0.9), presets.timm(0.9, 0.0, 10, use_warmup=True)),
    "ema_pytorch_karras_counts_updates": (
        karras_as_it_is(0.1, 10),
        presets.ema_pytorch_karras(0.1, update_every=10),
    ),
}


@pytest.mark.many(1)
@pytest.mark.parametrize("name", INSTEAD)
def test_what_a_library_does_instead_of_what_it_documents(name):
    actual, documented = (averages(decay, VALUES) for decay in INSTEAD[name])
    theirs = make_peers.averages(DEFECTS[name])
    assert_close(actual, theirs, 1e-6)
    assert np.abs(documented - theirs).max() > 0.05 * np.abs(theirs).max()


def test_tf1_debiases_a_ramp_to_something_that_is_no_average():
    # of ones: an average of ones is one
    theirs = make_peers.averages(DEFECTS["tf1_debiases_a_ramp_with_its_newest_decay"])
    assert np.abs(theirs - 1).max() > 1e-4
    ours = averages(presets.tf1(0.9999, num_updates=True), np.ones_like(VALUES))
    assert (ours == 1).all()


def test_swa_of_tensorflow_addons_is_zero_where_the_preset_has_the_parameters():
    case = next(case for case in CASES if "start_averaging" in case["arguments"])
    start = case["arguments"]["start_averaging"]
    ours = averages(preset(case), VALUES)
    assert (make_peers.averages(case)[:start] == 0).all()
    assert (ours[:start] == VALUES[1 : start + 1]).all()


@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps mixes dtypes
def test_keras_counts_micro_steps_and_multi_steps_around_the_chain_does_not():
    case, micro = DEFECTS["keras_counts_micro_steps"], make_peers.ACCUMULATED
    theirs = make_peers.averages(case)
    values = VALUES[: len(theirs) // micro + 1]
    after_each = values[np.arange(len(theirs) + 1) // micro]
    momentum = case["arguments"]["ema_momentum"]
    assert_close(averages(emaopt.after(micro, momentum), after_each), theirs, 1e-6)

    tx = optax.chain(optax.sgd(1.0), emaopt.ema(presets.keras(momentum)))
    tx = optax.MultiSteps(tx, micro)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    grads = jnp.asarray(np.repeat(-np.diff(values, axis=0), micro, axis=0), jnp.float32)
    params = jnp.asarray(values[0], jnp.float32)
    carry, _ = jax.lax.scan(step, (params, tx.init(params)), grads)
    ours = emaopt.average(*carry)
    assert_close(ours, averages(presets.keras(momentum), values)[-1], 1e-6)
    assert np.abs(ours - theirs[-1]).max() > 0.05


def test_keras_resumed_without_averages_starts_from_zero():
    case = DEFECTS["keras_resumes_from_zero"]
    expected, momentum = np.zeros(2), case["arguments"]["ema_momentum"]
    theirs = make_peers.averages(case)
    for value, average in zip(VALUES[1:], theirs, strict=True):
        expected = momentum * expected + (1 - momentum) * value
        np.testing.assert_allclose(average, expected, rtol=1e-12)


STALLED = [name.removesuffix("_in_bfloat16") for name in DEFECTS if name.endswith("_in_bfloat16")]


@pytest.mark.many(3)
@pytest.mark.parametrize("name", STALLED)
def test_in_bfloat16_the_library_stands_still_and_the_preset_does_not(name):
    case = DEFECTS[f"{name}_in_bfloat16"]
    assert (make_peers.averages(case) == 2).all()
    decay = PRESETS[name](**case["arguments"])
    ours = averages(decay, make_peers.as_bfloat16(), jnp.bfloat16)
    left = 0.999 ** (UPDATES - 1)
    np.testing.assert_allclose(ours[-1], 1 + left, rtol=1e-6)


@pytest.mark.slow
def test_karras_is_as_wide_as_asked_for_whatever_update_every():
    updates, sigma_rel = 2000, 0.1
    t = np.arange(updates + 1) / updates

    def width(decay):
        weights = emaopt.profile(decay, updates)
        return np.sqrt(weights @ (t - weights @ t) ** 2)

    for update_every in (1, 10, 100):
        ours = presets.ema_pytorch_karras(sigma_rel, update_every=update_every)
        assert width(ours) == pytest.approx(sigma_rel, rel=0.05)
    assert width(karras_as_it_is(sigma_rel, 10)) > 2.5 * sigma_rel
    # with its default of 100, most of the average is the first parameters
    assert emaopt.profile(karras_as_it_is(sigma_rel, 100), updates)[1] > 0.6


MISSING = [name for name in PEERS if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"pip install -r tests/peers.txt: {MISSING}")
def test_a_preset_gives_the_averages_of_the_library_that_is_installed(tmp_path):
    # a process of its own: the libraries do not know JAX at its strictest
    file = tmp_path / "peers.json"
    subprocess.run([sys.executable, "-W", "ignore", make_peers.__file__, file], check=True)
    live = json.loads(file.read_text())
    assert {"diffusers", "ema_pytorch", "keras", "nnx", "optax", "timm", "torch"} <= set(
        live["versions"]
    )
    for case in live["cases"]:
        assert_same(case)


def test_the_documentation_has_every_preset_with_its_version():
    text = (DOCS / "peers.md").read_text()
    for name in PRESETS:
        assert f"| `{name}(" in text
    for library, version in RECORDED["versions"].items():
        assert library in ("edm2", "torchtitan") or f" {version} |" in text


def test_the_documentation_names_tests_that_exist():
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", (DOCS / "peers.md").read_text())
    for file, name in named:
        (path,) = TESTS.rglob(file)
        assert f"def {name}" in path.read_text()
    assert len(named) > 20
