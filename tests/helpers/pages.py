"""Run the Python code of a Markdown page, in the order in which a reader pastes it."""

import re
from pathlib import Path
from typing import Any

from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser


HEADING = re.compile(r"(?m)^## (.*)$")


def headings(page: Path) -> list[str]:
    """Return the headings of the sections of a page."""
    return HEADING.findall(page.read_text())


def run(page: Path, section: str | None = None) -> dict[str, Any]:
    """Run the blocks of a page, and return the names that they define.

    With the heading of a section: the blocks before the first heading, and those of this section.
    A block in a comment, `<!--- invisible-code: python`, runs too. So pages check what they say.
    """
    document = Document.parse(str(page), PythonCodeBlockParser())
    starts = [match.start() for match in HEADING.finditer(document.text)] + [document.end]
    parts = [(0, document.end)]
    if section is not None:
        place = headings(page).index(section)
        parts = [(0, starts[0]), (starts[place], starts[place + 1])]
    for example in document.examples():
        if any(first <= example.region.start < last for first, last in parts):
            example.evaluate()
    return document.namespace
