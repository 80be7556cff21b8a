"""What a training step is compiled to for a GPU and a TPU: one kernel per leaf, nothing copied.

Of the compiled program, without a device: `pip install "jax[cuda13-local,tpu]"`.
"""

import itertools
import re

import deviceless
import jax
import jax.numpy as jnp
import optax
import pytest
import trees
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from train import step_of
from trees import OPTIMIZERS, PLACES

import emaopt


TARGETS = [
    pytest.param(target, marks=pytest.mark.skipif(bool(why), reason=why))
    for target, why in ((target, deviceless.missing(target)) for target in deviceless.NEEDS)
]
each_target = pytest.mark.parametrize("target", TARGETS)

SMALL = {"kernel": (3, 3, 64, 64), "bias": (64,)}
TREES = {"small": SMALL, "resnet_like": trees.each_rank_once(trees.RESNET50)}
EVERYWHERE = list(itertools.product(["small"], OPTIMIZERS, PLACES))
BIG = [("resnet_like", "momentum", "ema"), ("resnet_like", "adam", "both")]


def step_for(target, tx, params):
    """The compiled step, and what is carried from step to step."""
    carry = params, jax.eval_shape(tx.init, params)
    return deviceless.compiled(step_of(tx), target, carry, params), carry


@each_target
@pytest.mark.parametrize(("tree", "name", "place"), EVERYWHERE + BIG)
def test_a_step_is_one_kernel_per_leaf_in_place(target, tree, name, place):
    params = trees.abstract(TREES[tree])
    step, carry = step_for(target, PLACES[place](OPTIMIZERS[name]), params)
    clips, averages = place in ("clip", "both"), place in ("ema", "both")

    state = range(len(jax.tree.leaves(carry)))
    assert step.aliases == dict(zip(state, state, strict=True))
    assert step.copies == 0
    assert step.temporaries < 100_000

    # XLA for TPU computes the new accum_update in a kernel of its own
    split = target == "tpu" and name == "adadelta" and averages
    kernels = len(params) * (2 if split else 1)
    least = 2 * trees.nbytes(carry) + trees.nbytes(params)
    if clips:  # a norm of each leaf, for GPU in one or two kernels, and their sum
        kernels += len(params) * (2 if target == "gpu" else 1) + 2
        least += trees.nbytes(params)
    assert step.kernels <= kernels
    if not split:
        assert step.traffic <= 1.005 * least

    if target == "gpu" and not clips:  # the steps; Adam's powers, each read before it is written
        assert step.scalars <= 2 + (5 if name == "adam" else 0)


@each_target
def test_parameters_of_two_bytes_are_rounded_before_they_are_averaged(target):
    params = trees.abstract(SMALL, jnp.bfloat16)
    step, _ = step_for(target, PLACES["ema"](OPTIMIZERS["momentum"]), params)
    assert step.kernels == len(params)
    assert step.hlo.count(" reduce-precision(") >= len(params)


@each_target
def test_a_shadow_that_is_rounded_by_chance_needs_no_pass_more(target):
    params = trees.abstract(SMALL)
    ema = emaopt.ema(0.999, accumulator_dtype=emaopt.stochastic())
    step, carry = step_for(target, optax.chain(OPTIMIZERS["momentum"], ema), params)
    assert step.traffic <= 1.005 * (2 * trees.nbytes(carry) + trees.nbytes(params))
    # XLA for TPU numbers the rows of a matrix beforehand, on the chip
    rows = sum(x.ndim > 1 for x in params.values()) if target == "tpu" else 0
    assert step.kernels <= len(params) + rows


@each_target
@pytest.mark.parametrize("place", ["ema", "both"])
def test_a_step_of_sharded_parameters_sends_one_norm_at_most(target, place):
    mesh = Mesh(deviceless.devices(target), ("x",))
    put = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, P("x") if x.shape else P())
    )
    tx = PLACES[place](OPTIMIZERS["momentum"])
    params = jax.tree.map(put, trees.abstract({"kernel": (512, 256), "bias": (128,)}))
    carry = params, jax.tree.map(put, jax.eval_shape(tx.init, params))
    step = deviceless.compiled(step_of(tx), target, carry, params)
    assert sorted(step.aliases) == list(range(len(jax.tree.leaves(carry))))
    sends = r"= ([^=\n]*) (?:all-|collective-|reduce-scatter|send)[\w-]*(?<!-done)\("
    sent = [re.findall(r"\w+\[[^\]]*\]", types) for types in re.findall(sends, step.hlo)]
    assert {x for types in sent for x in types} <= {"f32[]", "f32[1]", "f32[2]"}
    assert len(sent) == (place == "both")


@pytest.mark.parametrize("target", TARGETS[1:])  # a GPU that is not there has no memory of a host
def test_an_average_on_the_host_stays_there(target):
    mesh = Mesh(deviceless.devices(target), ("x",))
    place = lambda *spec: NamedSharding(mesh, P(*spec))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=place())
    params, shadow = (
        jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=place("x").with_memory_kind(kind))
        for kind in ("device", "pinned_host")
    )
    update = jax.jit(emaopt.moving_average(0.9).update, donate_argnums=1)
    memory = update.lower(params, emaopt.EmaState(step, shadow)).compile().memory_analysis()
    part = 4 * 4096 * 1024 / mesh.size
    assert memory.host_argument_size_in_bytes == part
    assert memory.host_alias_size_in_bytes == part
    assert memory.host_output_size_in_bytes == part
    assert memory.output_size_in_bytes < 10_000  # the step


@each_target
@pytest.mark.parametrize("place", ["ema", "both"])
def test_a_packed_step_has_as_many_kernels_for_any_number_of_leaves(target, place):
    def kernels(number):
        params = {f"{i:02}": jax.ShapeDtypeStruct((200,), jnp.float32) for i in range(number)}
        packed = jax.eval_shape(emaopt.pack, params)
        return step_for(target, PLACES[place](OPTIMIZERS["momentum"]), packed)[0].kernels

    assert kernels(10) == kernels(20) <= (1 if place == "ema" else 4)


@each_target
def test_compiling_for_another_device_leaves_jax_on_the_cpu(target):
    deviceless.compiled(lambda x: x + 1, target, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert {x.platform for x in jax.devices()} == {"cpu"}
    assert len(jax.devices()) == 8
