"""A training step on the rows of an embedding table, beside the whole table, PyTorch and TF1.

    python benchmarks/rows.py --torch TORCH_PYTHON --tf1 TF1_PYTHON
    NPROC=1 taskset -c 0 python benchmarks/rows.py --torch TORCH_PYTHON --tf1 TF1_PYTHON

A table of a million rows of 64, float32, of which a batch looks up 4,096 ids, drawn anew for each
step from a Zipf law. A step is the lookup, the loss, the gradient, the optimizer and, where it says
so, the average of the table, jitted and donated. *Dense* is the same chain on the whole table, with
the gradient that JAX makes of a lookup. TORCH_PYTHON has PyTorch: `Embedding(sparse=True)` with
`SparseAdam` and `Adagrad`, which have no average. TF1_PYTHON is a Python 3.7 with TensorFlow 1.15.5
(`tests/golden/make.py` says how to make one). Everything takes turns in one run, others in
processes of their own; the figures are medians over the rounds. The second command is for a machine
that others use too: on one core nothing waits for the other, as PyTorch's threads do there for tens
of milliseconds. Writes results/rows.json and rows.md.
"""

import argparse
import functools
import os
import tempfile
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import HERE, Worker, publish, seconds, table

import emaopt


ROWS, WIDTH, IDS, BATCHES, STEPS = 1_000_000, 64, 4096, 16, 20
RATE, DECAY = 0.01, 0.999
SIZE = 2560  # more than a batch has distinct ids
TABLES = emaopt.matching("table")
MOMENTUM = emaopt.momentum(RATE, 0.9)
OURS = "emaopt, momentum and average"
DENSE, LARGER = "emaopt, the same, dense", "emaopt, the same, table of 4 million rows"


def batches(rows: int, seed: int = 0) -> np.ndarray:
    """Ids of some batches: row k with a probability in proportion to 1 / (k + 1)."""
    weights = np.cumsum(1 / np.arange(1, rows + 1))
    draws = np.random.default_rng(seed).random((BATCHES, IDS)) * weights[-1]
    return np.searchsorted(weights, draws).astype(np.int32)


def loss(params, positions, y):
    return jnp.mean((params["table"][positions].sum(-1) - y) ** 2)


def sparsely(tx, size=None):
    def step(params, opt_state, ids, y):
        tables = {"table": emaopt.rows(ids, size)}
        small, small_state = emaopt.take((params, opt_state), tables)
        grads = jax.grad(loss)(small, tables["table"].positions, y)
        updates, small_state = tx.update(grads, small_state, small)
        small = optax.apply_updates(small, updates)
        return emaopt.put((params, opt_state), (small, small_state), tables)

    return step


def densely(tx):
    def step(params, opt_state, ids, y):
        grads = jax.grad(loss)(params, ids, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


class Run:
    """A donated step that is called again and again; a call is some steps, each waited for."""

    def __init__(self, make, rows: int, *links, steps: int = STEPS):
        tx = optax.chain(*links)
        params = {"table": jax.random.normal(jax.random.key(0), (rows, WIDTH))}
        self.carry = params, jax.jit(tx.init)(params)
        self.ids = [jnp.asarray(ids) for ids in batches(rows)]
        self.y = jnp.ones(IDS)
        lowered = jax.jit(make(tx), donate_argnums=(0, 1)).lower(*self.carry, self.ids[0], self.y)
        self.step, self.steps = lowered.compile(), steps
        memory = self.step.memory_analysis()
        self.temporary = memory.temp_size_in_bytes
        for _ in range(2):
            self()

    def __call__(self):
        """Make some steps, on one batch after the other."""
        for i in range(self.steps):
            self.carry = jax.block_until_ready(
                self.step(*self.carry, self.ids[i % BATCHES], self.y)
            )


def runs(options: argparse.Namespace, data: str) -> dict:
    average = emaopt.ema(DECAY, rows=TABLES)
    enough = functools.partial(sparsely, size=SIZE)
    calls = {
        OURS: Run(sparsely, ROWS, MOMENTUM, average),
        LARGER: Run(sparsely, 4 * ROWS, MOMENTUM, average),
        DENSE: Run(densely, ROWS, MOMENTUM, emaopt.ema(DECAY), steps=1),
        "emaopt, momentum": Run(sparsely, ROWS, MOMENTUM),
        "emaopt, Adagrad": Run(sparsely, ROWS, emaopt.adagrad(RATE)),
        "emaopt, Adam": Run(sparsely, ROWS, emaopt.adam(RATE)),
        f"emaopt, Adagrad, size={SIZE:,}": Run(enough, ROWS, emaopt.adagrad(RATE)),
        f"emaopt, Adam, size={SIZE:,}": Run(enough, ROWS, emaopt.adam(RATE)),
    }
    shared = {
        "shape": [ROWS, WIDTH],
        "data": data,
        "rate": RATE,
        "threads": len(os.sched_getaffinity(0)),
    }
    if options.torch:
        for kind in ("Adagrad", "SparseAdam"):
            settings = shared | {"optimizer": kind, "steps": STEPS}
            script = str(HERE / "rows_torch.py")
            calls[f"PyTorch, {kind}"] = Worker(options.torch, script, **settings)
    if options.tf1:
        for kind in ("Momentum", "Adagrad", "LazyAdam"):
            settings = shared | {"optimizer": kind, "steps": STEPS, "average": False}
            command = options.tf1, "-W", "ignore", str(HERE / "rows_tf1.py")
            calls[f"TensorFlow 1.15, {kind}"] = Worker(*command, **settings)
        settings = shared | {"optimizer": "Momentum", "steps": 1, "average": True}
        calls["TensorFlow 1.15, Momentum and average"] = Worker(*command, **settings)
    return calls


def measure(calls: dict, rounds: int) -> dict[str, np.ndarray]:
    """The seconds that a step took in each round, in an order that changes."""
    found = {name: np.empty(rounds) for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            call = calls[name]
            found[name][i] = seconds(call) / (call.steps if isinstance(call, Run) else 1)
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--torch", help="a Python with PyTorch")
    parser.add_argument("--tf1", help="a Python 3.7 with TensorFlow 1.15.5")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "batches.npz")
        np.savez(data, ids=batches(ROWS), y=np.ones(IDS, np.float32))
        calls = runs(options, data)
    found = measure(calls, options.rounds)
    temporary = {name: call.temporary for name, call in calls.items() if isinstance(call, Run)}
    for call in calls.values():
        if isinstance(call, Worker):
            call.close()
    ours = found[OURS]
    rows = [
        (
            name,
            f"{1000 * np.median(times):.3g}",
            f"{np.median(times / ours):.3g}",
            f"{temporary[name] / 2**20:.1f}" if name in temporary else "",
        )
        for name, times in found.items()
    ]
    versions = [f"jax {jax.__version__}"]
    versions += [
        f"{k} {v}" for c in calls.values() if isinstance(c, Worker) for k, v in c.report.items()
    ]
    cores = len(os.sched_getaffinity(0))
    distinct = np.mean([len(np.unique(ids)) for ids in batches(ROWS)])
    lines = [
        f"`python benchmarks/rows.py`: a table of {ROWS:,} rows of {WIDTH}, "
        f"{ROWS * WIDTH * 4 >> 20} MiB; "
        f"{IDS:,} ids in a batch, {distinct:,.0f} of them distinct; "
        f"{cores} core{'s' * (cores > 1)}, {options.rounds} rounds; "
        f"{', '.join(dict.fromkeys(versions))}.",
        "",
        *table(("a step", "ms", "/ the first", "temporary memory, MiB"), rows),
    ]
    results = {name: {"ms": 1000 * float(np.median(t))} for name, t in found.items()}
    publish("rows", "A step on the rows of an embedding table", lines, results)


if __name__ == "__main__":
    main()
