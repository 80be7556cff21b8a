"""Write peers.json: the averages of other libraries, computed by these libraries.

    python3.11 -m venv peers && peers/bin/pip install -r tests/peers.txt
    peers/bin/python tests/golden/make_peers.py

TensorFlow Addons needs an old TensorFlow, so it has an environment of its own, and TensorFlow 1 the
one of make.py. A run leaves the records of libraries that are not installed as they are.

    python3.11 -m venv tfa && tfa/bin/pip install tensorflow-cpu==2.15.1 tensorflow-addons==0.23.0
    tfa/bin/python tests/golden/make_peers.py
    tf1/bin/python tests/golden/make_peers.py

    python3.11 -m venv composer && composer/bin/pip install torch==2.6.0 mosaicml==0.32.1
    composer/bin/python tests/golden/make_peers.py

EDM2's code is not a package, and not free: its records are the formulas of its papers, in NumPy.
torchtitan's averages are in no release yet: its records are the formula of its documentation.

Every case sees the same parameters, `values()`: row 0 at the start, row t after update t. A record
has the average after each update, as the base64 of an array [updates, 2], little-endian.
"""
# ruff: noqa: B905, RUF007 (Python 3.7)

import base64
import copy
import importlib
import importlib.util
import inspect
import json
import math
import operator
import os
import pathlib
import sys
import types

import numpy as np


try:
    from importlib import metadata
except ImportError:  # Python 3.7
    import importlib_metadata as metadata

FILE = pathlib.Path(__file__).parent / "peers.json"
SEED, UPDATES = 27182, 128
CASES = [
    ("tf1", {"decay": 0.9}),
    ("tf1", {"decay": 0.9999}),
    ("tf1", {"decay": 0.9999, "num_updates": True}),
    ("tf1", {"decay": 0.5, "num_updates": True}),
    ("tf1", {"decay": 0.9, "zero_debias": True}),
    ("tfa", {}),
    ("tfa", {"average_decay": 0.9, "start_step": 7}),
    ("tfa", {"average_decay": 0.999, "dynamic_decay": True}),
    ("tfa", {"average_decay": 0.6, "start_step": 20, "dynamic_decay": True}),
    ("tfa_swa", {}),
    ("tfa_swa", {"average_period": 1}),
    ("tfa_swa", {"start_averaging": 20, "average_period": 3}),
    ("keras", {}),
    ("keras", {"ema_momentum": 0.9}),
    ("keras", {"ema_momentum": 0.9999}),
    ("torch", {}),
    ("torch", {"decay": 0.9}),
    ("torch_swa", {}),
    ("timm", {}),
    ("timm", {"decay": 0.9, "min_decay": 0.5, "update_after_step": 10}),
    ("timm", {"use_warmup": True}),
    ("timm", {"decay": 0.8, "min_decay": 0.4, "update_after_step": 5, "use_warmup": True}),
    ("timm", {"use_warmup": True, "warmup_gamma": 10.0, "warmup_power": 0.75}),
    ("diffusers", {}),
    ("diffusers", {"use_ema_warmup": True}),
    ("diffusers", {"use_ema_warmup": True, "inv_gamma": 5.0, "power": 0.75}),
    ("diffusers", {"decay": 0.8, "min_decay": 0.3, "update_after_step": 12}),
    ("diffusers", {"decay": 0.9, "min_decay": 0.9}),
    ("diffusers", {"decay": 0.7, "min_decay": 0.45, "use_ema_warmup": True, "power": 1.0}),
    ("ema_pytorch", {}),
    ("ema_pytorch", {"update_after_step": 0, "update_every": 1}),
    ("ema_pytorch", {"beta": 0.8, "update_after_step": 30, "update_every": 4, "min_value": 0.5}),
    ("ema_pytorch", {"update_after_step": 13, "update_every": 5, "inv_gamma": 3.0, "power": 1.0}),
    ("ema_pytorch", {"beta": 1.0, "update_after_step": 24}),
    ("ema_pytorch_karras", {"sigma_rel": 0.1, "update_every": 1}),
    ("ema_pytorch_karras", {"gamma": 2.0, "update_every": 1}),
    ("edm2", {"std": 0.05}),
    ("edm2", {"std": 0.1}),
    ("edm2", {"std": 0.25}),
    ("edm2_traditional", {"batch_size": 2048}),
    ("edm2_traditional", {"halflife_Mimg": 0.02, "batch_size": 2048}),
    ("edm2_traditional", {"halflife_Mimg": 0.5, "rampup_ratio": None, "batch_size": 512}),
    ("lightning", {}),
    ("lightning", {"decay": 0.9, "update_every_n_steps": 3}),
    ("lightning", {"decay": 0.8, "update_every_n_steps": 5, "update_starting_at_step": 12}),
    ("composer", {}),
    ("composer", {"half_life": "20ba", "update_interval": "4ba"}),
    (
        "composer",
        {"half_life": None, "smoothing": 0.9, "ema_start": "7ba", "update_interval": "2ba"},
    ),
    ("composer", {"half_life": "10ba", "ema_start": "6ba", "update_interval": "4ba"}),
    ("nemo", {"decay": 0.9}),
    ("nemo", {"decay": 0.999, "every_n_steps": 4}),
    ("mmengine", {}),
    ("mmengine", {"momentum": 0.1, "interval": 3, "begin_iter": 10}),
    ("mmengine", {"ema_type": "StochasticWeightAverage", "interval": 4, "begin_iter": 5}),
    ("mmengine", {"ema_type": "MomentumAnnealingEMA"}),
    ("mmengine", {"ema_type": "MomentumAnnealingEMA", "gamma": 5, "momentum": 0.1, "interval": 2}),
    ("torchtitan", {}),
    ("torchtitan", {"half_life_fraction": 0.3, "start_step": 9, "step_bias": 4}),
    ("torchtitan", {"decay": 0.9, "start_step": 2, "update_every_n_steps": 3}),
    ("bema", {}),
    ("bema", {"update_freq": 1}),
    ("bema", {"update_freq": 4, "update_after": 10, "lag": 3, "min_ema_multiplier": 0.2}),
    ("bema", {"update_freq": 3, "ema_power": 0.8, "multiplier": 0.5}),
    ("optax", {"step_size": 0.1}),
    ("optax", {"step_size": 0.0001}),
    ("nnx", {"decay": 0.9}),
    ("nnx", {"decay": 0.9999}),
]
EVERY_UPDATE = {"update_after_step": 0, "update_every": 1}
# where a library does not do what it documents: the same records, of what it does
DEFECTS = [
    ("tf1_debiases_a_ramp_with_its_newest_decay", {"decay": 0.9999}),
    ("tfa_reads_num_updates_once", {"average_decay": 0.9}),
    ("keras_counts_micro_steps", {"ema_momentum": 0.9}),
    ("keras_resumes_from_zero", {"ema_momentum": 0.9}),
    ("timm_without_step", {"decay": 0.9, "update_after_step": 10, "use_warmup": True}),
    ("ema_pytorch_karras_counts_updates", {"sigma_rel": 0.1, "update_every": 10}),
    ("keras_in_bfloat16", {"ema_momentum": 0.999}),
    ("torch_in_bfloat16", {"decay": 0.999}),
    ("diffusers_in_bfloat16", {"decay": 0.999, "min_decay": 0.999}),
    ("ema_pytorch_in_bfloat16", {"beta": 0.999, "min_value": 0.999, **EVERY_UPDATE}),
    ("optax_in_bfloat16", {"step_size": 0.001}),
    ("nnx_in_bfloat16", {"decay": 0.999}),
]
# what BEMA makes of its average: with the correction of the bias
OUTPUTS = [
    ("bema_output", {"update_freq": 4, "update_after": 10, "bias_power": 0.3}),
    ("bema_output", {"update_freq": 1, "lag": 5}),
]
LIBRARIES = {  # the distribution that a case needs, and how its version begins
    "tf1": ("tensorflow", "1."),
    "tfa": ("tensorflow-addons", ""),
    "keras": ("keras", "3."),
    "torch": ("torch", ""),
    "timm": ("timm", ""),
    "diffusers": ("diffusers", ""),
    "ema_pytorch": ("ema-pytorch", ""),
    "edm2": ("numpy", "2."),  # the formulas of its papers
    "lightning": ("lightning", ""),
    "composer": ("mosaicml", ""),
    "nemo": ("nemo-toolkit", ""),
    "mmengine": ("mmengine", ""),
    "torchtitan": ("numpy", "2."),  # its averages are in no release yet: the documented formula
    "bema": ("trl", ""),
    "optax": ("optax", ""),
    "nnx": ("flax", ""),
}
ACCUMULATED = 4


def values():
    """The parameters, [updates + 1, 2]; any two differ by what float32 holds exactly."""
    return np.round(np.random.RandomState(SEED).randn(UPDATES + 1, 2) * 64) / 64


def as_bfloat16():
    """The parameters of the cases in bfloat16: 2 after the first update, then 1."""
    return np.array([[2.0, 2.0], [2.0, 2.0]] + [[1.0, 1.0]] * (UPDATES - 1))


def wide(x):
    """An array, as float32 if it is bfloat16."""
    x = np.asarray(x)
    return x if x.dtype == np.float64 else x.astype(np.float32)


def library(name):
    """The name in LIBRARIES of a case or defect."""
    return max((key for key in LIBRARIES if name.startswith(key)), key=len)


def _graph(feed, decay, num_updates=False, zero_debias=False, tensor=False):
    import tensorflow as tf

    with tf.Graph().as_default(), tf.Session() as session:
        new = tf.placeholder(tf.float32, [2])
        count = tf.Variable(0)
        v = tf.Variable(feed[0], dtype=tf.float32)
        with tf.control_dependencies([v.assign(new), count.assign_add(1)]):
            x = tf.identity(new) if tensor else v
            n = count.read_value() if num_updates else None
            ema = tf.train.ExponentialMovingAverage(decay, n, zero_debias=zero_debias)
            with tf.control_dependencies([ema.apply([x])]):
                read = ema.average(x).read_value()
        session.run(tf.global_variables_initializer())
        return [session.run(read, {new: w}) for w in feed[1:]]


def tf1(feed, **arguments):
    return _graph(feed, tensor=arguments.get("zero_debias", False), **arguments)


def tf1_debiases_a_ramp_with_its_newest_decay(feed, decay):
    return _graph(np.ones_like(feed), decay, num_updates=True, zero_debias=True, tensor=True)


def _addons(feed, optimizer, count=None):
    import tensorflow as tf

    v = tf.Variable(feed[0], dtype=tf.float32)
    rows = []
    for old, new in zip(feed, feed[1:]):
        optimizer.apply_gradients([(tf.constant(old - new, tf.float32), v)])
        assert (v.numpy() == new).all()
        rows.append(optimizer.get_slot(v, "average").numpy())
        if count is not None:
            count.assign_add(1)
    return rows


def tfa(feed, **arguments):
    import tensorflow as tf
    import tensorflow_addons as addons

    sgd = tf.keras.optimizers.legacy.SGD(1.0)
    return _addons(feed, addons.optimizers.MovingAverage(sgd, **arguments))


def tfa_reads_num_updates_once(feed, average_decay):
    import tensorflow as tf
    import tensorflow_addons as addons

    sgd = tf.keras.optimizers.legacy.SGD(1.0)
    count = tf.Variable(0)
    return _addons(feed, addons.optimizers.MovingAverage(sgd, average_decay, count), count)


def tfa_swa(feed, **arguments):
    import tensorflow as tf
    import tensorflow_addons as addons

    sgd = tf.keras.optimizers.legacy.SGD(1.0)
    return _addons(feed, addons.optimizers.SWA(sgd, **arguments))


def keras(feed, dtype="float64", repeat=1, iterations=0, **arguments):
    import jax

    jax.config.update("jax_enable_x64", True)
    import keras

    accumulate = {"gradient_accumulation_steps": repeat} if repeat > 1 else {}
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, **dict(arguments, **accumulate))
    v = keras.Variable(feed[0], dtype=dtype)
    optimizer.build([v])
    optimizer._iterations.assign(iterations)
    rows = []
    for old, new in zip(feed, feed[1:]):
        for _ in range(repeat):
            optimizer.apply([jax.numpy.asarray(old - new, dtype)], [v])
            rows.append(wide(optimizer._model_variables_moving_average[0].value))
        assert (np.asarray(v.value, float) == new).all()
    return rows


def keras_counts_micro_steps(feed, **arguments):
    return keras(feed[: UPDATES // ACCUMULATED + 1], repeat=ACCUMULATED, **arguments)


def keras_resumes_from_zero(feed, **arguments):
    return keras(feed, iterations=1000, **arguments)


def keras_in_bfloat16(feed, **arguments):
    return keras(as_bfloat16(), dtype="bfloat16", **arguments)


def _module(feed, dtype="float64"):
    import torch

    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.tensor(feed[0], dtype=getattr(torch, dtype)))
    return module


def _follow(feed, module, update, read):
    import torch

    rows = []
    for new in feed[1:]:
        with torch.no_grad():
            module.w.copy_(torch.tensor(new))
        update()
        average = read().detach()
        rows.append(wide(average.float() if average.dtype == torch.bfloat16 else average.clone()))
    return rows


def torch(feed, decay=None, dtype="float64"):
    from torch.optim import swa_utils

    module = _module(feed, dtype)
    function = swa_utils.get_ema_avg_fn() if decay is None else swa_utils.get_ema_avg_fn(decay)
    average = swa_utils.AveragedModel(module, avg_fn=function)
    update = lambda: average.update_parameters(module)
    return _follow(feed, module, update, lambda: average.module.w)


def torch_swa(feed):
    from torch.optim import swa_utils

    module = _module(feed)
    average = swa_utils.AveragedModel(module)
    update = lambda: average.update_parameters(module)
    return _follow(feed, module, update, lambda: average.module.w)


def timm(feed, counted=True, **arguments):
    from timm.utils import ModelEmaV3

    module = _module(feed)
    average = ModelEmaV3(module, **arguments)
    steps = iter(range(1, UPDATES + 1))
    update = lambda: average.update(module, step=next(steps) if counted else None)
    return _follow(feed, module, update, lambda: average.module.w)


def timm_without_step(feed, **arguments):
    return timm(feed, counted=False, **arguments)


def torch_in_bfloat16(feed, **arguments):
    return torch(as_bfloat16(), dtype="bfloat16", **arguments)


def diffusers(feed, dtype="float64", **arguments):
    from diffusers.training_utils import EMAModel

    module = _module(feed, dtype)
    average = EMAModel(module.parameters(), **arguments)
    update = lambda: average.step(module.parameters())
    return _follow(feed, module, update, lambda: average.shadow_params[0])


def diffusers_in_bfloat16(feed, **arguments):
    return diffusers(as_bfloat16(), "bfloat16", **arguments)


def ema_pytorch(feed, kind="EMA", dtype="float64", **arguments):
    import ema_pytorch

    module = _module(feed, dtype)
    average = getattr(ema_pytorch, kind)(module, **arguments)
    return _follow(feed, module, average.update, lambda: average.ema_model.w)


def ema_pytorch_in_bfloat16(feed, **arguments):
    return ema_pytorch(as_bfloat16(), dtype="bfloat16", **arguments)


def ema_pytorch_karras(feed, **arguments):
    return ema_pytorch(feed, "KarrasEMA", **arguments)


ema_pytorch_karras_counts_updates = ema_pytorch_karras


def _lerp(feed, betas):
    average, rows = copy.copy(feed[0]), []
    for new, beta in zip(feed[1:], betas):
        average = beta * average + (1 - beta) * new
        rows.append(average)
    return rows


def edm2(feed, std):
    # equation 126: the exponent; equation 127: the decay
    gamma = np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max()
    return _lerp(feed, [(1 - 1 / t) ** (gamma + 1) for t in range(1, UPDATES + 1)])


def edm2_traditional(feed, batch_size, halflife_Mimg=math.inf, rampup_ratio=0.09):
    images = batch_size * np.arange(1.0, UPDATES + 1)
    half = np.full(UPDATES, halflife_Mimg * 1e6)
    if rampup_ratio is not None:
        half = np.minimum(half, rampup_ratio * images)
    return _lerp(feed, 0.5 ** (batch_size / half))


def lightning(feed, **arguments):
    import torch
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(feed[0], dtype=torch.float64))

    module, trainer = Module(), types.SimpleNamespace(global_step=0)
    callback = EMAWeightAveraging(**arguments)
    callback.setup(trainer, module, "fit")

    def update():
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, trainer.global_step - 1)

    return _follow(feed, module, update, lambda: callback._average_model.module.w)


def composer(feed, **arguments):
    from composer import Event, Time, Timestamp
    from composer.algorithms import EMA

    module = _module(feed, "float64")
    state = types.SimpleNamespace(model=module, timestamp=Timestamp(), callbacks=[])
    state.get_elapsed_duration = lambda: Time.from_timestring("0.5dur")
    average = EMA(**arguments)

    def fire(event):
        if average.match(event, state):
            average.apply(event, state, None)

    def update():
        state.timestamp = state.timestamp.to_next_batch()
        fire(Event.BATCH_END)

    fire(Event.INIT)
    return _follow(feed, module, update, lambda: average.ema_model.named_parameters_dict["w"])


def nemo(feed, decay, every_n_steps=1):
    import torch

    # the file alone: the package around it loads a speech toolkit
    root = importlib.util.find_spec("nemo").submodule_search_locations[0]
    path = pathlib.Path(root, "collections", "common", "callbacks", "ema.py")
    spec = importlib.util.spec_from_file_location("nemo_ema", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    w = torch.nn.Parameter(torch.tensor(feed[0], dtype=torch.float64))
    optimizer = module.EMAOptimizer(
        torch.optim.SGD([w], lr=1.0), torch.device("cpu"), decay, every_n_steps
    )
    rows = []
    for old, new in zip(feed, feed[1:]):
        w.grad = torch.tensor(old - new, dtype=torch.float64)
        optimizer.step()
        optimizer.join()
        assert (w.detach().numpy() == new).all()
        rows.append(optimizer.ema_params[0].numpy().copy())
    return rows


def mmengine(feed, **arguments):
    from mmengine.hooks import EMAHook

    module = _module(feed, "float64")
    hook, runner = EMAHook(**arguments), types.SimpleNamespace(model=module, iter=0)
    hook.before_run(runner)

    def update():
        hook.after_train_iter(runner, runner.iter)
        runner.iter += 1

    return _follow(feed, module, update, lambda: hook.ema_model.module.w)


def torchtitan(
    feed, decay=None, half_life_fraction=0.05, start_step=0, step_bias=0, update_every_n_steps=1
):
    average, rows = feed[0], []
    for step, new in enumerate(feed[1:], 1):
        since = step - start_step
        if since > 0 and since % update_every_n_steps == 0:
            n = since // update_every_n_steps + step_bias
            kept = 2 ** (-1 / (half_life_fraction * n)) if decay is None else decay
            average = kept * average + (1 - kept) * new
        rows.append(average)
    return rows


def bema(feed, output=False, **arguments):
    import torch
    from trl import BEMACallback

    class Module(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            self.w = torch.nn.Parameter(torch.tensor(feed[0], dtype=torch.float64))

    module = Module(None)
    callback, state = BEMACallback(**arguments), types.SimpleNamespace(global_step=0)
    callback.on_train_begin(None, state, None, module)

    def update():
        state.global_step += 1
        callback.on_step_end(None, state, None, module)

    read = lambda: callback.running_model.w if output else callback.ema_params[0]
    return _follow(feed, module, update, read)


def bema_output(feed, **arguments):
    return bema(feed, output=True, **arguments)


def optax(feed, dtype="float64", **arguments):
    import jax

    jax.config.update("jax_enable_x64", True)
    import optax

    average, rows = jax.numpy.asarray(feed[0], dtype), []
    update = jax.jit(lambda new, old: optax.incremental_update(new, old, **arguments))
    for new in feed[1:]:
        average = update(jax.numpy.asarray(new, dtype), average)
        rows.append(wide(average))
    return rows


def optax_in_bfloat16(feed, **arguments):
    return optax(as_bfloat16(), "bfloat16", **arguments)


def nnx(feed, dtype="float64", **arguments):
    import jax

    jax.config.update("jax_enable_x64", True)
    from flax import nnx

    average = nnx.EMA({"w": nnx.Param(jax.numpy.asarray(feed[0], dtype))}, **arguments)
    rows = []
    for new in feed[1:]:
        average.update({"w": nnx.Param(jax.numpy.asarray(new, dtype))})
        rows.append(wide(average.params["w"][...]))
    return rows


def nnx_in_bfloat16(feed, **arguments):
    return nnx(as_bfloat16(), "bfloat16", **arguments)


def versions():
    """The version of each library that is installed here."""
    found = {}
    for name, (distribution, begin) in LIBRARIES.items():
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if version.startswith(begin):
            found[name] = version
    return found


def record(name, arguments):
    """One case, run now."""
    rows = np.array(globals()[name](values(), **arguments))
    rows = rows.astype("<f8" if rows.dtype == np.float64 else "<f4")
    assert rows.shape == (UPDATES, 2)
    text = base64.b64encode(rows.tobytes()).decode()
    return {"name": name, "arguments": arguments, "dtype": rows.dtype.name, "averages": text}


def signatures(here):
    """The arguments with their defaults ("" for none) where the presets have theirs from."""
    places = {
        "tf1": "tensorflow.train:ExponentialMovingAverage",
        "tfa": "tensorflow_addons.optimizers:MovingAverage",
        "tfa_swa": "tensorflow_addons.optimizers:SWA",
        "keras": "keras.optimizers:SGD",
        "torch": "torch.optim.swa_utils:get_ema_avg_fn",
        "timm": "timm.utils:ModelEmaV3",
        "diffusers": "diffusers.training_utils:EMAModel",
        "ema_pytorch": "ema_pytorch:EMA.__init__",
        "ema_pytorch_karras": "ema_pytorch:KarrasEMA.__init__",
        "lightning": "lightning.pytorch.callbacks:EMAWeightAveraging.__init__",
        "composer": "composer.algorithms:EMA.__init__",
        "mmengine": "mmengine.hooks:EMAHook.__init__ mmengine.model:MomentumAnnealingEMA.__init__",
        "bema": "trl:BEMACallback.__init__",
        "optax": "optax:incremental_update",
        "nnx": "flax.nnx:EMA.__init__",
    }
    found = {}
    for preset, place in places.items():
        if library(preset) not in here:
            continue
        found[preset] = {}
        for one in place.split():
            module, path = one.split(":")
            source = operator.attrgetter(path)(importlib.import_module(module))
            found[preset].update(
                (p.name, "" if p.default is p.empty else p.default)
                for p in inspect.signature(source).parameters.values()
                if p.default is p.empty
                or isinstance(p.default, (bool, int, float, str, type(None)))
            )
    return found


def averages(recorded):
    """The averages in a record, [updates, 2]."""
    data = base64.b64decode(recorded["averages"])
    return np.frombuffer(data, np.dtype(recorded["dtype"]).newbyteorder("<")).reshape(-1, 2)


def main(file=FILE):
    """Run what is installed, and write the file."""
    os.environ["KERAS_BACKEND"] = "jax"
    file = pathlib.Path(file)
    old = json.loads(file.read_text()) if file.exists() else {}
    here = versions()
    about = {
        "versions": dict(old.get("versions", {}), **here),
        "signatures": dict(old.get("signatures", {}), **signatures(here)),
    }
    for kind, rows in (("cases", CASES), ("defects", DEFECTS), ("outputs", OUTPUTS)):
        kept = {(r["name"], json.dumps(r["arguments"])): r for r in old.get(kind, [])}
        about[kind] = [
            record(name, arguments) if library(name) in here else kept[name, json.dumps(arguments)]
            for name, arguments in rows
            if library(name) in here or (name, json.dumps(arguments)) in kept
        ]
    lines = []
    for key, value in about.items():
        rows = ",\n ".join(json.dumps(row) for row in value) if isinstance(value, list) else ""
        lines.append(
            json.dumps(key) + ": " + ("[\n " + rows + "\n]" if rows else json.dumps(value))
        )
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
