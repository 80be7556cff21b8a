"""A small network with batch normalization, in Linen and in NNX, on scikit-learn's digits.

Trained by a recipe with a high learning rate and much weight decay, so that the averaged weights
are far from the raw ones and their batch statistics are not the same.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from sklearn.datasets import load_digits

import emaopt


WIDTH, LAYERS, BATCH_SIZE = 64, 2, 32


class Model(NamedTuple):
    """`init(key) -> params, statistics`; `apply(params, statistics, images, training) -> logits,
    statistics`.
    """

    init: Callable
    apply: Callable


class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, x, training):
        for _ in range(LAYERS):
            x = linen.Dense(WIDTH, use_bias=False)(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not training)(x))
        return linen.Dense(10)(x)


class NNXNetwork(nnx.Module):
    def __init__(self, rngs):
        widths = [64] + LAYERS * [WIDTH]
        self.dense = nnx.List(
            nnx.Linear(a, b, use_bias=False, rngs=rngs) for a, b in itertools.pairwise(widths)
        )
        self.norm = nnx.List(nnx.BatchNorm(b, rngs=rngs) for b in widths[1:])
        self.logits = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x, training):
        for dense, norm in zip(self.dense, self.norm, strict=True):
            x = nnx.relu(norm(dense(x), use_running_average=not training))
        return self.logits(x)


def _linen() -> Model:
    network = LinenNetwork()

    def init(key):
        variables = network.init(key, jnp.zeros((1, 64)), False)
        return variables["params"], variables["batch_stats"]

    def apply(params, statistics, images, training):
        variables = {"params": params, "batch_stats": statistics}
        logits, changed = network.apply(variables, images, training, mutable=["batch_stats"])
        return logits, changed["batch_stats"]

    return Model(init, apply)


def _nnx() -> Model:
    split = lambda key: nnx.split(NNXNetwork(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: NNXNetwork(nnx.Rngs(0))))

    def apply(params, statistics, images, training):
        network = nnx.merge(graphdef, params, statistics, copy=True)
        logits = network(images, training)
        return logits, nnx.state(network, nnx.BatchStat)

    return Model(lambda key: split(key)[1:], apply)


MODELS = {"linen": _linen(), "nnx": _nnx()}


@functools.cache
def digits():
    """Images and labels to train with and to test with: the two halves."""
    data = load_digits()
    images, labels = (data.data / 16).astype(np.float32), data.target.astype(np.int32)
    half = len(images) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])


class Trained(NamedTuple):
    """Everything with a leading axis: the seeds."""

    params: object
    statistics: object
    averaged: object
    averaged_statistics: object


def train(
    model: Model, seeds: int, *, learning_rate: float, weight_decay: float, epochs: int, start: int
) -> Trained:
    """Stochastic weight averaging (the plain mean) from an epoch on."""
    images, labels = map(jnp.asarray, digits()[0])
    steps = len(images) // BATCH_SIZE
    swa = emaopt.after(start * steps, emaopt.power(0))
    tx = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, 0.9), emaopt.ema(swa)
    )
    mean = emaopt.moving_average(swa)

    def step(carry, chosen):
        params, statistics, opt_state, averaged_statistics = carry

        def loss(params):
            logits, new = model.apply(params, statistics, images[chosen], True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen])
            return jnp.mean(losses), new

        grads, statistics = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, statistics, opt_state, mean.update(statistics, averaged_statistics)), None

    @jax.jit
    @jax.vmap
    def run(key, order):
        params, statistics = model.init(key)
        start = params, statistics, tx.init(params), mean.init(statistics)
        (params, statistics, opt_state, averaged_statistics), _ = jax.lax.scan(step, start, order)
        averaged = emaopt.average(params, opt_state)
        return Trained(params, statistics, averaged, averaged_statistics.shadow)

    shuffled = lambda rng: rng.permutation(len(images))[: steps * BATCH_SIZE]
    orders = [
        [shuffled(rng) for _ in range(epochs)] for rng in map(np.random.default_rng, range(seeds))
    ]
    orders = np.reshape(orders, (seeds, epochs * steps, BATCH_SIZE))
    keys = [jax.random.key(seed, impl="rbg") for seed in range(seeds)]  # compiles quickly
    return run(jnp.stack(keys), orders)


def recalibrated(model: Model, trained: Trained):
    """The statistics of the averaged weights, on the training images in batches of 128."""
    forward = jax.jit(
        jax.vmap(lambda p, s, images: model.apply(p, s, images, True)[1], (0, 0, None))
    )
    images = digits()[0][0]
    return emaopt.recalibrate(
        functools.partial(forward, trained.averaged),
        trained.statistics,
        images[: len(images) // 128 * 128].reshape(-1, 128, 64),
    )


def accuracies(model: Model, trained: Trained) -> dict[str, np.ndarray]:
    """The accuracy on the test images, for each seed."""
    images, labels = digits()[1]

    @jax.jit
    @jax.vmap
    def accuracy(params, statistics):
        logits, _ = model.apply(params, statistics, images, False)
        return jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)

    both = {
        "raw": (trained.params, trained.statistics),
        "copied": (trained.averaged, trained.statistics),
        "averaged": (trained.averaged, trained.averaged_statistics),
        "recalibrated": (trained.averaged, recalibrated(model, trained)),
    }
    return {name: np.asarray(accuracy(*of)) for name, of in both.items()}
