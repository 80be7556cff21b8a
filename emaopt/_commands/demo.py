"""Run `emaopt demo`: a small network learns handwritten digits, and its average reads them better.

This file imports nothing heavy, so that the first lines are printed at once.
"""

import os
import subprocess
import sys
from argparse import ArgumentError
from pathlib import Path

import jax

from emaopt._extras import require


START = """\
A small network of two convolutions and two dense layers learns to read 898 real
handwritten digits, on the CPU, in {epochs} epochs. After each update its
parameters are averaged by emaopt.ema(), over the last tenth of the updates.
Every epoch is saved in {out}/checkpoints. Ctrl-C is safe:
--resume goes on. It starts in some seconds, when the step is compiled.
"""
NEXT = """\

What you can do next:
  emaopt ls {out}/checkpoints --averages
  emaopt diff {out}/checkpoints         the averages against the parameters
  emaopt demo --out {out} --epochs {more} --resume
"""


def command(
    seed: int, epochs: int, out: Path, resume: bool, tensorboard: Path | None = None
) -> None:
    """Run the demo, and say after Ctrl-C how it goes on."""
    try:
        run(seed=seed, epochs=epochs, out=out, resume=resume, tensorboard=tensorboard)
    except KeyboardInterrupt:
        print("\nemaopt demo: interrupted. With --resume it continues.", file=sys.stderr)
        raise


def run(
    *, seed: int, epochs: int, out: Path, resume: bool, tensorboard: Path | None = None
) -> None:
    """Train, draw, and let another process read the last checkpoint.

    Args:
        seed: The seed of parameters and batches.
        epochs: The number of epochs of the whole run.
        out: Where checkpoints and picture go.
        resume: Whether to go on with the run that is there.
        tensorboard: Where to write curves, histograms and the graph.
    """
    if tensorboard:
        _check_tensorboard(tensorboard)
    checkpoints = _directory(out, resume)
    print(START.format(epochs=epochs, out=out), flush=True)
    # the network is too small to gain from an accelerator, and the CPU repeats every bit
    jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
    digits = require("emaopt._commands.digits", "demo")
    averages, history = digits.train(checkpoints, seed, epochs, tensorboard)
    digits.draw(history, out / "accuracy.png")
    last = str(len(history))
    here = digits.accuracy(averages, *digits.digits()[1])
    there = _in_another_process(digits.__file__, checkpoints / last)
    print(f"\naverages in this process                            {here:.2%}")
    print("averages in another process, which read them with")
    print(f"plain Orbax and knows no optimizer                  {there:.2%}")
    print(f"checkpoint  {out / 'checkpoints' / last}\npicture     {out / 'accuracy.png'}")
    if tensorboard:
        print(f"curves      tensorboard --logdir {tensorboard}")
    print(NEXT.format(out=out, more=2 * epochs), end="")
    if here != there:
        raise ValueError("the two accuracies differ, so the checkpoint is wrong")


def _directory(out: Path, resume: bool) -> Path:
    """Return where the checkpoints are. Make it for a new run."""
    checkpoints = out / "checkpoints"
    try:
        if resume and not checkpoints.is_dir():
            raise ArgumentError(None, f"--out {out} holds no run. Leave out --resume to start one")
        if not resume and out.exists() and any(out.iterdir()):
            raise ArgumentError(
                None, f"--out {out} is not empty. Pass --resume to go on there, or another --out"
            )
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            None, f"--out {out} cannot be used: {error.strerror}. Pass another --out"
        ) from None
    return checkpoints.resolve()


def _check_tensorboard(directory: Path) -> None:
    """Raise unless event files can be written."""
    require("tensorboardX", "tensorboard")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            None, f"--tensorboard {directory} cannot be used: {error.strerror}. Pass another DIR"
        ) from None


def _in_another_process(file: str, checkpoint: Path) -> float:
    """Run a file on a checkpoint. The file's directory is not searched for modules (-P)."""
    command = [sys.executable, "-P", file, str(checkpoint)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
