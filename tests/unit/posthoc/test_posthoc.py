"""Synthesis from snapshots, against profiles written out and against averages really computed."""

import itertools
import json
import math
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import GOLDEN
from hypothesis import given, strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import emaopt
from emaopt import posthoc
from emaopt.posthoc._fit import profile_of


RECORDED = json.loads((GOLDEN / "posthoc.json").read_text())
TWO = [posthoc.gamma(0.05), posthoc.gamma(0.10)]


def profiles(rates, steps):
    """[T + 1, steps]: the weights of an average, by the recursion itself."""
    weights, found = np.eye(len(rates) + 1)[0], []
    for t in range(len(rates) + 1):
        if t:
            weights = weights * (1 - rates[t - 1])
            weights[t] = rates[t - 1]
        if t in steps:
            found.append(weights)
    return np.stack(found, axis=1)


T = 240
STEPS = list(range(30, T + 1, 30))
UPDATES = np.arange(1, T + 1)
RATES = {  # each decay, and what its updates take
    "power": (emaopt.power(4.0), 1 - (1 - 1 / UPDATES) ** 5),
    "gamma": (12.0, 1 - (1 - 1 / UPDATES) ** 13),
    "constant": (lambda t: jnp.float32(0.9375), np.full(T, 0.0625)),
    "half-life": (emaopt.half_life(10), np.full(T, 1 - 0.5**0.1)),
    "every": (emaopt.every(3, 0.875), np.where(UPDATES % 3, 0, 1 - 0.875**3)),
    "copies": (emaopt.after(50, emaopt.power(0)), 1 / np.maximum(UPDATES - 50, 1)),
}


def of(name, steps):
    return profiles(RATES[name][1], steps)


@pytest.mark.parametrize("sigma_rel", RECORDED["gamma"])
def test_gamma_is_the_root_to_the_last_digits(sigma_rel):
    assert math.isclose(
        posthoc.gamma(float(sigma_rel)), RECORDED["gamma"][sigma_rel], rel_tol=4e-15, abs_tol=4e-15
    )


@given(st.floats(1e-9, 12**-0.5))
def test_gamma_and_sigma_rel_are_inverse(sigma_rel):
    assert math.isclose(posthoc.sigma_rel(posthoc.gamma(sigma_rel)), sigma_rel, rel_tol=1e-15 * 4)


@given(st.floats(0, 1e9))
def test_sigma_rel_and_gamma_are_inverse(gamma):
    again = posthoc.gamma(posthoc.sigma_rel(gamma))
    assert math.isclose(again, gamma, rel_tol=1e-14, abs_tol=1e-14)


@given(st.floats(0, 50), st.floats(1.001, 2))
def test_a_larger_gamma_is_a_shorter_average(gamma, times):
    assert posthoc.sigma_rel((gamma + 1) * times - 1) < posthoc.sigma_rel(gamma)


def test_the_ends_of_the_range():
    for bound in (12**-0.5, math.sqrt(1 / 12), math.nextafter(12**-0.5, 1)):
        assert 0 <= posthoc.gamma(bound) < 1e-15
    assert posthoc.sigma_rel(0) == pytest.approx(12**-0.5, rel=1e-15)
    assert posthoc.sigma_rel(-0.999) < 0.1


@pytest.mark.parametrize(
    "case", RECORDED["cases"], ids=lambda c: f"{len(c['steps'])}-{c['target']}"
)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_factors_are_those_of_fifty_digits(case, normalize):
    gammas = [posthoc.gamma(s) for s in case["recorded"]]
    wanted = {"at": case["at"], "target": posthoc.gamma(case["target"]), "normalize": normalize}
    golden = "normalized" if normalize else "free"
    factors = posthoc.weights(case["steps"], gammas, **wanted, threshold=0.2)
    residual = posthoc.residual(case["steps"], gammas, **wanted)
    assert factors.dtype == np.float64
    np.testing.assert_allclose(factors, case[golden], rtol=1e-7, atol=1e-18)
    assert residual == pytest.approx(case[f"{golden} residual"], rel=1e-9)


@pytest.mark.many(2)
@pytest.mark.parametrize("recorded", list(itertools.pairwise(RATES)), ids="+".join)
@pytest.mark.parametrize("target", ["power", "half-life", "copies", "window"])
@pytest.mark.parametrize("at", [T, 200])
def test_any_decays_make_what_brute_force_makes(recorded, target, at):
    columns = np.stack([of(name, STEPS) for name in recorded], axis=2).reshape(T + 1, -1)
    decay = posthoc.window(90, at) if target == "window" else RATES[target][0]
    wanted = np.zeros(T + 1)
    wanted[: at + 1] = decay if target == "window" else of(target, [at])[: at + 1, 0]
    best, *_ = np.linalg.lstsq(columns, wanted)
    arguments = {"at": at, "target": decay, "normalize": False}
    gammas = [RATES[name][0] for name in recorded]
    error = np.linalg.norm(columns @ best - wanted) / np.linalg.norm(wanted)
    residual = posthoc.residual(STEPS, gammas, **arguments)
    # of a target that was recorded, square roots of zeros; rates in float32 otherwise
    assert residual == pytest.approx(error, rel=1e-4, abs=3e-6)
    factors = posthoc.weights(STEPS, gammas, **arguments, threshold=math.inf)
    made = np.linalg.norm(columns @ factors - wanted) / np.linalg.norm(wanted)
    assert made == pytest.approx(error, rel=1e-4, abs=3e-6)


def test_discrete_and_continuous_profiles_agree_on_long_runs():
    steps, target = range(1000, 8001, 1000), posthoc.gamma(0.15)
    functions = posthoc.weights(steps, TWO, at=8000, target=target)
    updates = posthoc.weights(steps, TWO, at=8000, target=emaopt.power(target))
    np.testing.assert_allclose(updates, functions, atol=1e-4)
    assert not np.array_equal(updates, functions)


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_window_of_cumulative_means_is_exact(start, n):
    end = start + n
    arguments = {"at": end, "target": posthoc.window(n, end)}
    factors = posthoc.weights([start, end], [0.0], **arguments)
    np.testing.assert_allclose(factors, [-start / n, end / n], rtol=1e-12)
    assert posthoc.residual([start, end], [0.0], **arguments) < 1e-12


def test_the_factors_are_in_the_order_of_the_snapshots():
    arguments = {"at": 400, "target": 4.0}
    steps, gammas = [100, 200, 300, 400], [3.0, 9.0]
    grid = posthoc.weights(steps, gammas, **arguments).reshape(4, 2)
    assert np.abs(grid[-1]).max() == np.abs(grid).max()
    turned = posthoc.weights(steps[::-1], gammas[::-1], **arguments)
    np.testing.assert_allclose(turned, grid[::-1, ::-1].ravel(), rtol=1e-9)
    each = posthoc.weights(np.repeat(steps, 2), gammas * 4, **arguments)
    np.testing.assert_array_equal(each, grid.ravel())
    by_average = posthoc.weights(steps * 2, np.repeat(gammas, 4), **arguments)
    np.testing.assert_allclose(by_average, grid.T.ravel(), rtol=1e-9)


def test_one_average_needs_no_list():
    arguments = {"at": 400, "target": 4.0}
    one = posthoc.weights([200, 400], 3.5, **arguments)
    np.testing.assert_array_equal(one, posthoc.weights([200, 400], [3.5], **arguments))


@pytest.mark.parametrize("average", [TWO[1], emaopt.half_life(40), emaopt.warmup(0.99)])
def test_what_was_recorded_is_found(average):
    gammas = [TWO[0], average]
    found = posthoc.weights(STEPS, gammas, at=180, target=average)
    np.testing.assert_allclose(found, np.eye(16)[STEPS.index(180) * 2 + 1], atol=1e-9)
    assert posthoc.residual(STEPS, gammas, at=180, target=average) < 1e-12


def test_factors_of_averages_that_are_alike_keep_their_digits():
    alike = [7.0, 7.001]
    weights = [profile_of(gamma, 640) for gamma in alike]
    arguments = {"at": 640, "target": 3 * weights[0] - 2 * weights[1]}
    factors = posthoc.weights(range(10, 641, 10), alike, **arguments)
    np.testing.assert_allclose(factors, [0] * 126 + [3, -2], atol=1e-8)


def test_dependent_snapshots_share():
    factors = posthoc.weights([100, 200, 200, 200], [3.0] * 4, at=200, target=3.0)
    np.testing.assert_allclose(factors, [0, 1 / 3, 1 / 3, 1 / 3], atol=1e-9)


def test_factors_stay_small_where_averages_are_alike():
    gammas = [7.0, 7.0 + 1e-9]
    factors = posthoc.weights(range(10, 641, 10), gammas, at=640, target=6.0)
    assert np.abs(factors).max() < 2


@pytest.mark.parametrize("target", [4.0, emaopt.power(4.0), posthoc.window(120, T)])
def test_factors_add_up_to_one_unless_told_otherwise(target):
    wanted = {"at": T, "target": target, "threshold": 1.0}
    free = posthoc.weights(STEPS, TWO, **wanted, normalize=False)
    factors = posthoc.weights(STEPS, TWO, **wanted)
    assert factors.sum() == pytest.approx(1, abs=1e-12)
    assert abs(free.sum() - 1) > 1e-9
    np.testing.assert_allclose(factors, free / free.sum(), rtol=1e-12)


def test_the_residual_is_what_noise_is_off_by_relative_to_the_targets_own():
    noise = np.random.default_rng(0).standard_normal((T + 1, 20_000))
    snapshots = of("power", STEPS).T @ noise
    target, wanted = RATES["half-life"][0], of("half-life", [T])[:, 0] @ noise
    residual = posthoc.residual(STEPS, RATES["power"][0], at=T, target=target)
    assert 0.1 < residual < 0.5
    factors = posthoc.weights(STEPS, RATES["power"][0], at=T, target=target, threshold=1)
    assert (factors @ snapshots - wanted).std() / wanted.std() == pytest.approx(residual, rel=0.02)


@pytest.mark.slow
def test_trajectories_are_averaged_with_the_predicted_error():
    t = np.arange(T + 1.0)
    values = np.stack([t / T, np.log1p(t), np.sin(20 * t / T), 1 / np.sqrt(t + 1)], axis=1)
    target = emaopt.power(posthoc.gamma(0.15))
    decays = [emaopt.power(gamma) for gamma in TWO]
    averages = [emaopt.moving_average(decay) for decay in (*decays, target)]
    update = jax.jit(
        lambda x, states: [a.update(x, s) for a, s in zip(averages, states, strict=True)]
    )
    states = [average.init(jnp.float32(values[0])) for average in averages]
    snapshots = []
    for n in range(1, T + 1):
        states = update(jnp.float32(values[n]), states)
        snapshots += [state.shadow for state in states[:2]] if n in STEPS else []
    factors = posthoc.weights(STEPS, decays, at=T, target=target)
    made = posthoc.synthesize(snapshots, factors)
    columns = [np.pad(emaopt.profile(d, n), (0, T - n)) for n in STEPS for d in decays]
    off = factors @ columns - emaopt.profile(target, T)
    np.testing.assert_allclose(made - states[2].shadow, off @ values, atol=1e-5)
    assert np.abs(off @ values).max() > 1e-3
    residual = posthoc.residual(STEPS, decays, at=T, target=target)
    size = np.linalg.norm(emaopt.profile(target, T))
    assert residual == pytest.approx(np.linalg.norm(off) / size, rel=1e-6)


def test_memory_does_not_grow_with_the_snapshots():
    updates = 100_000
    tracemalloc.start()
    posthoc.residual(
        range(1000, updates + 1, 1000),
        [9.0, 4.0],
        at=updates,
        target=posthoc.window(20_000, updates),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * updates * 8 < updates * 200 * 8


@pytest.mark.parametrize(
    ("target", "weights"),
    [
        (posthoc.anneal([1.0], at=2), [0, 0, 1]),
        (posthoc.anneal([0.75, 0.25], at=3), [0, 0.25, 0.5, 0.25]),
        (posthoc.anneal([1.0, 0.5], at=5, every=2), [0, 0, 0.25, 0.25, 0.25, 0.25]),
        (posthoc.anneal([0.5], at=4, every=2), [0, 0, 0.5, 0.25, 0.25]),
        (posthoc.window(3, at=3), [0, 1 / 3, 1 / 3, 1 / 3]),
        (posthoc.one_minus_sqrt(4, at=5, every=4), [0, 0, 0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_ready_targets(target, weights):
    np.testing.assert_allclose(target, weights, atol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize(
    "make", [posthoc.window, posthoc.one_minus_sqrt, lambda n, at: posthoc.anneal([0.5] * n, at)]
)
def test_an_anneal_is_the_run_whose_steps_were_scaled(make, n):
    """Of fixed gradients: scaled steps from step 10 - n on, or the average of the plain run."""
    steps = np.random.default_rng(n).standard_normal(10)
    plain = np.append(0, np.cumsum(steps))
    target = make(n, 10)
    shares = np.append(np.cumsum(target[::-1])[::-1], 0)[1:-1]
    assert target @ plain == pytest.approx(steps @ shares)
    scaled = {
        posthoc.window: 1 - np.arange(n) / n,
        posthoc.one_minus_sqrt: 1 - np.sqrt(np.arange(n) / n),
    }.get(make, np.full(n, 0.5))
    np.testing.assert_allclose(shares[10 - n :], scaled, atol=1e-12)
    np.testing.assert_allclose(shares[: 10 - n], 1)


def range_mode(schedule, n):
    """The weights of Megatron-LM's range mode, as its rule says: `weighted_merge.py`, June 2026."""
    decayed = [schedule(i / n) for i in range(n)]
    if n == 1:
        return [1.0]
    weights = [0.0] * n
    weights[-1] = decayed[-1]
    for i in range(1, n - 1):
        weights[i] = decayed[i] - decayed[i + 1]
    weights[0] = 1 - sum(weights)
    return weights


SHAPES = {
    "linear": lambda x: 1 - x,
    "minus-sqrt": lambda x: 1 - np.sqrt(x),
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 10])
def test_on_plain_checkpoints_the_weights_are_those_of_megatron(shape, n):
    steps = 20 * np.arange(1, n + 1)
    target = posthoc.anneal(SHAPES[shape], at=steps[-1], on=steps)
    np.testing.assert_allclose(target[steps], range_mode(SHAPES[shape], n), atol=1e-15)
    assert np.count_nonzero(target) == n
    plain = {"at": int(steps[-1]), "gammas": [lambda t: jnp.float32(0)], "target": target}
    factors = posthoc.weights(steps, **plain)
    np.testing.assert_allclose(factors, target[steps], atol=1e-14)
    assert posthoc.residual(steps, **plain) < 1e-14
    if shape == "linear":
        np.testing.assert_allclose(factors, 1 / n)


def test_falls_on_steps_are_those_of_the_factors_between_them():
    target = posthoc.anneal([0.8, 0.5], at=9, on=[0, 4, 7])
    np.testing.assert_allclose(target, [0.2, 0, 0, 0, 0.3, 0, 0, 0.5, 0, 0], atol=1e-15)
    assert posthoc.anneal([], at=2, on=[1]).tolist() == [0, 1, 0]


@pytest.mark.parametrize("kept", [0.0, 0.9, 0.98])  # of the noise, from one update to the next
def test_a_sum_that_is_near_its_target_has_nearly_its_loss(kept):
    t = np.arange(401)
    covariance = kept ** np.abs(np.subtract.outer(t, t))
    steps, target = range(50, 401, 50), posthoc.anneal(1 - np.sqrt([0, 0.25, 0.5, 0.75]), 400, 50)
    source = posthoc.gamma(0.1)
    factors = posthoc.weights(steps, source, at=400, target=target, threshold=0.5)
    error = posthoc.residual(steps, source, at=400, target=target)
    assert 0.3 < error < 0.5
    profiles = [np.pad(emaopt.profile(emaopt.power(source), s), (0, 400 - s)) for s in steps]
    made = factors @ profiles
    loss, wanted = made @ covariance @ made, target @ covariance @ target
    assert 0.9 < loss / wanted < (1.05 if kept else 1.001 + error**2)


FEW = {"steps": [250, 500, 750, 1000], "gammas": TWO, "at": 1000}


def test_what_is_out_of_reach_is_refused_with_the_number_and_the_advice():
    posthoc.weights(**FEW, target=posthoc.gamma(0.15))  # 0.106
    with pytest.raises(ValueError, match=r"residual 0\.223 is above threshold=0\.15") as error:
        posthoc.weights(**FEW, target=posthoc.gamma(0.2))
    for advice in ("more snapshots", "a second average", "between the averages", "step of a snap"):
        assert advice in str(error.value)
    assert len(posthoc.weights(**FEW, target=posthoc.gamma(0.2), threshold=0.25)) == 8


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": []}, "steps or gammas is empty. Pass one of each at least"),
        ({"gammas": []}, "steps or gammas is empty"),
        ({"steps": [1, 1, 2]}, "steps has 3 entries and gammas 2, with repeats. Pass each step"),
        ({"gammas": [1.0, 1.0, 2.0]}, "steps has 4 entries and gammas 3, with repeats"),
        ({"gammas": [-1.0]}, r"gammas=-1.0 is out of range. Pass numbers above -1, or decays"),
        ({"gammas": ["a"]}, "gammas='a' is out of range"),
        ({"target": math.inf}, "target=inf is out of range. Pass numbers above -1"),
        ({"target": -0.7}, r"target is -0.7: the square .* no integral. .* or emaopt.power\(-0.7"),
        ({"steps": [0, 500]}, r"steps=\[0, 500\] is out of range. Pass numbers of updates, above"),
        ({"at": -3}, "at=-3 is out of range. Pass numbers of updates, above 0"),
        (
            {"steps": [0.5], "target": emaopt.power(1.0)},
            r"steps=\[0.5\] is out of range. Pass whole numbers of updates",
        ),
        ({"target": [0.5, 0.5]}, r"target has shape \(2,\), .* each of the at=1000 updates"),
        ({"target": np.full(1001, np.nan)}, "target has shape .* or is not finite"),
        ({"target": np.zeros(1001)}, "or all 0. Pass a weight for the initial"),
        ({"target": np.ones(1001)}, "target sums up to 1001. Pass .* or normalize=False"),
    ],
)
@pytest.mark.parametrize("function", [posthoc.weights, posthoc.residual])
def test_bad_arguments_are_named(function, change, told):
    with pytest.raises(ValueError, match=told):
        function(**{**FEW, "target": 4.0, **change})


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: posthoc.gamma(0), "sigma_rel=0 is out of range. Pass a number above 0, at most"),
        (lambda: posthoc.gamma(0.289), r"at most 1/sqrt\(12\) = 0.2887"),
        (lambda: posthoc.gamma(math.nan), "sigma_rel=nan is out of range"),
        (lambda: posthoc.sigma_rel(-1), "gamma=-1 is out of range. Pass a number above -1"),
        (lambda: posthoc.sigma_rel(math.inf), "gamma=inf is out of range"),
        (lambda: posthoc.anneal([0.5, 0.6], 9), r"factors=\[0.5, 0.6\] rises. Pass numbers from 1"),
        (lambda: posthoc.anneal([1.5], 9), r"factors=\[1.5\] rises"),
        (lambda: posthoc.anneal([-0.5], 9), r"factors=\[-0.5\] rises"),
        (lambda: posthoc.anneal([1, 0.5], 9, 5), "at=9 is out of range. .* 10 or more"),
        (lambda: posthoc.anneal([0.5], 9, on=[9]), "factors has 1 numbers for 1 checkpoints. Pass"),
        (lambda: posthoc.anneal([0.5], 9, on=[9, 3]), r"on=\[9, 3\] does not fit. .* to at=9"),
        (lambda: posthoc.anneal([0.5], 9, 2, on=[3, 9]), "every=2 has no meaning with on"),
        (lambda: posthoc.anneal(np.sqrt, 9), "factors is a function, and on is missing. Pass the"),
        (lambda: posthoc.window(10, 9), "n=10 is out of range. .* from 1 to at=9"),
        (lambda: posthoc.window(1.5, 9), "n=1.5 is out of range"),
        (lambda: posthoc.one_minus_sqrt(9, 9, 2), "every=2 is out of range. Pass a divisor of n=9"),
    ],
)
def test_bad_numbers_are_named(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_negative_gammas_have_discrete_profiles():
    decay = emaopt.power(-0.7)
    assert posthoc.residual([50, 100], [decay, 0.0], at=100, target=decay) < 1e-6


def test_the_initial_parameters_are_a_snapshot_too():
    decay = emaopt.half_life(20)
    window = posthoc.anneal([0.0], at=60)  # the parameters of step 59
    assert window.tolist()[58:] == [0, 1, 0]
    start = np.eye(61)[0]
    found = posthoc.weights([0, 60], [decay], at=60, target=start)
    np.testing.assert_allclose(found, [1, 0], atol=1e-12)


DTYPES = ["float32", "float64", "bfloat16", "float16", "float8_e4m3fn", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_has_the_dtype_and_is_rounded_once(dtype):
    dtype = jnp.dtype(dtype)
    exact = np.random.default_rng(0).standard_normal((3, 5))
    snapshots = [{"w": x.astype(dtype)} for x in exact]
    factors = [100.0, -100.0, 1.0]
    made = posthoc.synthesize(snapshots, factors)["w"]
    wide = np.result_type(dtype, np.float64)
    total = sum(f * s["w"].astype(wide) for f, s in zip(factors, snapshots, strict=True))
    assert made.dtype == dtype
    np.testing.assert_array_equal(made, total.astype(dtype))


def test_what_is_no_average_is_the_last_ones():
    keys = [jax.random.key(i) for i in range(3)]
    snapshots = [
        {"n": jnp.int32(i), "on": np.array(i > 0), "key": keys[i], "none": None, "x": float(i)}
        for i in range(3)
    ]
    made = posthoc.synthesize(snapshots, [0.5, 0.5, 0.0])
    assert made["n"] == 1
    assert made["on"]
    assert made["none"] is None
    assert made["x"] == 0.5
    assert jnp.array_equal(jax.random.key_data(made["key"]), jax.random.key_data(keys[1]))


def test_a_weight_of_zero_is_not_looked_at():
    snapshots = [{"w": np.array([x])} for x in (1.0, np.nan, 3.0)]
    assert posthoc.synthesize(snapshots, [0.5, 0.0, 0.5])["w"] == 2


@pytest.mark.parametrize("spec", [("x", None), (None, "y"), (("x", "y"), None), (None, None)])
def test_shards_stay_where_they_are(spec):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    values = np.random.default_rng(0).standard_normal((3, 8, 6)).astype(np.float32)
    snapshots = [jax.device_put(x, sharding) for x in values[:2]] + [values[2]]
    factors = [0.25, -0.5, 1.25]
    made = posthoc.synthesize(snapshots, factors)
    assert isinstance(made, jax.Array)
    assert made.sharding == sharding
    np.testing.assert_array_equal(made, posthoc.synthesize(values, factors))


def test_one_snapshot_is_alive_at_a_time():
    alive = set()

    def load():
        for i in range(5):
            assert not alive
            leaf = np.full(3, float(i), np.float32)
            alive.add(i)
            weakref.finalize(leaf, alive.discard, i)
            tree = {"w": leaf}
            del leaf
            yield tree
            del tree

    made = posthoc.synthesize(load(), [0.2] * 5)
    np.testing.assert_allclose(made["w"], [2, 2, 2])


TREE = {"a": {"w": np.ones(2)}, "b": None}


@pytest.mark.parametrize(
    ("snapshots", "weights", "told"),
    [
        ([TREE], [1.0, 1.0], "snapshots ends after 1 trees, and weights has 2 factors. Pass one"),
        ([TREE] * 3, [1.0, 1.0], "snapshots goes on, and weights has 2 factors"),
        ([TREE], [], r"weights=\[\] is not a list of finite numbers"),
        ([TREE], [math.nan], r"weights=\[nan\] is not a list of finite numbers"),
        ([TREE], [0.0], "or all are 0. Pass what posthoc.weights returns"),
        ([TREE], [[1.0]], "is not a list of finite numbers"),
        (
            [TREE, {"a": {"v": np.ones(2)}, "b": None}],
            [1, 1],
            r"snapshots\[1\] does not have .* a/v",
        ),
        ([TREE, {"a": {"w": np.ones(3)}, "b": None}], [1, 1], r"has shape \(3,\) at leaf 'a/w'"),
        (
            [TREE, {"a": {"w": None}, "b": None}],
            [1, 1],
            r"snapshots\[1\] has nothing at leaf 'a/w'",
        ),
        ([TREE, {"a": {"w": np.ones(2)}, "b": 1.0}], [1, 1], "snapshot has nothing at leaf 'b'"),
        (
            [TREE, {"a": {"w": np.array([1, np.inf])}, "b": None}],
            [1, 1],
            r"snapshots\[1\] is not finite at leaf 'a/w'. Leave that step out",
        ),
    ],
)
def test_bad_snapshots_are_named(snapshots, weights, told):
    with pytest.raises(ValueError, match=told):
        posthoc.synthesize(iter(snapshots), weights)
