"""What rounding takes from an average, and what each way to store it costs.

    python benchmarks/precision.py

30,000 updates of decay 0.9999 on 16,384 parameters, each way of storing beside an average in
float64 that sees the same values. Two kinds of values: parameters that train (a slow drift, and 1 %
noise from step to step), and the quiet end of a training run (constant values, 0.1 % away from
where the average starts). The way is what the float64 average moved. Error: the distance to it as a
share of the way. Followed: the part of the way that was gone, noise left out (the projection).
Held: the share of the elements that the last tenth of the updates left as they were, bit for bit.
Time: of one update of 8 million parameters, as a multiple of float32's, on this machine.
Rewrites results/precision.md and the part of docs/averaging.md between its precision marks.
"""

import os
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from helpers import RESULTS
from timing import HERE, Step, bandwidth, ratio, relative_times
from tqdm import tqdm

import emaopt


UPDATES, SIZE, DECAY, PARTS = 30_000, 2**14, 0.9999, 10
CHOICES = {
    "bfloat16": jnp.bfloat16,
    "`stochastic()`: bfloat16": emaopt.stochastic(),
    "`compensated(jnp.bfloat16)`": emaopt.compensated(jnp.bfloat16),
    "float32, the default": None,
    "`compensated()`: float32": emaopt.compensated(),
}


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    found = {
        name: dict(zip(("noisy", "quiet"), (measure(c, v) for v in (noisy, quiet)), strict=True))
        for name, c in tqdm(CHOICES.items(), leave=False, disable=None)
    }
    text = table(found, speeds())
    (RESULTS / "precision.md").write_text(f"# Precision\n\n{text}\n")
    guide = HERE.parent / "docs/averaging.md"
    marks = r"(<!-- precision -->\n).*(<!-- /precision -->)"
    guide.write_text(re.sub(marks, rf"\1{text}\n\2", guide.read_text(), flags=re.DOTALL))
    print(text)


def start(size: int = SIZE) -> jax.Array:
    """Numbers that bfloat16 holds too, so that every average starts at the same."""
    first = jax.random.normal(jax.random.key(0), (size,), jnp.float32)
    return first.astype(jnp.bfloat16).astype(jnp.float32)


def noisy(first: jax.Array, t: jax.Array) -> jax.Array:
    """Parameters in training: they drift to other values, and tremble by 1 %."""
    drift = jax.random.normal(jax.random.key(1), first.shape, jnp.float32)
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(2), t), first.shape, jnp.float32)
    way = t.astype(jnp.float32) / UPDATES
    return first * (1 - way) + drift * way + 0.01 * noise


def quiet(first: jax.Array, t: jax.Array) -> jax.Array:
    """Parameters that have come to rest, 0.1 % from where the average starts."""
    del t
    return first * jnp.float32(1.001)


def measure(accumulator_dtype, values) -> tuple[float, float, float, int]:
    """Error, part of the way followed, share of elements held at last, bytes per parameter."""
    *_, (_, last) = course(accumulator_dtype, values, start())
    return last


def course(
    accumulator_dtype, values, first: jax.Array, parts: int = PARTS
) -> Iterator[tuple[int, tuple[float, float, float, int]]]:
    """What `measure` gives, after so many updates and so many: (updates, measured)."""
    mean = emaopt.moving_average(DECAY, accumulator_dtype=accumulator_dtype)
    exact = emaopt.moving_average(DECAY, accumulator_dtype=jnp.float64)

    def step(t, states):
        x = values(first, t)
        return mean.update(x, states[0]), exact.update(x, states[1])

    @jax.jit
    def part(states, done):
        return jax.lax.fori_loop(done + 1, done + 1 + UPDATES // parts, step, states)

    at_first = states = mean.init(first), exact.init(first)
    for done in range(0, UPDATES, UPDATES // parts):
        before, states = states[0], part(states, jnp.int32(done))
        moved, way = (sum_of(new) - sum_of(old) for new, old in zip(states, at_first, strict=True))
        error = np.linalg.norm(sum_of(states[0]) - sum_of(states[1])) / np.linalg.norm(way)
        last = values(first, jnp.int32(done + UPDATES // parts))
        held = emaopt.stalled(last, before, states[0])
        stored = sum(x.nbytes for x in (states[0].shadow, states[0].residue) if x is not None)
        followed = float(moved @ way / (way @ way))
        yield done + UPDATES // parts, (float(error), followed, float(held), stored // first.size)


def speeds(size: int = 2**23, rounds: int = 25) -> dict[str, float]:
    """The time of an update of each choice, as a multiple of the default's."""
    params = start(size)

    def update(choice):
        mean = emaopt.moving_average(DECAY, accumulator_dtype=choice)
        return Step(lambda state, x: (mean.update(x, state),), mean.init(params), inputs=(params,))

    calls = {name: update(choice) for name, choice in CHOICES.items()}
    found = relative_times(calls, rounds, bandwidth(size, os.cpu_count() or 1))
    default = next(name for name, choice in CHOICES.items() if choice is None)
    return {name: ratio(times, found[default]) for name, times in found.items()}


def sum_of(state: emaopt.EmaState) -> np.ndarray:
    """The average in float64."""
    low = 0 if state.residue is None else np.float64(state.residue)
    return np.float64(state.shadow) + low


def table(found: dict, times: dict[str, float]) -> str:
    rows = [
        f"`python benchmarks/precision.py`: {UPDATES:,} updates of decay {DECAY} against float64.",
        "",
        "| `accumulator_dtype` | bytes | in training: error | followed | held | at rest: error | "
        "followed | held | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cells in found.items():
        numbers = [
            f"{error:.1e} | {followed:.1%} | {held:.0%}"
            for error, followed, held, _ in (cells["noisy"], cells["quiet"])
        ]
        bytes_each = cells["noisy"][-1]
        rows.append(f"| {name} | {bytes_each} | {' | '.join(numbers)} | {times[name]:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
