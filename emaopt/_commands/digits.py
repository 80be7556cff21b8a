"""Train the network of `emaopt demo` on handwritten digits: data, training and picture.

Run as a file with a checkpoint as its argument, this module is the other process of the demo. It
reads the parameters with plain Orbax and evaluates them. It imports neither emaopt nor optax then.
"""

import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from orbax.checkpoint import v1 as ocp
from sklearn.datasets import load_digits
from tqdm import tqdm


BATCH_SIZE = 32
STEPS_PER_POINT = 7  # of a curve in TensorBoard


class Network(nn.Module):
    """Map 8x8 grey images to ten logits by two convolutions and two dense layers."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(16, (3, 3), name="conv1")(images))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="conv2")(x))
        x = nn.relu(nn.Dense(64, name="dense")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="logits")(x)


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Load the images and labels to train with and to test with.

    They are the two halves of the 1797 real digits that come with scikit-learn.
    """
    data: Any = load_digits()
    images = (data.images[..., None] / 16).astype(np.float32)
    labels = data.target.astype(np.int32)
    half = len(images) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])


def batches(images: np.ndarray, labels: np.ndarray, seed: int, epoch: int) -> Iterator[tuple]:
    """Yield the batches of one epoch. They depend on seed and epoch only, so a run can resume.

    Each image is moved by up to one pixel, so that no two epochs are alike.
    """
    rng = np.random.default_rng([seed, epoch])
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[1:3], axis=(1, 2))
    down, right = rng.integers(0, 3, (2, len(images)))
    moved = windows[np.arange(len(images)), down, right, 0][..., None]
    order = rng.permutation(len(images))
    for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        yield moved[chosen], labels[chosen]


def logits(params, images) -> Any:
    """Return the ten logits of each image."""
    return Network().apply({"params": params}, images)


@jax.jit
def predict(params, images):
    """Return the digit that the network sees in each image."""
    return jnp.argmax(logits(params, images), axis=-1)


def accuracy(params, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of the images that are read right."""
    return float(np.mean(np.asarray(predict(params, images)) == labels))


def train(
    checkpoints: Path, seed: int, epochs: int, tensorboard: Path | None = None
) -> tuple[Any, np.ndarray]:
    """Train from the newest checkpoint on, or from the start.

    Args:
        checkpoints: The directory of the run.
        seed: The seed of parameters and batches.
        epochs: The last epoch.
        tensorboard: Where to write curves, histograms and the graph.

    Returns:
        The averages after the last epoch, and the history: a row for each epoch with the loss, and
        the accuracy of the parameters and of the averages.
    """
    import emaopt
    from emaopt import checkpoint, summary

    training, test = digits()
    steps = len(training[0]) // BATCH_SIZE
    tx, step = _optimizer_and_step(steps)
    params = Network().init(jax.random.key(seed), training[0][:1])["params"]
    opt_state = tx.init(params)
    history = np.zeros((0, 3))

    with ocp.training.Checkpointer(str(checkpoints)) as checkpointer:
        if checkpointer.latest is not None:
            done = np.zeros((checkpointer.latest.step, 3))
            params, opt_state, rest = checkpoint.resume(
                checkpointer, params, opt_state, seed=seed, history=done
            )
            history = rest["history"]
            _check_same_run(seed, epochs, rest["seed"], len(history))
            print(f"resumed after epoch {len(history)}")
        if len(history) < epochs:
            print("epoch    loss  accuracy: raw  averaged")
        bar = tqdm(total=epochs * steps, initial=len(history) * steps, disable=None)
        after = len(history) * steps + 1
        log: Any = summary.writer(tensorboard, purge_step=after) if tensorboard else nullcontext()
        with bar, log:
            if tensorboard:
                log.graph(step, params, opt_state, *(x[:BATCH_SIZE] for x in training))
            for epoch in range(len(history) + 1, epochs + 1):
                scalars = []
                for batch in batches(*training, seed, epoch):
                    params, opt_state, found = step(params, opt_state, *batch)
                    scalars.append(found)
                    bar.update()
                raw = accuracy(params, *test)
                averaged = accuracy(emaopt.average(params, opt_state), *test)
                losses = [found["loss"] for found in scalars]
                history = np.append(history, [[np.mean(losses), raw, averaged]], axis=0)
                if tensorboard:
                    for first in range(0, steps, STEPS_PER_POINT):
                        log.write(scalars[first : first + STEPS_PER_POINT])
                    read = {"accuracy/raw": raw, "accuracy/averaged": averaged}
                    log.write(read, step=epoch * steps)
                    log.histograms(params, opt_state)
                checkpoint.save(checkpointer, epoch, params, opt_state, seed=seed, history=history)
                bar.write(f"{epoch:5}  {history[-1, 0]:.4f}  {raw:13.2%}  {averaged:8.2%}")
                sys.stdout.flush()
    return emaopt.average(params, opt_state), history


def _optimizer_and_step(steps: int) -> tuple[Any, Callable[..., Any]]:
    """Make the optimizer, and the jitted training step that returns its summary as well.

    `steps`: the number of updates of an epoch.
    """
    import optax

    import emaopt
    from emaopt import summary
    from emaopt._average.decays import SCALE_FREE

    rate = emaopt.exponential_decay(0.006, decay_steps=6 * steps, decay_rate=0.9, staircase=True)
    clip = emaopt.clip_by_global_norm(1.0)
    tx = optax.chain(
        clip,
        emaopt.rmsprop(rate, decay=0.9, momentum=0.9, epsilon=1e-3),
        emaopt.ema(),
    )

    def loss(params, images, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)
        return jnp.mean(losses)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, images, labels):
        with jax.named_scope("gradients"):
            value, grads = emaopt.compute_gradients(loss, params, images, labels)
        with jax.named_scope("update"):
            params, opt_state = emaopt.apply_gradients(tx, grads, params, opt_state)
        with jax.named_scope("summary"):
            known = {"grads": grads, "clip": clip, "learning_rate": rate, "decay": SCALE_FREE}
            scalars = summary.scalars(params, opt_state, **known, loss=value)
        return params, opt_state, scalars

    return tx, step


def evaluate(checkpoint: Path) -> float:
    """Return the accuracy of a checkpoint's item `params`. Only the network is known here."""
    _, (images, labels) = digits()
    shapes = jax.eval_shape(Network().init, jax.random.key(0), images[:1])["params"]
    template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    params = ocp.load(str(checkpoint), template, checkpointable_name="params")
    return accuracy(params, images, labels)


def draw(history: np.ndarray, path: Path) -> None:
    """Draw both accuracies over the epochs, as a PNG picture for light and dark pages."""
    epochs = np.arange(1, len(history) + 1)
    raw, averaged = 100 * history[:, 1:].T
    blue, orange, grey = "#4184e4", "#d1742f", "#737b85"
    figure = Figure(figsize=(7.2, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.fill_between(epochs, raw, averaged, where=averaged >= raw, color=blue, alpha=0.12, lw=0)
    axes.plot(epochs, raw, color=orange, lw=1.3, marker="o", ms=3)
    axes.plot(epochs, averaged, color=blue, lw=2.2, marker="o", ms=4)
    for name, values, others, color in (
        ("averaged", averaged, raw, blue),
        ("raw", raw, averaged, orange),
    ):
        axes.annotate(
            f"{name} {values[-1]:.1f} %",
            (epochs[-1], values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="bottom" if values[-1] > others[-1] else "top",
            color=color,
            annotation_clip=False,
        )
    # the first epochs would flatten the rest
    axes.set_ylim(max(0.0, 100 - 6 * max(0.5, 100 - averaged[-1])), 100)
    axes.set_xlim(0, 1.01 * epochs[-1])
    axes.set_xlabel("epoch", color=grey)
    axes.set_ylabel("test digits read right (%)", color=grey)
    axes.set_title(
        f"In {np.sum(averaged > raw)} of {len(epochs)} epochs the averaged parameters read more "
        "digits right\nthan the raw ones of the same epoch",
        loc="left",
        fontsize=11,
        color=grey,
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=grey, alpha=0.25)
    axes.tick_params(colors=grey)
    axes.spines[["left", "bottom"]].set_color(grey)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, transparent=True)


def _check_same_run(seed: int, epochs: int, saved_seed: int, done: int) -> None:
    """Raise if the run to resume is another one, or is longer."""
    if seed != saved_seed:
        raise ArgumentError(
            None,
            f"--seed {seed}: the run to resume has seed {saved_seed}. Pass --seed {saved_seed}",
        )
    if epochs < done:
        raise ArgumentError(
            None,
            f"--epochs {epochs}: the run to resume has done {done}. Pass --epochs {done} or more",
        )


if __name__ == "__main__":
    print(evaluate(Path(sys.argv[1])))
