"""Where the folders of the repository are that tests read."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
TESTS, HELPERS = ROOT / "tests", ROOT / "tests" / "helpers"
GOLDEN = TESTS / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"
DOCS = ROOT / "docs"
BENCHMARKS = ROOT / "benchmarks"
