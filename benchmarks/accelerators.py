"""What a step is compiled to for a GPU and a TPU: kernels, bytes, temporaries. Nothing is timed.

    python benchmarks/accelerators.py

Needs no GPU and no TPU, but `pip install "jax[cuda13-local,tpu]"`: XLA compiles for a description
of an H100 and of a TPU v5e. Writes results/accelerators.md and results/accelerators.json.
"""

import itertools
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
from helpers import deviceless, train, trees
from timing import publish, table
from tqdm import tqdm


DEVICES = {"gpu": "NVIDIA H100", "tpu": "TPU v5e"}
TREES = {"": trees.each_shape_once(trees.RESNET50), "ResNet-50": trees.RESNET50}
ROWS = [*(("", name) for name in trees.OPTIMIZERS), ("ResNet-50", "momentum")]


def facts(target: str, tree: str, name: str, place: str) -> dict:
    tx, params = trees.PLACES[place](trees.OPTIMIZERS[name]), trees.abstract(TREES[tree])
    carry = params, jax.eval_shape(tx.init, params)
    step = deviceless.compiled(train.step_of(tx), target, carry, params)
    own = range(len(jax.tree.leaves(carry)))
    return {
        "kernels": step.kernels,
        "scalars": step.scalars,
        "bytes": step.traffic / (2 * trees.nbytes(carry) + trees.nbytes(params)),
        "temporaries": step.temporaries,
        "copies": step.copies,
        "in_place": step.aliases == dict(zip(own, own, strict=True)),
    }


def written(target: str, fact: dict) -> str:
    launches = f"{fact['kernels']} + {fact['scalars']}" if target == "gpu" else fact["kernels"]
    return f"{launches}; {fact['bytes']:.2f}; {fact['temporaries'] / 1000:.0f} kB"


def part(target: str, found: dict) -> list[str]:
    rows = (
        [f"{name}, {tree}" if tree else name, *(written(target, x) for x in places.values())]
        for (tree, name), places in found.items()
    )
    everything = [x for places in found.values() for x in places.values()]
    return [
        f"## {DEVICES[target]}",
        "",
        *table(["optimizer", *trees.PLACES], rows),
        "",
        f"Arrays copied: {sum(x['copies'] for x in everything)}. Steps with every output in the "
        f"place of its input: {sum(x['in_place'] for x in everything)} of {len(everything)}.",
        "",
    ]


def main() -> None:
    absent = [why for why in map(deviceless.missing, DEVICES) if why]
    if absent:
        sys.exit(f'{"; ".join(absent)}: pip install "jax[cuda13-local,tpu]"')
    for target in DEVICES:
        deviceless.devices(target)  # once, before there are threads
    cells = list(itertools.product(DEVICES, ROWS, trees.PLACES))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        each = pool.map(lambda cell: facts(cell[0], *cell[1], cell[2]), cells)
        each = list(tqdm(each, total=len(cells), leave=False, disable=None))
    found: dict = {target: {row: {} for row in ROWS} for target in DEVICES}
    for (target, row, place), fact in zip(cells, each, strict=True):
        found[target][row][place] = fact

    leaves, whole = TREES[""], TREES["ResNet-50"]
    lines = [
        f"`python benchmarks/accelerators.py`: compiled by jax {jax.__version__} without a device, "
        "not timed.",
        "",
        f"Parameters: one leaf of each of ResNet-50's shapes, {len(leaves)} leaves of "
        f"{sum(map(math.prod, leaves.values())) / 1e6:.1f} million; in the last row all "
        f"{len(whole)} of {sum(map(math.prod, whole.values())) / 1e6:.1f}. In each cell: kernels "
        "(on the GPU, plus those for scalars alone, the step and Adam's powers); bytes read and "
        "written in main memory, over those of reading every input and writing every output once "
        "(clipping reads the gradients twice, unless a TPU keeps them on the chip); temporaries.",
        "",
        *itertools.chain.from_iterable(part(target, found[target]) for target in DEVICES),
    ]
    kept = {
        target: {" ".join(filter(None, row)): places for row, places in rows.items()}
        for target, rows in found.items()
    }
    publish("accelerators", "What a step is compiled to on a GPU and a TPU", lines[:-1], kept)


if __name__ == "__main__":
    main()
