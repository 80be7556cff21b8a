"""The guides, the notebooks and the reference as one site: `sphinx-build -W -c docs . site/html`.

The sources stand where GitHub shows them: the README is the front page, and every link between
them works here and there. Docstrings are in Google's form, which napoleon reads. A public name that
no page documents is an error, and so is a link that leads nowhere.
"""

import ast
import contextlib
import html
import importlib
import importlib.util
import io
import os
import pkgutil
import re
from pathlib import Path
from urllib.parse import unquote

import emaopt


project = "emaopt"
version = release = emaopt.__version__
root_doc = "README"
include_patterns = ["*.md", "docs/**", "notebooks/*", "benchmarks/**.md"]
exclude_patterns = ["**/.*", "**/*.py"]
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_nb",
]
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
autodoc_typehints = "none"  # `Args:` says what each is, in fewer words than ArrayLike's union
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
default_role = "py:obj"  # `name` is code, and a link if it is a name of ours
highlight_language = "default"  # Python, where it is
python_maximum_signature_line_length = 88
autosummary_generate = False
viewcode_follow_imported_members = True
copybutton_exclude = ".linenos, .gp, .go"  # neither prompts nor what was printed
toc_object_entries_show_parents = "hide"

CONTENTS = {
    root_doc: """
```{toctree}
:hidden:
:glob:
:caption: Guides
docs/guides
docs/overview
docs/averaging
docs/frameworks
docs/recipes
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
SECURITY
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
results/*
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


# 1e-6 and 1.0-2.5: a browser would break the line after the hyphen
NUMBER = re.compile(r"(\d[\d.,]*(?:e?-\d[\d.,]*)+)")


def _contents(app, document, source):
    """Add the contents of a guide, and to a page of the reference a list of what it describes."""
    del app
    source[0] += CONTENTS.get(document, "")
    first = re.search(r"^\.\. auto(?!module)\w+::", source[0], re.MULTILINE)
    if document.startswith("docs/api/") and first:
        names = re.findall(r"^\.\. auto(?!module)\w+:: (\w+)", source[0], re.MULTILINE)
        listed = "".join(f"   {name}\n" for name in names)
        summary = f".. autosummary::\n   :nosignatures:\n\n{listed}\n"
        source[0] = source[0][: first.start()] + summary + source[0][first.start() :]


def _whole_numbers(app, document):
    """Keep every number on one line, and short code with a number in it."""
    del app
    from docutils import nodes

    for text in list(document.findall(nodes.Text)):
        pieces = NUMBER.split(text)
        if len(pieces) == 1 or isinstance(text.parent, nodes.literal_block):
            continue
        if isinstance(text.parent, nodes.literal):
            text.parent["classes"] += ["number"] if len(text) < 25 else []
            continue
        number = {1: lambda piece: nodes.inline("", piece, classes=["number"]), 0: nodes.Text}
        text.parent.replace(text, [number[i % 2](piece) for i, piece in enumerate(pieces)])


def _linked(app, document):
    """Link `emaopt.name`, and in the overview every public name, to the reference."""
    from docutils import nodes
    from sphinx.addnodes import pending_xref

    overview = app.env.docname == "docs/overview"
    names = {f"{room}.{name}" for room in ROOMS for name in public(room)}
    for literal in list(document.findall(nodes.literal)):
        name = literal.astext().partition("(")[0]
        full = f"emaopt.{name}" if overview and not name.startswith("emaopt.") else name
        if full in names and not isinstance(literal.parent, (nodes.reference, pending_xref)):
            link = pending_xref(
                "", literal.deepcopy(), refdomain="py", reftype="obj", reftarget=full
            )
            link["refdoc"], link["refexplicit"] = app.env.docname, True
            literal.replace_self(link)


def _module(app, room, name):
    """Return a room that shows what another one defines: one file of source leads to one room."""
    del app
    described = getattr(importlib.import_module(room), name, None) if room else None
    module = getattr(described, "__module__", None) or room
    return room if room and not f"{module}.".startswith(f"{room}.") else None


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
            os.environ["COLUMNS"] = "80"
            with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
                main([*self.arguments, "--help"])
            return [nodes.literal_block(text=printed.getvalue(), language="text")]

    app.add_directive("help", Help)
    app.connect("source-read", _contents)
    app.connect("doctree-read", _linked)
    app.connect("doctree-read", _whole_numbers)
    app.connect("viewcode-follow-imported", _module)
    app.connect("env-check-consistency", _check)
    app.connect("build-finished", _finish)
