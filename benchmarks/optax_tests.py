"""Optax's own generic tests, over emaopt's transformations.

    python benchmarks/optax_tests.py

Optax installs its tests beside its code. Those that are written for every optimizer
(`alias_test.py`: optimization, extra arguments, injected hyper-parameters, dtypes, stability of the
state, gradient accumulation; `sharding_test.py`: abstract parameters, shardings) are run here with
emaopt's optimizers, averages and clippings in place of Optax's. The files are read from the
installed package and changed in a temporary directory: the tables of optimizers, and a comparison
of versions as text, which skips tests under jax 0.10. Needs scikit-learn. Writes optax_tests.md.
Some minutes.
"""

import argparse
import collections
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import optax
from timing import publish, table

import emaopt


# What a test calls, with arguments that reach the minimum of Rosenbrock's function in 10,000 steps.
# Plain gradient descent does not in complex numbers, at any rate; nor does optax.sgd.
OPTIMIZERS = {
    "gradient_descent": {"learning_rate": 1e-3},
    "momentum": {"learning_rate": 1e-3, "momentum": 0.9},
    "nesterov": {"learning_rate": 3e-4, "momentum": 0.9},
    "adagrad": {"learning_rate": 1.0},
    "adadelta": {"learning_rate": 1.2},
    "adam": {"learning_rate": 0.1},
    "ftrl": {"learning_rate": 1.0},
    "rmsprop": {"learning_rate": 5e-3},
    "rmsprop_centered": {"learning_rate": 5e-3},
    "averaged": {"learning_rate": 0.1},
    "compensated": {"learning_rate": 0.1},
    "healed": {"learning_rate": 1e-3},
    "clipped": {"learning_rate": 1e-3},
}
# A test that complex parameters fail is right where emaopt refuses them, and says what to do.
REFUSED = "split_real_and_imaginary"


def nesterov(learning_rate, momentum):
    """Momentum that looks ahead."""
    return emaopt.momentum(learning_rate, momentum, use_nesterov=True)


def rmsprop_centered(learning_rate):
    """Centered RMSProp with momentum."""
    return emaopt.rmsprop(learning_rate, momentum=0.9, centered=True)


def averaged(learning_rate):
    """Adam with an average that ramps up."""
    return optax.chain(emaopt.adam(learning_rate), emaopt.ema(emaopt.warmup(0.99)))


def compensated(learning_rate):
    """Adam with a compensated average."""
    rounding = emaopt.compensated("bfloat16")
    return optax.chain(emaopt.adam(learning_rate), emaopt.ema(0.99, accumulator_dtype=rounding))


def healed(learning_rate):
    """Momentum with an average that bad values do not poison."""
    return optax.chain(emaopt.momentum(learning_rate, 0.9), emaopt.heal(emaopt.ema(0.99)))


def clipped(learning_rate):
    """Momentum of clipped gradients; the bound is never reached near the minimum."""
    clips = (emaopt.clip_by_value(-1e4, 1e4), emaopt.clip_by_norm(1e4))
    bound = emaopt.clip_by_global_norm(1e4)
    return optax.chain(*clips, bound, emaopt.momentum(learning_rate, 0.9))


def __getattr__(name: str):
    return getattr(emaopt, name)


def with_our_optimizers(name: str, table_name: str, before: str, of: str) -> str:
    """Return a test file of Optax in which a table of optimizers is followed by ours."""
    spec = importlib.util.find_spec("optax")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("Optax is not installed.")
    path = Path(spec.submodule_search_locations[0], "_src", name)
    if not path.exists():
        raise SystemExit(f"{path} is missing: this release of Optax has no tests in its wheel.")
    text = path.read_text()
    if text.count(before) != 1:
        raise SystemExit(f"{path} has another form than that of Optax 0.2.8.")
    ours = f"import optax_tests as alias\n\n{table_name} = {of}\n\n"
    # "0.10" is no version before "0.7.2"; compared as text, Optax's tests of shardings are skipped
    return text.replace(before, ours + before).replace("jax.__version__ <", "'9' <")


def outcomes(report: Path) -> list[tuple[str, str, str]]:
    """Return test, outcome and message of every case that pytest reported."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        inner = next((x for x in case if x.tag in ("failure", "error", "skipped")), None)
        text = "" if inner is None else (inner.get("message") or "") + (inner.text or "")
        outcome = "passed" if inner is None else inner.tag
        if outcome in ("failure", "error"):
            outcome = "refused" if REFUSED in text else "failed"
        found.append((case.get("name") or "", outcome, text))
    return found


def run(only: str) -> list[tuple[str, str, str]]:
    """Run the changed files in a process of their own, and return what came of each test."""
    aliases = "tuple({'opt_name': k, 'opt_kwargs': v} for k, v in alias.OPTIMIZERS.items())"
    sharded = "{k: getattr(alias, k)(**v) for k, v in alias.OPTIMIZERS.items()}"
    files = {
        "test_alias.py": ("alias_test.py", "_OPTIMIZERS_UNDER_TEST", "def _get_opt(", aliases),
        "test_sharding.py": ("sharding_test.py", "OPTIMIZERS", "class ShardingTest(", sharded),
    }
    with tempfile.TemporaryDirectory() as there:
        for file, arguments in files.items():
            Path(there, file).write_text(with_our_optimizers(*arguments))
        report = Path(there, "report.xml")
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        flags = "--xla_force_host_platform_device_count=8"
        environment = {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": flags}
        ours = f"(AliasTest or ShardingTest) and not explicit_dtype and not microbatch{only}"
        options = ["-q", "-k", ours]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", there]
        subprocess.run(command, cwd=there, env=os.environ | environment, check=False)
        return outcomes(report)


def kind_of(test: str) -> str:
    """Return the name of a test without the number or the optimizer at its end."""
    kind = test.rstrip("0123456789")
    for name in sorted(OPTIMIZERS, key=len, reverse=True):
        kind = kind.removesuffix(f"_{name}")
    return kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a further expression for pytest -k")
    only = parser.parse_args().only
    found = run(f" and ({only})" if only else "")
    kinds: dict[str, collections.Counter] = {}
    for name, outcome, _ in found:
        kinds.setdefault(kind_of(name), collections.Counter())[outcome] += 1
    columns = ["passed", "refused", "skipped", "failed"]
    total = sum(kinds.values(), collections.Counter())
    lines = [
        f"`python benchmarks/optax_tests.py{f' --only {only!r}' if only else ''}`: "
        f"Optax {optax.__version__}, jax {jax.__version__}, {jax.default_backend()}; "
        f"{len(OPTIMIZERS)} transformations: {', '.join(OPTIMIZERS)}.",
        "",
        *table(
            ["test", *columns],
            ([kind, *(str(n[column]) for column in columns)] for kind, n in kinds.items()),
        ),
        "",
        f"{total['passed']} of {len(found)} pass. Refused: complex parameters, by optimizers that "
        "say so. Skipped: by Optax, by the names of its own optimizers.",
        *(
            f"* failed: {name}: {text[:300]!r}"
            for name, outcome, text in found
            if outcome == "failed"
        ),
    ]
    publish("optax_tests", "Optax's own tests", lines)


if __name__ == "__main__":
    main()
