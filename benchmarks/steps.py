"""What a step costs: emaopt beside Optax with a hand-written average.

    python benchmarks/steps.py

Each of the seven optimizers, alone, after clipping by the global norm, with an average, and with
both, on parameters with the shapes of ResNet-50 (25.6 million in 161 leaves): one jitted step that
donates parameters and state. Beside it the nearest chain of Optax (for Ftrl, which Optax has not, a
plain function), and the average as one writes it by hand. The numbers are medians over rounds of
emaopt's time divided by the other's, each relative to memory traffic around it. Then the averaging
step alone against what the memory can move. Writes results/steps.json and steps.md.
"""

import argparse
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import trees
from timing import Step, bandwidth, publish, ratio, relative_times, scaling, table

import emaopt


RATE, DECAY, NORM = 1e-3, 0.999, 1.0


def ftrl(learning_rate, start=0.1):
    """FTRL-Proximal at its defaults, as a plain function of trees."""

    def init(params):
        accum = jax.tree.map(lambda p: jnp.full_like(p, start), params)
        return accum, jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params):
        def move(g, accum, linear, p):
            change = jnp.sqrt(accum + g * g) - jnp.sqrt(accum)
            return linear + g - change / learning_rate * p

        linear = jax.tree.map(move, grads, *state, params)
        accum = jax.tree.map(lambda g, a: a + g * g, grads, state[0])
        goal = lambda a, z, p: -z * learning_rate / jnp.sqrt(a) - p
        return jax.tree.map(goal, accum, linear, params), (accum, linear)

    return optax.GradientTransformation(init, update)


OPTIMIZERS = {
    "gradient_descent": (emaopt.gradient_descent(RATE), optax.sgd(RATE)),
    "momentum": (emaopt.momentum(RATE, 0.9), optax.sgd(RATE, 0.9)),
    "adagrad": (emaopt.adagrad(RATE), optax.adagrad(RATE, 0.1, eps=0)),
    "adadelta": (emaopt.adadelta(RATE), optax.adadelta(RATE, 0.95, 1e-8)),
    "adam": (emaopt.adam(RATE), optax.adam(RATE)),
    "ftrl": (emaopt.ftrl(RATE), ftrl(RATE)),
    "rmsprop": (
        emaopt.rmsprop(RATE, 0.9, 0.9),
        optax.rmsprop(RATE, 0.9, 1e-10, initial_scale=1, momentum=0.9),
    ),
}
FORMS = {"alone": (False, False), "clip": (True, False), "ema": (False, True), "both": (True, True)}


def ours(optimizer, clip: bool, average: bool):
    """A chain of emaopt's: `init(params)`, and a step of what it gives."""
    tx = optax.chain(
        *[emaopt.clip_by_global_norm(NORM)] * clip, optimizer, *[emaopt.ema(DECAY)] * average
    )

    def step(params, state, grads):
        return emaopt.apply_gradients(tx, grads, params, state)

    return tx.init, step


def by_hand(optimizer, clip: bool, average: bool):
    """Optax and an average by hand, in the same form."""
    tx = optax.chain(*[optax.clip_by_global_norm(NORM)] * clip, optimizer)

    def step(params, state, grads):
        slots, shadow = state
        updates, slots = tx.update(grads, slots, params)
        params = optax.apply_updates(params, updates)
        if average:
            shadow = jax.tree.map(lambda e, p: e - (e - p) * (1 - DECAY), shadow, params)
        return params, (slots, shadow)

    return lambda params: (tx.init(params), params if average else ()), step


def measure_steps(params, rounds: int) -> dict[str, dict[str, float]]:
    grads = jax.tree.map(lambda p: p * 1e-3, params)
    reference = scaling(256)
    found: dict[str, dict[str, float]] = {}
    for name, form in itertools.product(OPTIMIZERS, FORMS):
        mine, other = OPTIMIZERS[name]
        made = {"emaopt": ours(mine, *FORMS[form]), "other": by_hand(other, *FORMS[form])}
        calls = {
            who: Step(step, params, init(params), inputs=(grads,))
            for who, (init, step) in made.items()
        }
        times = relative_times(calls, rounds, reference)
        found.setdefault(name, {})[form] = ratio(times["emaopt"], times["other"])
    return found


def measure_averaging(trees_of: dict, rounds: int) -> dict[str, float]:
    """The share of the memory's bandwidth that the averaging step alone reaches."""
    mean = emaopt.moving_average(DECAY)
    found = {}
    for name, params in trees_of.items():
        size = sum(x.size for x in jax.tree.leaves(params))
        step = Step(lambda s, p: (mean.update(p, s),), mean.init(params), inputs=(params,))
        times = relative_times({"": step}, rounds, bandwidth(size, os.cpu_count() or 1))
        found[name] = float(1 / np.median(times[""]))
    return found


def report(found: dict) -> list[str]:
    ratios = [x for forms in found["steps"].values() for x in forms.values()]
    return [
        f"`python benchmarks/steps.py`: jax {jax.__version__}, {jax.default_backend()}, "
        f"{found['rounds']} rounds.",
        "",
        *table(
            ["emaopt / Optax and an average by hand", "alone", "clip", "ema", "clip and ema"],
            (
                [name, *(f"{forms[form]:.2f}" for form in FORMS)]
                for name, forms in found["steps"].items()
            ),
        ),
        "",
        f"Median {np.median(ratios):.3f}, worst {max(ratios):.3f}.",
        "",
        *table(
            ["the averaging step alone, on", "bandwidth reached"],
            ([name, f"{share:.2f}"] for name, share in found["averaging"].items()),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    resnet = trees.full(trees.RESNET50)
    large = {f"w{i}": jnp.ones((2**23,)) for i in range(8)}
    found = {
        "rounds": rounds,
        "steps": measure_steps(resnet, rounds),
        "averaging": measure_averaging({"8 x 8.4 million": large, "ResNet-50": resnet}, rounds),
    }
    publish("steps", "What a step costs", report(found), found)


if __name__ == "__main__":
    main()
