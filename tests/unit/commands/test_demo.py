import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt.__main__ import main
from emaopt._commands import demo, digits


pytestmark = pytest.mark.slow  # almost all read what one run of the command has written
EPOCHS = 4
STEPS = 28  # of an epoch
WRITER = find_spec("tensorboardX") is not None
needs_writer = pytest.mark.skipif(not WRITER, reason="needs tensorboardX")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}

# `emaopt demo`, met by a signal in the middle of an epoch
INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # `&` in a shell has it ignored
from emaopt import __main__
from emaopt._commands import digits

def interrupted(images, labels, seed, epoch, batches=digits.batches):
    for i, batch in enumerate(batches(images, labels, seed, epoch)):
        if (epoch, i) == ({epoch}, 9):
            os.kill(os.getpid(), {signal})
        yield batch

digits.batches = interrupted
__main__.main()
"""

# the other process, on a machine where no optimizer is installed
READER = """
import runpy, sys
sys.modules |= {"emaopt": None, "optax": None}
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def call(*command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def table(output):
    """Epoch, loss, raw and averaged accuracy, of each line that has them."""
    return re.findall(r"^ +(\d+)  (\d\.\d{4}) +(\d+\.\d\d%) +(\d+\.\d\d%)$", output, re.MULTILINE)


def item(out, epoch, name):
    return ocp.load(out / "checkpoints" / str(epoch), checkpointable_name=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run without a break: its directory and its output."""
    out = tmp_path_factory.mktemp("demo") / "run"
    logged = ("--tensorboard", out.parent / "logs") if WRITER else ()
    done = call("-m", "emaopt", "demo", "--epochs", EPOCHS, "--out", out, *logged)
    assert done.returncode == 0, done.stderr
    return out, done


def test_it_says_at_once_what_it_does_and_in_the_end_what_to_do_next(finished):
    out, done = finished
    start, end = done.stdout.split("epoch    loss")
    (images, _), _ = digits.digits()
    told = (f"{len(images)} real", f"in {EPOCHS} epochs", "emaopt.ema()", str(out))
    for text in told:
        assert text in start
    assert max(map(len, demo.START.splitlines())) <= 80
    assert f"emaopt ls {out}/checkpoints --averages" in end
    assert "import flax" not in Path(demo.__file__).read_text()  # nothing heavy comes before


def test_each_epoch_gets_a_line_and_a_pipe_gets_no_progress_bar(finished):
    _, done = finished
    assert done.stderr == ""
    epochs, losses, *_ = zip(*table(done.stdout), strict=True)
    assert epochs == ("1", "2", "3", "4")
    assert float(losses[-1]) < 0.6 * float(losses[0])


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_checkpoint_has_the_averages_under_the_original_names(finished):
    out, done = finished
    params, opt_state = item(out, EPOCHS, "params"), item(out, EPOCHS, "opt_state")
    assert sorted(params) == ["conv1", "conv2", "dense", "logits"]
    _, test = digits.digits()
    raw, averaged = (f"{digits.accuracy(p, *test):.2%}" for p in (opt_state[2]["shadow"], params))
    assert raw != averaged
    assert table(done.stdout)[-1][2:] == (raw, averaged)


def test_a_process_without_optimizers_reads_the_averages_to_the_same_accuracy(finished):
    out, done = finished
    read = call("-P", "-c", READER, digits.__file__, out / f"checkpoints/{EPOCHS}")
    assert float(read.stdout) == digits.evaluate(out / f"checkpoints/{EPOCHS}")
    shown = f"{float(read.stdout):.2%}"
    assert table(done.stdout)[-1][3] == shown
    assert re.findall(r"process  +(\S+)$|optimizer  +(\S+)$", done.stdout, re.MULTILINE) == [
        (shown, ""),
        ("", shown),
    ]


def test_the_picture_shows_both_curves(finished):
    out, _ = finished
    pixels = np.round(imread(out / "accuracy.png") * 255).astype(int)
    assert pixels.shape == (420, 720, 4)
    for color in "#4184e4", "#d1742f":
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.sum(np.all(pixels[..., :3] == rgb, axis=-1)) > 300


@needs_writer
def test_tensorboard_gets_curves_histograms_and_the_graph(finished):
    import eventfile

    out, done = finished
    found = eventfile.values(out.parent / "logs")
    epochs = [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
    points = list(range(digits.STEPS_PER_POINT, STEPS * EPOCHS + 1, digits.STEPS_PER_POINT))
    curves = {
        *("loss", "learning_rate", "params/norm", "slots/momentum", "slots/rms"),
        *("average/decay", "average/distance"),
        *("gradients/norm", "gradients/clipped_norm", "gradients/clipped"),
    }
    histograms = {
        f"{layer}/{leaf}{kind}"
        for layer in ("conv1", "conv2", "dense", "logits")
        for leaf in ("kernel", "bias")
        for kind in ("", "/RMSProp", "/RMSProp_1", "/ExponentialMovingAverage")
    }
    assert found.keys() == curves | histograms | {"accuracy/raw", "accuracy/averaged"}
    assert all([step for step, _ in found[tag]] == points for tag in curves)
    assert all([step for step, _ in found[tag]] == epochs for tag in found.keys() - curves)
    value = {tag: np.array([x for _, x in found[tag]]) for tag in found.keys() - histograms}
    _, losses, *accuracies = zip(*table(done.stdout), strict=True)
    for column, shown in zip(("raw", "averaged"), accuracies, strict=True):
        assert [f"{x:.2%}" for x in value[f"accuracy/{column}"]] == list(shown)
    means = np.mean(value["loss"].reshape(EPOCHS, -1), axis=1)
    assert [f"{x:.4f}" for x in means] == list(losses)
    clipped = value["gradients/clipped"]
    assert 0 == clipped.min() < clipped.max() == 1
    assert np.all((value["gradients/norm"] > value["gradients/clipped_norm"]) == (clipped > 0))
    scopes = {name.split("/")[0] for name in eventfile.graph(out.parent / "logs")}
    assert scopes == {"arguments", "gradients", "update", "summary", "results"}
    assert f"curves      tensorboard --logdir {out.parent / 'logs'}" in done.stdout


@needs_writer
def test_a_resumed_run_replaces_what_came_after_its_checkpoint(finished, tmp_path, monkeypatch):
    import eventfile

    out, _ = finished
    monkeypatch.setattr(demo, "_in_another_process", lambda _, saved: digits.evaluate(saved))
    arguments = ["--epochs", str(EPOCHS), "--resume", "--tensorboard", str(tmp_path)]
    main(["demo", "--out", str(out), *arguments])
    started = [event.step for event in eventfile.events(tmp_path) if event.session_log.status]
    assert started == [STEPS * EPOCHS + 1]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_that_was_interrupted_resumes_to_the_same_bits(finished, tmp_path):
    whole, _ = finished
    out = tmp_path / "run"
    arguments = ["demo", "--out", out, "--epochs"]

    code = INTERRUPTED.format(epoch=2, signal=int(signal.SIGKILL))
    killed = call("-c", code, *arguments, EPOCHS - 1)
    assert killed.returncode == -signal.SIGKILL
    assert [row[0] for row in table(killed.stdout)] == ["1"]

    code = INTERRUPTED.format(epoch=3, signal=int(signal.SIGINT))
    stopped = call("-c", code, *arguments, EPOCHS, "--resume")
    assert stopped.returncode == 130
    assert stopped.stderr == "\nemaopt demo: interrupted. With --resume it continues.\n"

    resumed = call("-m", "emaopt", *arguments, EPOCHS, "--resume")
    assert "resumed after epoch 2" in resumed.stdout
    assert [row[0] for row in table(resumed.stdout)] == ["3", "4"]
    for name in "params", "opt_state", "rest":
        ours, theirs = item(out, EPOCHS, name), item(whole, EPOCHS, name)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert (out / "accuracy.png").read_bytes() == (whole / "accuracy.png").read_bytes()


def test_a_checkpoint_that_evaluates_otherwise_fails_the_demo(finished, monkeypatch, capsys):
    out, _ = finished
    monkeypatch.setattr(demo, "_in_another_process", lambda *_: 0.5)
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--out", str(out), "--epochs", str(EPOCHS), "--resume"])
    assert "so the checkpoint is wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--seed 1", "--seed 1: the run to resume has seed 0. Pass --seed 0"),
        ("--epochs 3", "--epochs 3: the run to resume has done 4. Pass --epochs 4 or more"),
    ],
)
def test_another_run_is_not_resumed(arguments, told, finished, capsys):
    out, _ = finished
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--out", str(out), "--resume", *arguments.split()])
    shown = capsys.readouterr()
    assert table(shown.out) == []
    assert shown.err == f"emaopt demo: {told}. See emaopt demo --help.\n"


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    main(["demo", "--out", str(tmp_path), "--epochs", "1", "--resume"])
    shown = capsys.readouterr().out
    assert "resumed" not in shown
    assert [row[0] for row in table(shown)] == ["1"]


def test_the_seed_and_the_epoch_decide_the_batches():
    training, _ = digits.digits()
    epoch = lambda *which: np.concatenate([x for x, _ in digits.batches(*training, *which)])
    np.testing.assert_array_equal(epoch(0, 1), epoch(0, 1))
    assert np.any(epoch(0, 1) != epoch(0, 2))
    assert np.any(epoch(0, 1) != epoch(1, 1))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "emaopt: the following arguments are required: command"),
        ("train", "emaopt: argument command: invalid choice: 'train'"),
        ("demo --epoch", "emaopt demo: argument --epochs: expected one argument"),
        ("demo --epochs 0", "emaopt demo: argument --epochs: '0' is no whole number from 1 to"),
        ("demo --epochs two", "emaopt demo: argument --epochs: 'two' is no whole number from 1"),
        ("demo --seed -1", "emaopt demo: argument --seed: '-1' is no whole number from 0 to"),
        ("demo --seed 4294967296", "argument --seed: '4294967296' is no whole number from 0 to"),
        ("demo --quick", "emaopt: unrecognized arguments: --quick"),
        ("demo --out used", "emaopt demo: --out used is not empty. Pass --resume to go on there"),
        ("demo --out used/file", "--out used/file cannot be used: Not a directory. Pass another"),
        pytest.param(
            "demo --tensorboard used/file",
            "emaopt demo: --tensorboard used/file cannot be used: File exists. Pass another DIR",
            marks=needs_writer,
        ),
        ("demo --resume", "emaopt demo: --out emaopt-demo holds no run. Leave out --resume"),
        ("demo --out used --resume", "emaopt demo: --out used holds no run. Leave out --resume"),
    ],
)
def test_wrong_arguments_get_one_line(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("used").mkdir()
    Path("used/file").touch()
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert told in shown.err
    assert shown.err.endswith(" --help.\n")
    assert shown.err.count("\n") == 1


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "emaopt._commands.digits")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match="2"):
        main(["demo"])
    assert 'tqdm is not installed. pip install "emaopt[demo]"' in capsys.readouterr().err


def test_without_tensorboardx_nothing_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--tensorboard", "logs"])
    told = 'tensorboardX is not installed. pip install "emaopt[tensorboard]"'
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_shows_every_argument_and_examples(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for argument in "--seed", "--epochs", "--out", "--resume", "--tensorboard":
        assert argument in shown
    assert "emaopt demo --epochs 60 --resume" in shown


def test_the_command_is_installed_and_knows_its_version():
    script = Path(sys.executable).with_name("emaopt")
    shown = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"emaopt {emaopt.__version__}\n"
