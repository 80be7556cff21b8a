"""The helpers of the tests, for the benchmarks, `from helpers import trees`; and where results go.

A benchmark runs as a script, `python benchmarks/steps.py`, so it does not see pytest's settings.
This is the one place that says where the helpers are.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType


RESULTS = Path(__file__).resolve().parent / "results"
TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "golden")]


def __getattr__(name: str) -> ModuleType:
    """Import a helper when it is asked for: each of them needs other packages."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise AttributeError(f"tests/helpers has no {name}.py") from None
