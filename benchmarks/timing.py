"""Times that can be compared on a machine that others use too, and how they are published.

Every call stands between two passes of a reference that moves memory as the call does, and its
time is divided by theirs, so what slows the machine down for a while slows both. Calls that are
compared take turns, in an order that changes from round to round.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import RESULTS


HERE = Path(__file__).parent


class Times(NamedTuple):
    """Of one call in each round: seconds, and as a multiple of the reference around it."""

    seconds: np.ndarray
    relative: np.ndarray


def times(
    calls: Mapping[str, Callable], rounds: int, reference: Callable, pause: float = 0
) -> dict[str, Times]:
    """The time of each call in each round, after one call of each to warm up.

    `pause`: seconds after each, for threads that go on spinning when they have nothing to do.
    """
    found = {name: Times(np.empty(rounds), np.empty(rounds)) for name in calls}
    for call in (reference, *calls.values()):
        jax.block_until_ready(call())
    for i in range(rounds):
        before = seconds(reference)
        for name in list(calls)[:: 1 if i % 2 else -1]:
            own = seconds(calls[name])
            time.sleep(pause)
            after = seconds(reference)
            found[name].seconds[i] = own
            found[name].relative[i] = own / ((before + after) / 2)
            before = after
    return found


def relative_times(
    calls: Mapping[str, Callable], rounds: int, reference: Callable, pause: float = 0
) -> dict[str, np.ndarray]:
    """The time of each call in each round, as a multiple of the reference around it."""
    return {name: found.relative for name, found in times(calls, rounds, reference, pause).items()}


def seconds(call: Callable) -> float:
    """How long a call takes until what it returns is there."""
    if isinstance(call, Worker):
        return call()
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


class Step:
    """A compiled step that donates what it carries: each call is the next step, or the next few."""

    def __init__(self, step: Callable, *carry, inputs: tuple = (), repeat: int = 1):
        donated = range(len(carry))
        self.compiled = jax.jit(step, donate_argnums=donated).lower(*carry, *inputs).compile()
        self.carry, self.inputs, self.repeat = jax.tree.map(jnp.copy, carry), inputs, repeat

    def __call__(self):
        """One step, or `repeat` of them, each waited for."""
        for _ in range(self.repeat):
            self.carry = jax.block_until_ready(self.compiled(*self.carry, *self.inputs))
        return self.carry


class Worker:
    """A step in a process of its own, which takes it and tells the seconds when it is sent a line.

    The process first prints what it has to say, as JSON.
    """

    def __init__(self, *command: str, **settings):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*command, json.dumps(settings)], stdin=pipe, stdout=pipe, text=True, bufsize=1
        )
        self.report = json.loads(self._line())

    def __call__(self) -> float:
        """The seconds that one step took there."""
        self.process.stdin.write("\n")
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args[:3])} ended: {self.process.wait()}")
        return line


def serve(call: Callable, report: Any) -> None:
    """What a `Worker`'s process does."""
    print(json.dumps(report), flush=True)
    for _ in sys.stdin:
        print(seconds(call), flush=True)


def scaling(megabytes: int) -> Step:
    """A reference: one array read, and written in place."""
    return Step(lambda x: (x * 0.999999,), jnp.ones(megabytes * 2**18))


def handing(params) -> Step:
    """A reference where arrays are many and small: a step that hands on what it was given."""
    return Step(lambda x: (x,), params)


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


def ratio(own: np.ndarray, other: np.ndarray) -> float:
    """The median of the ratios, round by round."""
    return float(np.median(own / other))


def table(head: Iterable[str], rows: Iterable[Iterable]) -> list[str]:
    """The lines of a Markdown table."""
    head = list(head)
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def publish(name: str, title: str, lines: Iterable[str], found: Any = None) -> None:
    """Print the lines, and write `results/name.md`; and what was found to `results/name.json`."""
    text = "\n".join(lines)
    print(text)
    (RESULTS / f"{name}.md").write_text(f"# {title}\n\n{text}\n")
    if found is not None:
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
