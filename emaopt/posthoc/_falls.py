"""Say how much a learning rate falls from one checkpoint to the next."""

from typing import Any

import numpy as np


def falls_of(factors: Any, n: int | None = None) -> np.ndarray:
    """Return the falls of the factors of a learning rate that starts at 1 and ends at 0.

    Args:
        factors: [n - 1], or a function of the share of the decay that is over.
        n: How many falls there must be.

    Returns:
        float64 [n], from 0 on; their sum is 1.

    Raises:
        ValueError: A factor rises, or their number does not fit.
    """
    if callable(factors):
        given = np.asarray(factors(np.arange(1, n or 1) / (n or 1)), np.float64).ravel()
    else:
        given = np.asarray(factors, np.float64).ravel()
    if n is not None and len(given) != n - 1:
        raise ValueError(
            f"factors has {len(given)} numbers for {n} checkpoints. Pass one less than there are "
            "checkpoints: of each stretch between two of them."
        )
    from_one_to_zero = np.concatenate([[1.0], given, [0.0]])
    falls = from_one_to_zero[:-1] - from_one_to_zero[1:]
    if not falls.min() >= 0:
        raise ValueError(f"factors={factors} rises. Pass numbers from 1 or less to 0 or more.")
    return falls
