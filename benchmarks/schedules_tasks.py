"""The data and the networks of `schedules.py`: digits and Fashion-MNIST, three small networks.

Every network is a function `(params, images, statistics=None) -> (logits, statistics)`. Without
statistics, batch normalization uses those of the images.
"""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits


FASHION = Path("/usr/share/datasets/fashion-mnist")


class Task(NamedTuple):
    """What is trained. Index arrays have one row per seed.

    images: [n, height, width] uint8 with a border of `shift` pixels; labels: [n];
    order: [seeds, steps, batch], the images of each step; validation, test: [seeds, n];
    calibration: [seeds, n], for the statistics at evaluation; start: the parameters, [seeds, ...].
    """

    images: jax.Array
    labels: jax.Array
    order: jax.Array
    validation: jax.Array
    test: jax.Array
    calibration: jax.Array
    start: Any
    network: Callable
    shift: int = 0
    warm: int = 1


def fashion() -> tuple[np.ndarray, np.ndarray]:
    """Read the 60,000 images to train on, then the 10,000 to test on; and their labels."""
    if not FASHION.is_dir():
        raise SystemExit(f"{FASHION} is missing: apt-get install dataset-fashion-mnist")
    unpacked = lambda name: gzip.decompress((FASHION / name).read_bytes())
    read = lambda name, skip: np.frombuffer(unpacked(name), np.uint8, offset=skip)
    parts = [
        (
            read(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28),
            read(f"{part}-labels-idx1-ubyte.gz", 8),
        )
        for part in ("train", "t10k")
    ]
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels).astype(np.int32)


def dense(key, inputs, outputs, gain=2.0):
    """Initialize the kernel and the bias of a layer."""
    kernel = jax.random.normal(key, (inputs, outputs)) * (gain / inputs) ** 0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def apply(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def mlp(params, images, statistics=None):
    """A network with one hidden layer."""
    x = images.reshape(len(images), -1)
    return apply(params["output"], jax.nn.relu(apply(params["hidden"], x))), None


def init_mlp(inputs, hidden):
    def init(key):
        first, second = jax.random.split(key)
        return {"hidden": dense(first, inputs, hidden), "output": dense(second, hidden, 10, 1.0)}

    return init


def patches(x):
    """Collect the 3 x 3 neighbours of every second pixel: a convolution is then a product."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [x[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(parts, -1)


def cnn(params, images, statistics=None):
    """Two convolutions of stride 2, each with batch normalization, and a hidden layer."""
    x, found = images[..., None], []
    for i, name in enumerate(("first", "second")):
        layer = params[name]
        x = patches(x) @ layer["kernel"]
        own = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if statistics is None else statistics[i]
        found.append(own)
        x = (x - own[0]) * jax.lax.rsqrt(own[1] + 1e-5) * layer["scale"] + layer["bias"]
        x = jax.nn.relu(x)
    return mlp(params, x)[0], found


def init_cnn(key):
    first, second, third = jax.random.split(key, 3)
    normal = lambda key, inputs, outputs: {
        "kernel": dense(key, inputs, outputs)["kernel"],
        "scale": jnp.ones(outputs),
        "bias": jnp.zeros(outputs),
    }
    convolutions = {"first": normal(first, 9, 8), "second": normal(second, 72, 16)}
    return convolutions | init_mlp(784, 32)(third)


def normed(layer, x):
    """Normalize each token."""
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * layer["scale"] + layer["bias"]


def transformer(params, images, statistics=None):
    """One block with two heads; the rows of an image are its tokens."""
    x = apply(params["embed"], images) + params["position"]
    q, k, v = jnp.split(apply(params["attention"], normed(params["norm1"], x)), 3, -1)
    heads = lambda a: a.reshape(*a.shape[:2], 2, -1).swapaxes(1, 2)
    q, k, v = heads(q), heads(k), heads(v)
    weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5)
    mixed = (weights @ v).swapaxes(1, 2).reshape(x.shape)
    x = x + apply(params["mix"], mixed)
    hidden = jax.nn.gelu(apply(params["up"], normed(params["norm2"], x)))
    x = x + apply(params["down"], hidden)
    return apply(params["output"], normed(params["norm3"], x).mean(1)), None


def init_transformer(key, tokens=14, width=32):
    keys = jax.random.split(key, 7)
    norm = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    return {
        "embed": dense(keys[0], tokens, width, 1.0),
        "position": jax.random.normal(keys[1], (tokens, width)) * 0.1,
        "attention": dense(keys[2], width, 3 * width, 1.0),
        "mix": dense(keys[3], width, width, 1.0),
        "up": dense(keys[4], width, 2 * width),
        "down": dense(keys[5], 2 * width, width, 1.0),
        "output": dense(keys[6], width, 10, 1.0),
        "norm1": norm,
        "norm2": norm,
        "norm3": norm,
    }


def shuffled(rng, rows, steps, batch):
    """The rows of each step: epoch after epoch, each in an order of its own."""
    epochs = -(-steps * batch // (len(rows) // batch * batch))
    whole = [rng.permutation(rows)[: len(rows) // batch * batch] for _ in range(epochs)]
    return np.concatenate(whole)[: steps * batch].reshape(steps, batch)


def make(images, labels, splits, init, network, shape, shift=0, warm=1) -> Task:
    """Build a task of its splits: (to train on, validation, test, calibration) for each seed."""
    steps, batch = shape
    border = ((0, 0), (shift, shift), (shift, shift))
    rngs = [np.random.default_rng(1000 + seed) for seed in range(len(splits))]
    order = [shuffled(rng, split[0], steps, batch) for rng, split in zip(rngs, splits, strict=True)]
    rows = [jnp.int32(np.stack(part)) for part in list(zip(*splits, strict=True))[1:]]
    keys = jax.vmap(jax.random.key)(jnp.arange(len(splits)))
    images, labels = jnp.asarray(np.pad(images, border)), jnp.asarray(labels)
    start = jax.vmap(init)(keys) if callable(init) else init
    return Task(images, labels, jnp.int32(np.stack(order)), *rows, start, network, shift, warm)


def digits() -> Task:
    """10 splits of scikit-learn's digits."""
    images, labels = load_digits(return_X_y=True)
    images = np.uint8(images.reshape(-1, 8, 8) * 255 / 16)
    splits = []
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(len(images))
        splits.append((order[:1000], order[1000:1400], order[1400:], order[:100]))
    shape = (1600, 32)
    return make(images, labels.astype(np.int32), splits, init_mlp(64, 32), mlp, shape, shift=1)


def of_fashion(seeds, init, network, shape, trained_on=55_000, change=None, **options) -> Task:
    """A task on Fashion-MNIST: 5,000 images to choose by, the 10,000 to test."""
    images, labels = fashion()
    if change is not None:
        images = change(images)
    splits = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(60_000)
        parts = order[5000 : 5000 + trained_on], order[:5000], np.arange(60_000, 70_000)
        splits.append((*parts, order[5000:6000]))
    return make(images, labels, splits, init, network, shape, **options)


def halved(images):
    """The means of 2 x 2 pixels."""
    return np.uint8(images.reshape(-1, 14, 2, 14, 2).mean((2, 4)))


def turned(images):
    return np.ascontiguousarray(np.rot90(images, axes=(1, 2)))


def one_pass() -> Task:
    return of_fashion(5, init_mlp(784, 64), mlp, (1600, 32))


def epochs() -> Task:
    return of_fashion(3, init_cnn, cnn, (1600, 64), trained_on=10_240, shift=2)


def rows() -> Task:
    return of_fashion(3, init_transformer, transformer, (1600, 32), change=halved, warm=40)


def fine_tuning(start) -> Task:
    return of_fashion(5, start, mlp, (640, 32), trained_on=2_000, change=turned)
