"""Tell a terminal how far a long command is."""

import sys
from collections.abc import Iterator
from time import monotonic


AFTER = 2  # seconds until the first line


def watched(parts: Iterator[list[str]], sizes: dict[str, int], doing: str) -> Iterator[list[str]]:
    """Yield the same parts. A terminal is told from the third second on how far the work is.

    Args:
        parts: Names of leaves in groups, which are handled one after the other.
        sizes: The bytes of every leaf, by name.
        doing: A word for the work, such as `compared`.
    """
    start, done, told = monotonic(), 0, ""
    for part in parts:
        yield part
        done += sum(sizes[name] for name in part)
        if sys.stderr.isatty() and monotonic() - start > AFTER:
            told = f"{doing} {done / max(1, sum(sizes.values())):4.0%}"
            print(f"\r{told}", end="", file=sys.stderr, flush=True)
    if told:
        print(f"\r{' ' * len(told)}\r", end="", file=sys.stderr, flush=True)
