"""Run the command line: `emaopt`, or `python -m emaopt`. Each command imports what it needs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import emaopt
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
    parser = _Parser(prog="emaopt", description="Averages of the parameters, for JAX and Optax.")
    parser.add_argument("--version", action="version", version=f"emaopt {emaopt.__version__}")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        dest=argparse.SUPPRESS,
        choices=["bash", "zsh", "tcsh"],
        help="print a script with which this shell completes emaopt, and exit",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(commands)
    _add_ls(commands)
    _add_diff(commands)
    _add_convert(commands)
    _add_merge(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction,
    name: str,
    target: str,
    *,
    help: str,
    description: str,
    examples: list[str],
    extra: str = "",
) -> argparse.ArgumentParser:
    """Add a command, and return its parser. Its arguments are added to that parser.

    Args:
        commands: What to add it to.
        name: The command.
        target: The function that runs it, as `module:function`. It is imported when the command is
            called. It gets all arguments by name, and returns the exit code or nothing.
        help: A line for `emaopt --help`.
        description: What it does, in lines of at most 80 characters.
        examples: Lines of the command line.
        extra: The extra of emaopt that installs what the module imports, if there is one.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser, target=target, extra=extra)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = _add(
        commands,
        "demo",
        "emaopt._commands.demo:command",
        help="train a small network on handwritten digits and see what averaging does",
        description=(
            "Train a small convolutional network on real handwritten digits, on the CPU, in less\n"
            "than a minute. After each epoch it prints the test accuracy of the raw and of the\n"
            "averaged parameters, and saves a checkpoint with the averages under the original\n"
            "names. At the end it draws a picture, and another process reads the checkpoint with\n"
            "plain Orbax."
        ),
        examples=[
            "emaopt demo",
            "emaopt demo --epochs 60 --resume         go on, also after Ctrl-C or a crash",
            "emaopt demo --seed 1 --out other-seed    another run beside it",
            "emaopt demo --tensorboard logs           then: tensorboard --logdir logs",
        ],
        extra="demo",
    )
    demo.add_argument(
        "--seed",
        type=_whole(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="the seed of parameters and batches; default: %(default)s",
    )
    demo.add_argument(
        "--epochs",
        type=_whole(1, 10**6),
        default=30,
        metavar="N",
        help="epochs of the whole run, including those before --resume; default: %(default)s",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("emaopt-demo"),
        metavar="DIR",
        help="where checkpoints and picture go; default: %(default)s",
    )
    demo.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in DIR; the result is the same, bit for bit, as without the break",
    )
    demo.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write curves, histograms and the graph"
    )


def _add_ls(commands: argparse._SubParsersAction) -> None:
    ls = _add(
        commands,
        "ls",
        "emaopt._commands.ls:command",
        help="list what is in a checkpoint of TF1 or Orbax, or in a .safetensors file",
        description=(
            "List the leaves of a checkpoint: name, shape, dtype and bytes, in groups that say\n"
            "what they are: variables, averages, slots of an optimizer, raw parameters. A run\n"
            "means its newest checkpoint. Only metadata is read."
        ),
        examples=[
            "emaopt ls run/model.ckpt-20               TF1, by its prefix",
            "emaopt ls emaopt-demo/checkpoints         Orbax: the newest finished step",
            "emaopt ls emaopt-demo/checkpoints/30 --averages",
            "emaopt ls averages.safetensors --json",
        ],
    )
    ls.add_argument("checkpoint", metavar="CHECKPOINT", help="a prefix, a file or a directory")
    ls.add_argument("--averages", action="store_true", help="list the averages only")
    ls.add_argument("--json", action="store_true", dest="as_json", help="print JSON, ungrouped")


def _add_diff(commands: argparse._SubParsersAction) -> None:
    diff = _add(
        commands,
        "diff",
        "emaopt._commands.diff:command",
        help="compare two checkpoints, or the averages and the parameters of one",
        description=(
            "Compare two checkpoints of TF1 or Orbax, or .safetensors files, leaf by leaf: the\n"
            "largest difference, and the L2 norm of the difference relative to the larger of both\n"
            "norms. What differs most comes first. Without B, the averages in A are compared with\n"
            "the parameters in A.\n\n"
            "If one of them is of TF1, the other one is compared as what emaopt convert would\n"
            "make of it.\n\n"
            "The exit code is 0 if all is equal, 1 if anything differs, 2 if anything is wrong."
        ),
        examples=[
            "emaopt diff emaopt-demo/checkpoints/10 emaopt-demo/checkpoints/20",
            "emaopt diff emaopt-demo/checkpoints        its averages against its parameters",
            "emaopt diff run/model.ckpt-20 converted --json",
        ],
    )
    diff.add_argument("a", metavar="A", help="as for emaopt ls")
    diff.add_argument("b", metavar="B", nargs="?", help="another one")
    diff.add_argument("--json", action="store_true", dest="as_json", help="print JSON, all leaves")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = _add(
        commands,
        "convert",
        "emaopt._commands.convert:convert",
        help="make an Orbax checkpoint of a TF1 checkpoint, or back",
        description=(
            "Write a checkpoint of TF1 as one of Orbax, or one of Orbax as one of TF1.\n\n"
            "From TF1, by name, whatever the optimizer was:\n"
            "  params       the variables, as nested dicts: conv/kernel -> {conv: {kernel: ...}}\n"
            "  tf1/step     the global step\n"
            "  tf1/shadow   the averages, nested; emaopt.checkpoint.restore_averages reads them\n"
            "  tf1/other    all else under its own name: slots, powers\n"
            "Back from there: the names, shapes, dtypes and bits that TF1 wrote. Any other\n"
            "checkpoint of Orbax becomes what emaopt.tf1.save writes; strings are left out.\n\n"
            "TF1's swapping_saver writes the averages under the names of the variables, and the\n"
            "variables under those of the averages. Pass --swapped if the checkpoint of TF1 is of\n"
            "that form, as SOURCE or as DESTINATION."
        ),
        examples=[
            "emaopt convert run/model.ckpt-20 converted",
            "emaopt convert converted again/model.ckpt-20",
            "emaopt convert --averages run/model.ckpt-20 for-serving",
            "emaopt convert --average-name MovingAverage/{}/average run/model.ckpt-20 converted",
        ],
    )
    convert.add_argument("source", metavar="SOURCE", help="as for emaopt ls")
    convert.add_argument(
        "destination",
        metavar="DESTINATION",
        help="a new directory for Orbax, or a new prefix for TF1",
    )
    convert.add_argument(
        "--averages",
        action="store_true",
        help="write only the averages, under the names of the variables; a variable without one "
        "is written itself",
    )
    convert.add_argument(
        "--swapped",
        action="store_true",
        help="the checkpoint of TF1 is of the form of its swapping_saver",
    )
    convert.add_argument(
        "--average-name",
        default="ExponentialMovingAverage",
        metavar="NAME",
        help="the name= of TF1's ExponentialMovingAverage; {} in it stands for the variable",
    )


def _add_merge(commands: argparse._SubParsersAction) -> None:
    merge = _add(
        commands,
        "merge",
        "emaopt._commands.merge:command",
        help="another average from the checkpoints of a run, after training",
        description=(
            "Add up the averages in the checkpoints of a run to one of another length, and write\n"
            "it to OUT: a checkpoint of Orbax with the item params. How far it will be from the\n"
            "average that is wanted is known before, from the decays alone; without a target, and\n"
            "without OUT, a list of targets with these predicted errors is printed.\n\n"
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
    merge.add_argument("run", metavar="RUN", help="a directory with checkpoints of Orbax")
    merge.add_argument(
        "destination", metavar="OUT", help="a new directory"
    ).required = False  # nargs="?" would not be looked for after an option
    target = merge.add_mutually_exclusive_group()
    for option, kind, name, what in (
        ("--sigma-rel", float, "S", "a power average of this relative width, up to 0.2887"),
        ("--gamma", float, "G", "a power average of this exponent"),
        ("--half-life", float, "N", "an average of constant decay; its half-life in updates"),
        ("--window", _whole(1, 10**9), "N", "the mean of the last N updates"),
        ("--linear", _whole(1, 10**9), "N", "the same: a learning rate that fell linearly"),
        (
            "--one-minus-sqrt",
            _whole(1, 10**9),
            "N",
            "one that fell as 1 - sqrt, in steps of the checkpoints",
        ),
    ):
        target.add_argument(option, type=kind, metavar=name, help=what)
    merge.add_argument(
        "--at", type=_whole(0, 10**12), metavar="STEP", help="of a checkpoint; default: the newest"
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


def _whole(least: int, most: int) -> Callable[[str], int]:
    """Return the type of an argument: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return parse


if __name__ == "__main__":
    main()
