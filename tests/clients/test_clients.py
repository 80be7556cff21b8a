"""Programs as others write them: trained, averaged, saved, resumed and evaluated by processes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


PROGRAMS = Path(__file__).parent / "programs"
NEEDS = {
    "linen_sharded": "flax",
    "nnx_transformer": "flax",
    "haiku_mlp": "haiku",
    "numpyro_svi": "numpyro",
}


def call(client, *arguments):
    command = [sys.executable, "-W", "ignore", PROGRAMS / f"{client}.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(line.split() for line in run.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("client", NEEDS)
def test_a_client_resumes_bit_for_bit_and_is_evaluated_by_another_process(client, tmp_path):
    if not importlib.util.find_spec(NEEDS[client]):
        pytest.skip(f"needs {NEEDS[client]}")
    trained = call(client, "train", tmp_path)
    assert trained["kept"] == trained["evaluated"]
    assert call(client, "resume", tmp_path) == {"state": trained["state"]}
    assert call(client, "evaluate", tmp_path) == {"evaluated": trained["evaluated"]}
