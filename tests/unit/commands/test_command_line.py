"""What all commands have: help with examples, and one line for whatever stops them."""

import argparse
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import types
from importlib import import_module
from importlib.util import find_spec

import pytest
from folders import CHECKPOINTS as GOLDEN

from emaopt.__main__ import main, make_parser
from emaopt._commands import running


COMMANDS = next(
    action.choices
    for action in make_parser()._actions
    if isinstance(action, argparse._SubParsersAction)
)
NEEDED = {"demo": "", "ls": "run", "convert": "run new", "merge": "run", "diff": "run"}


@pytest.fixture(params=COMMANDS)
def stopped(request, monkeypatch):
    """Run a command whose work raises something."""

    def run(error):
        def work(*_, **__):
            raise error

        module, _, function = COMMANDS[request.param].get_default("target").partition(":")
        function = "run" if request.param == "demo" else function
        monkeypatch.setattr(import_module(module), function, work)
        main([request.param, *NEEDED[request.param].split()])

    run.name = request.param
    return run


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    listed = re.findall(r"^    (\w+)", capsys.readouterr().out, re.M)
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_fits_a_terminal(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = COMMANDS[command].format_help()
    assert f"\nexamples:\n  emaopt {command}" in text
    assert max(map(len, text.splitlines())) <= 80


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


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            IndexError("Read less bytes than requested"),
            "IndexError: Read less bytes than requested",
        ),
        (MemoryError(), "MemoryError"),
        (KeyError("https://"), "KeyError: 'https://'"),
        (SystemError("nanobind"), "SystemError: nanobind"),
        (ValueError("two\nlines\n  and more."), "two lines and more"),
        (ValueError("w\x1b[2J\x07 is missing."), r"w\x1b[2J\x07 is missing"),
        (ValueError("x" * 3000), "x" * 2000 + " ..."),
    ],
    ids=lambda x: type(x).__name__,
)
def test_an_error_of_any_type_is_one_line_and_exit_code_2(error, told, stopped, capsys):
    with pytest.raises(SystemExit, match="2"):
        stopped(error)
    assert capsys.readouterr().err == (
        f"emaopt {stopped.name}: {told}. See emaopt {stopped.name} --help.\n"
    )


def test_an_interrupt_that_became_an_error_is_an_interrupt(monkeypatch, capsys):
    def interrupted(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ValueError("a file is damaged") from error

    module = import_module(COMMANDS["ls"].get_default("target").partition(":")[0])
    monkeypatch.setattr(module, "command", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit, match="130"):
        main(["ls", "run"])
    assert capsys.readouterr().err == ""
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_command_runs_in_a_thread_too(capsys):
    """There no signal can be handled."""
    codes = []

    def run():
        with pytest.raises(SystemExit) as exit_:
            main(["ls", "/nowhere"])
        codes.append(exit_.value.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [2]


def shell(command):
    """Exit code, output and errors of a line of the shell."""
    line = command.replace("emaopt", f"{sys.executable} -m emaopt")
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


needs_tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs the extra tf1")


@needs_tensorflow
@pytest.mark.slow
def test_closed_streams_are_no_error():
    adam = GOLDEN / "adam"
    code, out, _ = shell(f"emaopt ls {adam} 2>&-")
    assert (code, "11 leaves" in out) == (0, True)
    assert shell(f"emaopt ls {adam} >&-") == (0, "", "")
    assert shell(f"emaopt diff {adam} {GOLDEN}/no_average >&- 2>&- <&-") == (1, "", "")
    code, _, said = shell("emaopt ls /nowhere >&-")
    assert (code, said.count("\n")) == (2, 1)


@pytest.mark.slow
def test_output_that_cannot_be_written_is_one_line():
    code, _, said = shell("emaopt ls --help >/dev/full; emaopt diff /nowhere >/dev/full")
    assert code == 2
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "path"),
    [
        ("ls {}", "s3://bucket/x"),
        ("ls {}", "https://a/b"),
        ("diff {}", "gs://bucket/x"),
        ("convert {} new", "foo://x"),
        ("convert {adam} {}", "gs://bucket/x"),
        ("convert {adam} {}", "foo://x"),
    ],
)
def test_a_place_that_cannot_be_reached_is_one_line(command, path, tmp_path, monkeypatch):
    if "{adam}" in command and not find_spec("tensorflow"):
        pytest.skip("needs the extra tf1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    code, out, said = shell(f"emaopt {command.format(path, adam=GOLDEN / 'adam')}")
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert path in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("shtab") is None, reason="needs the extra completion")
def test_bash_completes_commands_options_and_files(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    (tmp_path / "a-run").mkdir()
    typed = ["l", "ls --a", "ls a-r", "diff a-run a-r", "demo --out a-r", "convert a-r"]
    for words in typed:
        script += f"\nCOMP_WORDS=(emaopt {words}); COMP_CWORD={len(words.split())}; "
        script += 'COMPREPLY=(); _shtab_emaopt; echo "$COMPREPLY"'
    done = subprocess.run(
        ["bash"], input=script, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["ls", "--averages", "a-run", "a-run", "a-run", "a-run"]


def test_without_shtab_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit, match="2"):
        main(["--print-completion", "bash"])
    assert 'pip install "emaopt[completion]"' in capsys.readouterr().err


def test_a_completion_script_is_printed(monkeypatch, capsys):
    library = types.SimpleNamespace(complete=lambda parser, shell: f"{parser.prog} for {shell}")
    monkeypatch.setitem(sys.modules, "shtab", library)
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", "bash"])
    assert not stopped.value.code
    assert capsys.readouterr().out == "emaopt for bash\n"


def test_outside_the_main_thread_interrupts_are_left_to_others():
    before, seen = signal.getsignal(signal.SIGINT), []

    def look():
        with running._interrupts() as interrupts:
            seen.append((interrupts, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [([], before)]


def test_what_a_full_disk_does_not_take_of_the_output_is_dropped(monkeypatch):
    class Full:
        def flush(self):
            raise OSError(28, "No space left on device")

    dropped = []
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(running, "_drop_output", lambda: dropped.append(True))
    running._flush()
    assert dropped == [True]
