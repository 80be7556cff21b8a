"""Averaging beside other libraries: the averaging step alone, and momentum with averaging.

    pip install torch timm ema-pytorch keras tqdm
    python benchmarks/speed.py
    python benchmarks/speed.py --tf1 TF1_PYTHON

On parameters with the shapes of ResNet-50 and ViT-B, on eight large arrays and on a thousand small
ones, float32, with one thread and with two, in a process each. All libraries take turns in it, each
between two passes of memory traffic; TensorFlow 1.15.5, where TF1_PYTHON is a Python 3.7 that has
it (`tests/golden/make.py` says how to make one), in a process of its own that steps when told. The
numbers are medians over rounds of a library's time divided by emaopt's own averaging step, or by
its chain of momentum and average: above 1, it is slower than emaopt.

Of a library with several forms, the fastest of them: foreach, leaf by leaf, or fused. PyTorch's
`AveragedModel` has `get_ema_multi_avg_fn`; `torch._foreach_lerp_` is what the libraries on PyTorch
come down to, without the library. *Packed*: parameters are packed too, and have to be unpacked in
the loss (leaves.py has that cost). *In a step*: what `ema` adds to a step of momentum, which is how
it is meant to be used. Writes results/speed.json and speed.md.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")

import ema_pytorch
import jax
import keras
import numpy as np
import optax
import timm
import torch
from helpers import trees
from timing import HERE, Step, Worker, bandwidth, publish, ratio, relative_times, table
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import emaopt


RATE, MOMENTUM, DECAY = 1e-3, 0.9, 0.999
TREES = {
    "ResNet-50": trees.RESNET50,
    "ViT-B": trees.VIT_B,
    "8 x 8.4 million": {f"w{i}": (2**23,) for i in range(8)},
    "1,000 x 200": {f"w{i:03}": (200,) for i in range(1000)},
}
OURS, PACKED, ADDED = ("emaopt", ""), ("emaopt, packed", ""), ("emaopt, in a step", "")
Calls = dict[tuple[str, str], Callable]  # by library and form
MOMENTUM_ALONE, AND_AVERAGE = ("momentum", ""), ("momentum, ema", "")


def model_of(params: dict) -> torch.nn.Module:
    """The same numbers, and a gradient, in PyTorch."""
    leaves = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in params.values()]
    for p in leaves:
        p.grad = p.detach() * 1e-3
    return torch.nn.ParameterList(leaves)


def averaged(model: torch.nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))


def averaging(params: dict) -> Calls:
    mean = emaopt.moving_average(DECAY)
    calls: Calls = {
        name: Step(lambda s, p: (mean.update(p, s),), mean.init(form), inputs=(form,))
        for name, form in ((OURS, params), (PACKED, emaopt.pack(params)))
    }
    calls[MOMENTUM_ALONE] = step_of(params, emaopt.momentum(RATE, MOMENTUM))
    calls[AND_AVERAGE] = step_of(params, emaopt.momentum(RATE, MOMENTUM), emaopt.ema(DECAY))
    model = model_of(params)
    average = averaged(model)
    calls["torch AveragedModel", ""] = lambda: average.update_parameters(model)
    values = [p.detach() for p in model.parameters()]
    shadow = [x.clone() for x in values]
    calls["torch._foreach_lerp_", ""] = lambda: torch._foreach_lerp_(shadow, values, 1 - DECAY)
    for form, foreach in (("foreach", True), ("leaf by leaf", False)):
        always = {"update_every": 1, "update_after_step": 0, "include_online_model": False}
        own = ema_pytorch.EMA(model, beta=DECAY, use_foreach=foreach, **always)
        calls["ema-pytorch EMA", form] = own.update
        own = timm.utils.ModelEmaV3(model, decay=DECAY, foreach=foreach)
        calls["timm ModelEmaV3", form] = lambda own=own: own.update(model)
    return calls


def training(params: dict) -> Calls:
    links = emaopt.momentum(RATE, MOMENTUM), emaopt.ema(DECAY)
    calls: Calls = {OURS: step_of(params, *links), PACKED: step_of(emaopt.pack(params), *links)}
    for form in ("fused", "foreach"):
        calls["torch SGD + AveragedModel", form] = torch_step(params, form)
    calls["Keras 3 on JAX, use_ema", ""] = keras_step(params)
    return calls


def step_of(params, *links: optax.GradientTransformation) -> Step:
    tx = optax.chain(*links)

    def step(params, opt_state, grads):
        return emaopt.apply_gradients(tx, grads, params, opt_state)

    return Step(step, params, tx.init(params), inputs=(jax.tree.map(lambda p: p * 1e-3, params),))


def torch_step(params: dict, form: str) -> Callable:
    model = model_of(params)
    sgd = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, **{form: True})
    average = averaged(model)

    def step():
        sgd.step()
        average.update_parameters(model)

    return step


def keras_step(params: dict) -> Step:
    sgd = keras.optimizers.SGD(RATE, momentum=MOMENTUM, use_ema=True, ema_momentum=DECAY)
    variables = [keras.Variable(x) for x in params.values()]
    sgd.build(variables)
    carry = [[v.value for v in each] for each in (variables, sgd.variables)]

    def step(trainable, slots, grads):
        return sgd.stateless_apply(slots, grads, trainable)

    return Step(step, *carry, inputs=([x * 1e-3 for x in carry[0]],))


def measure(shapes: dict, what: str, threads: int, options: argparse.Namespace) -> dict:
    """The time of each form of each library, divided by emaopt's."""
    calls = {"averaging": averaging, "training": training}[what](trees.full(shapes))
    if options.tf1:
        calls["TensorFlow 1.15", ""] = Worker(
            *(options.tf1, "-W", "ignore", str(HERE / "speed_tf1.py")),
            shapes=list(shapes.values()),
            threads=threads,
            momentum=MOMENTUM if what == "training" else None,
            rate=RATE,
            decay=DECAY,
        )
    size = np.clip(sum(int(np.prod(shape)) for shape in shapes.values()), 2**22, 2**25)
    # OpenMP's threads, of PyTorch, spin for some milliseconds
    times = relative_times(calls, options.rounds, bandwidth(int(size), threads), pause=0.02)
    for call in calls.values():
        if isinstance(call, Worker):
            call.close()
    if AND_AVERAGE in times:
        times[ADDED] = times.pop(AND_AVERAGE) - times.pop(MOMENTUM_ALONE)
    found: dict[str, dict[str, float]] = {}
    for library, form in sorted(times, key=lambda name: not name[0].startswith("emaopt")):
        found.setdefault(library, {})[form] = ratio(times[library, form], times[OURS])
    return found


def report(found: dict) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"`python benchmarks/speed.py`: time / emaopt's, on a CPU, {found['rounds']} rounds; "
        f"{versions}. With one thread the numbers are steady; with as many threads as cores, which "
        "threads share a core decides, up to a factor of 1.6.",
    ]
    titles = {"averaging": "The averaging step alone", "training": "Momentum and averaging"}
    for threads, steps in found["threads"].items():
        for what, title in titles.items():
            trees_of = steps[what]
            rows = (
                [library, *(f"{min(each[library].values()):.2f}" for each in trees_of.values())]
                for library in next(iter(trees_of.values()))
            )
            lines += ["", *table([f"{title}, threads: {threads}", *trees_of], rows)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tf1", metavar="TF1_PYTHON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--trees", nargs="*", choices=TREES, default=list(TREES))
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        (threads,) = options.threads
        torch.set_num_threads(threads)
        bar = tqdm(total=2 * len(options.trees), leave=False, disable=None)
        found: dict[str, dict[str, dict]] = {"averaging": {}, "training": {}}
        for tree in options.trees:
            for what, each in found.items():
                each[tree] = measure(TREES[tree], what, threads, options)
                bar.update()
        print(json.dumps(found))
        return
    steps = {}
    for threads in options.threads:
        command = [sys.executable, *sys.argv, "--inside", "--threads", str(threads)]
        # where XLA and PyTorch look for the number of threads
        settings = {"NPROC": str(threads), "OMP_NUM_THREADS": str(threads)}
        run = subprocess.run(
            command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True
        )
        steps[threads] = json.loads(run.stdout.splitlines()[-1])
    packages = (jax, optax, torch, ema_pytorch, timm, keras)
    versions = {package.__name__: version(package.__name__) for package in packages}
    found = {"rounds": options.rounds, "versions": versions, "threads": steps}
    publish("speed", "Averaging beside other libraries", report(found), found)


if __name__ == "__main__":
    main()
