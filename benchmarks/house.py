"""The size and the structure of the package: rooms, arrows between them, lines, long functions.

    python benchmarks/house.py [CHECKOUT ...]

A room is a folder or a file directly in `emaopt/`. An arrow is a room that imports from another.
Lines of code are neither blank nor comments nor docstrings. A function's length is without its
docstring. The last number: how many names of `checkpoint`'s own modules the other rooms use. Prints
one row for each checkout; the default is this one.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path


LONG = 50


def imported(path: Path, house: Path) -> Iterator[str]:
    """The rooms that a file imports from."""
    package = ["emaopt", *path.relative_to(house).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            names = [node.module] if node.module else [alias.name for alias in node.names]
            modules = [".".join([*above, name]) for name in names]
        else:
            continue
        for module in modules:
            first, *rest = module.split(".")
            if first == "emaopt":
                yield rest[0] if rest else "__init__"


def inner_names(path: Path, room: str) -> Iterator[str]:
    """The names that a file takes from the inner modules of a room: `_stored.Stored`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"emaopt.{room}._"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def docstring_lines(node: ast.AST) -> int:
    """The lines of the docstring of a module, class or function."""
    first = node.body[0] if node.body else None
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first.end_lineno - first.lineno + 1 if text and isinstance(first.value.value, str) else 0


def measure(checkout: Path) -> dict[str, int]:
    """Count rooms, arrows, lines and long functions of a checkout."""
    house = checkout / "emaopt"
    rooms: set[str] = set()
    arrows: set[tuple[str, str]] = set()
    inner: set[str] = set()
    total = comments = docs = blank = functions = long = longest = 0
    for path in sorted(house.rglob("*.py")):
        room = path.relative_to(house).parts[0].removesuffix(".py")
        rooms.add(room)
        arrows |= {(room, other) for other in imported(path, house) if other != room}
        if room != "checkpoint":
            inner.update(inner_names(path, "checkpoint"))
        text = path.read_text()
        total += text.count("\n")
        blank += sum(not line.strip() for line in text.splitlines())
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments += sum(token.type == tokenize.COMMENT for token in tokens)
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                docs += docstring_lines(node)
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
                functions, long = functions + 1, long + (length > LONG)
                longest = max(longest, length)
    return {
        "rooms": len(rooms),
        "arrows": len(arrows),
        "files": len(list(house.rglob("*.py"))),
        "lines": total,
        "lines of code": total - blank - docs - comments,
        "comments": comments,
        "functions": functions,
        f"over {LONG} lines": long,
        "longest": longest,
        "names of checkpoint": len(inner),
    }


def main() -> None:
    checkouts = [Path(name) for name in sys.argv[1:]] or [Path(__file__).parents[1]]
    rows = [measure(checkout) for checkout in checkouts]
    print("| checkout |", " | ".join(rows[0]), "|")
    for checkout, row in zip(checkouts, rows, strict=True):
        print(f"| {checkout.resolve().name} |", " | ".join(map(str, row.values())), "|")


if __name__ == "__main__":
    main()
