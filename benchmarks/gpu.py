"""What emaopt does on a GPU: the numbers of a CPU, and what steps, options, rows and saving cost.

    pip install "jax[cuda13]" -e ".[test]"
    python benchmarks/gpu.py
    JAX_PLATFORMS=cpu python benchmarks/gpu.py --small     # does the script run? In a minute

One script for one NVIDIA GPU, without a network, in less than eight minutes; it needs jax, optax,
and orbax for the last part. *Numbers*: each optimizer and each kind of average takes 20 steps
there and on the CPU; the largest difference is divided by the largest number. Of bfloat16
parameters, an average of decay 0 must be the parameters as they were rounded: elements that differ
are counted. *Steps*: clipping by the global norm, an optimizer and an average, beside Optax with an
average by hand, eight arrays of 8.4 million; how many kernels, and which share of the bandwidth
that a scaling in place reaches, counting each input and each output once. *Options*: an update of
an average beside the plain one's. *Rows*: a step on 4,096 rows of a table of a million, beside the
dense one. *Saving*: an Orbax checkpoint with digests and without.

Steps are handed to the device in rows of 10 and waited for once. Competitors take turns; figures
are medians. With `--small` nothing is published. Otherwise writes results/gpu.md and gpu.json.
"""

import argparse
import datetime
import importlib.util
import re
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import trees
from options import DECAY, PLAIN, UPDATES
from rows import MOMENTUM, TABLES, Run, densely, sparsely
from steps import OPTIMIZERS, by_hand, ours
from timing import publish, ratio, table

import emaopt


AVERAGES = {
    "constant": emaopt.ema(0.9),
    "`warmup`": emaopt.ema(emaopt.warmup(0.9)),
    "`power`, the default": emaopt.ema(),
    "`every`": emaopt.ema(emaopt.every(3, 0.9)),
    "`compensated()`": emaopt.ema(0.9, accumulator_dtype=emaopt.compensated()),
    "`stochastic()`": emaopt.ema(0.9, accumulator_dtype=emaopt.stochastic()),
    "`heal`": emaopt.heal(emaopt.ema(0.9)),
    "`primal`": emaopt.primal(emaopt.gradient_descent(0.1), emaopt.ema(0.9)),
}
OPTIONS = [
    "`warmup(d)`",
    "`ledger=True`",
    "`compensated()`",
    "`stochastic()`",
    "`stochastic()`, `warmup(d)`",
    "`heal`",
]
SHAPES = {"kernel": (64, 257), "bias": (257,), "scale": ()}
SMALL, LARGE = (2**16, 20_000), (2**23, 1_000_000)  # numbers of an array, rows of the table


class Calls:
    """A donated step that is handed to the device ten times for each call, and waited for once."""

    repeat = 10

    def __init__(self, step, *carry, inputs: tuple = ()):
        donated = tuple(range(len(carry)))
        lowered = jax.jit(step, donate_argnums=donated).lower(*carry, *inputs)
        self.compiled, self.inputs = lowered.compile(), inputs
        self.carry = carry
        self.traffic = 2 * trees.nbytes(carry) + trees.nbytes(inputs)
        self()

    def __call__(self) -> float:
        """Return the seconds that one step took."""
        start = time.perf_counter()
        for _ in range(self.repeat):
            self.carry = self.compiled(*self.carry, *self.inputs)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / self.repeat


def kernels(compiled) -> int:
    """Count the launches over arrays in a compiled step."""
    entry = compiled.as_text().split("\nENTRY ")[1].split("\n}")[0]
    passive = "parameter|constant|tuple|get-tuple-element|bitcast|copy-done"
    found = re.findall(rf"^  (?:ROOT )?%\S+ = (.*?) (?!(?:{passive})\()[a-z][\w-]*\(", entry, re.M)
    return sum(bool(re.search(r"\[\d", shapes)) for shapes in found)


def in_turn(calls: dict, rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of each call in each round, in an order that changes."""
    found = {name: np.empty(rounds) for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            found[name][i] = calls[name]()
    return found


def run_on(device, tx, dtype=jnp.float32, steps: int = 20):
    """Return parameters and state after some steps on a device, with the same random gradients."""
    rng = np.random.default_rng(0)
    draw = lambda: {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
    params, grads = (jax.tree.map(lambda x: x.astype(dtype), draw()) for _ in range(2))
    with jax.default_device(device), jax.numpy_dtype_promotion("standard"):
        params, grads = jax.device_put((params, grads), device)
        state = tx.init(params)
        step = jax.jit(lambda p, s, g: emaopt.apply_gradients(tx, g, p, s))
        for i in range(steps):
            scaled = jax.tree.map(lambda g, i=i: g * (1 - 0.1 * i), grads)
            params, state = step(params, state, scaled)
    return jax.device_get((params, state))


def distance(found, wanted) -> float:
    """Return the largest difference of two trees, each leaf over its largest number."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    wide = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    return max(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30) for x, y in wide)


def not_as_rounded(device, tx) -> int:
    """Count the elements of an average of decay 0 that are not the bfloat16 parameters."""
    chain = optax.chain(tx, emaopt.ema(0.0))
    params, state = run_on(device, chain, jnp.bfloat16)
    shadow = state[-1].shadow
    return sum(int(np.sum(np.float32(params[k]) != shadow[k])) for k in params)


def measure_numbers(device) -> dict:
    cpu = jax.devices("cpu")[0]
    found = {}
    for name, (tx, _) in OPTIMIZERS.items():
        chain = optax.chain(emaopt.clip_by_global_norm(5.0), tx, emaopt.ema(0.9))
        far = distance(run_on(device, chain), run_on(cpu, chain))
        found[name] = {"distance": far, "not as rounded": not_as_rounded(device, tx)}
    for name, average in AVERAGES.items():
        tx = average if "primal" in name else optax.chain(emaopt.gradient_descent(0.1), average)
        found[name] = {"distance": distance(run_on(device, tx), run_on(cpu, tx))}
    return found


def arrays(size: int, number: int = 8) -> dict:
    return {f"w{i}": jnp.full(size, 1.0 + i) for i in range(number)}


def measure_bandwidth(size: int, rounds: int) -> float:
    """Return the bytes in a second that a scaling in place reads and writes."""
    call = Calls(lambda x: (x * 0.999999,), jnp.ones(8 * size))
    return call.traffic / float(np.median([call() for _ in range(rounds)]))


def measure_steps(params: dict, names: list[str], bandwidth: float, rounds: int) -> dict:
    grads = jax.tree.map(lambda p: p * 1e-3, params)
    found = {}
    for name in names:
        mine, other = OPTIMIZERS[name]
        calls = {}
        for who, (init, step) in {
            "emaopt": ours(mine, clip=True, average=True),
            "other": by_hand(other, clip=True, average=True),
        }.items():
            carry = jax.tree.map(jnp.copy, (params, init(params)))  # each donates its own
            calls[who] = Calls(step, *carry, inputs=(grads,))
        times = in_turn(calls, rounds)
        seconds = float(np.median(times["emaopt"]))
        found[name] = {
            "ms": 1000 * seconds,
            "ratio": ratio(times["emaopt"], times["other"]),
            "bandwidth": calls["emaopt"].traffic / seconds / bandwidth,
            "kernels": [kernels(calls[who].compiled) for who in ("emaopt", "other")],
        }
    return found


def measure_options(params: dict, rounds: int) -> dict:
    absent = dict.fromkeys(params)

    def call_of(tx, move=lambda state: state):
        step = lambda state, params: (tx.update(absent, state, params)[1],)
        return Calls(step, move(jax.jit(tx.init)(params)), inputs=(params,))

    calls = {name: call_of(UPDATES[name]) for name in [PLAIN, *OPTIONS]}
    times = in_turn(calls, rounds)
    found = {
        name: {
            "time": ratio(times[name], times[PLAIN]),
            "temporary": call.compiled.memory_analysis().temp_size_in_bytes / 1e6,
        }
        for name, call in calls.items()
    }
    on_host = call_of(UPDATES[PLAIN], emaopt.on_host)
    times = in_turn({"on_host": on_host, PLAIN: calls[PLAIN]}, rounds)
    temporary = on_host.compiled.memory_analysis().temp_size_in_bytes / 1e6
    found["`on_host`"] = {"time": ratio(times["on_host"], times[PLAIN]), "temporary": temporary}
    return found


def measure_rows(number: int, rounds: int) -> dict:
    lazy, whole = emaopt.ema(DECAY, rows=TABLES), emaopt.ema(DECAY)
    runs = {
        "rows": Run(sparsely, number, MOMENTUM, lazy),
        "dense": Run(densely, number, MOMENTUM, whole),
    }

    def seconds(run):
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / run.steps

    times = in_turn({name: lambda run=run: seconds(run) for name, run in runs.items()}, rounds)
    return {
        name: {"ms": 1000 * float(np.median(times[name])), "temporary": run.temporary / 1e6}
        for name, run in runs.items()
    }


def measure_saving(params: dict, rounds: int) -> dict:
    """Return the seconds of a save of parameters, Adam's slots and the average, and its bytes."""
    from orbax.checkpoint import v1 as ocp

    from emaopt import checkpoint

    tx = optax.chain(emaopt.adam(), emaopt.ema(DECAY))
    state = jax.jit(tx.init)(params)
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(2 * rounds + 2):
        with (
            tempfile.TemporaryDirectory() as folder,
            ocp.training.Checkpointer(Path(folder) / "run") as checkpointer,
        ):
            start = time.perf_counter()
            checkpoint.save(checkpointer, 0, params, state, digest=i % 2 == 0)
            times[i % 2 == 0].append(time.perf_counter() - start)
    return {
        "GB": trees.nbytes((params, state)) / 1e9,
        "with digests": float(np.median(times[True][1:])),  # the first one of each compiles
        "without": float(np.median(times[False][1:])),
    }


def measure(small: bool, rounds: int) -> dict:
    device, (size, number) = jax.devices()[0], SMALL if small else LARGE
    bandwidth = measure_bandwidth(size, rounds)
    many = trees.full(trees.each_shape_once(trees.RESNET50) if small else trees.RESNET50)
    found = {
        "device": f"{device.device_kind}, {device.platform}",
        "GB/s": bandwidth / 1e9,
        "numbers": measure_numbers(device),
        "steps": measure_steps(arrays(size), list(OPTIMIZERS), bandwidth, rounds),
        "ResNet-50": measure_steps(many, ["momentum"], bandwidth, rounds),
        "options": measure_options(arrays(size), rounds),
        "rows": measure_rows(number, rounds),
    }
    if importlib.util.find_spec("orbax"):
        found["saving"] = measure_saving(arrays(size), rounds=2)
    return found


def report(found: dict) -> list[str]:
    steps = found["steps"] | {"momentum, ResNet-50": found["ResNet-50"]["momentum"]}
    rows = [(f"numbers of {k}", f"{x['distance']:.1e} off") for k, x in found["numbers"].items()]
    rows += [
        (f"bfloat16 averaged as rounded, {name}", f"{x['not as rounded']} elements differ")
        for name, x in found["numbers"].items()
        if "not as rounded" in x
    ]
    rows += [
        (
            f"clip, {name} and average",
            f"{x['ratio']:.2f} of Optax by hand; {x['bandwidth']:.2f} of the bandwidth; "
            f"{x['kernels'][0]} kernels, by hand {x['kernels'][1]}; {x['ms']:.3g} ms",
        )
        for name, x in steps.items()
    ]
    rows += [
        (f"update of {name}", f"{x['time']:.2f} of plain; {x['temporary']:.1f} MB temporary")
        for name, x in found["options"].items()
    ]
    sparse, dense = found["rows"]["rows"], found["rows"]["dense"]
    rows.append(
        (
            "a step on 4,096 rows, beside dense",
            f"{sparse['ms']:.3g} ms, {dense['ms'] / sparse['ms']:.1f} times faster; "
            f"{sparse['temporary']:.1f} MB temporary",
        )
    )
    saving = found.get("saving")
    text = "not measured: orbax is not installed"
    if saving:
        text = f"{saving['with digests']:.2f} s, without {saving['without']:.2f}"
    rows.append(("saving with digests" + (f", {saving['GB']:.2f} GB" if saving else ""), text))
    return [
        f"`python benchmarks/gpu.py`: {found['device']}, {datetime.date.today()}, jax "
        f"{jax.__version__}; a scaling in place moves {found['GB/s']:.0f} GB/s.",
        "",
        *table(["what", "found"], rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="does the script run?")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    start = time.perf_counter()
    found = measure(options.small, options.rounds)
    lines = [*report(found), "", f"In {(time.perf_counter() - start) / 60:.1f} minutes."]
    if options.small:
        print("\n".join(lines))
    else:
        publish("gpu", "On a GPU", lines, found)


if __name__ == "__main__":
    main()
