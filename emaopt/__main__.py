"""Run the command line: `emaopt`, or `python -m emaopt`. Each command imports what it needs."""

import argparse
from pathlib import Path

import emaopt
from emaopt._commands.arguments import (
    add,
    add_convert,
    add_demo,
    add_diff,
    add_ls,
    complete_files,
    length,
    numbers,
    updates,
    whole,
)
from emaopt._commands.parser import Parser
from emaopt._commands.running import open_streams, run
from emaopt._extras import require


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
    parser = Parser(
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
        help="merge checkpoints: in place of a learning-rate decay, or to another average",
        description=(
            "Add up the checkpoints of a run, block by block, and write a checkpoint of Orbax\n"
            "with the item params to OUT; or a file, if OUT ends in .safetensors.\n\n"
            "Of any run of Orbax, of .safetensors files or of TF1 the plain parameters are\n"
            "merged, as a decay of the learning rate would have merged the updates between\n"
            "the checkpoints. Of a run with recorded averages, emaopt.ema(..., ledger=True),\n"
            "any other average is made. What is predicted is printed before anything is read:\n"
            "the noise that remains, or the error. Without a target and OUT, it is printed\n"
            "for targets of all lengths.\n\n"
            "Several runs, or checkpoints, are a soup: the mean, or --weights.\n\n"
            "A decay takes the last N updates, or a share of all so far, as 10%; or the\n"
            "checkpoints that --last says; or all."
        ),
        examples=[
            "emaopt merge run                             what is within reach?",
            "emaopt merge run --one-minus-sqrt 5000 out   as a decay of 5000 updates",
            "emaopt merge run --mean --last 8 out",
            "emaopt merge run --mean --last 8 --curve out at every checkpoint",
            "emaopt merge run --mean 10% --curve out      each of a tenth of the updates",
            "emaopt merge run --sigma-rel 0.15 out        of recorded averages",
            "emaopt merge run --source fast=decay:0.99 --half-life 700 out",
            "emaopt merge run1 run2 run3 soup --weights 0.5,0.25,0.25",
        ],
        extra="posthoc",
    )
    merge.usage = "%(prog)s [options] RUN [RUN ...] [OUT]"
    vars(merge)["intermixed"] = True  # see Parser
    complete_files(
        merge.add_argument(
            "paths",
            metavar="RUN",
            nargs="+",
            help="a directory with checkpoints, or a checkpoint; OUT: a new directory or file",
        )
    )
    _add_target(merge)
    _add_choice(merge)
    _add_recorded(merge)
    merge.add_argument("--json", action="store_true", dest="as_json", help="print JSON")


def _add_target(merge: argparse.ArgumentParser) -> None:
    """Add the options of which one says what to merge the checkpoints to."""
    target = merge.add_mutually_exclusive_group()
    for option, kind, name, what in (
        ("--mean", updates, "[N]", "the mean of the last checkpoints, or N updates"),
        ("--linear", updates, "[N]", "the same: a learning rate that fell linearly"),
        ("--one-minus-sqrt", updates, "[N]", "a learning rate that fell as 1 - sqrt"),
        ("--cosine", updates, "[N]", "a learning rate that fell as half a cosine"),
        ("--factors", numbers, "F,F,...", "one that was multiplied by these, between checkpoints"),
        ("--sigma-rel", float, "S", "a power average of this relative width, up to 0.2887"),
        ("--gamma", float, "G", "a power average of this exponent"),
        ("--half-life", float, "N", "an average of constant decay; its half-life in updates"),
    ):
        target.add_argument(option, type=kind, metavar=name, help=what)


def _add_recorded(merge: argparse.ArgumentParser) -> None:
    """Add the options for recorded averages: their decays, and the predicted error."""
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
        default=0.5,
        metavar="E",
        help="the predicted error above which nothing is written; default: %(default)s",
    )
    merge.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the predicted error over sigma_rel"
    )


def _add_choice(merge: argparse.ArgumentParser) -> None:
    """Add the options that say which checkpoints are merged."""
    merge.add_argument(
        "--window",
        type=length,
        metavar="N",
        help="the last N updates, of any decay; 10%% is a tenth of the updates so far",
    )
    merge.add_argument(
        "--last", type=whole(2, 10**9), metavar="K", help="the last K checkpoints, of any decay"
    )
    merge.add_argument(
        "--every",
        type=whole(1, 10**9),
        metavar="N",
        help="only checkpoints that are N updates or more apart, the newest first",
    )
    merge.add_argument(
        "--curve",
        action="store_true",
        help="merge at every checkpoint, to OUT/STEP; without OUT, say what is predicted",
    )
    merge.add_argument(
        "--at", type=whole(0, 10**12), metavar="STEP", help="of a checkpoint; default: the newest"
    )
    merge.add_argument(
        "--params",
        metavar="NODE",
        help="merge the plain parameters, not averages; they lie at this node, such as "
        "state/params",
    )
    merge.add_argument(
        "--weights", type=numbers, metavar="W,W,...", help="of several runs; their sum is 1"
    )


if __name__ == "__main__":
    main()
