"""What the tests of this room share."""

import signal

import pytest


@pytest.fixture(autouse=True)
def interruptible():
    """Raise `KeyboardInterrupt` at Ctrl-C: a shell that starts pytest with `&` has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
