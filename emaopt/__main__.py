"""The command line: `emaopt`, or `python -m emaopt`. Each command imports what it needs."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import emaopt


# nothing is computed, so nothing needs an accelerator, or to be told how one would be used
_QUIET = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


class _Parser(argparse.ArgumentParser):
    """A wrong argument gets one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. See {self.prog} --help.\n")


def main(argv: list[str] | None = None) -> None:
    """Run the command that the arguments name."""
    parser = _Parser(prog="emaopt", description="Averages of the parameters, for JAX and Optax.")
    parser.add_argument("--version", action="version", version=f"emaopt {emaopt.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(commands)
    _add_ls(commands)
    _add_convert(commands)
    _add_synthesize(commands)
    _add_diff(commands)
    arguments = vars(parser.parse_args(argv))
    arguments.pop("command")(**arguments)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small network on handwritten digits and see what averaging does",
        description=(
            "Train a small convolutional network on real handwritten digits, on the CPU, in less\n"
            "than a minute. After each epoch: the test accuracy of the raw and of the averaged\n"
            "parameters, and a checkpoint with the averages under the original names. In the\n"
            "end: a picture, and another process that reads the checkpoint with plain Orbax."
        ),
        epilog=(
            "examples:\n"
            "  emaopt demo\n"
            "  emaopt demo --epochs 60 --resume         go on, also after Ctrl-C or a crash\n"
            "  emaopt demo --seed 1 --out other-seed    another run beside it\n"
            "  emaopt demo --tensorboard logs           then: tensorboard --logdir logs\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--seed", type=_whole(0, 2**32 - 1), default=0, metavar="N", help="default: %(default)s"
    )
    demo.add_argument(
        "--epochs",
        type=_whole(1, 10**6),
        default=30,
        metavar="N",
        help="of the whole run, those before --resume too; default: %(default)s",
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
        help="continue the run in DIR; the outcome is the same, bit for bit, as without the break",
    )
    demo.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write curves, histograms and the graph"
    )

    def command(**arguments):
        with _one_line(demo, "demo"):
            from emaopt._commands.demo import run

            try:
                run(**arguments)
            except KeyboardInterrupt:
                print("\nemaopt demo: interrupted. With --resume it continues.", file=sys.stderr)
                raise

    demo.set_defaults(command=command)


def _add_ls(commands: argparse._SubParsersAction) -> None:
    ls = commands.add_parser(
        "ls",
        help="what is in a checkpoint of TF1 or Orbax",
        description=(
            "List the leaves of a checkpoint, of TF1 or of Orbax: name, shape, dtype, size, and\n"
            "what it is: a variable, or the average, a slot or the raw parameter of which one.\n"
            "Only metadata is read."
        ),
        epilog=(
            "examples:\n"
            "  emaopt ls run/model.ckpt-20     TF1, by prefix; of a directory, its newest\n"
            "  emaopt ls emaopt-demo/checkpoints         Orbax: the newest finished step\n"
            "  emaopt ls emaopt-demo/checkpoints/30 --json\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ls.add_argument("checkpoint", metavar="CHECKPOINT", help="a prefix or a directory")
    ls.add_argument("--json", action="store_true", dest="as_json", help="for machines")

    def command(**arguments):
        with _one_line(ls):
            from emaopt._commands.ls import show

            show(**arguments)

    ls.set_defaults(command=command)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
        "convert",
        help="a checkpoint of TF1 as one of Orbax, or back",
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
            "variables under those of the averages. With --swapped, the checkpoint of TF1 is of\n"
            "that form, whether it is SOURCE or DESTINATION."
        ),
        epilog=(
            "examples:\n"
            "  emaopt convert run/model.ckpt-20 converted\n"
            "  emaopt convert converted again/model.ckpt-20\n"
            "  emaopt convert --averages run/model.ckpt-20 for-serving\n"
            "  emaopt convert --average-name MovingAverage/{}/average run/model.ckpt-20 converted\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("source", metavar="SOURCE", help="as for emaopt ls")
    convert.add_argument(
        "destination", metavar="DESTINATION", help="a directory for Orbax, a prefix for TF1; new"
    )
    convert.add_argument(
        "--averages",
        action="store_true",
        help="the averages only, under the names of the variables; one without is itself",
    )
    convert.add_argument(
        "--swapped", action="store_true", help="TF1's side is what its swapping_saver writes"
    )
    convert.add_argument(
        "--average-name",
        default="ExponentialMovingAverage",
        metavar="NAME",
        help="the name= of TF1's ExponentialMovingAverage; {} in it stands for the variable",
    )

    def command(**arguments):
        with _one_line(convert, "tf1"):
            from emaopt._commands.convert import convert as run

            run(**arguments)

    convert.set_defaults(command=command)


def _add_synthesize(commands: argparse._SubParsersAction) -> None:
    synthesize = commands.add_parser(
        "synthesize",
        help="another average from the checkpoints of a run, after training",
        description=(
            "Add up the averages in the checkpoints of a run to one of another length, and write\n"
            "it to OUT: a checkpoint of Orbax with the item params. How far it will be from the\n"
            "average that is wanted is known before, from the decays alone; without a target, and\n"
            "without OUT, a list of targets with these predicted errors is printed.\n\n"
            "What the recorded averages are, their ledgers say: emaopt.ema(..., ledger=True).\n"
            "Leaves of params that are not averaged are those of the newest checkpoint."
        ),
        epilog=(
            "examples:\n"
            "  emaopt synthesize run                              what is within reach?\n"
            "  emaopt synthesize run --sigma-rel 0.15 out\n"
            "  emaopt synthesize run --window 5000 --at 20000 out\n"
            "  emaopt synthesize run --source fast=decay:0.99 --source slow=decay:0.998 \\\n"
            "                        --half-life 700 out\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    synthesize.add_argument("run", metavar="RUN", help="a directory with checkpoints of Orbax")
    synthesize.add_argument(
        "destination", metavar="OUT", help="a new directory"
    ).required = False  # nargs="?" would not be looked for after an option
    target = synthesize.add_mutually_exclusive_group()
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
    synthesize.add_argument(
        "--at", type=_whole(0, 10**12), metavar="STEP", help="of a checkpoint; default: the newest"
    )
    synthesize.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="NAME=DECAY",
        help="use this average, which was sigma_rel:S, gamma:G, decay:D, half_life:N, warmup:D or "
        "debiased:D, instead of all that have ledgers; repeatable",
    )
    synthesize.add_argument(
        "--threshold",
        type=float,
        default=0.15,
        metavar="E",
        help="the predicted error above which nothing is written; default: %(default)s",
    )
    synthesize.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the predicted error over sigma_rel"
    )
    synthesize.add_argument("--json", action="store_true", dest="as_json", help="for machines")

    def command(**arguments):
        with _one_line(synthesize, "posthoc"):
            from emaopt._commands.synthesize import command as run

            run(**arguments)

    synthesize.set_defaults(command=command)


def _add_diff(commands: argparse._SubParsersAction) -> None:
    diff = commands.add_parser(
        "diff",
        help="how far apart two checkpoints are, or averages and parameters",
        description=(
            "Compare two checkpoints, of TF1 or of Orbax, leaf by leaf: the largest difference,\n"
            "and the L2 norm of the difference relative to the larger of both. What differs most\n"
            "comes first. Without B: the averages in A, and the parameters in it.\n\n"
            "If one of them is of TF1, the other one is compared as what emaopt convert would\n"
            "make of it.\n\n"
            "The exit code is 0 if all is equal, 1 if anything differs, 2 if anything is wrong."
        ),
        epilog=(
            "examples:\n"
            "  emaopt diff emaopt-demo/checkpoints/10 emaopt-demo/checkpoints/20\n"
            "  emaopt diff emaopt-demo/checkpoints        its averages against its parameters\n"
            "  emaopt diff run/model.ckpt-20 converted --json\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    diff.add_argument("a", metavar="A", help="as for emaopt ls")
    diff.add_argument("b", metavar="B", nargs="?", help="another one")
    diff.add_argument("--json", action="store_true", dest="as_json", help="for machines")

    def command(a, b, as_json):
        differs = False
        with _one_line(diff, "tf1"):
            from emaopt._commands.diff import compare, show

            found = compare(a, b)
            differs = not found.equal
            show(found, a, b, as_json)
        if differs:
            sys.exit(1)

    diff.set_defaults(command=command)


@contextmanager
def _one_line(parser: argparse.ArgumentParser, extra: str = "") -> Iterator[None]:
    """What is wrong gets one line; a missing package, the name of the extra that has it."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ModuleNotFoundError as error:
        extra = "tensorboard" if error.name == "tensorboardX" else extra
        install = f'{error.name} is not installed. pip install "emaopt[{extra}]"'
        parser.error(install if extra else str(error))
    except (ValueError, OSError, argparse.ArgumentError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)


def _whole(least: int, most: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number within bounds."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return parse


if __name__ == "__main__":
    main()
