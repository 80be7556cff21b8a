"""What every client does: train, keep the average, save; resume bit for bit; evaluate alone.

A client is a program of its own, as somebody would write it. It gives `run` four things:

* `start()`: params and opt_state before training;
* `step(params, opt_state, t)`: both after update t; it may donate what it gets;
* `like()`: what a process that knows no optimizer has of the parameters, real or abstract;
* `evaluate(params)`: a number.
"""

import hashlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


SAVED, LAST = 3, 6


def digest(tree: Any) -> str:
    """Return a hash of all bits of a tree."""
    found = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        found.update(np.asarray(x).tobytes())
    return found.hexdigest()


def run(
    start: Callable[[], tuple[Any, Any]],
    step: Callable[[Any, Any, int], tuple[Any, Any]],
    like: Callable[[], Any],
    evaluate: Callable[[Any], Any],
) -> None:
    """Do what the command line says: `train DIR`, `resume DIR` or `evaluate DIR`."""
    command, directory = sys.argv[1:]
    if command == "evaluate":
        averaged = checkpoint.restore_averages(directory, like(), step=SAVED)
        print(f"evaluated {float(evaluate(averaged)):.9g}")
        return
    with ocp.training.Checkpointer(directory) as checkpointer:
        params, opt_state = start()
        first = 0
        if command == "resume":
            params, opt_state, rest = checkpoint.resume(
                checkpointer, params, opt_state, step=SAVED, epoch=0
            )
            first = SAVED
            assert rest == {"epoch": 7}, rest
        best = None
        for t in range(first, LAST):
            params, opt_state = step(params, opt_state, t)
            if command == "train" and t + 1 == SAVED:
                best = emaopt.average(params, opt_state)
                print(f"evaluated {float(evaluate(best)):.9g}")
                assert checkpoint.save(checkpointer, SAVED, params, opt_state, epoch=7)
        if best is not None:  # still there, though the next steps were donated
            print(f"kept {float(evaluate(best)):.9g}")
        print(f"state {digest((params, opt_state))}")
