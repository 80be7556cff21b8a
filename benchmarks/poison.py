"""What one bad number does to an average, by composition.

    python benchmarks/poison.py

A small network learns to add, 300 steps of momentum with `ema(0.98)`. At step 150 one element of a
gradient, of the parameters or of the shadow is NaN, or Inf, which gives the same but where the
table tells them apart. In the end: whether parameters and average are finite, how far the average
is from that of the run without the bad number (as a share of its way from the start), and how many
leaves were healed. Writes results/poison.md.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from helpers import RESULTS

import emaopt


STEPS, BAD_STEP = 300, 150
OPTIMIZER, AVERAGE = emaopt.momentum(0.02, 0.9), emaopt.ema(0.98)
COMPOSITIONS = {
    "chain(momentum, ema)": optax.chain(OPTIMIZER, AVERAGE),
    "apply_if_finite(chain(momentum, ema), 5)": optax.apply_if_finite(
        optax.chain(OPTIMIZER, AVERAGE), 5
    ),
    "MultiSteps(chain(momentum, ema), 1, should_skip_update_fn=skip_not_finite)": optax.MultiSteps(
        optax.chain(OPTIMIZER, AVERAGE), 1, should_skip_update_fn=optax.skip_not_finite
    ),
    "chain(zero_nans(), momentum, ema)": optax.chain(optax.zero_nans(), OPTIMIZER, AVERAGE),
    "chain(momentum, heal(ema))": optax.chain(OPTIMIZER, emaopt.heal(AVERAGE)),
    "apply_if_finite(chain(momentum, heal(ema)), 5)": optax.apply_if_finite(
        optax.chain(OPTIMIZER, emaopt.heal(AVERAGE)), 5
    ),
}
PLACES = ("gradient", "parameter", "shadow")


def loss(params, x):
    hidden = jnp.tanh(x @ params["w"])
    return jnp.mean((hidden @ params["v"] - x.sum(1)) ** 2)


def start():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "w": jax.random.normal(keys[0], (4, 16)) / 2,
        "v": jax.random.normal(keys[1], (16,)) / 4,
    }


def run(tx, place: str | None, bad: float):
    """The end of a run in which one element of a place was bad, once."""
    params = start()
    spoil = lambda tree: {**tree, "v": tree["v"].at[3].set(bad)}

    @functools.partial(jax.jit, static_argnums=3)
    def step(params, state, x, spoiled):
        grads = jax.grad(loss)(params, x)
        if spoiled and place == "gradient":
            grads = spoil(grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(STEPS):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (32, 4))
        if i == BAD_STEP and place == "parameter":
            params = spoil(params)
        if i == BAD_STEP and place == "shadow":
            state = jax.tree.map(
                lambda s: s._replace(shadow=spoil(s.shadow)) if is_average(s) else s,
                state,
                is_leaf=is_average,
            )
        params, state = step(params, state, x, i == BAD_STEP)
    return params, state


def is_average(node) -> bool:
    return isinstance(node, emaopt.EmaState)


def healed(state) -> int:
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, emaopt.HealState))
    counts = [node.healed for node in nodes if isinstance(node, emaopt.HealState)]
    return sum(int(x) for x in jax.tree.leaves(counts))


def is_finite(tree) -> bool:
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


def outcome(tx, reference, place: str, bad: float) -> str:
    params, state = run(tx, place, bad)
    averaged = emaopt.average(params, state)
    minus = lambda a, b: jax.tree.map(jnp.subtract, a, b)
    way = optax.tree.norm(minus(reference, start()))
    if not is_finite(averaged):
        return f"{'finite' if is_finite(params) else 'NaN'} | **NaN** | |"
    off = float(optax.tree.norm(minus(averaged, reference)) / way)
    return f"{'finite' if is_finite(params) else 'NaN'} | {off:.1e} off | {healed(state)} |"


def main() -> None:
    lines = [
        "| one bad | composition | parameters | average | leaves healed |",
        "|---|---|---|---|---|",
    ]
    unharmed = {name: emaopt.average(*run(tx, None, 0.0)) for name, tx in COMPOSITIONS.items()}
    for place in PLACES:
        for name, tx in COMPOSITIONS.items():
            nan, inf = (outcome(tx, unharmed[name], place, bad) for bad in (jnp.nan, jnp.inf))
            kinds = [(f"{place}, NaN", nan), (f"{place}, Inf", inf)]
            if nan == inf:
                kinds = [(place, nan)]
            lines += [f"| {kind} | `{name}` | {cells}" for kind, cells in kinds]
    text = "\n".join(lines)
    (RESULTS / "poison.md").write_text(
        f"# What one bad number does\n\n`python benchmarks/poison.py`\n\n{text}\n"
    )
    print(text)


if __name__ == "__main__":
    main()
