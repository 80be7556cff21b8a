"""Run a command so that whatever goes wrong gets one line and an exit code."""

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from emaopt._extras import require


# nothing is computed, so nothing needs an accelerator, or to be told how one would be used
_QUIET = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


def run(
    parser: argparse.ArgumentParser, target: str, extra: str, arguments: dict[str, Any]
) -> None:
    """Run a command. Whatever goes wrong gets one line and the exit code 2."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    module, _, function = target.partition(":")
    code = None
    with _interrupts() as interrupts, _no_logs():
        try:
            loaded = require(module, extra) if extra else import_module(module)
            code = getattr(loaded, function)(**arguments)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has seen enough
            _drop_output()
        except KeyboardInterrupt:
            code = 130
        except Exception as error:
            if interrupts:  # Orbax makes an error of its own of it
                sys.exit(130)
            _flush()
            parser.error(_one_line(error))
    if code:
        sys.exit(code)


def _one_line(error: Exception) -> str:
    """Return what an error says; of one that is not meant for people, its type as well."""
    meant = isinstance(error, (ValueError, OSError, ModuleNotFoundError, argparse.ArgumentError))
    if meant:
        return str(error)
    return ": ".join(filter(None, [type(error).__name__, str(error)]))


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Record every Ctrl-C, and raise KeyboardInterrupt as Python does."""
    seen: list[int] = []

    def note(number, frame):
        seen.append(number)
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _no_logs() -> Iterator[None]:
    """Silence all loggers, and threads of TensorStore: they print what is then raised."""
    disabled, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda *_: None
    try:
        yield
    finally:
        logging.disable(disabled)
        sys.unraisablehook = hook


def open_streams() -> None:
    """Open what a shell closed with `>&-` or `2>&-`: else the next file would get its place."""
    descriptor = 0
    while descriptor < 3:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()


def _flush() -> None:
    """Print what is still to be printed, or drop it where the disk is full."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """Send what is still to be printed nowhere, so that the end of the process cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
