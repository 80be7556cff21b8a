"""Flax Linen, NNX, Equinox and a dict: the examples of `docs/frameworks.md`, run and checked."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import pytest
import reference
from compare import bitwise, close
from flax import nnx
from flax.training.train_state import TrainState
from folders import DOCS
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


# Orbax looks for the sharding itself where plain Orbax code gives none
pytestmark = [
    pytest.mark.slow,  # every test is of a whole example, trained
    pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning"),
]

RTOL = 1e-5  # of the largest in a tensor; 1.5e-6 was seen
DOCUMENT = DOCS / "frameworks.md"


@pytest.fixture(autouse=True, scope="module")
def _as_jax_comes():
    """Equinox and plain code rely on its promotions."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Framework(NamedTuple):
    """How to read an example. A run is what its `evaluate` takes before the data."""

    run: Callable  # of the names of the example
    smooth: Callable  # the run with averaged statistics
    measured: Callable  # the run with recalibrated ones
    step: Callable  # (names, run, batch) -> the run after it
    parts: Callable  # of a run: parameters, state of the optimizer, statistics
    having: Callable  # (run, parameters) -> the run with these
    leaves: dict[str, str]  # what the example calls the leaves of the dict


def step_of_one(names, run, batch):
    return (names.step(*run, *batch)[0],)


def step_in_place(names, run, batch):
    names.step(*run, *batch)
    return run


def with_params(run, params):
    model = nnx.clone(run[0])
    nnx.update(model, params)
    return model, run[1]


DICT = ("hidden", "scale", "bias", "out", "offset", "mean", "var")
FRAMEWORKS = {
    "Linen": Framework(
        run=lambda names: (names.state,),
        smooth=lambda names: (names.smooth,),
        measured=lambda names: (names.measured,),
        step=step_of_one,
        parts=lambda run: (run[0].params, run[0].opt_state, run[0].batch_stats),
        having=lambda run, params: (run[0].replace(params=params),),
        leaves={
            "Dense_0/kernel": "hidden",
            "BatchNorm_0/scale": "scale",
            "BatchNorm_0/bias": "bias",
            "Dense_1/kernel": "out",
            "Dense_1/bias": "offset",
            "BatchNorm_0/mean": "mean",
            "BatchNorm_0/var": "var",
        },
    ),
    "NNX": Framework(
        run=lambda names: (names.model, names.optimizer),
        smooth=lambda names: (names.smooth, names.optimizer),
        measured=lambda names: (names.measured, names.optimizer),
        step=step_in_place,
        parts=lambda run: (
            nnx.state(run[0], nnx.Param),
            run[1].opt_state,
            nnx.state(run[0], nnx.BatchStat),
        ),
        having=with_params,
        leaves={
            "hidden/kernel": "hidden",
            "norm/scale": "scale",
            "norm/bias": "bias",
            "out/kernel": "out",
            "out/bias": "offset",
            "norm/mean": "mean",
            "norm/var": "var",
        },
    ),
    "Equinox": Framework(
        run=lambda names: (names.model, names.state, names.opt_state),
        smooth=lambda names: (names.model, names.kept.shadow, names.opt_state),
        measured=lambda names: (names.model, names.measured, names.opt_state),
        step=lambda names, run, batch: names.step(batch, *run)[:3],
        parts=lambda run: (eqx.filter(run[0], eqx.is_inexact_array), run[2], run[1]),
        having=lambda run, params: (eqx.combine(params, run[0]), *run[1:]),
        leaves={
            "hidden/weight": "hidden",
            "norm/weight": "scale",
            "norm/bias": "bias",
            "out/weight": "out",
            "out/bias": "offset",
            "1/0": "mean",
            "1/1": "var",
        },
    ),
    "A dict": Framework(
        run=lambda names: (names.state,),
        smooth=lambda names: (names.smooth,),
        measured=lambda names: (names.measured,),
        step=step_of_one,
        parts=lambda run: tuple(run[0][k] for k in ("params", "opt_state", "statistics")),
        having=lambda run, params: (run[0] | {"params": params},),
        leaves={name: name for name in DICT},
    ),
}


class Example(NamedTuple):
    """An example that ran as documented, and how to read it."""

    names: SimpleNamespace
    framework: Framework

    @property
    def run(self) -> tuple:
        return self.framework.run(self.names)

    def create(self) -> tuple:
        """The run before its first step."""
        created = self.names.create(0)
        return created if isinstance(created, tuple) else (created,)

    def parts(self, run) -> tuple:
        return self.framework.parts(run)

    def evaluate(self, run) -> Any:
        return self.names.evaluate(*run, self.names.x, self.names.y)

    def step(self, run) -> tuple:
        return self.framework.step(self.names, run, self.names.batches[0])

    def arrays(self, tree) -> dict[str, np.ndarray]:
        """Parameters or statistics, called and shaped as in the dict."""
        shapes = {"hidden": (4, 8), "offset": ()}
        found = {}
        leaves = zip(jax.tree.leaves(emaopt.names(tree)), jax.tree.leaves(tree), strict=True)
        for leaf, x in leaves:
            if name := self.framework.leaves.get(leaf):
                x = np.asarray(x)
                x = x.T if x.shape == (8, 4) else x
                found[name] = x.reshape(shapes.get(name, (8,)))
        return found


@pytest.fixture(scope="module", params=FRAMEWORKS)
def example(request):
    names = pages.run(DOCUMENT, request.param)
    return Example(SimpleNamespace(**names), FRAMEWORKS[request.param])


def test_every_example_is_checked():
    assert pages.headings(DOCUMENT) == list(FRAMEWORKS)


# the same by hand


def network(params, mean, var, x):
    h = (x @ params["hidden"] - mean) / np.sqrt(var + 1e-5)
    h = np.maximum(h * params["scale"] + params["bias"], 0)
    return h @ params["out"] + params["offset"]


def own_statistics(params, x):
    h = x @ params["hidden"]
    return {"mean": h.mean(0), "var": h.var(0)}


def gradients(params, x, y):
    own = own_statistics(params, x)
    std = np.sqrt(own["var"] + 1e-5)
    n = (x @ params["hidden"] - own["mean"]) / std
    z = n * params["scale"] + params["bias"]
    a = np.maximum(z, 0)
    d = 2 * (a @ params["out"] + params["offset"] - y) / len(y)
    dz = np.outer(d, params["out"]) * (z > 0)
    dn = dz * params["scale"]
    return {
        "hidden": x.T @ ((dn - dn.mean(0) - n * (dn * n).mean(0)) / std),
        "scale": (dz * n).sum(0),
        "bias": dz.sum(0),
        "out": a.T @ d,
        "offset": d.sum(),
    }


def averaged(trees, gamma):
    beta = reference.power(gamma)
    return {name: reference.theta_bar(beta, [t[name] for t in trees])[-1] for name in trees[0]}


@pytest.fixture(scope="module")
def by_hand(example):
    """In float64, from the parameters that the example begins with."""
    first = example.arrays(example.parts(example.create())[0])
    params = {k: v.astype(np.float64) for k, v in first.items()}
    batches = [[np.asarray(a, np.float64) for a in batch] for batch in example.names.batches]
    a = dict.fromkeys(params, 0.0)
    trees, statistics = [params], [{"mean": np.zeros(8), "var": np.ones(8)}]
    for x, y in 20 * batches:
        g, own = gradients(params, x, y), own_statistics(params, x)
        a = {k: 0.9 * a[k] + g[k] for k in params}
        params = {k: params[k] - 0.1 * a[k] for k in params}
        trees.append(params)
        statistics.append({k: 0.9 * v + 0.1 * own[k] for k, v in statistics[-1].items()})
    average = averaged(trees, emaopt.posthoc.gamma(0.10))
    measured = [own_statistics(average, x) for x, _ in batches]
    return SimpleNamespace(
        params=params,
        average=average,
        copied=statistics[-1],
        smooth=averaged(statistics, 7),
        measured={k: np.mean([m[k] for m in measured], axis=0) for k in measured[0]},
    )


def test_parameters_and_averages_are_those_of_float64(example, by_hand):
    params, opt_state, _ = example.parts(example.run)
    close(example.arrays(params), by_hand.params, rtol=0, atol=0, of_largest=RTOL)
    close(
        example.arrays(emaopt.average(params, opt_state)),
        by_hand.average,
        rtol=0,
        atol=0,
        of_largest=RTOL,
    )


@pytest.mark.parametrize("policy", ["copied", "smooth", "measured"])
def test_the_averages_are_evaluated_with_statistics_of_each_kind(policy, example, by_hand):
    read = {"copied": example.framework.run} | example.framework._asdict()
    run, statistics = read[policy](example.names), getattr(by_hand, policy)
    close(example.arrays(example.parts(run)[2]), statistics, rtol=0, atol=0, of_largest=RTOL)

    if example.framework is FRAMEWORKS["Equinox"] and policy != "measured":
        statistics = {k: v / (1 - 0.9**80) for k, v in statistics.items()}  # as that layer does
    x, y = (np.asarray(a, np.float64) for a in (example.names.x, example.names.y))
    loss = np.mean((network(by_hand.average, **statistics, x=x) - y) ** 2)
    np.testing.assert_allclose(example.evaluate(run), loss, rtol=RTOL)


# what follows is bitwise


def copy(run):
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, run)


def test_evaluation_reads_nothing_of_the_raw_parameters(example):
    params, _, _ = example.parts(example.run)
    others = example.framework.having(example.run, jax.tree.map(jnp.zeros_like, params))
    assert example.evaluate(others) == example.evaluate(example.run)


def test_evaluation_leaves_the_run_and_its_next_step_as_they_are(example):
    one, other = copy(example.run), copy(example.run)
    before = copy(one)
    example.evaluate(one)
    bitwise(one, before)
    bitwise(example.step(one), example.step(other))


def arrays(tree):
    """The leaves that are arrays or numbers; a module has functions and strings too."""
    leaves = [x for x in jax.tree.leaves(tree) if not callable(x) and not isinstance(x, str)]
    return [jnp.asarray(x) for x in leaves]


def test_a_resumed_run_goes_on_bit_for_bit(example):
    resumed = example.names.resumed
    resumed = (resumed,) if len(example.run) == 1 else tuple(resumed)
    # the functions in a TrainState are made anew, and its step starts as a Python number
    bitwise(arrays(resumed), arrays(example.run))
    one, other = example.step(copy(resumed)), example.step(copy(example.run))
    bitwise(arrays(one), arrays(other))


def test_the_averages_are_read_without_an_optimizer(example):
    params, opt_state, _ = example.parts(example.run)
    got = checkpoint.restore_averages(example.names.run, like=params)
    bitwise(got, emaopt.average(params, opt_state))


def test_a_step_takes_over_the_buffers_and_neither_it_nor_an_evaluation_is_compiled_again(
    example, caplog
):
    run = copy(example.run)
    old = jax.tree.leaves(example.parts(run)[:2])
    with jax.log_compiles():
        run = example.step(run)
        example.evaluate(run)
    assert not caplog.records
    assert all(x.is_deleted() for x in old)


def test_averages_are_in_the_dtype_and_the_place_of_their_parameters(example):
    mesh = jax.make_mesh((8,), ("x",))
    spec = lambda x: P(*("x" if n == 8 else None for n in x.shape))
    place = lambda x: jax.device_put(x.astype(jnp.bfloat16), NamedSharding(mesh, spec(x)))
    params, _, _ = example.parts(example.run)
    params = jax.tree.map(place, params)
    averages = emaopt.average(params, emaopt.ema(0.9).init(params))
    assert jax.tree.structure(averages) == jax.tree.structure(params)
    for a, p in zip(jax.tree.leaves(averages), jax.tree.leaves(params), strict=True):
        assert a.dtype == jnp.bfloat16
        assert a.sharding.is_equivalent_to(p.sharding, p.ndim)


# NNX: what is not a parameter, and weights that are tied


TX = optax.chain(optax.sgd(0.5), emaopt.ema(0.5))


def optimized(model, optimizer=None):
    """With an optimizer that has made a step: every parameter is 0.5 less, its average 0.25."""
    optimizer = optimizer or nnx.Optimizer(model, TX, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    return model, optimizer


class NoPytree(nnx.Module, pytree=False):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(2))


class Tied(nnx.Module):
    def __init__(self):
        self.encode = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.decode = nnx.Linear(3, 3, rngs=nnx.Rngs(1))
        self.decode.kernel = self.encode.kernel


def test_weights_that_are_tied_stay_tied_in_the_average_and_when_resumed(tmp_path):
    model, optimizer = optimized(Tied())
    names = SimpleNamespace(model=model, optimizer=optimizer, nnx=nnx, emaopt=emaopt)
    (line,) = re.findall(r"(?m)^averaged = (nnx\.merge\(nnx\.graphdef.*)", DOCUMENT.read_text())
    averaged = eval(line, vars(names))
    assert averaged.encode.kernel is averaged.decode.kernel
    np.testing.assert_array_equal(averaged.encode.kernel[...], model.encode.kernel[...] + 0.25)

    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, 1, nnx.state(model), optimizer)
        other = Tied()
        like = nnx.state(other), nnx.Optimizer(other, TX, wrt=nnx.Param)
        state, resumed, _ = checkpoint.resume(checkpointer, *like)
    nnx.update(other, state)
    bitwise((nnx.state(other), resumed), (nnx.state(model), optimizer))


# what one would try, and what it says


VARIABLES = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.zeros(2)}}
STATE = TrainState.create(apply_fn=None, params=VARIABLES["params"], tx=TX)
MODULE, STATISTICS = eqx.nn.make_with_state(eqx.nn.BatchNorm)(2, "batch", mode="batch")
BELOW = "params has the leaves that opt_state averages below '{}'. Pass that part"
IN_TWO = "params has one Variable in several places, 'decode/kernel', 'encode/kernel',.*nnx.state"
NO_ARRAY = r"params has a str at leaf 'axis_name', which is not an array.*eqx.filter\(model"
MISTAKES = {
    "train state": (lambda: emaopt.average(STATE, STATE.opt_state), BELOW.format("params")),
    "variables": (lambda: emaopt.average(VARIABLES, STATE.opt_state), BELOW.format("params")),
    "model and state": (
        lambda: emaopt.average(
            (MODULE, STATISTICS), TX.init(eqx.filter(MODULE, eqx.is_inexact_array))
        ),
        BELOW.format("0"),
    ),
    "transformation": (
        lambda: emaopt.average(STATE.params, STATE.tx),
        "opt_state holds no average.*pass the state",
    ),
    "nnx.state of the optimizer": (
        lambda: emaopt.average(*map(nnx.state, optimized(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))),
        "opt_state holds no average.*optimizer.opt_state",
    ),
    "tied weights": (lambda: emaopt.average(*optimized(Tied())), IN_TWO),
    "tied weights, swapped": (lambda: emaopt.swap(*optimized(Tied())), IN_TWO),
    "a module that is no pytree": (
        lambda: emaopt.average(*optimized(NoPytree())),
        r"params has a NoPytree at leaf '', which is not an array.*nnx.state\(model, nnx.Param\)",
    ),
    "training on a swapped model": (
        lambda: optimized(*emaopt.swap(*optimized(nnx.Linear(2, 2, rngs=nnx.Rngs(0))))),
        "opt_state is swapped.*before training on",
    ),
    "a whole Equinox module": (lambda: emaopt.ema(0.5).init(MODULE), NO_ARRAY),
    "a whole Equinox module, optimized": (lambda: emaopt.momentum(0.1, 0.9).init(MODULE), NO_ARRAY),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_likely_mistake_with_a_framework_raises_and_names_the_fix(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"(?s)^{message}"):
        call()
