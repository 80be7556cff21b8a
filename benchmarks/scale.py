"""A network of 7 billion parameters on 64 devices: what it takes, on paper and compiled.

    python benchmarks/scale.py

The parameters have the shapes of a decoder like Llama 2 7B, on a mesh of 8 x 8 devices, eight to a
host: sharded over "data" (FSDP) and "model" (tensor parallelism), norms on every device. For each
optimizer, with clipping by the global norm and an average of each kind, the bytes that a device
holds and touches in one step are counted by hand, and compared with what XLA says of the step that
it compiled for 64 devices. Nothing is allocated. Writes results/scale.json and scale.md.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=64"
)

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from timing import publish, table
from tqdm import tqdm

import emaopt


MESH = {"data": 8, "model": 8}
DEVICES, PER_HOST = math.prod(MESH.values()), 8
INTERVAL = 100  # training steps between two updates of an average on the host
TO_DISK = 1e9  # bytes per second and host: an assumption

Leaves = Mapping[str, tuple[tuple[int, ...], P]]


def decoder(layers: int = 32, width: int = 4096, inner: int = 11008, words: int = 32000) -> Leaves:
    """Shapes and shardings. The layers are stacked, as for `jax.lax.scan`."""
    into, out, each = P(None, "data", "model"), P(None, "model", "data"), P(None, None)
    return {
        "embedding": ((words, width), P("model", "data")),
        **{f"layers/{name}": ((layers, width, width), into) for name in ("query", "key", "value")},
        "layers/attended": ((layers, width, width), out),
        **{f"layers/{name}": ((layers, width, inner), into) for name in ("gate", "up")},
        "layers/down": ((layers, inner, width), out),
        **{f"layers/norm{i}": ((layers, width), each) for i in range(2)},
        "norm": ((width,), P(None)),
        "head": ((width, words), P("data", "model")),
    }


class Optimizer(NamedTuple):
    """`reads`: of how many arrays each result is made, of the parameter and of every slot.

    XLA for CPU makes a loop of each result. In Adadelta and Ftrl, two of the reads only keep the
    order in which results take the places of what they are made of.
    """

    tx: optax.GradientTransformation
    reads: tuple[int, ...]
    scalars: int = 1


OPTIMIZERS = {
    "gradient_descent": Optimizer(emaopt.gradient_descent(1e-3), (2,)),
    "momentum": Optimizer(emaopt.momentum(1e-3, 0.9), (2, 2)),
    "adagrad": Optimizer(emaopt.adagrad(1e-3), (2, 3)),
    "adadelta": Optimizer(emaopt.adadelta(1e-3), (2, 4, 4)),
    "adam": Optimizer(emaopt.adam(1e-3), (2, 2, 3), scalars=3),
    "ftrl": Optimizer(emaopt.ftrl(1e-3), (4, 3, 3)),
    "rmsprop": Optimizer(emaopt.rmsprop(1e-3, momentum=0.9), (2, 3, 2)),
}
HOST = emaopt.moving_average(emaopt.every(INTERVAL, 0.9999))
IN_CHAIN = {
    "float32": [emaopt.ema(0.9999)],
    "stochastic": [emaopt.ema(0.9999, accumulator_dtype=emaopt.stochastic())],
}
BYTES = {"none": 0, "float32": 4, "stochastic": 2, "host": 4}  # of the average, per parameter
CASES = [(optimizer, average) for optimizer in OPTIMIZERS for average in BYTES]


def on_paper(leaves: Leaves, optimizer: str, average: str) -> dict[str, Any]:
    """The bytes of one device; `checkpoint`: of all together, every array once.

    `held`: by parameters and state. `fused`: touched in a step if each array is read once and
    written once, and gradients once more before, for their norm: what a kernel per leaf does.
    `loops`: if each result has a loop of its own. `sent`: a float32 for each axis that a leaf is
    sharded over. `update`: the same of an update of an average on the host.
    """
    reads, scalars = OPTIMIZERS[optimizer].reads, OPTIMIZERS[optimizer].scalars
    local = sum(map(_local_size, leaves.values()))
    slots, chained = len(reads) - 1, average in IN_CHAIN
    shadow = BYTES[average] if chained else 0
    found = {
        "gradients": 4 * local,
        "held": (4 * (1 + slots) + shadow) * local + 4 * (scalars + chained),
        "fused": (4 * (4 + 2 * slots) + 2 * shadow) * local,
        "loops": (4 * (1 + sum(reads) + len(reads) + chained) + 2 * shadow) * local,
        "sent": 4 * sum(len(_axes(spec)) for _, spec in leaves.values()),
        "checkpoint": (4 * (1 + slots) + BYTES[average]) * number_of(leaves),
    }
    if average == "host":
        found["update"] = {
            "held": 4 * local + 4,
            "loops": 12 * local,
            "over the link": 8 * local,
            "sent": 0,
        }
    return found


def number_of(leaves: Leaves) -> int:
    """How many parameters there are."""
    return sum(math.prod(shape) for shape, _ in leaves.values())


def _axes(spec: P) -> list[str]:
    return [axis for axis in spec if axis is not None]


def _local_size(leaf: tuple[tuple[int, ...], P]) -> int:
    shape, spec = leaf
    return math.prod(shape) // math.prod(MESH[axis] for axis in _axes(spec))


def compiled(leaves: Leaves, optimizer: str, average: str) -> dict[str, Any]:
    """What XLA says of the step, and of the update of an average on the host."""
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, (_, spec) in leaves.items()}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[name])
        for name, (shape, _) in leaves.items()
    }

    def state_of(init, memory_kind="device"):
        def place(path, x):
            if x.ndim == 0:
                return x.update(sharding=NamedSharding(mesh, P()))
            return x.update(sharding=shardings[path[-1].key].with_memory_kind(memory_kind))

        return jax.tree_util.tree_map_with_path(place, jax.eval_shape(init, params))

    links = emaopt.clip_by_global_norm(1.0), OPTIMIZERS[optimizer].tx, *IN_CHAIN.get(average, [])
    tx = optax.chain(*links)
    step = jax.jit(
        lambda params, opt_state, grads: emaopt.apply_gradients(tx, grads, params, opt_state),
        donate_argnums=(0, 1),
    )
    found = _read(step.lower(params, state_of(tx.init), params))
    if average == "host":
        update = jax.jit(lambda state, params: HOST.update(params, state), donate_argnums=0)
        found["update"] = _read(update.lower(state_of(HOST.init, "pinned_host"), params))
    return found


def _read(lowered) -> dict[str, Any]:
    program = lowered.compile()
    memory, lines = program.memory_analysis(), program.as_text().split("\n")
    sends = r" = (.*?) (all|reduce|collective)-[-a-z]*\("
    sent = [found[1] for line in lines if (found := re.search(sends, line.split("metadata=")[0]))]
    return {
        "arguments": memory.argument_size_in_bytes,
        "held": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "loops": program.cost_analysis()["bytes accessed"],
        "collectives": len(sent),
        "sent": sum(map(_bytes_of, sent)),
    }


def _bytes_of(types: str) -> int:
    """Of the type of a result in HLO: `f32[8,2]{1,0}`, or a tuple of such."""
    sizes = re.findall(r"[a-z](\d+)\[([\d,]*)\]", types)
    return sum(
        int(bits) // 8 * math.prod(map(int, filter(None, n.split(",")))) for bits, n in sizes
    )


def measure(leaves: Leaves, cases: Iterable[tuple[str, str]] = CASES) -> dict[str, Any]:
    """Paper and program, by case."""
    return {
        f"{optimizer}, {average}": {
            "paper": on_paper(leaves, optimizer, average),
            "compiled": compiled(leaves, optimizer, average),
        }
        for optimizer, average in cases
    }


def main() -> None:
    leaves = decoder()
    found = measure(leaves, tqdm(CASES, leave=False, disable=None))
    publish("scale", "Seven billion parameters on 64 devices", report(leaves, found), found)


def report(leaves: Leaves, found: Mapping[str, Any]) -> list[str]:
    def rows(cell):
        for optimizer in OPTIMIZERS:
            cases = [found[f"{optimizer}, {average}"] for average in BYTES]
            yield [optimizer, *(cell(case["paper"], case["compiled"]) for case in cases)]

    gigabytes = lambda x: f"{x / 1e9:.2f}"
    pair = lambda name: (
        lambda paper, program: " / ".join(gigabytes(x[name]) for x in (paper, program))
    )
    off = {
        name: max(abs(1 - case["paper"][name] / case["compiled"][name]) for case in found.values())
        for name in ("held", "loops", "sent")
    }
    case = found["adam, host"]
    step, update = case["compiled"], case["paper"]["update"]
    hosts = DEVICES // PER_HOST
    seconds = lambda paper, _: (
        f"{paper['checkpoint'] / 1e9:.0f}, {paper['checkpoint'] / hosts / TO_DISK:.0f}"
    )
    fused = lambda paper, program: gigabytes(paper["fused"])
    head = ["average: none", "float32", "stochastic, 2 bytes", "float32, on the host"]
    return [
        f"`python benchmarks/scale.py`: {number_of(leaves) / 1e9:.2f} billion parameters in "
        f"{len(leaves)} arrays, {DEVICES} devices as {' x '.join(map(str, MESH.values()))}, "
        f"clipping by the global norm; jax {jax.__version__}. XLA's numbers are those of the "
        "program for CPU devices; nothing ran.",
        "",
        "**Held by each device** in parameters, slots and average, GB: paper / XLA. Gradients take "
        f"{gigabytes(case['paper']['gradients'])} more, all the rest "
        f"{max(x['compiled']['temporary'] for x in found.values())} bytes.",
        "",
        *table(["", *head], rows(pair("held"))),
        "",
        f"On the host, an average takes {gigabytes(update['held'])} GB of its memory per device. "
        f"An update moves {gigabytes(update['over the link'])} GB over the link, after every "
        f"{INTERVAL} steps {update['over the link'] / INTERVAL / 1e6:.0f} MB a step.",
        "",
        "**Touched by each device** in a step, from the gradients on, GB: with a loop for each "
        "result, paper / XLA.",
        "",
        *table(["", *head], rows(pair("loops"))),
        "",
        "With one kernel for each leaf, on paper:",
        "",
        *table(["", *head], rows(fused)),
        "",
        f"**Sent** in a step: {case['paper']['sent']} bytes on paper, {step['sent']} in XLA's "
        f"{step['collectives']} all-reduces, all for the global norm: a float32 for each axis that "
        "a leaf is sharded over. Slots and averages send nothing.",
        "",
        f"**A checkpoint**, GB in all, and seconds if each of the {hosts} hosts writes its share "
        f"at {TO_DISK / 1e9:g} GB/s (an assumption): bytes / hosts / bandwidth.",
        "",
        *table(["", *head], rows(seconds)),
        "",
        "Paper and XLA differ by at most "
        + ", ".join(f"{x:.1e} ({name})" for name, x in off.items())
        + ".",
    ]


if __name__ == "__main__":
    main()
