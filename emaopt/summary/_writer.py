"""Write event files with tensorboardX. Arrays on the device are fetched in one transfer."""

import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._extras import require
from emaopt._names import GLOBAL_STEP, global_step, names
from emaopt._tree.checks import describe
from emaopt._tree.paths import Tree

from ._graph import graph_of
from ._histogram import histogram


_REAL = (jnp.floating, jnp.integer, jnp.bool_)


def writer(directory: Any, *, purge_step: int | None = None) -> "Writer":
    """Open a `Writer` for a directory that TensorBoard reads: `tensorboard --logdir directory`.

    With several processes, only the first one writes. The counterpart of TF1's
    `tf.summary.FileWriter`.

    Args:
      directory: Where the event file goes.
      purge_step: The step from which a run was resumed. TensorBoard then drops what an earlier,
        interrupted process wrote for this step and later ones.

    Returns:
      A `Writer`, which is a context manager.
    """
    package = require("tensorboardX", "tensorboard")
    file = package.SummaryWriter(
        str(directory),
        purge_step=purge_step,
        flush_secs=10,
        filename_suffix=f".{time.time_ns() % 10**9:09}",  # two in one second would be one file
        write_to_disk=jax.process_index() == 0,
    )
    return Writer(file)


class Writer:
    """Write what TensorBoard shows. As a context manager it closes the file at the end.

    Every method fetches its arrays in one transfer. Nothing else waits for the device.
    """

    def __init__(self, file: Any):
        self._file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what is pending, and close the file."""
        self._file.close()

    def write(
        self, scalars: Mapping[str, Any] | Iterable[Mapping[str, Any]], step: int | None = None
    ) -> None:
        """Write scalars by tag. The counterpart of TF1's `FileWriter.add_summary`.

        Args:
          scalars: A dict from tag to a scalar, as `summary.scalars` returns it; or a list of such
            dicts, of several steps, of which the mean is written.
          step: The step to write them under. By default the `global_step` among the scalars, the
            last one of a list.
        """
        each: Iterable[Any] = [scalars] if isinstance(scalars, Mapping) else scalars
        rows = [dict(row) for row in each]
        for row in rows:
            check_scalars(row)
        rows = jax.device_get(rows)
        steps = [row.pop(GLOBAL_STEP) for row in rows if GLOBAL_STEP in row]
        if step is None and not steps:
            raise ValueError(f"step is missing, and scalars has no {GLOBAL_STEP!r}. Pass step=.")
        step = int(steps[-1] if step is None else step)
        for tag in dict.fromkeys(tag for row in rows for tag in row):
            mean = np.mean([np.float64(row[tag]) for row in rows if tag in row])
            self._file.add_scalar(tag, mean, step)

    def histograms(self, params: Tree, opt_state: Tree, step: int | None = None) -> None:
        """Write a histogram of every floating-point array, under its name in `emaopt.names`.

        The average of `conv/kernel` and its slots therefore stand beside it. The histograms are
        counted on the device, without NaN and infinity. An array of shape [] has none. The
        counterpart of TF1's `tf.summary.histogram`, called for each variable.

        Args:
          params: The parameters.
          opt_state: The state of the optimizer.
          step: The step to write them under. By default `emaopt.global_step(opt_state)`.
        """
        found = {
            name: histogram(x)
            for tree in (params, opt_state)
            for name, x in zip(jax.tree.leaves(names(tree)), jax.tree.leaves(tree), strict=True)
            if jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.ndim(x) and jnp.size(x)
        }
        found, at = jax.device_get((found, global_step(opt_state) if step is None else step))
        for name, counted in found.items():
            self._file.add_histogram_raw(name, *(x.tolist() for x in counted), int(at))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write a text, which may be Markdown. The counterpart of TF1's `tf.summary.text`."""
        self._file.add_text(tag, text, step)

    def graph(self, function: Callable[..., Any], *args: Any) -> None:
        """Write the jaxpr of `function(*args)` as the graph; the arguments may be abstract.

        Each equation is a node, inside the scopes of `jax.named_scope` and of Flax's modules. Each
        function that is called is a scope. The counterpart of TF1's `FileWriter.add_graph`.
        """
        proto = importlib.import_module("tensorboardX.proto.event_pb2")
        graph = graph_of(function, *args).SerializeToString()
        self._file.file_writer.add_event(proto.Event(graph_def=graph))


def check_scalars(values: Mapping[str, Any]) -> None:
    """Raise unless each one is a real number, or an array that holds one."""
    for tag, x in values.items():
        number = isinstance(x, (bool, int, float)) or (
            np.shape(x) == ()
            and hasattr(x, "dtype")
            and any(jnp.issubdtype(x.dtype, kind) for kind in _REAL)
        )
        if not number:
            raise ValueError(f"{tag} is {describe(x)}, no scalar. Pass a number, such as a mean.")
