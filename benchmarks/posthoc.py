"""How near averages that are synthesized after training come to those that are computed in it.

    python benchmarks/posthoc.py            # two minutes

The relative error of the profiles; the distance of parameters and the accuracy in a real training
run. What it costs on disk is in `merge.py`. Writes `results/posthoc.md`.
"""

import os
import time


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import RESULTS
from sklearn.datasets import load_digits
from timing import table

import emaopt
from emaopt import posthoc


TWO = [posthoc.gamma(0.05), posthoc.gamma(0.10)]


def profile_errors():
    last, lengths = 8192, (0.03, 0.06, 0.075, 0.12, 0.15, 0.20, 0.25)
    rows = []
    for n in (4, 8, 16, 32, 64):
        steps = np.arange(1, n + 1) * last // n
        errors = [posthoc.residual(steps, TWO, at=last, target=posthoc.gamma(s)) for s in lengths]
        rows.append([str(n), *(f"{error:.2g}" for error in errors)])
    lines = [
        "## Relative error of the profile",
        "",
        "Power averages of sigma_rel 0.05 and 0.10, at update 8192, by the number of snapshots:",
        "",
        *table(["snapshots", *(f"{s:g}" for s in lengths)], rows),
    ]
    last = 4096
    steps = np.arange(1, 65) * last // 64
    decay = lambda d: lambda t: jnp.float32(d)
    targets = {
        "EMA 0.999": decay(0.999),
        "EMA 0.997": decay(0.997),
        "mean of the last 25 %": posthoc.window(last // 4, last),
        "power, sigma_rel 0.1": posthoc.gamma(0.1),
        "1-sqrt over the last 25 %, every 64": posthoc.one_minus_sqrt(last // 4, last, 64),
        "1-sqrt over the last 25 %": posthoc.one_minus_sqrt(last // 4, last),
    }
    recorded = {
        "EMA 0.99 and 0.998": [decay(0.99), decay(0.998)],
        "EMA 0.99": [decay(0.99)],
        "EMA 0.998": [decay(0.998)],
        "raw parameters": [decay(0.0)],
    }
    error = lambda g, t: f"{posthoc.residual(steps, g, at=last, target=t):.2g}"
    rows = [[name, *(error(g, t) for g in recorded.values())] for name, t in targets.items()]
    lines += ["", "Ordinary averages, 64 snapshots, at update 4096, by what was recorded:"]
    lines += ["", *table(["target", *recorded], rows)]
    last = 10**6
    steps = np.arange(1, 65) * last // 64
    start = time.perf_counter()
    posthoc.residual(steps, [decay(0.99999), decay(0.9999)], at=last, target=decay(0.99995))
    seconds = time.perf_counter() - start
    return [*lines, "", f"10**6 updates, two averages, 64 snapshots: {seconds:.1f} s."]


def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = np.float32(images[order] / 16), np.int32(labels[order])
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def training():
    """A small network on the digits; the averages of every length computed, two of them saved."""
    last, snapshots = 4096, 64
    train, test = (tuple(map(jnp.asarray, xy)) for xy in digits())
    lengths = (0.03, 0.05, 0.06, 0.075, 0.10, 0.12, 0.15, 0.20, 0.25)
    averages = {s: emaopt.moving_average(emaopt.power(posthoc.gamma(s))) for s in lengths}

    def logits(params, x):
        return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    accuracy = jax.jit(lambda params: (logits(params, test[0]).argmax(1) == test[1]).mean())
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "w1": jax.random.normal(keys[0], (64, 64)) / 8,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(keys[1], (64, 10)) / 8,
        "b2": jnp.zeros(10),
    }
    tx = optax.sgd(0.3)

    @jax.jit
    def interval(carry, key):
        def step(carry, key):
            params, state, means = carry
            at = jax.random.randint(key, (16,), 0, len(train[1]))
            grads = jax.grad(loss)(params, train[0][at], train[1][at])
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            means = {s: averages[s].update(params, mean) for s, mean in means.items()}
            return (params, state, means), None

        return jax.lax.scan(step, carry, jax.random.split(key, last // snapshots))[0]

    carry = params, tx.init(params), {s: averages[s].init(params) for s in lengths}
    saved = []
    for i in range(snapshots):
        carry = interval(carry, jax.random.key(i))
        saved += [jax.tree.map(np.asarray, carry[2][s].shadow) for s in (0.05, 0.10)]
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(float)
    raw, rows = flat(carry[0]), []
    for keep in (8, 64):
        every = snapshots // keep
        steps = np.arange(1, keep + 1) * last // keep
        chosen = [x for i in range(every - 1, snapshots, every) for x in saved[2 * i : 2 * i + 2]]
        for s in lengths:
            if s in (0.05, 0.10):
                continue
            arguments = {"at": last, "target": emaopt.power(posthoc.gamma(s))}
            decays = [emaopt.power(gamma) for gamma in TWO]
            residual = posthoc.residual(steps, decays, **arguments)
            factors = posthoc.weights(steps, decays, **arguments, threshold=1)
            made, direct = posthoc.synthesize(chosen, factors), carry[2][s].shadow
            off = np.linalg.norm(flat(made) - flat(direct))
            rows.append(
                [
                    f"{keep}",
                    f"{s:g}",
                    f"{residual:.2g}",
                    f"{off / np.linalg.norm(raw - flat(direct)):.2g}",
                    f"{off / np.linalg.norm(flat(direct)):.2g}",
                    f"{accuracy(jax.tree.map(jnp.asarray, made)):.2%}",
                    f"{accuracy(direct):.2%}",
                ]
            )
    head = ["snapshots", "sigma_rel", "predicted error of the profile"]
    head += ["distance from the direct average / that average's from the raw parameters"]
    head += ["distance / size of the parameters", "accuracy, synthesized", "accuracy, direct"]
    return [
        "",
        "## Parameters of a real run",
        "",
        f"4,810 parameters trained on scikit-learn's digits, SGD, {last} updates, float32; "
        "recorded 0.05 and 0.10, each other length computed beside them. The raw parameters have "
        f"an accuracy of {accuracy(carry[0]):.2%}.",
        "",
        *table(head, rows),
    ]


def main():
    text = "\n".join(
        ["# Averages that are chosen after training", "", *profile_errors(), *training()]
    )
    print(text)
    (RESULTS / "posthoc.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
