"""A run that several files read."""

import shutil

import jax.numpy as jnp
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Steps 1, 2, 3, whose averages are 1., 2., 3."""
    tx = optax.chain(optax.sgd(0.1), emaopt.ema(0.5))
    run = tmp_path_factory.mktemp("saved") / "run"
    with ocp.training.Checkpointer(run) as checkpointer:
        for step in (1, 2, 3):
            params = {"w": jnp.full(3, float(step))}
            checkpoint.save(checkpointer, step, params, tx.init(params))
    return run


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"
