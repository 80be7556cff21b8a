"""Write `orbax_0.1.0.tar.xz`: checkpoints as emaopt 0.1.0 wrote them, and what was saved in each.

    PYTHONPATH=<a checkout of emaopt 0.1.0> python tests/golden/make_orbax.py

Later versions must load them. Made once, with the last commit before 0.2.0; not to be made again.
`<case>/run/3` is a checkpoint, `<case>/averages.npz` has the averages that were evaluated, by name,
`<case>/raw.npz` the parameters. Saved with 2 updates of `train`, step 3.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


HERE = pathlib.Path(__file__).parent
PARAMS = {
    "conv": {"kernel": jnp.linspace(-1, 1, 6, dtype=jnp.bfloat16).reshape(2, 3)},
    "bias": jnp.arange(3.0),
}
AVERAGE = emaopt.ema(emaopt.warmup(0.9))
COMPENSATED = emaopt.compensated(jnp.bfloat16)
CASES = {
    "chain": (optax.chain(emaopt.adam(0.1), AVERAGE), {}),
    "named": (
        optax.named_chain(
            ("sgd", optax.sgd(0.1)),
            ("fast", emaopt.ema(0.5)),
            ("slow", emaopt.ema(0.9, ledger=True)),
        ),
        {"name": "slow"},
    ),
    "masked": (
        optax.chain(optax.sgd(0.1), optax.masked(AVERAGE, emaopt.matching("kernel"))),
        {},
    ),
    "accumulated": (optax.MultiSteps(optax.chain(emaopt.momentum(0.1, 0.9), AVERAGE), 2), {}),
    "compensated": (
        optax.chain(optax.sgd(0.1), emaopt.ema(0.9, accumulator_dtype=COMPENSATED)),
        {},
    ),
    "undigested": (optax.chain(optax.sgd(0.1), AVERAGE), {"digest": False}),
}
REST = {
    "stats": {"mean": jnp.ones(2)},
    "key": jax.random.key(7),
    "epoch": 3,
    "temperature": 0.25,
    "history": np.linspace(0.0, 1.0, 3),
    "label": "a run",
}


def train(tx, params):
    opt_state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(lambda p: p + jnp.asarray(0.37, p.dtype), params)
        params, opt_state = emaopt.apply_gradients(tx, grads, params, opt_state)
    return params, opt_state


def flat(tree):
    """The leaves by their position, in float32, which holds each of them exactly."""
    return {str(i): np.asarray(x, np.float32) for i, x in enumerate(jax.tree.leaves(tree))}


def write(folder, params, opt_state, name=None, **save):
    with ocp.training.Checkpointer(folder / "run") as checkpointer:
        assert checkpoint.save(checkpointer, 3, params, opt_state, name=name, **save)
    np.savez(folder / "averages.npz", **flat(emaopt.average(params, opt_state, name)))
    np.savez(folder / "raw.npz", **flat(params))


def main():
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        for case, (tx, save) in CASES.items():
            params, opt_state = train(tx, PARAMS)
            write(place / case, params, opt_state, **save, **REST)
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        tx = optax.chain(emaopt.adam(0.1), AVERAGE)
        params, opt_state = train(tx, nnx.state(model, nnx.Param))
        write(place / "nnx", params, opt_state)
        (place / "exported").mkdir()
        checkpoint.export_averages(place / "chain/run", place / "exported" / "run")
        (place / "one_tree").mkdir()
        params, opt_state = train(CASES["chain"][0], PARAMS)
        ocp.save(place / "one_tree/run", {"params": params, "opt_state": opt_state})
        (place / "converted").mkdir()
        convert = [sys.executable, "-m", "emaopt", "convert"]
        source = HERE / "checkpoints" / "adam"
        subprocess.run([*convert, source, place / "converted" / "run"], check=True)
        shutil.make_archive(str(HERE / "orbax_0.1.0"), "xztar", place)


if __name__ == "__main__":
    main()
