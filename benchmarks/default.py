"""Which average needs no tuning: averages of many widths, for many lengths of training.

    python benchmarks/default.py               # 5 seeds, two minutes of one core

A network of two layers on scikit-learn's digits, one half to train on and one to test, by Adam and
by SGD with momentum, each at two constant learning rates. One run keeps all the averages. After
several numbers of steps the loss of each is compared with the best of all of them there, which a
user does not know beforehand: the difference is its regret. Writes `results/default.md`.
"""

import argparse
import os


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import RESULTS
from sklearn.datasets import load_digits

import emaopt


HORIZONS = (30, 100, 300, 1000, 3000)
BATCH = 32
OPTIMIZERS = {
    "Adam, 1e-3": lambda: emaopt.adam(1e-3),
    "Adam, 1e-2": lambda: emaopt.adam(1e-2),
    "momentum, 0.03": lambda: emaopt.momentum(0.03, 0.9),
    "momentum, 0.1": lambda: emaopt.momentum(0.1, 0.9),
}
WIDTHS = (0.03, 0.05, 0.08, 0.10, 0.125, 0.15, 0.20, 0.25)
AVERAGES = {f"power, width {s}": emaopt.power(emaopt.posthoc.gamma(s)) for s in WIDTHS} | {
    "power(0), the plain mean": emaopt.power(0),
    "warmup(0.9999)": emaopt.warmup(0.9999),
    "half-life 5 % of t (torchtitan)": emaopt.presets.torchtitan(),
    "0.9": 0.9,
    "0.99": 0.99,
    "0.999": 0.999,
    "no average": 0.0,
}


def data(seed):
    """The digits, [2 halves] of images in [0, 1] and labels."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = jnp.float32(images[order] / 16), jnp.int32(labels[order])
    half = len(images) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])


def loss(params, images, labels):
    """The mean cross entropy of a network with one hidden layer."""
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def losses(tx, train, test, key):
    """The test loss of every average after each of the horizons, [horizons, averages]."""
    w1, w2, order = jax.random.split(key, 3)
    params = {
        "w1": jax.random.normal(w1, (64, 64)) / 8,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(w2, (64, 10)) / 8,
        "b2": jnp.zeros(10),
    }
    averages = [(name, emaopt.ema(decay)) for name, decay in AVERAGES.items()]
    chain = optax.chain(tx, optax.named_chain(*averages))

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(loss)(params, train[0][batch], train[1][batch])
        return emaopt.apply_gradients(chain, grads, params, state), None

    count = len(train[0]) // BATCH
    epochs = -(-HORIZONS[-1] // count)
    shuffled = [
        jax.random.permutation(k, len(train[0]))[: count * BATCH].reshape(count, BATCH)
        for k in jax.random.split(order, epochs)
    ]
    batches, carry, found = jnp.concatenate(shuffled), (params, chain.init(params)), []
    for begin, end in zip((0, *HORIZONS), HORIZONS, strict=False):
        carry, _ = jax.lax.scan(step, carry, batches[begin:end])
        each = [emaopt.average(*carry, name=name) for name in AVERAGES]
        found.append(jnp.stack([loss(average, *test) for average in each]))
    return jnp.stack(found)


def main():
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    found = []
    for make in OPTIMIZERS.values():
        run = jax.jit(lambda train, test, key, make=make: losses(make(), train, test, key))
        found.append([run(*data(seed), jax.random.key(seed)) for seed in range(seeds)])
    all_losses = np.array(found)  # [optimizers, seeds, horizons, averages]
    regret = all_losses - all_losses.min(axis=-1, keepdims=True)
    by_horizon = regret.mean(axis=(0, 1))
    scale = all_losses.min(axis=-1).mean(axis=(0, 1))
    steps = [f"{horizon} steps" for horizon in HORIZONS]
    head = ["average", *steps, "mean", "worst"]
    lines = [
        f"Test loss above the best of these averages, mean of {len(OPTIMIZERS)} optimizers and "
        f"{seeds} seeds;",
        "mean and worst are over all. Made by `python benchmarks/default.py`.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for i, name in enumerate(AVERAGES):
        of_all = [by_horizon[:, i], [regret[..., i].mean(), regret[..., i].max()]]
        cells = [f"{x:.4f}" for x in np.concatenate(of_all)]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    best = [f"{x:.4f}" for x in scale]
    lines.append("| loss of the best | " + " | ".join(best) + " | | |")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    (RESULTS / "default.md").write_text(f"# An average without tuning\n\n{text}")


if __name__ == "__main__":
    main()
