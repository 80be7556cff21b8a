"""How far the presets are from the libraries that they are named after.

    python benchmarks/peers.py

The recorded averages of the real libraries (`tests/golden/make_peers.py`), 128 updates of two
parameters in several settings each, beside `emaopt.ema` of the preset: the largest difference as a
share of the largest number, the worst over the settings. In float32, and in float64 where the
library has it. Writes results/peers.md.
"""

import jax
import numpy as np
from helpers import RESULTS, make_peers, recorded


def deviation(case: dict, dtype) -> float:
    """From the first snapshot on: before it, SWA of TensorFlow Addons has no average."""
    begin = case["arguments"].get("start_averaging", 0)
    theirs = make_peers.averages(case)[begin:]
    ours = recorded.averages(recorded.preset(case), recorded.VALUES, dtype)[begin:]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def row(name: str) -> str:
    cases = [case for case in recorded.CASES if case["name"] == name]
    single = max(deviation(case, np.float32) for case in cases)
    jax.config.update("jax_enable_x64", True)
    exact = [deviation(case, np.float64) for case in cases if case["dtype"] == "float64"]
    jax.config.update("jax_enable_x64", False)
    double = f"{max(exact):.1e}" if exact else ""
    library = make_peers.library(name)
    formulas = ("edm2", "torchtitan")  # no package has them: see make_peers.py
    version = "its formula" if library in formulas else recorded.RECORDED["versions"][library]
    return f"| `{name}` | {version} | {len(cases)} | {single:.1e} | {double} |"


def main() -> None:
    lines = [
        "| preset | library's version | settings | float32 | float64 |",
        "|---|---|---|---|---|",
        *map(row, dict.fromkeys(case["name"] for case in recorded.CASES)),
    ]
    text = "\n".join(lines)
    (RESULTS / "peers.md").write_text(
        "# The presets beside the real libraries\n\n"
        "Worst deviation from the libraries' own averages: `python benchmarks/peers.py`. The\n"
        f"float64 of ema_pytorch's `EMA` has decays in float32.\n\n{text}\n"
    )
    print(text)


if __name__ == "__main__":
    main()
