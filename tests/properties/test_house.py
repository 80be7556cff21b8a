"""The house: who imports whom, what is loaded when, and what every public name has."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import emaopt


HOUSE = Path(emaopt.__file__).parent
FILES = {str(path.relative_to(HOUSE)): path for path in sorted(HOUSE.rglob("*.py"))}
LIGHT = {"jax", "numpy", "optax"}
# room: the rooms that it may import, and the packages of others; ground floor first
ROOMS = {
    "_extras": (set(), set()),
    "_files": (set(), {"etils"}),
    "_tree": (set(), LIGHT),
    "_safetensors": ({"_files", "_tree"}, {"jax", "numpy", "etils"}),
    "_average": ({"_tree"}, LIGHT),
    "_optimizers": ({"_tree", "_average"}, LIGHT),
    "_names": ({"_tree", "_average", "_optimizers"}, LIGHT),
    "presets": ({"_tree", "_average"}, {"jax"}),
    "posthoc": ({"_tree", "_average"}, {"jax", "numpy"}),
    "checkpoint": (
        {"_files", "_safetensors", "_tree", "_average"},
        LIGHT | {"orbax", "etils", "safetensors", "tensorstore"},
    ),
    "tf1": ({"_extras", "_tree", "_average", "_names"}, LIGHT | {"tensorflow"}),
    "summary": (
        {"_tree", "_average", "_optimizers", "_names", "_extras"},
        LIGHT | {"tensorboardX"},
    ),
    "merge": (
        {"_files", "_safetensors", "_tree", "_average", "_names", "checkpoint", "posthoc", "tf1"},
        LIGHT | {"etils", "orbax", "tensorstore"},
    ),
    "__init__": ({"_tree", "_average", "_optimizers", "_names"}, set()),
    "_commands": (
        {"", "_extras", "_files", "_safetensors", "_tree", "_average", "_optimizers", "_names"}
        | {"checkpoint", "posthoc", "merge", "tf1"},
        LIGHT | {"etils", "flax", "matplotlib", "orbax", "sklearn", "tqdm"},
    ),
    "__main__": ({"", "_extras", "_tree", "_commands"}, set()),
}
# inside a folder: its floors, ground floor first; a file may import those of the floors below
FLOORS = {
    "_tree": "paths numbers | leaves devices | checks | calls | packing tables | rows",
    "_average": "decay rounding | clock decays profile ledger lazy | ema | match"
    " | find healing meters statistics | feedback host",
    "_optimizers": "interrupts numerics | builder clip learning_rate steps | rules",
    "checkpoint": "_context _errors _leaf _digest _place _run _trees"
    " | _roots | _contents _item _verify | _stored _items _shards"
    " | _blocks _frame _write"
    " | _partial _export _snapshot _watch | _resume | _managers | __init__",
    "presets": "_common | _tensorflow _pytorch _trainers _jax | __init__",
    "posthoc": "_falls _fit _sum | __init__",
    "tf1": "_rename | _files _leaves | __init__",
    "summary": "_graph _histogram | _writer | __init__",
    "merge": "_blocks _ledgers _processes | _files _orbax | _averages _find | _sum"
    " | _write _write_file | _plan | _run | __init__",
    "_commands": "arguments parser running paths progress digits demo | convert merge | ls diff",
}
# jax loads etils itself
HEAVY = set.union(*(packages for _, packages in ROOMS.values())) - LIGHT - {"etils"}


def imports(file):
    """The modules that a file imports, in full; "emaopt" itself for the public package."""
    package = ["emaopt", *Path(file).parts[:-1]]
    tree = ast.parse(FILES[file].read_text())
    for node in filter(_is_for_types, ast.walk(tree)):
        node.body = []  # no import at run time
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join([*above, module]) for module in modules)


def _is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def place_of(module):
    """Room and file of a module of ours: `emaopt._tree.leaves` is ("_tree", "leaves")."""
    _, *rest = module.split(".")
    room, *inside = rest or [""]
    return room, inside[0] if inside else "__init__"


@pytest.mark.parametrize("file", FILES)
def test_a_room_imports_only_what_it_may(file):
    room = Path(file).parts[0].removesuffix(".py")
    modules = list(imports(file))
    ours = {place_of(module)[0] for module in modules if module.split(".")[0] == "emaopt"}
    others = {module.split(".")[0] for module in modules} - {"emaopt"} - sys.stdlib_module_names
    allowed, packages = ROOMS[room]
    assert ours - {room} <= allowed
    assert others <= packages


def test_rooms_stand_in_the_order_of_their_floors():
    below = {""}  # the public package, which the commands use
    for room, (allowed, _) in ROOMS.items():
        assert allowed <= below, room
        below.add(room)


@pytest.mark.parametrize("file", [file for file in FILES if len(Path(file).parts) > 1])
def test_a_file_imports_only_from_the_floors_below_it(file):
    room, name = Path(file).parts[0], Path(file).parts[1].removesuffix(".py")
    if name == "__init__" and "__init__" not in FLOORS[room]:
        assert list(imports(file)) == []  # says what the folder is, no more
        return
    floors = [floor.split() for floor in FLOORS[room].split("|")]
    own = next(i for i, floor in enumerate(floors) if name in floor)
    below = {name for floor in floors[:own] for name in floor}
    places = {place_of(module) for module in imports(file) if module.startswith("emaopt")}
    inside = {there for there_room, there in places if there_room == room}
    assert inside - {name} <= below  # what is below a folder inside a room is its own


def test_floors_name_files_that_are_there():
    for room, floors in FLOORS.items():
        there = {Path(f).parts[1].removesuffix(".py") for f in FILES if Path(f).parts[0] == room}
        assert set(floors.replace("|", " ").split()) | {"__init__"} == there | {"__init__"}


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_short_enough_to_read(file):
    lines = FILES[file].read_text().count("\n")
    assert lines <= 350


def test_unit_tests_stand_in_the_rooms_of_the_package():
    unit = Path(__file__).parents[1] / "unit"
    rooms = {room.removeprefix("_") for room in ROOMS}
    inside = {path.name for path in unit.iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.stem.removeprefix("test_") for path in unit.glob("test_*.py")}
    assert inside | files <= rooms


def loaded_by(code):
    """The packages that are loaded after some code in a new process."""
    code += "; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {module.split(".")[0] for module in run.stdout.splitlines()[-1].split()}


def test_importing_the_package_loads_jax_numpy_and_optax_only():
    assert not loaded_by("import emaopt") & HEAVY


@pytest.mark.many(2)
@pytest.mark.parametrize("command", ["", "demo", "ls", "convert", "merge", "diff"])
def test_help_loads_nothing_heavy(command):
    code = (
        "import contextlib, emaopt.__main__ as m; s = contextlib.suppress(SystemExit); "
        f"s.__enter__(); m.main([*{command!r}.split(), '--help'])"
    )
    run = f"import contextlib\nwith contextlib.suppress(SystemExit):\n    exec({code!r})\npass"
    assert not loaded_by(run) & HEAVY


def test_a_room_is_an_attribute_of_the_package():
    code = "import emaopt; print(emaopt.checkpoint.save.__name__, emaopt.posthoc.window(1, 1)[1])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "save 1.0\n"


def test_completion_offers_what_there_is_and_nothing_else():
    public = {name for name in dir(emaopt) if not name.startswith("_")}
    assert public == EXPORTED | set(emaopt._ROOMS)
    assert {room for room in ROOMS if not room.startswith("_")} == set(emaopt._ROOMS)


def test_a_name_that_is_not_there_is_an_attribute_error_with_a_hint():
    with pytest.raises(AttributeError, match="has no attribute 'checkpoints'"):
        _ = emaopt.checkpoints
    assert not hasattr(emaopt, "importlib")


EXPORTED = {
    alias.name
    for node in ast.parse(FILES["__init__.py"].read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.name == alias.asname and not alias.name.startswith("_")
}


TYPES = {"DecayLike", "LearningRate"}  # other names for types have no docstring


@pytest.mark.parametrize("name", sorted(EXPORTED - TYPES))
def test_a_public_name_has_a_docstring_with_an_example(name):
    value = getattr(emaopt, name)
    record = isinstance(value, type) and issubclass(value, tuple)
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")  # what Python says of a record by itself
    assert record or ">>>" in value.__doc__


def test_names_are_listed_once():
    assert not [file for file, path in FILES.items() if "__all__" in path.read_text()]


# the first words of a sentence that is turned around, or has no verb
NO_VERBS = {
    *("A", "All", "An", "Another", "Each", "Every", "How", "Its", "Many", "Of", "One", "Several"),
    *("Some", "That", "The", "Their", "These", "This", "Those", "To", "Two", "What", "When"),
    *("Where", "Whether", "Which", "Who", "Whose", "Why"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_docstring_begins_with_a_verb(file):
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node) or "Return"
            assert text.split()[0] not in NO_VERBS, text


@pytest.mark.parametrize("file", FILES)
def test_a_public_definition_has_a_docstring(file):
    for node in ast.parse(FILES[file].read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            overload = "overload" in map(ast.unparse, node.decorator_list)
            assert overload or ast.get_docstring(node), node.name
