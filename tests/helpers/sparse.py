"""A table sharded over its rows, on one device, on a mesh, or on two processes that share it.

    python sparse.py OUT --processes P --process I --port PORT

Momentum and an average on the rows that each batch looks up. Run as a process, it writes into OUT
what the parameters and averages are after `STEPS` steps, from all processes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from processes import join

import emaopt


ROWS, WIDTH, IDS, STEPS = 40_000, 8, 4096, 3
SPECS = {"table": P("rows", None), "bias": P(None)}
TX = optax.chain(
    emaopt.clip_by_global_norm(1.0),
    emaopt.momentum(0.1, 0.9),
    emaopt.ema(emaopt.warmup(0.9), rows=emaopt.matching("table")),
)


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("rows",), axis_types=(kind,))


def batches():
    """The ids of each step, drawn from a Zipf law: many repeat."""
    draw = np.random.default_rng(0)
    return [np.minimum(draw.zipf(1.2, IDS) - 1, ROWS - 1).astype(np.int32) for _ in range(STEPS)]


def start(mesh=None):
    """`params, opt_state`, on a mesh or on one device."""
    draw = np.random.default_rng(1)
    params = {
        "table": draw.normal(size=(ROWS, WIDTH)).astype(np.float32),
        "bias": np.ones(WIDTH, np.float32),
    }
    if mesh is None:
        params = jax.tree.map(jnp.asarray, params)
    else:
        put = lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec))
        params = jax.tree.map(put, SPECS, params, is_leaf=lambda x: isinstance(x, P))
    return params, jax.jit(TX.init)(params)


def loss(params, positions):
    return jnp.mean(jnp.cos(params["table"][positions] * params["bias"][None]))


def step(params, opt_state, ids):
    tables = {"table": emaopt.rows(ids)}
    small, small_state = emaopt.take((params, opt_state), tables)
    grads = jax.grad(loss)(small, tables["table"].positions)
    updates, small_state = TX.update(grads, small_state, small)
    small = optax.apply_updates(small, updates)
    return emaopt.put((params, opt_state), (small, small_state), tables)


def trained(mesh=None):
    carry = start(mesh)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    for ids in batches():
        carry = jax.block_until_ready(jitted(*carry, ids))
    return carry


def main():
    args = join(timeout=60)
    from jax.experimental.multihost_utils import process_allgather

    params, opt_state = trained(mesh_of())
    trees = {"params": params, "average": jax.jit(emaopt.average)(params, opt_state)}
    found = {
        f"{name}/{leaf}": x
        for name, tree in trees.items()
        for leaf, x in process_allgather(tree, tiled=True).items()
    }
    np.savez(f"{args.out}/{args.process}.npz", **found)


if __name__ == "__main__":
    main()
