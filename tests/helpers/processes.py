"""Several real processes that train together: started, joined by JAX, and waited for."""

import argparse
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax


def together(command: Sequence[Any], env: Mapping[str, str], number: int = 2) -> list:
    """Start a program as several processes, which `join` brings together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = ["--processes", str(number), "--port", port]
    return [
        subprocess.Popen(
            [*command, *group, "--process", str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            text=True,
        )
        for i in range(number)
    ]


def finish(processes: list, timeout: float) -> list[str]:
    """Wait for all processes and return what each printed; none is left waiting for the others."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * len(processes), outputs[0][1][-2000:]
    return [out for out, _ in outputs]


def join(timeout: int) -> argparse.Namespace:
    """Read the command line of one of them, `OUT` first, and connect it to the others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    jax.distributed.initialize(
        f"localhost:{args.port}", args.processes, args.process, initialization_timeout=timeout
    )
    return args
