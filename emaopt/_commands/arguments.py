"""Define the arguments of each command, and its help."""

import argparse
from collections.abc import Callable
from pathlib import Path


_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}  # shtab's words for files


def add(
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


def complete_files(argument: argparse.Action) -> None:
    """Let a shell complete an argument by the files that are there."""
    vars(argument)["complete"] = _FILES


_EXAMPLES_OF_DEMO = [
    "emaopt demo",
    "emaopt demo --epochs 60 --resume         go on, also after Ctrl-C or a crash",
    "emaopt demo --seed 1 --out other-seed    another run beside it",
    "emaopt demo --tensorboard logs           then: tensorboard --logdir logs",
]


def add_demo(commands: argparse._SubParsersAction) -> None:
    """Add `emaopt demo`."""
    demo = add(
        commands,
        "demo",
        "emaopt._commands.demo:command",
        help="train a small network on handwritten digits and see what averaging does",
        description=(
            "Train a small convolutional network on real handwritten digits, on the CPU, in\n"
            "less than a minute. After each epoch it prints the test accuracy of the raw and\n"
            "of the averaged parameters, and saves a checkpoint with the averages under the\n"
            "original names. At the end it draws a picture, and another process reads the\n"
            "checkpoint with plain Orbax."
        ),
        examples=_EXAMPLES_OF_DEMO,
        extra="demo",
    )
    demo.add_argument(
        "--seed",
        type=whole(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="the seed of parameters and batches; default: %(default)s",
    )
    demo.add_argument(
        "--epochs",
        type=whole(1, 10**6),
        default=30,
        metavar="N",
        help="epochs of the whole run, including those before --resume; default: %(default)s",
    )
    out = demo.add_argument(
        "--out",
        type=Path,
        default=Path("emaopt-demo"),
        metavar="DIR",
        help="where checkpoints and picture go; default: %(default)s",
    )
    complete_files(out)
    demo.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in DIR; the result is the same, bit for bit, as without the break",
    )
    demo.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write curves, histograms and the graph"
    )


def add_ls(commands: argparse._SubParsersAction) -> None:
    """Add `emaopt ls`."""
    ls = add(
        commands,
        "ls",
        "emaopt._commands.ls:command",
        help="list what is in a checkpoint of TF1 or Orbax, or in .safetensors files",
        description=(
            "List the leaves of a checkpoint: name, shape, dtype and bytes, in groups that\n"
            "say what they are: variables, averages, slots of an optimizer, raw parameters.\n"
            "Of a run, the newest checkpoint is listed. A run one level below DIR is found.\n"
            "Only metadata is read, no value."
        ),
        examples=[
            "emaopt ls run/model.ckpt-20               TF1, by its prefix",
            "emaopt ls emaopt-demo/checkpoints         Orbax: the newest finished step",
            "emaopt ls emaopt-demo/checkpoints/30 --averages",
            "emaopt ls averages.safetensors --json",
        ],
    )
    complete_files(
        ls.add_argument(
            "checkpoint",
            metavar="CHECKPOINT",
            help="a directory of Orbax: a run or one checkpoint; a prefix of TF1, such as "
            "model.ckpt-20, or its directory; a .safetensors file, the index of several, or their "
            "directory",
        )
    )
    ls.add_argument("--averages", action="store_true", help="list the averages only")
    ls.add_argument("--json", action="store_true", dest="as_json", help="print JSON, ungrouped")


def add_diff(commands: argparse._SubParsersAction) -> None:
    """Add `emaopt diff`."""
    diff = add(
        commands,
        "diff",
        "emaopt._commands.diff:command",
        help="compare two checkpoints, or the averages and the parameters of one",
        description=(
            "Compare two checkpoints of TF1 or Orbax, or .safetensors files, leaf by leaf:\n"
            "the largest difference, and the L2 norm of the difference relative to the larger\n"
            "of both norms. What differs most comes first. Without B, the averages in A are\n"
            "compared with the parameters in A.\n\n"
            "If one of them is of TF1, the other one is compared as what emaopt convert\n"
            "would make of it.\n\n"
            "The exit code is 0 if all is equal, 1 if anything differs, and 2 for an error."
        ),
        examples=[
            "emaopt diff emaopt-demo/checkpoints/10 emaopt-demo/checkpoints/20",
            "emaopt diff emaopt-demo/checkpoints        its averages against its parameters",
            "emaopt diff run/model.ckpt-20 converted --json",
        ],
    )
    complete_files(diff.add_argument("a", metavar="A", help="as for emaopt ls"))
    complete_files(diff.add_argument("b", metavar="B", nargs="?", help="another one"))
    diff.add_argument("--json", action="store_true", dest="as_json", help="print JSON, all leaves")


_EXAMPLES_OF_CONVERT = [
    "emaopt convert run/model.ckpt-20 converted",
    "emaopt convert converted again/model.ckpt-20",
    "emaopt convert --averages run/model.ckpt-20 for-serving",
    "emaopt convert --average-name MovingAverage/{}/average model.ckpt-20 converted",
]


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Add `emaopt convert`."""
    convert = add(
        commands,
        "convert",
        "emaopt._commands.convert:convert",
        help="make an Orbax checkpoint of a TF1 checkpoint, or back",
        description=(
            "Write a checkpoint of TF1 as one of Orbax, or one of Orbax as one of TF1.\n\n"
            "From TF1, by name, whatever the optimizer was:\n"
            "  params       the variables, nested: conv/kernel -> {conv: {kernel: ...}}\n"
            "  tf1/step     the global step\n"
            "  tf1/shadow   the averages, nested, for emaopt.checkpoint.restore_averages\n"
            "  tf1/other    all else under its own name: slots, powers\n"
            "Back from there: the names, shapes, dtypes and bits that TF1 wrote. Any other\n"
            "checkpoint of Orbax becomes what emaopt.tf1.save writes; strings are left out.\n\n"
            "TF1's swapping_saver writes the averages under the names of the variables, and\n"
            "the variables under those of the averages. Pass --swapped if the checkpoint of\n"
            "TF1 is of that form, as SOURCE or as DESTINATION."
        ),
        examples=_EXAMPLES_OF_CONVERT,
    )
    complete_files(convert.add_argument("source", metavar="SOURCE", help="as for emaopt ls"))
    complete_files(
        convert.add_argument(
            "destination",
            metavar="DESTINATION",
            help="a new directory for Orbax, or a new prefix for TF1",
        )
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


def updates(text: str) -> float | str:
    """Return the number of updates of a decay, or `all`, if it is not said: see `length`."""
    return text if text == "all" else length(text)


def length(text: str) -> float:
    """Return a number of updates, int; or their share of all so far, float: `10%` is 0.1."""
    if not text.endswith("%"):
        return whole(1, 10**9)(text)
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share of the updates, such as 10%")
    return share


def numbers(text: str) -> list[float]:
    """Return numbers that are joined with commas."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers: 0.5,0.25") from None


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return the type of an argument: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return parse
