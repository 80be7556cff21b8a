"""The guides, the notebooks and the reference as one site: `sphinx-build -W -c docs . site/html`.

The sources stand where GitHub shows them: the README is the front page, and every link between
them works here and there. Docstrings are plain text with `code` and examples; `rst` makes of them
what Sphinx takes. A public name that no page documents is an error.
"""

import ast
import contextlib
import html
import importlib.util
import inspect
import io
import itertools
import os
import pkgutil
import re
import textwrap
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import emaopt


project = "emaopt"
version = release = emaopt.__version__
root_doc = "README"
include_patterns = ["*.md", "docs/**", "notebooks/*", "benchmarks/*.md"]
exclude_patterns = ["**/.*", "**/*.py"]
extensions = ["sphinx.ext.autodoc", "myst_nb"]
html_theme = "furo"
html_static_path = html_css_files = ["site.css"]
html_title = "emaopt"
html_copy_source = html_show_sourcelink = html_show_copyright = False
pygments_style, pygments_dark_style = "default", "monokai"

nb_execution_mode = "off"  # what was committed is shown; the tests execute it
nb_merge_streams = True
myst_heading_anchors = 3
autodoc_mock_imports = [
    name for name in ("tensorflow", "tensorboardX", "tqdm") if not importlib.util.find_spec(name)
]
highlight_language = "none"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

CONTENTS = {
    root_doc: """
```{toctree}
:hidden:
:glob:
:caption: Guides
docs/overview
docs/averaging
docs/frameworks
docs/checkpoints
docs/*
notebooks/README
```
```{toctree}
:hidden:
:caption: Reference
docs/api/index
benchmarks/README
CHANGELOG
CONTRIBUTING
```
""",
    "notebooks/README": """
```{toctree}
:hidden:
:glob:
first_steps
*
```
""",
    "benchmarks/README": """
```{toctree}
:hidden:
:glob:
*
```
""",
}


def public(module: str) -> set[str]:
    """The public names of a module: what it defines, and what it imports as itself."""
    names = set()
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname for alias in node.names if alias.asname == alias.name}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    return {name for name in names if not name.startswith("_")}


ROOMS = ["emaopt"] + [
    f"emaopt.{room.name}"
    for room in pkgutil.iter_modules(emaopt.__path__)
    if not room.name.startswith("_")
]


def targets(module: str) -> dict[str, str]:
    """What the code in a docstring may name, and the full name of it; shorter names are nearer."""
    found = {room: room for room in ROOMS}
    for room in (*ROOMS, module):
        for name in public(room) if room in ROOMS else ():
            full = f"{room}.{name}"
            found |= {full: full, full.removeprefix("emaopt."): full}
            if room == module:
                found[name] = full
    return found


def rst(text: str, links: dict[str, str]) -> str:
    """A docstring as reStructuredText: inline code, blocks of code, examples; all else is text."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if blocks and block.startswith("    ") and blocks[-1].startswith("    "):
            blocks[-1] += f"\n\n{block}"
        else:
            blocks.append(block)
    return "\n\n".join(_block(block, links) for block in blocks)


def _block(block: str, links: dict[str, str]) -> str:
    if block.startswith(">>>"):
        return block
    if block.startswith("    "):
        return f".. code-block:: python\n\n{block}"
    text, *rest = re.split(r"`([^`]+)`", block)
    pieces = [_plain(text)]
    for code, text in zip(rest[::2], rest[1::2], strict=True):
        named = links.get(code.partition("(")[0])
        pieces.append(f":py:obj:`{code} <{named}>`" if named else f"``{code}``")
        pieces.append("\\ " * bool(re.match(r"\w", text)) + _plain(text))
    return "".join(pieces)


def _plain(text: str) -> str:
    """Text in which nothing but an emphasized word has a meaning."""
    return re.sub(r"(\*\w+\*)|([\\|_*])", lambda found: found[1] or "\\" + found[2], text)


def written(obj: Any) -> tuple[str, str]:
    """The signature as the source has it: `ArrayLike`, and not all that it stands for."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(obj))).body
    if isinstance(node, ast.ClassDef):
        body = {getattr(part, "name", None): part for part in node.body}
        if "__init__" not in body:
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return f"({', '.join(map(ast.unparse, fields))})", ""
        node = body["__init__"]
    assert isinstance(node, ast.FunctionDef)
    arguments = [a for a in node.args.args if a.arg != "self"]
    node.args.args = arguments
    returns = ast.unparse(node.returns).strip("'") if node.returns else ""
    return f"({ast.unparse(node.args)})", returns


def said_of(module: str, name: str) -> str:
    """The string below an assignment, in any file of the module."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin
    for path in Path(spec.origin).parent.glob("*.py"):
        body = ast.parse(path.read_text()).body
        for node, after in itertools.pairwise(body):
            assigned = isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name
            if assigned and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                return str(after.value.value)
    raise LookupError(f"{module}.{name} has no text below it")


def _docstring(app, what, name, obj, options, lines):
    del app, options
    room = name
    while room not in ROOMS:
        room = room.rpartition(".")[0]
    own = {name} | set(inspect.signature(obj).parameters if callable(obj) else ())
    text = said_of(room, name.rpartition(".")[2]) if what == "data" else "\n".join(lines)
    links = {short: full for short, full in targets(room).items() if not {short, full} & own}
    lines[:] = rst(text, links).split("\n")


def _signature(app, what, name, obj, options, signature, returns):
    del app, name, options, signature, returns
    return None if what in ("module", "data", "attribute") else written(obj)


def _contents(app, document, source):
    del app
    source[0] += CONTENTS.get(document, "")
    if document.startswith("benchmarks/") and not source[0].startswith("# "):
        source[0] = f"# {document}\n\n{source[0]}"  # a table alone


def _linked(app, document):
    """`emaopt.name` becomes a link, and the names in the first column of the overview's tables."""
    from docutils import nodes
    from sphinx.addnodes import pending_xref

    names = targets("emaopt") if app.env.docname == "docs/overview" else {}
    for literal in list(document.findall(nodes.literal)):
        code = literal.astext()
        cell = literal.parent.parent
        first = isinstance(cell, nodes.entry) and cell.parent.index(cell) == 0
        if not isinstance(literal.parent, (nodes.reference, pending_xref)) and (
            first or code.startswith("emaopt.")
        ):
            named = (names or targets("")).get(code.partition("(")[0])
            if named:
                link = pending_xref(
                    "", literal.deepcopy(), refdomain="py", reftype="obj", reftarget=named
                )
                link["refdoc"], link["refexplicit"] = app.env.docname, True
                literal.replace_self(link)


def _check(app, env):
    del app
    from sphinx.errors import ExtensionError

    documented = env.domains["py"].objects
    if missing := {f"{r}.{n}" for r in ROOMS for n in public(r)} - documented.keys():
        raise ExtensionError(f"public, and not in the reference: {', '.join(sorted(missing))}")


def broken(site: Path) -> list[str]:
    """The links between pages of a built site that lead nowhere."""
    pages = {page.resolve(): page.read_text() for page in site.rglob("*.html")}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    found = []
    for page, text in pages.items():
        for link in set(re.findall(r'\b(?:href|src)="([^"]+)"', text)):
            path, _, anchor = html.unescape(link).partition("#")
            if re.match(r"\w+:|//", link):
                continue
            there = (page.parent / unquote(path.partition("?")[0])).resolve() if path else page
            lost = anchor and there in anchors and unquote(anchor) not in anchors[there]
            if lost or not there.exists():
                found.append(f"{page.relative_to(site.resolve())}: {link}")
    return sorted(found)


def _finish(app, error):
    from sphinx.errors import ExtensionError

    if error or app.builder.name != "html":
        return
    site = Path(app.outdir)
    front = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html">'
    (site / "index.html").write_text(front)
    if links := broken(site):
        raise ExtensionError("links that lead nowhere:\n" + "\n".join(links))


def setup(app) -> None:
    """Connect what is above."""
    from docutils import nodes
    from docutils.parsers.rst import Directive

    class Help(Directive):
        """What `emaopt COMMAND --help` prints."""

        required_arguments = 1

        def run(self):
            from emaopt.__main__ import main

            printed = io.StringIO()
            os.environ["COLUMNS"] = "88"
            with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
                main([*self.arguments, "--help"])
            return [nodes.literal_block(text=printed.getvalue(), language="text")]

    app.add_directive("help", Help)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _contents)
    app.connect("doctree-read", _linked)
    app.connect("env-check-consistency", _check)
    app.connect("build-finished", _finish)
