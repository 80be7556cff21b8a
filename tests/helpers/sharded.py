"""A network on a mesh of devices, of one process or of several that train it together.

    python sharded.py OUT --processes P --process I --port PORT

A residual block with a layer norm, its kernels sharded over both axes of the mesh: over "data", and
gathered to compute (FSDP), over "model", and computed with in parts (tensor parallelism). The
meshes are those of one axis, and of both. Run as a process, it writes into OUT what the parameters
and averages are after `STEPS` steps, from all processes.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from processes import join

import emaopt


MESHES = {"fsdp": (8, 1), "tensor": (1, 8), "both": (4, 2)}
SPECS = {
    "scale": P(None),
    "up": {"kernel": P("data", "model"), "bias": P("model")},
    "down": {"kernel": P("model", "data"), "bias": P(None)},
}
STEPS = 3
TX = optax.chain(
    emaopt.clip_by_global_norm(0.5),
    emaopt.momentum(0.1, 0.9),
    emaopt.ema(emaopt.warmup(0.9)),
)


def collectives(hlo):
    """The types of what the devices send to each other, by the operation."""
    hlo = re.sub(r"/\*.*?\*/", "", hlo)  # a tuple of six and more counts its parts: /*index=5*/
    kinds = (
        "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    )
    return re.findall(rf"= ([^=\n]*?) ({kinds})(?:-start)?\(", hlo)


def mesh_of(name, kind):
    return jax.make_mesh(MESHES[name], ("data", "model"), axis_types=(kind, kind))


def place(tree, mesh, specs):
    """On the mesh; from the host, so that it does on several processes too."""
    put = lambda spec, x: jax.device_put(np.asarray(x), NamedSharding(mesh, spec))
    return jax.tree.map(put, specs, tree, is_leaf=lambda x: isinstance(x, P))


def init(width=16, hidden=32):
    a, b = jax.random.normal(jax.random.key(0), (2, width, hidden))
    return {
        "scale": jnp.ones(width),
        "up": {"kernel": 0.3 * a, "bias": jnp.zeros(hidden)},
        "down": {"kernel": 0.3 * b.T, "bias": jnp.zeros(width)},
    }


def data(width=16):
    x, y = jax.random.normal(jax.random.key(1), (2, 24, width))
    return x, y


def loss(params, x, y, kind=AxisType.Auto):
    """Where shardings are part of the types, what is gathered and what is added up is written."""
    explicit = kind == AxisType.Explicit
    gather = jax.sharding.reshard if explicit else lambda w, spec: w
    into = {"out_sharding": P("data", None)} if explicit else {}
    up, down = params["up"], params["down"]
    rows = lambda v: jnp.expand_dims(v, 0)
    h = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    h = h * rows(params["scale"])
    h = jnp.tanh(h @ gather(up["kernel"], P(None, "model")) + rows(up["bias"]))
    out = jnp.dot(h, gather(down["kernel"], P("model", None)), **into) + rows(down["bias"])
    return jnp.mean((x + out - y) ** 2)


def start(tx, mesh=None):
    """`params, opt_state` and the data, on a mesh or on one device."""
    params, batch = init(), data()
    if mesh is not None:
        params = place(params, mesh, SPECS)
        batch = place(batch, mesh, (P("data", None),) * 2)
    return params, jax.jit(tx.init)(params), batch


def step_of(tx, kind=AxisType.Auto):
    return emaopt.minimize(functools.partial(loss, kind=kind), tx)


def within(mesh, kind):
    return jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext()


def trained(mesh=None, kind=AxisType.Auto, tx=TX, steps=STEPS):
    params, opt_state, batch = start(tx, mesh)
    step = step_of(tx, kind)
    with within(mesh, kind):
        for _ in range(steps):
            params, opt_state, value = step(params, opt_state, *batch)
            value.block_until_ready()
    return params, opt_state


def main():
    args = join(timeout=30)
    from jax.experimental.multihost_utils import process_allgather

    params, opt_state = trained(mesh_of("both", AxisType.Auto))
    averaged, swapped = emaopt.swap(params, opt_state)
    trees = {
        "params": params,
        "average": emaopt.average(params, opt_state),
        "swapped": averaged,
        "swapped back": emaopt.swap(averaged, swapped)[0],
    }
    found = {
        f"{name}/{i}": x
        for name, tree in trees.items()
        for i, x in enumerate(jax.tree.leaves(process_allgather(tree, tiled=True)))
    }
    np.savez(f"{args.out}/{args.process}.npz", **found)


if __name__ == "__main__":
    main()
