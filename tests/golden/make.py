"""Write the golden numbers in this folder, with the real TensorFlow 1.15.5.

    python3.7 -m venv tf1
    tf1/bin/pip install "tensorflow==1.15.5" "protobuf<3.21" "numpy<1.19"
    tf1/bin/python tests/golden/make.py

`cases.json` says what was run, one case a line; the arrays are in the .npz files, under the id of
the case. Every run writes the same bytes on the same kind of CPU: TensorFlow 1.15 takes float32
square roots of eight elements at once from the CPU's estimate, so their last bits differ between
makers of CPUs.

All training cases use one stream of gradients; a case begins at its own place (`first`) in it.
Row i of a recorded array is read after `recorded[i]` steps; row 0 is the start value.
"""
# ruff: noqa: B905 (zip has no strict= in Python 3.7)

import json
import pathlib
import sys

import numpy as np


FOLDER = pathlib.Path(__file__).parent
SEED = 31415
RECORDED = (0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 300, 500, 1000)
CLASSES = {
    "gradient_descent": "GradientDescentOptimizer",
    "momentum": "MomentumOptimizer",
    "adagrad": "AdagradOptimizer",
    "adadelta": "AdadeltaOptimizer",
    "adam": "AdamOptimizer",
    "ftrl": "FtrlOptimizer",
    "rmsprop": "RMSPropOptimizer",
}
# decay_steps that TensorFlow's own graph rewriting does not shift (see `schedules`)
STAIRS = {"learning_rate": 0.05, "decay_steps": 10, "decay_rate": 0.9, "staircase": True}
SMOOTH = {"learning_rate": 0.05, "decay_steps": 20, "decay_rate": 0.8, "staircase": False}


def training_cases():
    """(name, hyper-parameters, what else); from `first` = 20 k - 1 the first gradient is zero."""
    long = {"steps": 1000, "first": 0}
    nesterov = {"momentum": 0.9, "use_nesterov": True}
    # names every float hyper-parameter: TensorFlow rounds also the defaults to float32
    float64 = {"dtype": "float64", "steps": 50}
    adam = {"beta1": 0.9, "beta2": 0.999}
    l1 = {"l1_regularization_strength": 0.05}
    l2 = {"l2_regularization_strength": 0.1}
    shrinkage = {"l2_shrinkage_regularization_strength": 0.1}
    centered = {"learning_rate": 0.001, "centered": True}
    inception = {"momentum": 0.9, "epsilon": 1.0}
    clip = {"clip_norm": 2.0, "steps": 300}
    fixed = {"average": {"decay": 0.9, "num_updates": False, "wrapper": True}, "steps": 50}
    counted = {"average": {"decay": 0.9999, "num_updates": True, "wrapper": True}, "steps": 50}
    recipe = dict(clip, average={"decay": 0.9999, "num_updates": True, "wrapper": False})
    inception_rate = dict(STAIRS, learning_rate=0.045, decay_steps=40, decay_rate=0.94)
    rows = [
        ("gradient_descent/long", {"learning_rate": 0.001}, long),
        ("gradient_descent/stairs", {"learning_rate": STAIRS}, {}),
        ("gradient_descent/smooth", {"learning_rate": SMOOTH}, {}),
        ("gradient_descent/float64", {"learning_rate": 0.1}, float64),
        ("momentum/long", {"learning_rate": 0.001, "momentum": 0.9}, long),
        ("momentum/high", {"learning_rate": 0.003, "momentum": 0.99}, {"first": 59}),
        ("momentum/stairs", {"learning_rate": STAIRS, "momentum": 0.9}, {}),
        ("momentum/smooth", {"learning_rate": SMOOTH, "momentum": 0.5}, {}),
        ("momentum/float64", {"learning_rate": 0.01, "momentum": 0.9}, float64),
        ("momentum/nesterov_long", dict(nesterov, learning_rate=0.001), long),
        ("momentum/nesterov_stairs", dict(nesterov, learning_rate=STAIRS), {}),
        ("momentum/nesterov_smooth", dict(nesterov, learning_rate=SMOOTH), {}),
        ("momentum/nesterov_float64", dict(nesterov, learning_rate=0.01), float64),
        ("adagrad/long", {"learning_rate": 0.1}, long),
        ("adagrad/tiny", {"learning_rate": 0.5, "initial_accumulator_value": 1e-6}, {"first": 99}),
        ("adagrad/stairs", {"learning_rate": STAIRS, "initial_accumulator_value": 1.0}, {}),
        ("adagrad/float64", {"learning_rate": 0.1}, float64),
        ("adadelta/long", {}, long),
        ("adadelta/paper", {"learning_rate": 1.0, "epsilon": 1e-6}, {"first": 119}),
        ("adadelta/stairs", {"learning_rate": STAIRS, "rho": 0.9, "epsilon": 1e-3}, {}),
        ("adadelta/float64", {"learning_rate": 1.0, "rho": 0.95, "epsilon": 1e-6}, float64),
        ("adam/long", {}, long),
        ("adam/epsilon_one", {"learning_rate": 0.1, "epsilon": 1.0}, {}),
        ("adam/slow_start", {"learning_rate": 0.01, "beta1": 0.5, "beta2": 0.99}, {"first": 19}),
        ("adam/stairs", {"learning_rate": STAIRS, "epsilon": 0.1}, {}),
        ("adam/smooth", {"learning_rate": SMOOTH}, {}),
        ("adam/float64", dict(adam, learning_rate=0.001, epsilon=1e-8), float64),
        ("ftrl/long", {"learning_rate": 0.1}, long),
        ("ftrl/l1", dict(l1, learning_rate=0.1), {"first": 139}),
        ("ftrl/l2", dict(l2, learning_rate=0.1), {}),
        ("ftrl/shrinkage", dict(shrinkage, learning_rate=0.1), {}),
        ("ftrl/power", dict(l1, learning_rate=0.1, learning_rate_power=-0.7, **shrinkage), {}),
        ("ftrl/fixed_rate", dict(l1, learning_rate=0.01, learning_rate_power=0.0, **l2), {}),
        ("ftrl/from_zero", {"learning_rate": 0.1, "initial_accumulator_value": 0.0}, {"first": 19}),
        ("ftrl/stairs", dict(l1, learning_rate=STAIRS), {}),
        ("ftrl/smooth", dict(l2, learning_rate=SMOOTH, learning_rate_power=-0.7), {}),
        ("ftrl/float64", dict(l1, learning_rate=0.1, **shrinkage), float64),
        ("ftrl/power_float64", dict(l2, learning_rate=0.1, learning_rate_power=-0.7), float64),
        ("rmsprop/long", dict(inception, learning_rate=0.045), long),
        ("rmsprop/plain", {"learning_rate": 0.001}, {}),
        ("rmsprop/momentum", {"learning_rate": 0.01, "momentum": 0.9}, {"first": 159}),
        ("rmsprop/stairs", dict(inception, learning_rate=STAIRS), {}),
        ("rmsprop/float64", dict(inception, learning_rate=0.01, decay=0.95), float64),
        ("rmsprop/centered", centered, long),
        ("rmsprop/centered_one", dict(inception, learning_rate=SMOOTH, centered=True), {}),
        ("rmsprop/centered_float64", dict(inception, decay=0.95, **centered), float64),
        ("momentum/average", {"learning_rate": 0.01, "momentum": 0.9}, fixed),
        ("adam/average", {"learning_rate": 0.01}, counted),
        ("rmsprop/recipe", dict(inception, learning_rate=inception_rate), recipe),
    ]
    defaults = {"dtype": "float32", "steps": 100, "average": None, "clip_norm": None}
    for i, (name, hyper, what) in enumerate(rows):
        yield dict(dict(defaults, id=name, hyper=hyper, first=7 * i), **what)


def average_cases():
    """(of what, decay, dtype, `num_updates` at the first update; one more each time)."""
    for decay in (0.5, 0.9, 0.99, 0.999, 0.9999, 0.0, 1.0):
        yield "variable", decay, "float32", None
    for decay, first in ((0.5, 1), (0.99, 1), (0.9999, 1), (0.9999, 500)):
        yield "variable", decay, "float32", first
    yield "variable", 0.99, "float64", None
    yield "variable", 0.9999, "float64", 1
    yield "tensor", 0.9, "float32", None
    # no slower ones: there TensorFlow's float32 `1 - (1 - rate)**t` is noise of its own
    for decay in (0.5, 0.9, 0.99):
        yield "debiased", decay, "float32", None
    yield "debiased", 0.9, "float64", None


def clip_cases():
    """(operation, arguments, leaves, inputs)."""
    leaves = ["w", "v", "s"]
    inputs = ["ordinary", "wide", "zeros", "tiny", "huge", "one_inf", "one_nan"]
    arrays = {
        "clip_value_min": [[-1.0, -0.5, 0.0, 0.5, 1.0]] * 3,
        "clip_value_max": [[-0.5, 0.5, 0.0, 2.0, 1.5]] * 3,
    }
    yield "clip_by_value", {"clip_value_min": -0.5, "clip_value_max": 0.75}, leaves, inputs
    yield "clip_by_value", arrays, ["w"], inputs
    for clip_norm in (0.05, 1.0, 41.0):
        for op in ("clip_by_norm", "clip_by_average_norm", "clip_by_global_norm"):
            yield op, {"clip_norm": clip_norm}, leaves, inputs
    for axes in (0, 1, [0, 1]):
        yield "clip_by_norm", {"clip_norm": 1.0, "axes": axes}, ["w"], inputs
    for norm in ("0", "0.5", "2.5", "inf", "nan"):
        yield "clip_by_global_norm", {"clip_norm": 1.0, "use_norm": norm}, leaves, ["ordinary"]


def schedule_cases():
    """Of 41 and 82, TensorFlow's graph rewriting makes the first stair late."""
    for decay_steps, decay_rate in ((100, 0.96), (7, 0.5), (41, 0.94), (82, 1.1), (2.5, 0.8)):
        for staircase in (False, True):
            yield {
                "learning_rate": 0.1,
                "decay_steps": decay_steps,
                "decay_rate": decay_rate,
                "staircase": staircase,
            }


def gradient_stream(rng):
    """Wide in range over elements and steps; spikes, zeros, and an element that is never touched.

    Every twentieth step is all zero.
    """
    grads = {}
    for name, shape in (("w", (3, 5)), ("b", (3,))):
        per_element = 10 ** rng.uniform(-4, 1, size=shape)
        per_step = 10 ** rng.uniform(-1, 1, size=(1000, *[1] * len(shape)))
        g = rng.standard_normal((1000, *shape)) * per_element * per_step
        g = np.where(rng.random(g.shape) < 0.01, 100 * g, g)
        g = np.where(rng.random(g.shape) < 0.05, 0, g)
        g[19::20] = 0
        grads[name] = g
    grads["w"][:, 0, 0] = 0
    return grads


def clip_inputs(rng):
    """Trees of float64; the dtype is applied by whoever reads them."""
    shapes = {"w": (3, 5), "v": (4,), "s": ()}

    def tree(f):
        return {k: np.asarray(f(shape)) for k, shape in shapes.items()}

    made = {
        "ordinary": tree(rng.standard_normal),
        "wide": tree(lambda s: rng.standard_normal(s) * 10 ** rng.uniform(-4, 3, size=s)),
        "zeros": tree(np.zeros),
        "tiny": tree(lambda s: rng.uniform(1e-26, 1e-25, size=s)),  # its squares are 0 in float32
        "huge": tree(lambda s: rng.uniform(1e24, 1e25, size=s)),  # its squares are infinite
    }
    for name, value in (("one_inf", -np.inf), ("one_nan", np.nan)):
        made[name] = tree(rng.standard_normal)
        made[name]["w"][1, 2] = value
    return made


def session(rewrites=True):
    """One thread, so that every run gives the same bits."""
    config = tf.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
    if not rewrites:
        config.graph_options.rewrite_options.disable_meta_optimizer = True
    return tf.Session(config=config)


def train(case, grads, initial):
    """The recorded rows of every variable, and what the case did not say: names and defaults."""
    tf.reset_default_graph()
    dtype = tf.as_dtype(case["dtype"])
    step = tf.train.get_or_create_global_step()
    variables = {k: tf.Variable(x, dtype=dtype, name=k) for k, x in initial.items()}
    feeds = {k: tf.placeholder(dtype, v.shape) for k, v in variables.items()}
    hyper = dict(case["hyper"])
    if isinstance(hyper.get("learning_rate"), dict):
        hyper["learning_rate"] = tf.train.exponential_decay(
            global_step=step, **hyper["learning_rate"]
        )
    optimizer = inner = getattr(tf.train, CLASSES[case["id"].split("/")[0]])(**hyper)
    average, fetches = case["average"], {}
    num_updates = step if average and average["num_updates"] else None
    if average and average["wrapper"]:
        optimizer = tf.contrib.opt.MovingAverageOptimizer(
            inner, average["decay"], num_updates=num_updates, sequential_update=True
        )
    clipped = list(feeds.values())
    if case["clip_norm"]:
        clipped, fetches["global_norm"] = tf.clip_by_global_norm(clipped, case["clip_norm"])
    pairs = list(zip(clipped, variables.values()))
    update = optimizer.apply_gradients(pairs, global_step=step)
    if average:
        ema = getattr(optimizer, "_ema", None)
        if not average["wrapper"]:
            ema = tf.train.ExponentialMovingAverage(average["decay"], num_updates=num_updates)
            with tf.control_dependencies([update]):
                update = ema.apply(list(variables.values()))
    slots = {name: {} for name in inner.get_slot_names()}
    rows, names = {}, {}
    for k, v in variables.items():
        rows["var/" + k], names["var/" + k] = v, v.op.name
        for slot in slots:
            s = inner.get_slot(v, slot)
            rows["slot/" + slot + "/" + k], names["slot/" + slot + "/" + k] = s, s.op.name
        if average:
            s = ema.average(v)
            rows["average/" + k], names["average/" + k] = s, s.op.name
    for power in ("beta1_power", "beta2_power") if case["id"].startswith("adam/") else ():
        rows["power/" + power] = tf.get_default_graph().get_tensor_by_name(power + ":0")
        names["power/" + power] = power
    recorded = {k: [] for k in list(rows) + list(fetches)}
    with session() as run:
        run.run(tf.global_variables_initializer())
        for t in range(case["steps"] + 1):
            if t:
                g = {feeds[k]: grads[k][case["first"] + t - 1] for k in feeds}
                for k, x in run.run([fetches, update], g)[0].items():
                    recorded[k].append(x)
            if t in RECORDED:
                for k, x in run.run(rows).items():
                    recorded[k].append(x)
    case["recorded"] = [t for t in RECORDED if t <= case["steps"]]
    case["slot_names"], case["names"] = list(slots), names
    return recorded


def run_average(case, values):
    """The shadow after every update; of a tensor it starts at zero."""
    tf.reset_default_graph()
    dtype, of_tensor = tf.as_dtype(case["dtype"]), case["of"] != "variable"
    value = tf.placeholder(dtype, values.shape[1:])
    count = tf.placeholder(tf.int64, [])
    what = tf.identity(value) if of_tensor else tf.Variable(values[0], dtype=dtype)
    ema = tf.train.ExponentialMovingAverage(
        case["decay"],
        num_updates=None if case["num_updates"] is None else count,
        zero_debias=case["of"] == "debiased",
    )
    assign = tf.no_op() if of_tensor else tf.assign(what, value)
    update = ema.apply([what])
    shadow = []
    with session() as run:
        run.run(tf.global_variables_initializer())
        for t, x in enumerate(values[1:]):
            run.run(assign, {value: x})
            run.run(update, {value: x, count: (case["num_updates"] or 0) + t})
            shadow.append(run.run(ema.average(what)))
    return {"shadow": shadow}


def worked_example():
    """The shadow in the example of `ExponentialMovingAverage`'s tutorial: 0, 4.5, 4.555, ..."""
    tf.reset_default_graph()
    v, step = tf.Variable(0.0), tf.Variable(0, trainable=False)
    ema = tf.train.ExponentialMovingAverage(0.99, num_updates=step)
    update, shadow = ema.apply([v]), []
    with session() as run:
        run.run(tf.global_variables_initializer())
        shadow.append(run.run(ema.average(v)))
        for value, count in ((5.0, 0), (10.0, 10000), (10.0, 10000)):
            run.run([v.assign(value), step.assign(count)])
            run.run(update)
            shadow.append(run.run(ema.average(v)))
    return shadow


def clip(case, tree):
    """Every leaf clipped; the global norm too where there is one."""
    tf.reset_default_graph()
    dtype, kwargs = case["dtype"], dict(case["kwargs"])
    leaves = {k: tf.constant(tree[k], dtype) for k in case["leaves"]}
    if case["op"] == "clip_by_global_norm":
        if "use_norm" in kwargs:
            kwargs["use_norm"] = tf.constant(float(kwargs["use_norm"]), dtype)
        (_, *clipped), norm = tf.clip_by_global_norm([None, *leaves.values()], **kwargs)
        out = dict(zip(leaves, clipped), norm=norm)
    else:
        if case["op"] == "clip_by_value":
            kwargs = {k: tf.constant(x, dtype) for k, x in kwargs.items()}
        out = {k: getattr(tf, case["op"])(x, **kwargs) for k, x in leaves.items()}
    with session() as run:
        return run.run(out)


def schedule(kwargs, steps):
    """The values in a session as it comes, and in one that does not rewrite the graph."""
    values = {}
    for name, rewrites in (("values", True), ("as_written", False)):
        tf.reset_default_graph()
        step = tf.placeholder(tf.int64, [])
        rate = tf.train.exponential_decay(global_step=step, **kwargs)
        with session(rewrites) as run:
            values[name] = [run.run(rate, {step: t}) for t in steps]
    return values


def restore_maps():
    """`variables_to_restore` where v1 and the tensor v3 have an average and v2 has none."""
    tf.reset_default_graph()
    step = tf.train.get_or_create_global_step()
    v1, v2 = tf.Variable(1.0, name="v1"), tf.Variable(2.0, name="v2")
    ema = tf.train.ExponentialMovingAverage(0.99)
    ema.apply([v1, tf.add(v1, v2, name="v3")])
    chosen = {"all": None, "v1": [v1], "v2": [v2], "global_step": [step]}
    return {
        name: {key: v.op.name for key, v in sorted(ema.variables_to_restore(some).items())}
        for name, some in chosen.items()
    }


def main():
    """Run everything and write the files."""
    rng = np.random.default_rng(SEED)
    grads, clips = gradient_stream(rng), clip_inputs(rng)
    values = np.cumsum(rng.standard_normal((61, 3, 5)), axis=0)
    values *= 10 ** rng.uniform(-3, 2, size=(3, 5))
    training = {"grad/" + k: g for k, g in grads.items()}
    averages, clipping, schedules = {"values": values}, {}, {}
    for inputs, tree in clips.items():
        clipping.update(("in/" + inputs + "/" + k, x) for k, x in tree.items())

    cases = {"training": list(training_cases()), "averages": [], "clipping": [], "schedules": []}
    for case in cases["training"]:
        initial = {"w": rng.standard_normal((3, 5)), "b": rng.standard_normal(3)}
        training.update((case["id"] + "/" + k, x) for k, x in train(case, grads, initial).items())
    for row in average_cases():
        case = dict(zip(("of", "decay", "dtype", "num_updates"), row))
        case["id"] = "/".join(map(str, row))
        averages.update((case["id"] + "/" + k, x) for k, x in run_average(case, values).items())
        cases["averages"].append(case)
    averages["worked_example"] = worked_example()
    for i, (op, kwargs, leaves, inputs) in enumerate(clip_cases()):
        # tf.clip_by_average_norm knows float32 alone
        for dtype in ("float32",) if op == "clip_by_average_norm" else ("float32", "float64"):
            case = {"op": op, "kwargs": kwargs, "leaves": leaves, "inputs": inputs, "dtype": dtype}
            case["id"] = "/".join([op, str(i), dtype])
            cases["clipping"].append(case)
            for name in inputs:
                out = clip(case, clips[name])
                clipping.update((case["id"] + "/" + name + "/" + k, x) for k, x in out.items())
    for kwargs in schedule_cases():
        stair = kwargs["decay_steps"]
        steps = sorted({int(k * stair) + d for k in range(9) for d in (0, 1, 2)} | {5000})
        case = {"id": str(stair) + "/" + ("stairs" if kwargs["staircase"] else "smooth")}
        schedules[case["id"] + "/steps"] = steps
        schedules.update((case["id"] + "/" + k, x) for k, x in schedule(kwargs, steps).items())
        cases["schedules"].append(dict(case, kwargs=kwargs))

    np.savez_compressed(FOLDER / "training.npz", **training)
    np.savez_compressed(FOLDER / "averages.npz", **averages)
    np.savez_compressed(FOLDER / "clipping.npz", **clipping)
    np.savez_compressed(FOLDER / "schedules.npz", **schedules)
    about = {
        "tensorflow": tf.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "seed": SEED,
        "variables_to_restore": restore_maps(),
    }
    lines = [json.dumps(k) + ": " + json.dumps(v) for k, v in about.items()]
    for kind, rows in cases.items():
        body = ",\n ".join(json.dumps(row, sort_keys=True) for row in rows)
        lines.append(json.dumps(kind) + ": [\n " + body + "\n]")
    (FOLDER / "cases.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    import tensorflow as tf  # not above: pytest imports every module in its search for doctests

    main()
