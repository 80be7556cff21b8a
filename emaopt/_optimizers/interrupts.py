"""Finish a call that donates its arguments, although the user interrupts it.

Ctrl-C raises `KeyboardInterrupt` between two instructions of Python, most often right after the
long one: the training step. By then the arguments of a donated step are deleted, and its results
are not yet assigned. Without this module an interrupted loop would lose parameters, optimizer and
averages. The interrupt is kept, and raised when the results are assigned.
"""

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax


_WAIT = 1.0  # seconds until an interrupt is raised that no next step has raised
# Ctrl-C, and what a cluster sends before it stops a program. Not all systems have all of them.
_HELD_BACK = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
# A mark for an interrupt that is not raised yet. It is not the exception: its traceback would hold
# the arrays of the step, and a thread that deletes arrays while Python ends aborts the program.
_kept: list[object] = []


class _Structure:
    """Hold the structure of trees, as the only key of a dict of their leaves."""

    def __init__(self, structure: Any):
        self.structure = structure

    def __repr__(self) -> str:
        return "leaves"  # part of the name of every result; that of a structure is long


def flat(trees: Any) -> dict[_Structure, list[Any]]:
    """Return trees so that they leave `jax.jit` without an instruction of Python.

    `jax.jit` puts its results together when they are computed, and runs Python for each named
    tuple. There a waiting `KeyboardInterrupt` would be raised, and the results lost. Dicts and
    lists are put together in C.
    """
    leaves, structure = jax.tree.flatten(trees)
    return {_Structure(structure): leaves}


def unflat(trees: dict[_Structure, list[Any]]) -> Any:
    """Return the trees that `flat` made flat."""
    [(key, leaves)] = trees.items()
    return key.structure.unflatten(leaves)


def keep_interrupt() -> None:
    """Keep an interrupt until `raise_interrupt` is called, or for a second."""
    interrupt = object()
    _kept.append(interrupt)
    # not a threading.Timer: its start waits for the new thread, with the results in our hands
    _thread.start_new_thread(_interrupt_main_thread, (interrupt,))


def raise_interrupt() -> None:
    """Raise the interrupt that is kept, if there is one."""
    if _kept:
        _kept.pop()
        raise KeyboardInterrupt("it came during a training step, which was finished first")


def _interrupt_main_thread(interrupt: object) -> None:
    """Raise an interrupt that is kept, if no step has raised it within a second."""
    time.sleep(_WAIT)
    if interrupt in _kept:
        _kept.remove(interrupt)
        main = threading.main_thread().ident
        if main is not None and hasattr(signal, "pthread_kill"):
            # a real signal: a main thread that sleeps or waits would see the other one afterwards
            signal.pthread_kill(main, signal.SIGINT)
        else:  # on Windows
            _thread.interrupt_main()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until a block is done: the call of a training step, and its assignment.

    A step that donates its arguments deletes them. If `KeyboardInterrupt` comes before its results
    are assigned, parameters, optimizer and averages are lost. This holds for any step, of any
    framework. The steps of `emaopt.minimize` need no such block for Ctrl-C. A second Ctrl-C
    interrupts at once. In other threads than the main one nothing is done, as no interrupt comes
    there.

    The signals that a cluster sends before it stops a program (SIGTERM, SIGHUP, SIGUSR1, SIGUSR2)
    wait as well, if you have set a handler for them. Put this block around the steps of
    `emaopt.minimize` too, if such a handler raises.

    Example:
        >>> params = 0
        >>> for _ in range(3):
        ...     with uninterrupted():
        ...         params = params + 1
        >>> params
        3
    """
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    came: dict[int, FrameType | None] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _HELD_BACK}
        before = {number: handler for number, handler in handlers.items() if callable(handler)}

    def wait(number: int, frame: FrameType | None) -> None:
        if number not in came:
            came[number] = frame
            return
        del came[number]
        before[number](number, frame)

    def call(number: int) -> None:
        if number in came:
            before[number](number, came[number])

    # A stack runs all of its callbacks, the last one first, also if a handler raises in between.
    # The handlers are back before they are called: a signal would be lost in between.
    with contextlib.ExitStack() as at_end:
        for number in before:
            at_end.callback(call, number)
        for number, handler in before.items():
            signal.signal(number, wait)
            at_end.callback(signal.signal, number, handler)
        yield
