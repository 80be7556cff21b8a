"""What all commands have: help with examples, and one line for whatever stops them."""

import errno
import re
from importlib.util import find_spec

import pytest

from emaopt.__main__ import main


needs_tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs the extra tf1")
COMMANDS = {  # what to pass, and what does the work
    "demo": ("", "emaopt._commands.demo.run"),
    "ls": ("run", "emaopt._commands.ls.show"),
    "convert": ("run new", "emaopt._commands.convert.convert"),
    "synthesize": ("run", "emaopt._commands.synthesize.command"),
    "diff": ("run", "emaopt._commands.diff.compare"),
}


@pytest.fixture(
    params=[pytest.param(c, marks=needs_tensorflow) if c == "convert" else c for c in COMMANDS]
)
def stopped(request, monkeypatch):
    """Run a command whose work raises something."""

    def run(error):
        def work(*_, **__):
            raise error

        arguments, place = COMMANDS[request.param]
        monkeypatch.setattr(place, work)
        main([request.param, *arguments.split()])

    run.name = request.param
    return run


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    listed = re.findall(r"^    (\w+)", capsys.readouterr().out, re.M)
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"\nexamples:\n  emaopt {command}" in capsys.readouterr().out


def test_an_interrupt_is_no_traceback(stopped, capsys):
    with pytest.raises(SystemExit, match="130"):
        stopped(KeyboardInterrupt())
    shown = capsys.readouterr()
    hint = "\nemaopt demo: interrupted. With --resume it continues.\n"
    assert (shown.out, shown.err) == ("", hint if stopped.name == "demo" else "")


def test_a_reader_that_has_seen_enough_is_no_error(stopped, capfd):
    stopped(BrokenPipeError())
    print("to nobody", flush=True)
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_gets_one_line(stopped, capsys):
    with pytest.raises(SystemExit, match="2"):
        stopped(OSError(errno.ENOSPC, "No space left on device"))
    assert capsys.readouterr().err == (
        f"emaopt {stopped.name}: [Errno 28] No space left on device. "
        f"See emaopt {stopped.name} --help.\n"
    )
