"""docs/recipes.md: the lines for each library, run with the library where it is installed."""

import importlib.util
import sys

import jax
import pages
import pytest
from folders import DOCS, HELPERS


PAGE = DOCS / "recipes.md"
# what must be importable; none: what the tests are installed with
NEEDS = {
    "Linen, `with_logical_partitioning`": None,
    "NNX, with batch normalization and dropout": None,
    "`nnx.ModelAndOptimizer`": None,
    "Haiku": "haiku",
    "numpyro": "numpyro",
    "kauldron": "kauldron",
    "tunix": "tunix",
    "NetKet": "netket",
    "haliax": "haliax",
    "levanter": "levanter",
    "MaxText": "maxtext",
    "big_vision": "big_vision",
    "t5x": "t5x",
    "purejaxrl": "ppo",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("section", NEEDS)
def test_a_recipe_runs(section, monkeypatch):
    package = NEEDS[section]
    if package and not importlib.util.find_spec(package):
        pytest.skip(f"needs {package}")
    if package == "netket":  # it imports a package that is called as one of the tests' helpers
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(HELPERS)])
        monkeypatch.delitem(sys.modules, "sparse", raising=False)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert pages.run(PAGE, section)


def test_every_recipe_is_run():
    assert pages.headings(PAGE) == [*NEEDS, "How they were run"]
