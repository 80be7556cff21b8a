"""What must work where nothing but the wheel and what it needs is installed. From any other folder.

The README that the wheel carries runs; every room is there, or names its extra; so do the commands.
"""

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import emaopt


def command(*arguments):
    """Exit code, output and errors of `emaopt`."""
    run = subprocess.run(["emaopt", *arguments], capture_output=True, text=True, check=False)
    return run.returncode, run.stdout, run.stderr


assert Path(__file__).parents[1] not in Path(emaopt.__file__).parents, emaopt.__file__
readme = importlib.metadata.metadata("emaopt").get_payload()
examples = re.findall(r"```python\n(.*?)```", str(readme), re.DOTALL)
assert examples
for example in examples:
    exec(compile(example, "README.md", "exec"), {})

absent = {}
for room in pkgutil.iter_modules(emaopt.__path__):
    if not room.name.startswith("_"):
        try:
            importlib.import_module(f"emaopt.{room.name}")
        except ModuleNotFoundError as error:
            absent[room.name] = str(error)
assert not absent, absent

assert command("--version") == (0, f"emaopt {emaopt.__version__}\n", "")
assert command("--help")[0] == 0
for extra, arguments in {
    "demo": ["demo"],
    "tf1": ["ls", __file__],  # any file might be a checkpoint of TF1
    "posthoc": ["merge", "run"],
}.items():
    code, _, errors = command(*arguments)
    assert code, arguments
    assert f'pip install "emaopt[{extra}]"' in errors, errors
    assert errors.count("\n") == 1, errors

with tempfile.TemporaryDirectory() as run:
    import jax.numpy as jnp
    import optax
    from orbax.checkpoint import v1 as ocp

    from emaopt import checkpoint

    tx = optax.chain(emaopt.adam(), emaopt.ema(0.99))
    params = {"w": jnp.ones(3)}
    with ocp.training.Checkpointer(run) as checkpointer:
        checkpoint.save(checkpointer, 7, params, tx.init(params))
    code, listed, errors = command("ls", run)
    assert (code, errors) == (0, ""), errors
    assert "params: average" in listed, listed
    assert command("diff", run)[0] == 0
print(
    f"emaopt {emaopt.__version__} on Python {sys.version.split()[0]}:",
    f"{len(examples)} blocks of the README",
)
