"""The rows of a table that is sharded over its rows: same numbers, and no more sent than rows."""

import contextlib
import functools
import math
import os
import re
import sys

import compare
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparse
from jax.sharding import AxisType
from processes import finish, together

import emaopt


KINDS = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)
WIDTH = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


@functools.cache
def alone():
    return sparse.trained()


def within(mesh, kind):
    return jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext()


close = functools.partial(compare.close, rtol=1e-5, atol=0, of_largest=1e-6)


@pytest.mark.slow
@KINDS
def test_on_eight_devices_the_numbers_are_those_of_one(kind):
    mesh = sparse.mesh_of(kind)
    with within(mesh, kind):
        params, opt_state = sparse.trained(mesh)
        averaged = emaopt.average(params, opt_state)
    close((params, opt_state), alone())
    close(averaged, emaopt.average(*alone()))
    for leaf in (
        params["table"],
        opt_state[1].slots["momentum"]["table"],
        opt_state[2].shadow["table"],
    ):
        assert leaf.addressable_shards[0].data.shape == (sparse.ROWS // 8, sparse.WIDTH)
    assert opt_state[2].rows.then["table"].addressable_shards[0].data.shape == (sparse.ROWS // 8, 3)


@pytest.mark.slow
@KINDS
def test_a_step_sends_the_rows_once_and_never_a_table(kind):
    mesh = sparse.mesh_of(kind)
    with within(mesh, kind):
        carry = sparse.start(mesh)
        step = jax.jit(sparse.step, donate_argnums=(0, 1))
        compiled = step.lower(*carry, sparse.batches()[0]).compile()
    hlo = re.sub(r"/\*.*?\*/", "", compiled.as_text())
    kinds = (
        "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    )
    sent = re.findall(rf"= ([^=\n]*?) ({kinds})(?:-start)?\(", hlo)
    assert {operation for _, operation in sent} == {"all-reduce"}
    shapes = [
        (WIDTH[dtype], [int(n) for n in shape.split(",") if n])
        for types, _ in sent
        for dtype, shape in re.findall(r"(\w+)\[([^\]]*)\]", types)
    ]
    size = sum(width * math.prod(shape) for width, shape in shapes)
    # the rows of the table, its momentum and its average, and when they were touched
    rows = sparse.IDS * (3 * sparse.WIDTH + 3) * 4
    assert rows <= size <= 1.01 * rows
    memory = compiled.memory_analysis()
    shard = sparse.ROWS // 8 * sparse.WIDTH * 4
    assert memory.alias_size_in_bytes >= 3 * shard
    # what it needs beside is a few times the rows: nothing is as large as a whole table
    assert memory.temp_size_in_bytes < 3 * rows


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    command = [sys.executable, sparse.__file__, tmp_path]
    finish(together(command, os.environ | {"XLA_FLAGS": flags}), timeout=300)
    params, opt_state = alone()
    want = {"params": params, "average": emaopt.average(params, opt_state)}
    for i in range(2):
        found = dict(np.load(tmp_path / f"{i}.npz"))
        for name, tree in want.items():
            close({leaf: jnp.asarray(found[f"{name}/{leaf}"]) for leaf in tree}, tree)
