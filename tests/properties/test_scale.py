"""Training on many devices: real steps on meshes, two processes, averages on the host, and paper.

What each transformation compiles to is in test_sharding.py; here is a network with its gradients.
"""

import collections
import functools
import json
import re
import subprocess
import sys
import threading

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharded
from compare import bitwise, close
from folders import BENCHMARKS
from jax.sharding import AxisType
from orbax.checkpoint import v1 as ocp
from processes import finish, together
from sharded import collectives
from trainer import environment

import emaopt
from emaopt import checkpoint


CASES = [
    (name, kind)
    for kind in (AxisType.Auto, AxisType.Explicit)
    for name in ("fsdp", "tensor", "both")
]
each_mesh = pytest.mark.parametrize(
    ("name", "kind"), CASES, ids=[f"{name}-{kind.name.lower()}" for name, kind in CASES]
)
BARE = optax.stateless(lambda updates, params: updates)


@functools.cache
def compiled(name, kind, tx=sharded.TX):
    mesh = sharded.mesh_of(name, kind)
    params, opt_state, batch = sharded.start(tx, mesh)
    with sharded.within(mesh, kind):
        return sharded.step_of(tx, kind).lower(params, opt_state, *batch).compile()


@functools.cache
def alone():
    return sharded.trained()


def assert_at(tree, shardings):
    for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.slow
@each_mesh
def test_training_on_a_mesh_is_training_on_one_device(name, kind):
    params, opt_state, batch = sharded.start(sharded.TX, sharded.mesh_of(name, kind))
    places = jax.tree.map(lambda x: x.sharding, (params, opt_state))
    for _ in range(sharded.STEPS):
        params, opt_state, value = compiled(name, kind)(params, opt_state, *batch)
        value.block_until_ready()  # programs under way at once may starve each other of threads
    close((params, opt_state), alone(), rtol=1e-5, atol=1e-6)
    assert_at((params, opt_state), places)
    (average,) = emaopt.averages(opt_state).values()
    for like_params in (average.shadow, emaopt.slot(opt_state, "momentum")):
        assert_at(like_params, places[0])


@pytest.mark.many(1)
@pytest.mark.parametrize("name", sharded.MESHES)
def test_clipping_optimizer_and_average_send_nothing_but_scalars(name):
    """One for each leaf that is in parts, at most: its share of the global norm."""
    more = sent(name, sharded.TX) - sent(name, BARE)
    assert set(more) == {("all-reduce", "f32[]")}
    assert more.total() <= len(jax.tree.leaves(sharded.SPECS))
    assert not sent(name, BARE) - sent(name, sharded.TX)


def sent(name, tx):
    """How often an array of each shape is sent by each operation."""
    return collections.Counter(
        (operation, shape)
        for shapes, operation in collectives(compiled(name, AxisType.Auto, tx).as_text())
        for shape in re.findall(r"\w+\[[^\]]*\]", shapes)
    )


# ---- two processes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    command = [sys.executable, sharded.__file__, tmp_path]
    finish(together(command, environment(4)), timeout=120)
    found = [dict(np.load(tmp_path / f"{i}.npz")) for i in range(2)]
    params, opt_state = alone()
    average = emaopt.average(params, opt_state)
    want = {"params": params, "average": average, "swapped": average, "swapped back": params}
    for each in found:
        for name, tree in want.items():
            close(
                [each[f"{name}/{i}"] for i in range(5)], jax.tree.leaves(tree), rtol=1e-5, atol=1e-6
            )
        assert all(np.array_equal(each[f"params/{i}"], each[f"swapped back/{i}"]) for i in range(5))
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


# ---- on the host --------------------------------------------------------------------------------


KINDS_OF_AVERAGES = {
    "explicit": (AxisType.Explicit, {"ledger": True}),
    "stochastic": (AxisType.Auto, {"accumulator_dtype": emaopt.stochastic()}),
    "compensated": (AxisType.Auto, {"accumulator_dtype": emaopt.compensated()}),
}


def on_mesh(kind):
    return sharded.place(sharded.init(), sharded.mesh_of("both", kind), sharded.SPECS)


def memory_kinds(tree):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS_OF_AVERAGES)
def test_an_average_on_the_host_stays_there_and_is_the_same(name):
    kind, options = KINDS_OF_AVERAGES[name]
    grown = jax.jit(lambda params: jax.tree.map(lambda x: 1.5 * x, params))
    params = grown(on_mesh(kind))
    mean = emaopt.moving_average(emaopt.every(10, 0.9), **options)
    here, there = mean.init(params), emaopt.on_host(mean.init(params))
    places = jax.tree.map(lambda x: x.sharding, there)
    on_devices = jax.jit(lambda *args: mean.update(*args), donate_argnums=1)
    on_host = compiling.jit(lambda *args: mean.update(*args), donate_argnums=1)
    for t in (10, 20):
        params = grown(params)
        here, there = on_devices(params, here, t), on_host(params, there, t)
    bitwise(there, here)
    assert_at(there, places)
    assert memory_kinds((there.shadow, there.residue)) == {"pinned_host"}
    assert memory_kinds((there.step, there.ledger, emaopt.average(params, there))) == {"device"}
    bitwise(emaopt.average(params, there), emaopt.average(params, here))
    assert compiling.compilations(on_host) == 1


def test_an_update_of_an_average_on_the_host_is_in_place_and_local():
    params = on_mesh(AxisType.Auto)
    mean = emaopt.moving_average(0.9)
    state = emaopt.on_host(mean.init(params))
    update = jax.jit(mean.update, donate_argnums=1).lower(params, state).compile()
    local = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)]
    assert update.memory_analysis().alias_size_in_bytes == sum(local)
    assert collectives(update.as_text()) == []


def test_every_k_steps_is_what_the_chain_would_average():
    k, decay, grads = 2, emaopt.half_life(3), {"w": jnp.ones(4)}
    tx = optax.chain(emaopt.momentum(0.1, 0.9), emaopt.ema(emaopt.every(k, decay)))
    mean = emaopt.moving_average(emaopt.every(k, decay))
    update = compiling.jit(mean.update, donate_argnums=1)
    params = {"w": jnp.arange(4.0)}
    opt_state, average = tx.init(params), emaopt.on_host(mean.init(params))
    weights = np.array([params["w"]])
    for step in range(1, 7):
        params, opt_state = emaopt.apply_gradients(tx, grads, params, opt_state)
        weights = np.append(weights, [params["w"]], axis=0)
        if step % k == 0:
            average = update(params, average, step)
    assert compiling.compilations(update) == 1
    close(average.shadow, opt_state[-1].shadow, rtol=1e-5, atol=1e-6)
    kept = 0.5 ** (k / 3)  # of a decay d over k updates: d**k
    want = weights[0]
    for taken in weights[k::k]:
        want = kept * want + (1 - kept) * taken
    np.testing.assert_allclose(average.shadow["w"], want, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "average",
    [emaopt.ema(0.9), emaopt.heal(emaopt.ema(0.9, accumulator_dtype=emaopt.compensated()))],
    ids=["ema", "heal"],
)
def test_a_chain_whose_average_is_on_the_host(average):
    params = {"w": jnp.arange(4.0), "count": jnp.arange(3), "key": jax.random.key(0)}
    tx = optax.chain(optax.stateless(lambda updates, params: updates), average)
    grads = {"w": jnp.ones(4), "count": None, "key": None}
    step = jax.jit(lambda p, s: emaopt.apply_gradients(tx, grads, p, s))
    here = params, tx.init(params)
    there = params, emaopt.on_host(here[1])
    for _ in range(2):
        here, there = step(*here), step(*there)
    bitwise(there, here)
    (state,) = emaopt.averages(there[1]).values()
    assert state.shadow["w"].sharding.memory_kind == "pinned_host"
    assert memory_kinds(there[0]) == {"device"}


@pytest.mark.slow
def test_what_is_on_the_host_is_saved_and_resumed_on_another_mesh(tmp_path):
    tx = optax.chain(optax.sgd(0.1), emaopt.ema(0.9))
    meshes = [sharded.mesh_of(name, AxisType.Auto) for name in ("fsdp", "tensor")]
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        saved, like = (
            (params, emaopt.on_host(tx.init(params)))
            for params in (sharded.place(sharded.init(), mesh, sharded.SPECS) for mesh in meshes)
        )
        saved = jax.tree.map(lambda x: x * jnp.asarray(2, x.dtype), saved[0]), saved[1]
        checkpoint.save(checkpointer, 1, *saved)
        *got, _ = checkpoint.resume(checkpointer, *like)
    bitwise(tuple(got), saved)
    assert_at(got, jax.tree.map(lambda x: x.sharding, list(like)))
    assert memory_kinds(got[1][-1].shadow) == {"pinned_host"}


def test_nothing_waits_for_an_update():
    """Two steps and an update between them are under way while the first still computes."""
    go = threading.Event()

    def hold(x):
        assert go.wait(60)
        return np.asarray(x)

    mesh = jax.sharding.Mesh(jax.devices()[:2], ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = jax.device_put(jnp.ones(256), sharding)
    like = jax.ShapeDtypeStruct((), jnp.float32)
    held = jax.jit(lambda p: jax.pure_callback(hold, like, p[0]) + p, out_shardings=sharding)
    step = jax.jit(lambda p: 3 * p, donate_argnums=0)
    mean = emaopt.moving_average(0.5)
    update = jax.jit(mean.update, donate_argnums=1)
    average = update(params, emaopt.on_host(mean.init(params)))
    second = held(params)
    average = update(second, average)
    third = step(second)
    assert not average.shadow.is_ready()
    go.set()
    assert np.array_equal(average.shadow, np.full(256, 1.5))
    assert np.array_equal(third, np.full(256, 6.0))


def test_an_average_of_no_numbers_stays():
    tx = optax.masked(emaopt.ema(0.9), {"w": False})
    state = tx.init({"w": jnp.ones(2)})
    assert jax.tree.structure(emaopt.on_host(state)) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "make",
    [
        jax.jit(lambda params: emaopt.on_host(emaopt.ema(0.9).init(params))),
        lambda params: emaopt.on_host(jax.eval_shape(emaopt.ema(0.9).init, params)),
    ],
    ids=["inside jit", "abstract"],
)
def test_on_host_without_arrays_is_an_error(make):
    message = r"opt_state is traced or abstract.*on_host\(jax.jit\(tx.init\)"
    with pytest.raises(ValueError, match=message):
        make(jnp.ones(2))


def without_the_kind(monkeypatch):
    """JAX refuses, as for any memory kind that is not there."""
    far = lambda: jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="far")
    monkeypatch.setattr(jax, "device_put", lambda x, where: far())


def without_host_in_jit(monkeypatch):
    """What jax 0.8 does on CPU."""
    put, host = jax.device_put, jax.memory.Space.Host
    forget = lambda x, where: put(x, jax.memory.Space.Device if where == host else where)
    monkeypatch.setattr(jax, "device_put", forget)


@pytest.mark.parametrize("backend", [without_the_kind, without_host_in_jit])
def test_a_backend_that_keeps_nothing_on_the_host_is_an_error(backend, monkeypatch):
    state = emaopt.ema(0.9).init({"w": jnp.ones(2)})
    backend(monkeypatch)
    message = r"opt_state cannot be on the host: the cpu backend .* of its memories .*device.*Leave"
    with pytest.raises(ValueError, match=message):
        emaopt.on_host(state)


# ---- on paper -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_paper_calculation_is_what_xla_says_of_64_devices():
    cases = ["adam, float32", "rmsprop, stochastic", "momentum, host"]
    script = (
        "import json, scale\n"
        f"cases = [case.split(', ') for case in {cases}]\n"
        "print(json.dumps(scale.measure(scale.decoder(), cases)))"
    )
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert list(found) == cases
    for case in found.values():
        paper, program = case["paper"], case["compiled"]
        assert_counted(paper, program)
        assert program["arguments"] == paper["held"] + paper["gradients"]
    host = found["momentum, host"]
    assert_counted(host["paper"]["update"], host["compiled"]["update"])


def assert_counted(paper, program):
    assert program["held"] == paper["held"]
    assert program["sent"] == paper["sent"]
    assert program["loops"] == pytest.approx(paper["loops"], rel=1e-6)
    assert program["temporary"] < 10_000
