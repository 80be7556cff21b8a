"""A training process to be killed, or one of several that train together.

    python trainer.py RUN --steps N [--processes P --process I --port PORT]

Resumes from the newest checkpoint in RUN, saves every step in the background, and prints "step N"
when step N is on its way. `state_after` is what must have been saved.
"""

import argparse
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from folders import HELPERS
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


TX = optax.chain(emaopt.momentum(0.01, 0.9), emaopt.ema(emaopt.warmup(0.99)))
SIZE = 1 << 18


def environment(devices):
    """Return the environment of a process with so many CPU devices, which finds the helpers."""
    path = [str(HELPERS), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }


def mesh_of_all():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))


@partial(jax.jit, static_argnums=0)
def init(sharding):
    params = {"w": jnp.sin(jnp.arange(SIZE, dtype=jnp.float32)).reshape(-1, 64)}
    params = jax.lax.with_sharding_constraint(params, sharding)
    return params, TX.init(params)


@jax.jit
def train(params, opt_state):
    return emaopt.apply_gradients(TX, jax.tree.map(jnp.cos, params), params, opt_state)


def state_after(steps, sharding):
    params, opt_state = init(sharding)
    for _ in range(steps):
        params, opt_state = train(params, opt_state)
    return params, opt_state


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    if args.processes > 1:
        jax.distributed.initialize(
            f"localhost:{args.port}", args.processes, args.process, initialization_timeout=60
        )
    params, opt_state = init(mesh_of_all())
    keep = ocp.training.preservation_policies.LatestN(3)
    with ocp.training.Checkpointer(args.run, preservation_policy=keep) as checkpointer:
        start = 0
        if checkpointer.latest is not None:
            params, opt_state, rest = checkpoint.resume(checkpointer, params, opt_state, step_=0)
            start = rest["step_"]
            print("resumed", start, flush=True)
        for step in range(start + 1, args.steps + 1):
            params, opt_state = train(params, opt_state)
            checkpoint.save_async(checkpointer, step, params, opt_state, step_=step)
            print("step", step, flush=True)
            checkpointer.wait()
    print("done", flush=True)


if __name__ == "__main__":
    main()
