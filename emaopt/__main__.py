"""Run the command line: `emaopt`, or `python -m emaopt`. Each command imports what it needs."""

import argparse
from pathlib import Path
from typing import NoReturn

import emaopt
from emaopt._commands.arguments import (
    add,
    add_convert,
    add_demo,
    add_diff,
    add_ls,
    complete_files,
    whole,
)
from emaopt._commands.running import open_streams, run
from emaopt._extras import require
from emaopt._tree.paths import printable


_LONGEST = 2000  # characters of an error


class _Parser(argparse.ArgumentParser):
    """Parse the command line, and say in one line what is wrong with an argument."""

    def error(self, message: str) -> NoReturn:
        text = printable(" ".join(message.split()).rstrip("."))
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
        self.exit(2, f"{self.prog}: {text}. See {self.prog} --help.\n")


class _Completion(argparse.Action):
    """Print the script with which a shell completes `emaopt`."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            shtab = require("shtab", "completion")
        except ModuleNotFoundError as error:
            parser.error(str(error))
        print(shtab.complete(parser, shell=values))
        parser.exit()


def main(argv: list[str] | None = None) -> None:
    """Run the command that the arguments name."""
    open_streams()
    arguments = vars(make_parser().parse_args(argv))
    run(arguments.pop("parser"), arguments.pop("target"), arguments.pop("extra"), arguments)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands. It imports none of them."""
    parser = _Parser(
        prog="emaopt",
        description="Averages of the parameters, for JAX and Optax.",
        epilog="emaopt COMMAND --help says more of a command, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"emaopt {emaopt.__version__}")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        dest=argparse.SUPPRESS,
        choices=["bash", "zsh", "tcsh"],
        help="print a script with which this shell completes emaopt, and exit; for bash: "
        'eval "$(emaopt --print-completion bash)"',
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    add_demo(commands)
    add_ls(commands)
    add_diff(commands)
    add_convert(commands)
    _add_merge(commands)
    return parser


def _add_merge(commands: argparse._SubParsersAction) -> None:
    merge = add(
        commands,
        "merge",
        "emaopt._commands.merge:command",
        help="another average from the checkpoints of a run, after training",
        description=(
            "Add up the averages in the checkpoints of a run to one of another length, and\n"
            "write it to OUT: a checkpoint of Orbax with the item params. How far it will be\n"
            "from the average that is wanted is known before, from the decays alone. Without\n"
            "a target and without OUT, a list of targets with these errors is printed.\n\n"
            "What the recorded averages are, their ledgers say: emaopt.ema(..., ledger=True).\n"
            "Leaves of params that are not averaged are those of the newest checkpoint."
        ),
        examples=[
            "emaopt merge run                              what is within reach?",
            "emaopt merge run --sigma-rel 0.15 out",
            "emaopt merge run --window 5000 --at 20000 out",
            "emaopt merge run --source fast=decay:0.99 --source slow=decay:0.998 \\",
            "                      --half-life 700 out",
        ],
        extra="posthoc",
    )
    merge.usage = "emaopt merge [options] RUN [OUT]"  # argparse would not break the line
    complete_files(
        merge.add_argument("run", metavar="RUN", help="a directory with checkpoints of Orbax")
    )
    merge.add_argument(
        "destination", metavar="OUT", help="a new directory"
    ).required = False  # nargs="?" would not be looked for after an option
    target = merge.add_mutually_exclusive_group()
    for option, kind, name, what in (
        ("--sigma-rel", float, "S", "a power average of this relative width, up to 0.2887"),
        ("--gamma", float, "G", "a power average of this exponent"),
        ("--half-life", float, "N", "an average of constant decay; its half-life in updates"),
        ("--window", whole(1, 10**9), "N", "the mean of the last N updates"),
        ("--linear", whole(1, 10**9), "N", "the same: a learning rate that fell linearly"),
        (
            "--one-minus-sqrt",
            whole(1, 10**9),
            "N",
            "one that fell as 1 - sqrt, in steps of the checkpoints",
        ),
    ):
        target.add_argument(option, type=kind, metavar=name, help=what)
    merge.add_argument(
        "--at", type=whole(0, 10**12), metavar="STEP", help="of a checkpoint; default: the newest"
    )
    merge.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=DECAY",
        help="use this average, which was sigma_rel:S, gamma:G, decay:D, half_life:N, warmup:D or "
        "debiased:D, instead of all that have ledgers; repeatable",
    )
    merge.add_argument(
        "--threshold",
        type=float,
        default=0.15,
        metavar="E",
        help="the predicted error above which nothing is written; default: %(default)s",
    )
    merge.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the predicted error over sigma_rel"
    )
    merge.add_argument("--json", action="store_true", dest="as_json", help="for machines")


if __name__ == "__main__":
    main()
