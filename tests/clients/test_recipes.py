"""docs/recipes.md: the lines for each library, run with the library where it is installed."""

import importlib.util

import jax
import pages
import pytest
from folders import DOCS


PAGE = DOCS / "recipes.md"
# what must be importable; none: what the tests are installed with
NEEDS = {
    "Linen, `with_logical_partitioning`": None,
    "NNX, with batch normalization and dropout": None,
    "`nnx.ModelAndOptimizer`": None,
    "Haiku": "haiku",
    "numpyro": "numpyro",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("section", NEEDS)
def test_a_recipe_runs(section):
    package = NEEDS[section]
    if package and not importlib.util.find_spec(package):
        pytest.skip(f"needs {package}")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert pages.run(PAGE, section)


def test_every_recipe_is_run():
    assert [heading for heading in pages.headings(PAGE) if heading in NEEDS] == list(NEEDS)
    assert set(pages.headings(PAGE)) - NEEDS.keys() <= {"How they were run"}
