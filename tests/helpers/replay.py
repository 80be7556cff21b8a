"""The golden cases, and runs of them: for the tests and for `benchmarks/exactness.py`."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from folders import GOLDEN

import emaopt


def cases(kind):
    """The cases of a kind: training, averages, clipping or schedules."""
    return json.loads((GOLDEN / "cases.json").read_text())[kind]


@functools.cache
def arrays(kind):
    """The arrays of a kind, by case and name."""
    return dict(np.load(GOLDEN / f"{kind}.npz"))


def hyper(case, exponential_decay=emaopt.exponential_decay):
    """The hyper-parameters of a training case, its schedule made; float64 rounded as TF1 does."""
    kept = ("initial_accumulator_value",) if case["dtype"] == "float64" else case["hyper"]
    rounded = {
        name: value if name in kept or type(value) is not float else float(np.float32(value))
        for name, value in case["hyper"].items()
    }
    if isinstance(rounded.get("learning_rate"), dict):
        rounded["learning_rate"] = exponential_decay(**rounded["learning_rate"])
    return rounded


def transformation(case):
    """A training case in emaopt: clipping, the optimizer, the average."""
    links = [getattr(emaopt, case["id"].split("/")[0])(**hyper(case))]
    if case["clip_norm"]:
        links.insert(0, emaopt.clip_by_global_norm(case["clip_norm"]))
    if case["average"]:
        decay = case["average"]["decay"]
        links.append(emaopt.ema(emaopt.warmup(decay) if case["average"]["num_updates"] else decay))
    return optax.chain(*links)


def gradients(case):
    """All gradients of a training case, stacked."""
    data, first = arrays("training"), case["first"]
    return {
        name: data[f"grad/{name}"][first : first + case["steps"]].astype(case["dtype"])
        for name in ("w", "b")
    }


def train(tx, case, jitted=True):
    """Parameters and states before the first step and after every step, stacked."""
    params = {k: jnp.asarray(arrays("training")[f"{case['id']}/var/{k}"][0]) for k in ("w", "b")}
    start = params, tx.init(params)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates), state
        return new, new

    def stack(first, rest):
        return jax.tree.map(lambda x, xs: np.concatenate([[x], xs]), first, rest)

    grads = gradients(case)
    if jitted:
        return stack(start, jax.jit(lambda: jax.lax.scan(step, start, grads)[1])())
    steps, carry = [], start
    with jax.disable_jit():
        for t in range(case["steps"]):
            carry, _ = step(carry, jax.tree.map(lambda g, t=t: jnp.asarray(g[t]), grads))
            steps.append(carry)
    return stack(start, jax.tree.map(lambda *x: np.stack(x), *steps))


def values(case):
    """Where the average of a case starts, and all the values it sees, stacked."""
    first, rest = jnp.split(jnp.asarray(arrays("averages")["values"], case["dtype"]), [1])
    return first[0] if case["of"] == "variable" else jnp.zeros_like(first[0]), rest


def average(update, state, values, num_updates=None):
    """The states of an average after every value, stacked."""

    def step(state, now):
        state = update(now[0], state, now[1])
        return state, state

    return jax.lax.scan(step, state, (values, num_updates))[1]
