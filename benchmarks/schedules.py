"""Train without a schedule: averages at a constant rate against decays tuned for each length.

    python benchmarks/schedules.py run             # pieces, resumable; about two hours of one core
    python benchmarks/schedules.py run digits-adam # the pieces of one setting and optimizer
    python benchmarks/schedules.py report          # reads the test set: results/schedules.json
    python benchmarks/schedules_report.py          # writes results/schedules.md

The plan was written before the first number: `results/schedules_plan.md`. Needs scikit-learn, and
Debian's package `dataset-fashion-mnist`.
"""

import argparse
import functools
import json
import os
import tempfile
import time
from pathlib import Path


os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import schedules_tasks as tasks
from helpers import RESULTS
from jax.flatten_util import ravel_pytree

import emaopt


WORK = Path(tempfile.gettempdir()) / "emaopt-schedules"
BLOCK = 40  # steps from one look at the next batch to the next
STRIDE = 5  # steps from one update of the averages in the bank to the next
KINDS = ("constant", "linear", "cosine", "wsd", "warm")
WIDTHS = (0.03, 0.05, 0.08, 0.10, 0.125, 0.15, 0.20, 0.25)
BANK = {f"width {s}": emaopt.power(emaopt.posthoc.gamma(s)) for s in WIDTHS} | {
    "power(0)": emaopt.power(0),
    "warmup(0.9999)": emaopt.warmup(0.9999),
    "half-life 5 %": emaopt.presets.torchtitan(),
    "0.99": 0.99,
    "0.999": 0.999,
}
CANDIDATES = ("none", "0.99", "0.999", "width 0.05", "width 0.1", "width 0.2")
DEFAULT = "width 0.1"
muon = optax.contrib.muon
OPTIMIZERS = {
    "adam": optax.adam,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "muon": muon,
}
BARE = {
    "adam": functools.partial(optax.adam, b1=0),
    "momentum": optax.sgd,
    "muon": functools.partial(muon, beta=0.0, nesterov=False, adam_b1=0.0),
}
PRIMAL = {"power(0)": emaopt.power(0), "ema()": BANK[DEFAULT], "0.99": 0.99}
WITH_MOMENTUM = ", with momentum"
# The rate that a search begins with, as the exponent of 2 in 0.001 * 2**k.
GUESS = {"adam": 1, "momentum": 6, "muon": 3}
GUESS_PRIMAL = {"adam": 2, "momentum": 9, "muon": 4}
SETTINGS = {
    "digits": (tasks.digits, ("adam", "momentum", "muon")),
    "fashion": (tasks.one_pass, ("adam", "momentum")),
    "fine-tuning": (None, ("adam",)),
    "rows": (tasks.rows, ("adam", "muon")),
    "epochs": (tasks.epochs, ("momentum", "adam")),
}


def factor(t, kind, horizon, warm):
    """The rate at a step (0, 1, ...) as a share of the highest."""
    share = t / horizon
    of_kinds = (
        jnp.ones_like(share),
        1 - share,
        (1 + jnp.cos(jnp.pi * share)) / 2,
        jnp.minimum(1, (1 - share) / 0.2),
        jnp.minimum(1, (t + 1) / (0.05 * horizon)) * (1 - share),
    )
    return jnp.stack(of_kinds)[kind] * jnp.minimum(1, (t + 1) / warm)


def loss(task, params, images, labels, statistics=None):
    """The cross entropy, and the share that is read wrong."""
    logits, _ = task.network(params, images / jnp.float32(255), statistics)
    wrong = jnp.mean(jnp.argmax(logits, -1) != labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), wrong


class Trainer:
    """The compiled programs of one task, one optimizer and one method, for all seeds at once."""

    def __init__(self, task, make_tx, bank=()):
        self.task, self.make_tx = task, make_tx
        self.bank = {name: emaopt.moving_average(BANK[name]) for name in bank}
        self.seeds, self.steps = task.order.shape[:2]
        self.lengths = [self.steps // 8 * n for n in (1, 2, 4, 8)]
        self.keys = jax.vmap(jax.random.key)(jnp.arange(self.seeds) + 77)
        lanes = (0, 0, 0, None, None, None, None, None, None, None)
        self.program = jax.jit(jax.vmap(self._lane, lanes))

    def start(self):
        """What a run carries from step to step, with one row per seed."""
        return jax.jit(jax.vmap(self._start))(self.task.start)

    def _start(self, params):
        tx = self.make_tx(lambda t: 0.0 * t)
        looks = jnp.zeros((self.steps // BLOCK, len(CANDIDATES)))
        averages = {name: mean.init(params) for name, mean in self.bank.items()}
        return params, tx.init(params), averages, looks

    def advance(self, carry, begin, end, rate, kind="constant", horizon=None):
        """Train from a step to a step, both multiples of `BLOCK`."""
        where = (begin, end, jnp.float32(rate), KINDS.index(kind), horizon or end)
        return self.program(
            carry, self.task.order, self.keys, *where, self.task.images, self.task.labels
        )

    def _lane(self, carry, order, key, begin, end, rate, kind, horizon, images, labels):
        shift = self.task.shift
        tx = self.make_tx(lambda t: rate * factor(t, kind, horizon, self.task.warm))
        size = images.shape[1] - 2 * shift

        def batch(t):
            rows = order[t]
            if not shift:
                return images[rows], labels[rows]
            corners = jax.random.randint(
                jax.random.fold_in(key, t), (len(rows), 2), 0, 2 * shift + 1
            )
            cut = lambda row, corner: jax.lax.dynamic_slice(images, (row, *corner), (1, size, size))
            return jax.vmap(cut)(rows, corners)[:, 0], labels[rows]

        def step(t, carry):
            params, state = carry
            grads = jax.grad(lambda p: loss(self.task, p, *batch(t))[0])(params)
            return emaopt.apply_gradients(tx, grads, params, state)

        def stride(i, carry):
            params, state, averages, looks = carry
            now = i * STRIDE
            params, state = jax.lax.fori_loop(now, now + STRIDE, step, (params, state))
            averages = {
                name: mean.update(params, averages[name], advance=STRIDE)
                for name, mean in self.bank.items()
            }
            return params, state, averages, looks

        def block(i, carry):
            if self.bank:
                looks = carry[3].at[i].set(self._look(carry, batch(i * BLOCK)))
                carry = *carry[:3], looks
            per = BLOCK // STRIDE
            return jax.lax.fori_loop(i * per, (i + 1) * per, stride, carry)

        return jax.lax.fori_loop(begin // BLOCK, end // BLOCK, block, carry)

    def _look(self, carry, batch):
        """The losses of the candidates on the batch that is trained on next."""
        trees = {"none": carry[0]} | {name: s.shadow for name, s in carry[2].items()}
        return jnp.stack([loss(self.task, trees[name], *batch)[0] for name in CANDIDATES])

    @functools.cached_property
    def _read(self):
        task, images, labels = self.task, self.task.images, self.task.labels
        border = slice(task.shift, -task.shift or None)

        def of_seed(params, rows, calibration, images, labels):
            _, statistics = task.network(params, images[calibration, border, border] / 255.0)

            def part(rows):
                return loss(task, params, images[rows, border, border], labels[rows], statistics)

            # in parts that fit into a cache
            size = 500 if len(rows) % 500 == 0 else len(rows)
            parts = jax.lax.map(part, rows.reshape(-1, size))
            return jax.tree.map(jnp.mean, parts)

        program = jax.jit(jax.vmap(of_seed, (0, 0, 0, None, None)))
        return lambda params, rows: program(params, rows, task.calibration, images, labels)

    def evaluate(self, params, part):
        """The loss and the share read wrong, [2, seeds], on "validation" or "test"."""
        return np.stack(self._read(params, getattr(self.task, part)))

    @functools.cached_property
    def flat(self):
        """A function that makes one array [seeds, parameters] of a tree."""
        return jax.jit(jax.vmap(lambda params: ravel_pytree(params)[0]))

    def whole(self, arrays):
        """The tree of such an array."""
        first = jax.tree.map(lambda x: x[0], self.task.start)
        return jax.vmap(ravel_pytree(first)[1])(arrays)


def primal_of(optimizer, which):
    decay = PRIMAL[which.removesuffix(WITH_MOMENTUM)]
    base = (OPTIMIZERS if which.endswith(WITH_MOMENTUM) else BARE)[optimizer]
    return lambda rate: emaopt.primal(base(rate), emaopt.ema(decay))


def schedule_free_of(optimizer):
    return lambda rate: optax.contrib.schedule_free(BARE[optimizer](rate), rate)


class Setting:
    """One task and one optimizer: its pieces, and the choices made of them."""

    def __init__(self, name, optimizer, work):
        self.name, self.optimizer, self.work = name, optimizer, work
        make = SETTINGS[name][0]
        self.task = make() if make else tasks.fine_tuning(pretrained(work))
        self.plain = Trainer(self.task, OPTIMIZERS[optimizer])
        self.lengths = self.plain.lengths
        self.banked = Trainer(self.task, OPTIMIZERS[optimizer], tuple(BANK))
        self.others = {}

    def piece(self, method, k, compute):
        """What a run found, computed or read: {name: array}, the losses as `name/val`."""
        path = self.work / f"{self.name}-{self.optimizer}-{method}-{k}.npz"
        if not path.exists():
            began = time.perf_counter()
            found = compute(0.001 * 2.0**k)
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **found)
            partial.rename(path)
            print(f"{path.stem}: {time.perf_counter() - began:.0f} s", flush=True)
        return np.load(path)

    def test(self, path, key):
        """Test loss and share read wrong, [2, seeds], of what a piece holds; kept on disk."""
        file = path.with_name(f"{path.stem}-{key.replace('/', '-')}.test.npy")
        if not file.exists():
            params = self.plain.whole(np.load(path)[f"{key}/params"])
            np.save(file, self.plain.evaluate(params, "test"))
        return np.load(file)

    def _found(self, trainer, trees):
        found = {}
        for name, params in trees.items():
            found[f"{name}/params"] = np.asarray(trainer.flat(params))
            found[f"{name}/val"] = trainer.evaluate(params, "validation")
        return found

    def scheduled(self, kind, length, k, bare=False):
        """A run whose rate goes to zero at a length."""
        trainer = self.other("bare", BARE[self.optimizer]) if bare else self.plain

        def compute(rate):
            carry = trainer.advance(trainer.start(), 0, length, rate, kind)
            return self._found(trainer, {f"{length}": carry[0]})

        return self.piece(f"{kind}{', bare' * bare}-{length}", k, compute)

    def constant(self, k):
        """A run at a constant rate with all averages, and WSD's decays from it."""
        trainer = self.banked

        def compute(rate):
            carry, now, trees = trainer.start(), 0, {}
            for length in self.lengths:
                fall = length // 5 * 4
                carry = trainer.advance(carry, now, fall, rate)
                falling = (*carry[:2], {}, carry[3])
                falling = self.plain.advance(falling, fall, length, rate, "wsd")
                carry, now = trainer.advance(carry, fall, length, rate), length
                trees[f"wsd/{length}"] = falling[0]
                trees[f"none/{length}"] = carry[0]
                trees |= {f"{name}/{length}": s.shadow for name, s in carry[2].items()}
            return self._found(trainer, trees) | {"looks": np.asarray(carry[3])}

        return self.piece("constant", k, compute)

    def other(self, name, make_tx):
        """A trainer that is made once."""
        if name not in self.others:
            self.others[name] = Trainer(self.task, make_tx)
        return self.others[name]

    def free(self, name, make_tx, k, read):
        """A run whose average is what is evaluated, at all lengths."""
        trainer = self.other(name, make_tx)
        evaluated = jax.jit(jax.vmap(read))

        def compute(rate):
            carry, now, trees = trainer.start(), 0, {}
            for length in self.lengths:
                carry, now = trainer.advance(carry, now, length, rate), length
                trees[f"{length}"] = evaluated(*carry[:2])
            return self._found(trainer, trees)

        return self.piece(name, k, compute)

    def primal(self, which, k):
        """A run of `primal` around the optimizer, without momentum if nothing else is said."""
        make_tx = primal_of(self.optimizer, which)
        return self.free(f"primal {which}", make_tx, k, emaopt.average)

    def schedule_free(self, k):
        """A run of Optax's `schedule_free` around the optimizer without momentum."""
        read = lambda params, state: optax.contrib.schedule_free_eval_params(state, params)
        return self.free("schedule_free", schedule_free_of(self.optimizer), k, read)

    def search_scheduled(self, kind, bare=False):
        """The best exponent for each length, and whether it lies inside of the grid."""
        chosen, guess = {}, GUESS[self.optimizer]
        for length in self.lengths[::-1]:
            measure = lambda k, n=length: mean_losses(self.scheduled(kind, n, k, bare), [f"{n}"])
            chosen[length] = guess, _ = search(measure, guess, lambda table: table[:, 0, None])
        return chosen

    def search_constant(self):
        """The best exponent for each average, and for WSD at each length."""
        names = ["none", *BANK]
        keys = [f"{name}/{n}" for name in [*names, "wsd"] for n in self.lengths]

        def criteria(table):
            table = table.reshape(len(table), -1, len(self.lengths))
            one_rate = relative(table[:, :-1])
            return np.concatenate([one_rate, table[:, -1]], 1)

        measure = lambda k: mean_losses(self.constant(k), keys)
        found = search(measure, GUESS[self.optimizer], criteria, each=True)
        return dict(zip([*names, *(f"wsd/{n}" for n in self.lengths)], found, strict=True))

    def search_primal(self, which):
        """The best exponent of a method with one rate for all lengths."""
        keys = [f"{n}" for n in self.lengths]
        measure = lambda k: mean_losses(self.primal(which, k), keys)
        guess = (GUESS if which.endswith(WITH_MOMENTUM) else GUESS_PRIMAL)[self.optimizer]
        return search(measure, guess, lambda t: relative(t[:, None]))


def mean_losses(found, keys):
    """The validation losses in the mean over seeds; infinite where a run diverged."""
    means = np.array([found[f"{key}/val"][0].mean() for key in keys], float)
    return np.where(np.isfinite(means), means, np.inf)


def relative(table):
    """Of [rates, averages, lengths]: the loss over the least of the length, in the mean."""
    return (table / table.min((0, 1))).mean(-1)


def search(measure, guess, criteria, each=False, most=9):
    """Widen a grid until the best exponents are inside: `(exponent, is inside)`, or a list."""
    tried = {k: measure(k) for k in (guess - 1, guess, guess + 1)}
    while True:
        grid = sorted(tried)
        best = criteria(np.stack([tried[k] for k in grid])).argmin(0)
        low, high = (best == 0).any(), (best == len(grid) - 1).any()
        if len(grid) >= most or not (low or high):
            break
        new = grid[0] - 1 if low else grid[-1] + 1
        tried[new] = measure(new)
    found = [(grid[i], bool(0 < i < len(grid) - 1)) for i in best]
    return found if each else found[0]


def pretrained(work):
    """The averages of fashion's network after its pass, at the rate that suits `ema()` best."""
    setting = Setting("fashion", "adam", work)
    k, _ = setting.search_constant()[DEFAULT]
    found = setting.constant(k)
    return setting.plain.whole(found[f"{DEFAULT}/{setting.lengths[-1]}/params"])


def methods_of(name, optimizer):
    """The methods of a setting, in the order in which they are run."""
    methods = ["constant", "primal power(0)", "linear"]
    if name in ("digits", "fashion"):
        methods += ["schedule_free", "primal ema()", "primal 0.99", "cosine", "warm"]
    if name == "digits":
        methods += [f"primal {which}{WITH_MOMENTUM}" for which in ("power(0)", "ema()")]
    if (name, optimizer) == ("fashion", "adam"):
        methods.append("linear, bare")
    return methods


def choices(setting):
    """The pieces that were chosen: {method: [(exponent, is inside, piece, key) per length]}."""
    chosen = {}
    for method in methods_of(setting.name, setting.optimizer):
        if method == "constant":
            for name, found in setting.search_constant().items():
                method, _, length = name.partition("/")
                at = [int(length)] if length else setting.lengths
                keys = [(*found, setting.constant(found[0]), f"{method}/{n}") for n in at]
                chosen[method] = chosen.get(method, []) + keys
        elif method.startswith("primal"):
            which = method.removeprefix("primal ")
            found = setting.search_primal(which)
            piece = setting.primal(which, found[0])
            chosen[method] = [(*found, piece, f"{n}") for n in setting.lengths]
        elif method == "schedule_free":
            k, inside, _, _ = chosen["primal power(0)"][0]
            piece = setting.schedule_free(k)
            chosen[method] = [(k, inside, piece, f"{n}") for n in setting.lengths]
        else:
            kind, bare = method.removesuffix(", bare"), method.endswith("bare")
            found = setting.search_scheduled(kind, bare)
            chosen[method] = [
                (*found[n], setting.scheduled(kind, n, found[n][0], bare), f"{n}")
                for n in setting.lengths
            ]
    return chosen


def run(name, optimizer, work):
    """Make all pieces of a setting and an optimizer."""
    choices(Setting(name, optimizer, work))
    (work / f"{name}-{optimizer}.done").touch()


def rounded(array):
    return np.round(np.asarray(array, float), 5).tolist()


def read_test(name, optimizer, work):
    """Read the test set, for what was chosen: all numbers that the results are made of."""
    setting = Setting(name, optimizer, work)
    lengths = setting.lengths

    def test(piece, key):
        return setting.test(Path(piece.fid.name), key)

    methods = {}
    for method, found in choices(setting).items():
        ks, inside, pieces, keys = zip(*found, strict=True)
        values = [test(piece, key) for piece, key in zip(pieces, keys, strict=True)]
        methods[method] = {
            "rate": [0.001 * 2.0**k for k in ks],
            "inside": list(inside),
            "test": rounded([loss for loss, _ in values]),
            "wrong": rounded([wrong for _, wrong in values]),
        }
    averages = ["none", *BANK]
    best, _ = setting.search_constant()[DEFAULT]
    around, choice = {}, {}
    for k in (best - 1, best, best + 1):
        piece = setting.constant(k)
        found = [[test(piece, f"{average}/{n}")[0] for average in averages] for n in lengths]
        around[k] = np.array(found)  # [lengths, averages, seeds]
        choice[k] = {rule: chosen_by(piece["looks"], lengths, w) for rule, w in RULES.items()}
    foretold = []
    for path in sorted(work.glob(f"{name}-{optimizer}-constant-*.npz")):
        piece = np.load(path)
        for n in lengths:
            row = [mean_losses(piece, [f"{m}/{n}"])[0] for m in ("wsd", DEFAULT, "none")]
            foretold.append([int(path.stem.rpartition("constant-")[2]), n, *rounded(row)])
    return {
        "lengths": lengths,
        "seeds": setting.plain.seeds,
        "methods": methods,
        "averages": averages,
        "around": {f"{0.001 * 2.0**k:g}": rounded(found) for k, found in around.items()},
        "chosen": {f"{0.001 * 2.0**k:g}": rules for k, rules in choice.items()},
        "foretold": foretold,
    }


RULES = {"last tenth": 0.10, "last fifth": 0.20}


def chosen_by(looks, lengths, width):
    """Which candidate has the least running mean at each length: [lengths][seeds]."""
    means = emaopt.moving_average(emaopt.power(emaopt.posthoc.gamma(width)))
    state = means.init(jnp.asarray(looks[:, 0]))
    update, found = jax.jit(means.update), {}
    for i in range(looks.shape[1]):
        state = update(jnp.asarray(looks[:, i]), state)
        found[(i + 1) * BLOCK] = jnp.nan_to_num(state.shadow, nan=jnp.inf).argmin(-1).tolist()
    return [found[n] for n in lengths]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("which", nargs="*", help="such as digits-adam; all of them by default")
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pairs = [(name, o) for name, (_, optimizers) in SETTINGS.items() for o in optimizers]
    if args.which:
        pairs = [pair for pair in pairs if "-".join(pair) in args.which]
    if args.command == "run":
        for name, optimizer in pairs:
            run(name, optimizer, args.work)
        return
    file = RESULTS / "schedules.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for name, optimizer in pairs:
        if (args.work / f"{name}-{optimizer}.done").exists():
            found[f"{name}-{optimizer}"] = read_test(name, optimizer, args.work)
            file.write_text(json.dumps({key: found[key] for key in sorted(found)}) + "\n")


if __name__ == "__main__":
    main()
