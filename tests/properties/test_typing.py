"""`typed_user.py`, which pyright checks in strict mode, uses every public name, and runs."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import typed_user as user

import emaopt


HOUSE = Path(emaopt.__file__).parent
FILES = {path.parent.name: path for path in HOUSE.glob("*/__init__.py")} | {
    "emaopt": HOUSE / "__init__.py",
}
USED = {
    ast.unparse(node)
    for node in ast.walk(ast.parse(Path(user.__file__).read_text()))
    if isinstance(node, ast.Attribute)
}


def public(file):
    """What a module defines, and what it imports as itself."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name == alias.asname)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name


@pytest.mark.parametrize("room", sorted(FILES.keys() - {"convert"}))  # of the command line
def test_every_public_name_is_used_in_strict_mode(room):
    assert {f"{room}.{name}" for name in public(FILES[room])} <= USED


@pytest.mark.slow
@jax.disable_jit()
def test_what_is_written_in_strict_mode_runs():
    params = {"w": jnp.ones(3)}
    tx = optax.named_chain(("fast", emaopt.ema(0.5, ledger=True)), ("slow", emaopt.ema(0.5)))
    user.evaluate(params, tx.init(params))
    assert user.any_tree(params)["w"].tolist() == [1, 1, 1]
