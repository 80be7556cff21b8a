"""Parse the command line. Errors are one line, and arguments may stand between options."""

import argparse
from typing import Any, NoReturn

from emaopt._tree.paths import printable


_LONGEST = 2000  # characters of an error
_OPTIONAL = ("--mean", "--linear", "--one-minus-sqrt", "--cosine")  # may have a number


class Parser(argparse.ArgumentParser):
    """Parse the command line, and say in one line what is wrong with an argument."""

    intermixed = False  # whether arguments may stand between options

    def error(self, message: str) -> NoReturn:
        text = printable(" ".join(message.split()).rstrip("."))
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
        self.exit(2, f"{self.prog}: {text}. See {self.prog} --help.\n")

    def parse_known_args(self, *given: Any, **named: Any) -> Any:
        """Parse; where arguments may stand between options, in two passes.

        In one pass, `RUN --gamma 5 OUT` has no place for OUT, for RUN takes all that it may.
        """
        if not self.intermixed:
            return super().parse_known_args(*given, **named)
        self.intermixed = False  # it calls this method
        try:
            args, *namespace = given
            return self.parse_known_intermixed_args(_with_numbers(args), *namespace, **named)
        finally:
            self.intermixed = True


def _with_numbers(args: list[str] | None) -> list[str]:
    """Return the arguments, with a value for each option that may have a number."""
    result: list[str] = []
    for arg in args or []:
        if result and result[-1] in _OPTIONAL:
            has_number = arg.removesuffix("%").replace(".", "", 1).isdecimal()
            result[-1] += f"={arg}" if has_number else "=all"
            if has_number:
                continue
        if result and result[-1] == "--weights":  # argparse takes -1,2 for an option
            result[-1] += f"={arg}"
            continue
        result.append(arg)
    if result and result[-1] in _OPTIONAL:
        result[-1] += "=all"
    return result
