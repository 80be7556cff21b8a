"""Check what an error says."""

import re

import pytest


def check(do, said, fix):
    """Assert that `do()` raises an error that begins with `said` and names the fix: patterns."""
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        do()
    message = str(raised.value)
    assert re.match(f"(?s){said}", message)
    assert re.search(f"(?s){fix}", message)
    assert message.endswith((".", ")"))
