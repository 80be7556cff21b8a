"""The house: who imports whom, what is loaded when, and what every public name has."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import emaopt


HOUSE = Path(emaopt.__file__).parent
FILES = {str(path.relative_to(HOUSE)): path for path in sorted(HOUSE.rglob("*.py"))}
CORE = {
    "_tree",
    "_rounding",
    "_ledger",
    "_schedules",
    "_packing",
    "_clip",
    "_rule",
    "_optimizers",
    "_ema",
    "_averages",
    "_healing",
    "_feedback",
    "_statistics",
    "_training",
    "_names",
}
LIGHT = {"jax", "numpy", "optax"}
# room: what it may import from this package, and from others; the rooms of a folder are one
ROOMS = {
    "_tree": (set(), LIGHT),
    "_schedules": ({"_tree"}, LIGHT),
    "_packing": ({"_tree"}, LIGHT),
    "_clip": ({"_tree", "_packing"}, LIGHT),
    "_rule": ({"_tree", "_schedules"}, LIGHT),
    "_optimizers": ({"_tree", "_rule"}, LIGHT),
    "_rounding": (set(), LIGHT),
    "_ledger": ({"_rounding"}, LIGHT),
    "_ema": ({"_tree", "_schedules", "_rounding", "_ledger"}, LIGHT),
    "_averages": ({"_tree", "_ema"}, LIGHT),
    "_healing": ({"_tree", "_ema"}, LIGHT),
    "_feedback": ({"_tree", "_averages"}, LIGHT),
    "_statistics": ({"_tree", "_schedules", "_ema"}, LIGHT),
    "_training": ({"_tree"}, LIGHT),
    "_names": ({"_tree", "_ema", "_rule", "_packing"}, LIGHT),
    "checkpoint": (
        {"_tree", "_ema", "_averages", "_names"},
        LIGHT | {"orbax", "etils", "safetensors"},
    ),
    "posthoc": ({"_tree", "_schedules"}, {"jax", "numpy"}),
    "presets": ({"_tree", "_schedules", "posthoc"}, {"jax"}),
    "tf1": ({"_tree", "_names", "_ema", "_averages"}, LIGHT | {"tensorflow"}),
    "summary": (
        {"_tree", "_schedules", "_clip", "_rule", "_averages", "_names"},
        LIGHT | {"tensorboardX"},
    ),
    "demo": ({"", "checkpoint"}, LIGHT | {"flax", "matplotlib", "orbax", "sklearn", "tqdm"}),
    "listing": ({"_tree", "_names", "checkpoint", "tf1"}, LIGHT | {"etils"}),
    "convert": (
        {"_tree", "_names", "_ema", "_rule", "checkpoint", "tf1", "listing"},
        LIGHT | {"etils", "orbax", "tqdm"},
    ),
    "synthesize": (
        {"_tree", "_schedules", "checkpoint", "posthoc", "listing"},
        LIGHT | {"etils", "orbax", "tqdm", "matplotlib"},
    ),
    "diff": (
        {"_tree", "_names", "checkpoint", "listing", "convert", "tf1"},
        {"numpy", "etils"},
    ),
    "__main__": ({"", "demo", "listing", "convert", "synthesize", "diff"}, set()),
    "__init__": (CORE, set()),
}
# jax loads etils itself
HEAVY = set.union(*(packages for _, packages in ROOMS.values())) - LIGHT - {"etils"}


def room_of(file):
    return Path(file).parts[0].removesuffix(".py")


def imports(file):
    """The modules that a file imports, in full; "emaopt" itself for the public package."""
    package = ["emaopt", *Path(file).parts[:-1]]
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join([*above, module]) for module in modules)


@pytest.mark.parametrize("file", FILES)
def test_a_room_imports_only_what_it_may(file):
    room = room_of(file)
    ours, others = set(), set()
    for first, *rest in (module.split(".") for module in imports(file)):
        if first == "emaopt":
            ours.add(rest[0] if rest else "")
        elif first not in sys.stdlib_module_names:
            others.add(first)
    allowed, packages = ROOMS[room]
    assert ours - {room} <= allowed
    assert others <= packages


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_short_enough_to_read(file):
    lines = FILES[file].read_text().count("\n")
    assert lines <= 350


def test_importing_the_package_loads_no_room():
    code = "import sys, emaopt; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {module.split(".")[0] for module in run.stdout.split()}
    assert not loaded & HEAVY


PUBLIC = {name: value for name, value in vars(emaopt).items() if not name.startswith("_")}
EXPORTED = {
    alias.name
    for node in ast.parse(FILES["__init__.py"].read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.name == alias.asname
}


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_a_public_name_has_a_docstring_with_an_example(name):
    value = PUBLIC[name]
    assert value.__doc__
    record = isinstance(value, type) and issubclass(value, tuple)
    assert record or ">>>" in value.__doc__


def test_names_are_listed_once():
    modules = {"importlib"} | {room for room in CORE | set(ROOMS) if room in PUBLIC}
    assert set(PUBLIC) - modules == EXPORTED
    assert not [file for file, path in FILES.items() if "__all__" in path.read_text()]


@pytest.mark.parametrize("file", FILES)
def test_a_public_definition_has_a_docstring(file):
    for node in ast.parse(FILES[file].read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            overload = "overload" in map(ast.unparse, node.decorator_list)
            assert overload or ast.get_docstring(node), node.name
