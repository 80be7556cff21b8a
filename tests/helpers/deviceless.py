"""What a step is compiled to for a GPU or a TPU that is not there.

XLA compiles for a description of a device: NVIDIA's H100 where JAX's CUDA plugin is installed (its
two wheels, without CUDA's own), a TPU v5e where libtpu is. No device is looked for, and JAX's
backend stays the CPU.
"""

import functools
import math
import os
import re
from importlib.util import find_spec
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding


jax.config.update("jax_platforms", "cpu")
os.environ |= {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # CUDA itself is not needed
    "TPU_SKIP_MDS_QUERY": "1",  # no network
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # as many tests as there are workers
}
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 7 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
"""
NEEDS = {
    "gpu": ("jax-cuda13-plugin", ["jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"]),
    "tpu": ("libtpu", ["libtpu"]),
}


def missing(target: str) -> str:
    """Why nothing can be compiled for the target here; empty if it can."""
    package, modules = NEEDS[target]
    found = any(find_spec(m.split(".")[0]) and find_spec(m) for m in modules)
    return "" if found else f"{package} is not installed"


@functools.cache
def devices(target: str) -> list:
    """Four devices to compile for."""
    if target == "gpu":
        described = {"topology": "1x1x4", "target_config": H100}
        return topologies.get_topology_desc(platform="cuda", **described).devices
    return topologies.get_topology_desc("v5e:2x2", platform="tpu").devices


class Compiled(NamedTuple):
    """`kernels`: launches over arrays; `scalars`: over scalars alone. `copies`: arrays copied.

    `traffic`, `temporaries`: bytes read and written, and kept, in main memory: what a TPU fetches
    ahead into the memory on the chip is read there once. `aliases`: the input that each output
    writes over.
    """

    kernels: int
    scalars: int
    copies: int
    traffic: int
    temporaries: int
    aliases: dict[int, int]
    hlo: str


def compiled(step, target: str, *arguments) -> Compiled:
    """A step for abstract arguments, the first of them donated; on one device if not sharded."""
    one = SingleDeviceSharding(devices(target)[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or one)
    lowered = jax.jit(step, donate_argnums=0).lower(*jax.tree.map(place, arguments))
    # no time for the insides of kernels; TPU has no such option
    options = {"xla_backend_optimization_level": 0} if target == "gpu" else {}
    return read(lowered.compile(compiler_options=options).as_text())


class _Array(NamedTuple):
    size: int
    rank: int
    main: bool  # in main memory


_NO_WORK = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_FETCHES = {"copy-start", "slice-start"}
_PASSES = _NO_WORK | _FETCHES | {"copy-done", "slice-done"}


def _arrays(written: str) -> list[_Array]:
    found = []
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", written):
        shape = [int(n) for n in dims.split(",") if n]
        width = int(re.sub(r"\D", "", dtype) or 8) // 8
        found.append(_Array(width * math.prod(shape), len(shape), "S(" not in layout))
    return found


def read(hlo: str) -> Compiled:
    """The facts in the text of a compiled program."""
    entry = hlo[hlo.index("\nENTRY ") :].split("\n}")[0]
    lines = re.findall(r"^  (ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)", entry, re.M)
    arrays = {name: _arrays(written) for _, name, written, *_ in lines}
    operands = {name: re.findall(r"%([\w.-]+)", given) for _, name, _, _, given, _ in lines}
    kept = _reaching([name for root, name, *_ in lines if root], operands, lines)
    kernels = scalars = copies = traffic = temporaries = 0
    for _, name, _, op, _, rest in lines:
        results = arrays[name]
        touched = results + [x for other in operands[name] for x in arrays[other]]
        assert op not in ("call", "while", "conditional"), f"{op} hides what it runs"
        if op in _FETCHES:  # from main memory to that on the chip, or back
            copies += all(x.main for x in results[:2])
            traffic += min(x.size for x in results[:2])
        if op in _PASSES or '"ConcatBitcast"' in rest:
            continue
        traffic += sum(x.size for x in touched if x.main)
        copies += op == "copy" and results[0].rank > 0
        if any(x.rank for x in touched):
            kernels += 1
        else:
            scalars += 1
        if name not in kept:
            temporaries += sum(x.size for x in results if x.main)
    aliases = re.findall(r"\{(\d+)\}: \((\d+), \{\}, \w+-alias\)", hlo.split("\n")[0])
    pairs = {int(output): int(given) for output, given in aliases}
    return Compiled(kernels, scalars, copies, traffic, temporaries, pairs, hlo)


def _reaching(names, operands, lines):
    """What is a result of the program: the root, and what it only passes on."""
    passes = {name for _, name, _, op, *_ in lines if op in _PASSES}
    found, ahead = set(), list(names)
    while ahead:
        name = ahead.pop()
        found.add(name)
        ahead += operands[name] if name in passes else []
    return found
