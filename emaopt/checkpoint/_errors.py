"""Define what can be wrong with a checkpoint, as types that a program can tell apart.

Both are `ValueError`s. A path that leads nowhere is a `FileNotFoundError`.
"""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager

from emaopt._files import DamagedError as DamagedError
from emaopt._tree.paths import KeyPath, printable


SHOWN = 10  # problems that an error lists, of each kind


class MismatchError(ValueError):
    """Report that a sound checkpoint does not hold what was asked for."""


def cause(error: BaseException) -> str:
    """Return the innermost reason in one line, without TensorStore's dump of its arguments."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    text = text.strip().split("\n")[0]
    # TensorStore names the array as it is stored: `dense.kernel/zarr.json`
    text = re.sub(
        r'reading "([^"]+)/(zarr.json|.zarray)"',
        lambda found: f"reading {found[1].replace('.', '/')}",
        text,
    )
    return f"({type(error).__name__}: {printable(text[:400])})"


def unreadable(
    checkpoint: object, path: KeyPath, error: BaseException, advice: str = "Use another step."
) -> DamagedError:
    """Return the error of a leaf that cannot be read. `path`: the item, and its key path there."""
    leaf = printable("/".join(filter(None, path)))
    return DamagedError(
        f"checkpoint {checkpoint}: {leaf} cannot be read, the data is cut off, missing or damaged. "
        f"{cause(error)} {advice}"
    )


@contextmanager
def saving(what: str) -> Iterator[None]:
    """Say which checkpoint was not saved and why, whatever Orbax raises.

    Orbax raises the failure of a save in the background when the next save begins.
    """
    try:
        yield
    except Exception as error:
        raise OSError(
            f"{what} was not saved, or one before it, in the background. {cause(error)} The "
            "training state is as it was."
        ) from error


def missing(paths: list[KeyPath], known: list[KeyPath]) -> list[str]:
    """Return what to say of leaves that are not there: some with close names, and how many more.

    To compare each with all names would take minutes for 2,000 leaves. So the closest by their keys
    are looked for, and the closest by their letters only among these.
    """
    problems = []
    for path in paths[:SHOWN]:
        keys = set(path)
        nearest = sorted(known, key=lambda other: -len(keys.intersection(other)))[:50]
        close = difflib.get_close_matches("/".join(path), map("/".join, nearest), 3)
        near = f"; close: {', '.join(map(printable, close))}" if close else ""
        problems.append(f"{printable('/'.join(path))} is missing{near}")
    more = len(paths) - SHOWN
    return problems + ([f"{more} more are missing"] if more > 0 else [])


def shortened(problems: list[str]) -> list[str]:
    """Return some problems, and how many more there are."""
    more = len(problems) - SHOWN
    return problems if more <= 1 else [*problems[:SHOWN], f"and {more} more like these"]
