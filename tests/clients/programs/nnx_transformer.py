"""An NNX transformer whose blocks are in lists, as nearly all are, trained as `nnx.state`."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from harness import run

import emaopt


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.mlp = nnx.List(
            [nnx.Linear(width, 2 * width, rngs=rngs), nnx.Linear(2 * width, width, rngs=rngs)]
        )

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp[1](nnx.gelu(self.mlp[0](self.norms[1](x))))


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        self.blocks = nnx.List([Block(16, rngs) for _ in range(3)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 32, rngs=rngs)

    def __call__(self, tokens):
        x = self.dropout(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


MODEL = Transformer(nnx.Rngs(0))
MODEL.eval()  # without dropout, so that a resumed run is the same
GRAPH, PARAMS, OTHERS = nnx.split(MODEL, nnx.Param, ...)
TOKENS = jax.random.randint(jax.random.key(1), (4, 10), 0, 32)
TX = optax.chain(optax.adamw(1e-2, mask=emaopt.matching("kernel$")), emaopt.ema(emaopt.warmup(0.9)))


def loss(params):
    logits = nnx.merge(GRAPH, params, OTHERS)(TOKENS)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


STEP = emaopt.minimize(loss, TX)


def start():
    params = jax.tree.map(jnp.copy, PARAMS)
    return params, TX.init(params)


def step(params, opt_state, t):
    params, opt_state, _ = STEP(params, opt_state)
    return params, opt_state


if __name__ == "__main__":
    run(start, step, lambda: PARAMS, jax.jit(loss))
