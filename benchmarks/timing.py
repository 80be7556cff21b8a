"""Times that can be compared on a machine that others use too.

Every call stands between two passes of a reference that moves memory as the call does, and its
time is divided by theirs, so what slows the machine down for a while slows both. Calls that are
compared take turns, in an order that changes from round to round.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np


def relative_times(
    calls: Mapping[str, Callable], rounds: int, reference: Callable
) -> dict[str, np.ndarray]:
    """The time of each call in each round, as a multiple of the reference around it."""
    found = {name: np.empty(rounds) for name in calls}
    for call in (reference, *calls.values()):
        jax.block_until_ready(call())
    for i in range(rounds):
        before = seconds(reference)
        for name in list(calls)[:: 1 if i % 2 else -1]:
            own, after = seconds(calls[name]), seconds(reference)
            found[name][i] = own / ((before + after) / 2)
            before = after
    return found


def seconds(call: Callable) -> float:
    """How long a call takes until what it returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


class Step:
    """A compiled step that donates what it carries: each call is the next step."""

    def __init__(self, step: Callable, *carry, inputs: tuple = ()):
        donated = range(len(carry))
        self.compiled = jax.jit(step, donate_argnums=donated).lower(*carry, *inputs).compile()
        self.carry, self.inputs = jax.tree.map(jnp.copy, carry), inputs

    def __call__(self):
        """One step."""
        self.carry = self.compiled(*self.carry, *self.inputs)
        return self.carry


def scaling(megabytes: int) -> Step:
    """A reference: one array read, and written in place."""
    return Step(lambda x: (x * 0.999999,), jnp.ones(megabytes * 2**18))


def bandwidth(size: int, threads: int) -> Callable:
    """A reference that no compiler made: NumPy adds one array of float32 to another, in place.

    Two arrays read and one written, as an average does; in pieces, by so many threads.
    """
    x, y = np.ones(size, np.float32), np.full(size, 1e-9, np.float32)
    pieces = list(zip(np.array_split(x, threads), np.array_split(y, threads), strict=True))
    pool = ThreadPoolExecutor(threads)

    def add(piece):
        np.add(piece[0], piece[1], out=piece[0])

    return lambda: list(pool.map(add, pieces))
