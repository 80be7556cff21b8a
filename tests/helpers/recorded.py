"""The recorded averages of other libraries, and those that emaopt's presets make.

For the tests, and for `benchmarks/peers.py`.
"""

import json

import jax
import jax.numpy as jnp
import make_peers
import numpy as np

import emaopt
from emaopt import presets


RECORDED = json.loads(make_peers.FILE.read_text())
CASES = RECORDED["cases"]
DEFECTS = {case["name"]: case for case in RECORDED["defects"]}
VALUES = make_peers.values()
UPDATES = len(VALUES) - 1


def preset(case):
    return getattr(presets, case["name"])(**case["arguments"])


def averages(decay, values, dtype=jnp.float32):
    """What `ema` makes of parameters that an optimizer changes so, [updates, 2]."""
    tx = emaopt.ema(decay)

    def step(state, pair):
        old, new = pair
        _, state = tx.update(new - old, state, old)
        return state, state.shadow

    @jax.jit
    def run(values):
        return jax.lax.scan(step, tx.init(values[0]), (values[:-1], values[1:]))[1]

    return np.asarray(run(jnp.asarray(values, dtype)), np.float64)
