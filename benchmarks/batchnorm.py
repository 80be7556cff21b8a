"""What averaged weights need of their batch statistics: accuracy by policy, over several seeds.

    python benchmarks/batchnorm.py             # 16 seeds, a minute

The network with batch normalization of the tests, on the two halves of scikit-learn's digits, by
four recipes: SGD at a constant learning rate with more and more weight decay, and the plain mean
of all weights from the fourth epoch on. The harder the recipe shakes the weights, the further their
mean is from them, and from their batch statistics. Writes `results/batchnorm.md`.
"""

import argparse
import os


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from helpers import RESULTS, batchnorm


RECIPES = {
    "lr 0.1, decay 1e-4": {"learning_rate": 0.1, "weight_decay": 1e-4},
    "lr 0.5, decay 1e-3": {"learning_rate": 0.5, "weight_decay": 1e-3},
    "lr 0.5, decay 1e-2": {"learning_rate": 0.5, "weight_decay": 1e-2},
    "lr 0.5, decay 2e-2": {"learning_rate": 0.5, "weight_decay": 2e-2},
}
HEAD = [
    "",
    "",
    "raw weights",
    "averaged weights, statistics copied",
    "averaged",
    "recalibrated",
]


def rows(seeds: int):
    for framework, model in batchnorm.MODELS.items():
        for name, recipe in RECIPES.items():
            trained = batchnorm.train(model, seeds, epochs=15, start=3, **recipe)
            accuracies = batchnorm.accuracies(model, trained).values()
            cells = (f"{100 * np.mean(a):.1f} ± {100 * np.std(a):.1f}" for a in accuracies)
            yield framework, name, *cells


def main():
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=16)
    options = parser.parse_args()
    lines = [
        "# Averaged weights with batch normalization",
        "",
        f"Test accuracy in %, mean and standard deviation over {options.seeds} seeds, jax "
        f"{jax.__version__}; made by `python benchmarks/batchnorm.py`.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(options.seeds)),
    ]
    text = "\n".join([*lines, ""])
    print(text, end="")
    (RESULTS / "batchnorm.md").write_text(text)


if __name__ == "__main__":
    main()
