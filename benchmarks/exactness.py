"""How far emaopt and optax are from TensorFlow 1.15.5, on the golden cases of the tests.

`python benchmarks/exactness.py` prints the table and writes it to `results/exactness.md`. A
deviation is the largest `|got - expected|` of a tensor as a share of its largest `|expected|`: the
worst over all float32 cases, recorded steps and tensors. Everything is jitted. optax has the
settings that bring it closest to TensorFlow; rows with other settings follow where they matter.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import RESULTS, replay

import emaopt


STAIRS = 1000
SAME = "the same formula"
EPSILON = "adds epsilon after the bias correction, TF1 before it"
EPSILON_HAT = "the same, `eps` a schedule: `eps / sqrt(1 - b2**t)`"
FROM_ZERO = "the default `initial_scale=0`; TF1 starts at 1"


def sgd(learning_rate, momentum=None, use_nesterov=False):
    return optax.sgd(learning_rate, momentum, nesterov=use_nesterov)


def adagrad(learning_rate, initial_accumulator_value=0.1, *, eps=0.0):
    return optax.adagrad(learning_rate, initial_accumulator_value, eps=eps)


def adadelta(learning_rate=0.001, rho=0.95, epsilon=1e-8):
    return optax.adadelta(learning_rate, rho, eps=epsilon)


def adam(learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-8):
    return optax.adam(learning_rate, beta1, beta2, epsilon)


def adam_with_epsilon_hat(learning_rate=0.001, beta1=0.9, beta2=0.999, epsilon=1e-8):
    scale = optax.inject_hyperparams(lambda eps: optax.scale_by_adam(beta1, beta2, eps))
    moments = scale(eps=lambda step: epsilon / jnp.sqrt(1 - beta2 ** (step + 1.0)))
    return optax.chain(moments, optax.scale_by_learning_rate(learning_rate))


def rmsprop(
    learning_rate, decay=0.9, momentum=0.0, epsilon=1e-10, centered=False, *, initial_scale=1.0
):
    return optax.rmsprop(
        learning_rate,
        decay,
        eps=epsilon,
        initial_scale=initial_scale,
        centered=centered,
        momentum=momentum,
    )


def rmsprop_from_zero(**hyper):
    return rmsprop(**hyper, initial_scale=0.0)


# (optimizer, call of optax, the function, why it differs)
OPTIMIZERS = [
    ("gradient_descent", "`sgd(lr)`", sgd, SAME),
    ("momentum", "`sgd(lr, momentum)`", sgd, SAME),
    ("momentum, Nesterov", "`sgd(lr, momentum, nesterov=True)`", sgd, SAME),
    ("adagrad", "`adagrad(lr, start, eps=0)`", adagrad, SAME),
    (
        "adagrad",
        "`adagrad(lr, start)`",
        lambda **hyper: adagrad(**hyper, eps=1e-7),
        "the default `eps=1e-7`; TF1 has no epsilon",
    ),
    ("adadelta", "`adadelta(lr, rho, eps)`", adadelta, SAME),
    ("adam", "`adam(lr, b1, b2, eps)`", adam, EPSILON),
    ("adam", EPSILON_HAT, adam_with_epsilon_hat, SAME + ", `b2**t` for a running product"),
    ("adam, epsilon 0.1 and 1", "`adam(lr, b1, b2, eps)`", adam, EPSILON),
    ("adam, epsilon 0.1 and 1", EPSILON_HAT, adam_with_epsilon_hat, SAME + ", as above"),
    ("ftrl", "", None, "no counterpart"),
    ("rmsprop", "`rmsprop(lr, decay, eps, initial_scale=1, momentum=mu)`", rmsprop, SAME),
    ("rmsprop", "`rmsprop(lr, decay, eps, momentum=mu)`", rmsprop_from_zero, FROM_ZERO),
    ("rmsprop, centered", "`rmsprop(..., initial_scale=1, centered=True)`", rmsprop, SAME),
    ("rmsprop, centered", "`rmsprop(..., centered=True)`", rmsprop_from_zero, FROM_ZERO),
]


def optimizer(case):
    """The optimizer of a case, as the first column has it."""
    name, hyper = case["id"].split("/")[0], case["hyper"]
    name += ", Nesterov" * ("use_nesterov" in hyper) + ", centered" * ("centered" in hyper)
    return name + ", epsilon 0.1 and 1" * (name == "adam" and hyper.get("epsilon", 0) >= 0.1)


def exponential_decay(learning_rate, decay_steps, decay_rate, staircase):
    return optax.exponential_decay(learning_rate, decay_steps, decay_rate, staircase=staircase)


def by_optax(make):
    return lambda case: make(**replay.hyper(case, exponential_decay))


def deviation(got, want):
    """Of one tensor, where both are finite; NaN is counted apart."""
    both = np.isfinite(got) & np.isfinite(want)
    largest = np.abs(want[both]).max(initial=0)
    return np.abs(got - want)[both].max(initial=0) / largest if largest else 0.0


def training(cases, make):
    """The worst deviation of the parameters; `make(case)` is the transformation."""
    worst = 0.0
    for case in cases:
        params, _ = replay.train(make(case), case)
        for name, got in params.items():
            wanted = replay.arrays("training")[f"{case['id']}/var/{name}"]
            worst = max([worst, *map(deviation, got[case["recorded"]], wanted)])
    return worst


def averages(cases, make):
    """The worst deviation of an average; `make(decay, start)` is (update, state, its average)."""
    worst = 0.0
    for case in cases:
        start, values = replay.values(case)
        update, state, average = make(case["decay"], start)
        states = jax.jit(replay.average, static_argnums=0)(update, state, values)
        wanted = replay.arrays("averages")[f"{case['id']}/shadow"]
        worst = max([worst, *map(deviation, np.asarray(average(states)), wanted)])
    return worst


def fixed(decay, start):
    mean = emaopt.moving_average(decay)
    return mean.update, mean.init(start), lambda state: state.shadow


def warmup(decay, start):
    return fixed(emaopt.warmup(decay), start)


def debiased(decay, start):
    return fixed(emaopt.debiased(decay), start)


def optax_fixed(decay, start):
    update = lambda value, state, _: optax.incremental_update(value, state, 1 - decay)
    return update, start, lambda state: state


def optax_debiased(decay, start):
    tx = optax.ema(decay, debias=True)
    update = lambda value, state, _: tx.update(value, state[1])
    return update, (start, tx.init(start)), lambda state: state[0]


def clipping(cases, make):
    """The worst deviation, and how many gradients have NaN elsewhere than in TensorFlow."""
    data, worst, differ = replay.arrays("clipping"), 0.0, 0
    for case in cases:
        tx = make(case["kwargs"]["clip_norm"])
        clip = jax.jit(tx.update)
        for inputs in case["inputs"]:
            grads = {k: np.float32(data[f"in/{inputs}/{k}"]) for k in case["leaves"]}
            got = {k: np.asarray(x) for k, x in clip(grads, tx.init(grads))[0].items()}
            want = {k: data[f"{case['id']}/{inputs}/{k}"] for k in grads}
            worst = max([worst, *(deviation(got[k], want[k]) for k in grads)])
            differ += any((np.isnan(got[k]) != np.isnan(want[k])).any() for k in grads)
    return worst, differ


def late_stairs(decay):
    """For how many of the `decay_steps` 1 to STAIRS step `decay_steps` is not on stair 1."""
    halves = (jax.jit(decay(1.0, n, 0.5, staircase=True))(n) for n in range(1, STAIRS + 1))
    return sum(float(half) != 0.5 for half in halves)


def rows():
    """(what, cases, emaopt, optax, the call of optax, why it differs)."""
    everything = [c for c in replay.cases("training") if c["dtype"] == "float32"]
    seen = set()
    for name, call, make, why in OPTIMIZERS:
        cases = [c for c in everything if optimizer(c) == name and not c["clip_norm"]]
        head = ("", "", "")
        if name not in seen:
            head = name, len(cases), f"{training(cases, replay.transformation):.1e}"
        seen.add(name)
        yield *head, f"{training(cases, by_optax(make)):.1e}" if make else "", call, why

    some = [c for c in everything if c["clip_norm"]]
    ours = training(some, replay.transformation)
    clipped = lambda case: optax.clip_by_global_norm(case["clip_norm"])
    theirs = training(some, lambda case: optax.chain(clipped(case), by_optax(rmsprop)(case)))
    call = "`chain(clip_by_global_norm(c), rmsprop(..., initial_scale=1))`"
    yield "recipe: clip, rmsprop, stairs", len(some), f"{ours:.1e}", f"{theirs:.1e}", call, SAME

    everything = [c for c in replay.cases("averages") if c["dtype"] == "float32"]
    some = [c for c in everything if c["of"] == "variable" and c["num_updates"] is None]
    ours, theirs = averages(some, fixed), averages(some, optax_fixed)
    call = "`incremental_update(new, old, 1 - decay)`"
    why = "`(1 - decay) * new + decay * old`, `1 - decay` not in float32"
    yield "average, fixed decay", len(some), f"{ours:.1e}", f"{theirs:.1e}", call, why
    some = [c for c in everything if c["num_updates"] == 1]
    ours = averages(some, warmup)
    yield "average, `num_updates`", len(some), f"{ours:.1e}", "", "", "no counterpart"
    some = [c for c in everything if c["of"] == "debiased"]
    ours, theirs = averages(some, debiased), averages(some, optax_debiased)
    call = "`ema(decay, debias=True)`"
    yield "average, debiased", len(some), f"{ours:.1e}", f"{theirs:.1e}", call, SAME

    some = [c for c in replay.cases("clipping") if c["op"] == "clip_by_global_norm"]
    some = [c for c in some if c["dtype"] == "float32" and "use_norm" not in c["kwargs"]]
    ours, our_nan = clipping(some, emaopt.clip_by_global_norm)
    theirs, their_nan = clipping(some, optax.clip_by_global_norm)
    call, count = "`clip_by_global_norm(c)`", sum(len(c["inputs"]) for c in some)
    yield "clip_by_global_norm, finite", count, f"{ours:.1e}", f"{theirs:.1e}", call, SAME
    why = "an infinite norm scales by 0; in TF1 every element is NaN"
    yield "clip_by_global_norm, not NaN where TF1 is", count, our_nan, their_nan, call, why

    ours, theirs = late_stairs(emaopt.exponential_decay), late_stairs(optax.exponential_decay)
    call = "`exponential_decay(..., staircase=True)`"
    why = "jitted, `n / n` becomes `n * (1 / n)`, which can be below 1 (in TF1 too)"
    yield "late first stair, `decay_steps` 1 to 1000", STAIRS, ours, theirs, call, why


def main():
    """Print the table and write it."""
    lines = [
        "| | cases | emaopt | optax | optax called as | why optax differs |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(map(str, row)) + " |" for row in rows()),
    ]
    title = (
        f"Deviation from TensorFlow 1.15.5, jax {jax.__version__}, optax {optax.__version__}, "
        f"{jax.default_backend()}; made by `python benchmarks/exactness.py`."
    )
    text = "\n".join(["# How near TensorFlow 1.15.5", "", title, "", *lines, ""])
    print(text, end="")
    (RESULTS / "exactness.md").write_text(text)


if __name__ == "__main__":
    main()
