"""A Linen transformer block with logical partitioning, its TrainState on a mesh of 8 devices."""

import os


os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from harness import run
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import emaopt


MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
RULES = (("batch", "data"), ("embed", None), ("mlp", "model"), ("vocab", "model"))


class Block(nn.Module):
    """Two dense layers with named axes, as MaxText and others write them."""

    @nn.compact
    def __call__(self, x):
        boxed, init = nn.with_logical_partitioning, nn.initializers.lecun_normal()
        y = nn.LayerNorm(scale_init=boxed(nn.initializers.ones, ("embed",)))(x)
        y = nn.Dense(32, kernel_init=boxed(init, ("embed", "mlp")))(y)
        y = nn.Dense(16, kernel_init=boxed(init, ("mlp", "embed")))(nn.gelu(y))
        return x + y


class Network(nn.Module):
    """An embedding and several blocks: 62 arrays."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.with_logical_partitioning(nn.initializers.normal(), ("vocab", "embed"))
        x = nn.Embed(64, 16, embedding_init=table)(tokens)
        for _ in range(10):
            x = Block()(x)
        return nn.Dense(64)(x)


MODEL = Network()
TOKENS = jax.random.randint(jax.random.key(1), (8, 12), 0, 64)
DECAYED = emaopt.matching("kernel$")  # names see through the boxes
TX = optax.chain(
    optax.adamw(1e-2, mask=DECAYED), optax.masked(emaopt.ema(emaopt.power(7)), DECAYED)
)


def init(key):
    params = MODEL.init(key, TOKENS)["params"]
    return TrainState.create(apply_fn=MODEL.apply, params=params, tx=TX)


ABSTRACT = jax.eval_shape(init, jax.random.key(0))
SHARDINGS = nn.logical_to_mesh_sharding(nn.get_partition_spec(ABSTRACT), MESH, RULES)


def loss(params):
    logits = MODEL.apply({"params": params}, TOKENS)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


@jax.jit
def update(params, opt_state):
    grads = jax.grad(loss)(params)
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


STEP = jax.jit(update, donate_argnums=(0, 1), out_shardings=(SHARDINGS.params, SHARDINGS.opt_state))


def start():
    state = jax.jit(init, out_shardings=SHARDINGS)(jax.random.key(0))
    kernel = state.params["Block_0"]["Dense_0"]["kernel"].value
    assert kernel.sharding == NamedSharding(MESH, PartitionSpec(None, "model"))
    return state.params, state.opt_state


def like():
    def place(boxed, sharding):
        x = nn.meta.unbox(boxed)
        placed = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return nn.meta.replace_boxed(boxed, placed)

    is_box = lambda node: isinstance(node, nn.meta.AxisMetadata)
    return jax.tree.map(place, ABSTRACT.params, SHARDINGS.params, is_leaf=is_box)


if __name__ == "__main__":
    run(start, lambda params, opt_state, t: STEP(params, opt_state), like, jax.jit(loss))
