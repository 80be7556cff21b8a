"""Evaluate a run while it is trained: each checkpoint's averages, as it is finished."""

import threading
import time
from collections.abc import Iterator
from typing import Any

from etils.epath import Path

from emaopt._tree.checks import check_scalar
from emaopt._tree.paths import Params

from ._errors import DamagedError
from ._run import FINISHED, as_path, as_step, finished_steps
from ._stored import Stored


def watch(
    directory: Any,
    like: Params,
    *,
    interval: float = 10.0,
    timeout: float | None = None,
    after: int | None = None,
    name: str | None = None,
) -> Iterator[tuple[int, Params]]:
    """Yield the averages of each checkpoint of a run as it is finished, beside a trainer at work.

    It only reads. Where several checkpoints are waiting, the newest comes first. Checkpoints that
    the trainer deletes meanwhile are left out. So one that cannot be read is an error only if it is
    still there an interval (at least 2 seconds) later.

    Args:
        directory: the absolute path of the run, which need not be there yet.
        like: the parameters, see `restore_averages`. What does not fit is raised at once.
        interval: how often to look, in seconds, above 0.
        timeout: end after so many seconds without a new checkpoint; by default never.
        after: only later steps than this.
        name: which average, if there are several.

    Yields:
        The step and its averages.
    """
    check_scalar(
        "interval", interval, lambda x: (x > 0) & (x < threading.TIMEOUT_MAX), "seconds, above 0"
    )
    if timeout is not None:
        check_scalar("timeout", timeout, lambda x: x >= 0, "seconds, 0 or above, or None")
    after = None if after is None else as_step(after, "after")
    directory = as_path("directory", directory)
    done: dict[int, bytes | None] = {}  # by step, the file that finished it
    unreadable: dict[int, float] = {}
    since = time.monotonic()
    while True:
        found = finished_steps(directory)
        states = {number: _state(path) for number, path in found.items()}
        new = [s for s, state in states.items() if state is not None and done.get(s) != state]
        new = [s for s in new if after is None or s > after]
        now = time.monotonic()
        if new:
            newest = max(new)
            try:
                averaged = Stored(found[newest]).load_averages(like, name, False)
            except (DamagedError, OSError):
                first = unreadable.setdefault(newest, now)
                if newest in finished_steps(directory) and now - first > max(interval, 2.0):
                    raise
                time.sleep(min(interval, 0.1))
                continue
            done[newest] = states[newest]
            yield newest, averaged
            since = time.monotonic()
        elif timeout is not None and now - since >= timeout:
            return
        else:
            time.sleep(interval)


def _state(checkpoint: Path) -> bytes | None:
    """Read the file that finished a checkpoint, which has the time to the nanosecond in it.

    A run that was removed and started again has other checkpoints of the same steps. Returns
    `None` if the checkpoint is gone.
    """
    try:
        return (checkpoint / FINISHED).read_bytes()
    except OSError:
        return None
