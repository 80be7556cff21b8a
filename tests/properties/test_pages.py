"""The code on the pages, which people paste: README.md and docs/*.md."""

import jax
import pages
import pytest
from folders import DOCS, ROOT


# Orbax looks for the sharding itself where plain Orbax code gives none
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")

# frameworks.md is run by test_frameworks.py, migration.md by test_migration.py, and recipes.md,
# which needs the packages of others, by tests/clients
WHOLE = [
    ROOT / "README.md",
    *(DOCS / f"{name}.md" for name in ("averaging", "checkpoints", "peers")),
]


@pytest.fixture(autouse=True)
def _as_jax_comes():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


GUIDES = DOCS / "guides.md"  # each section stands for itself


@pytest.mark.many(2)
@pytest.mark.parametrize("section", pages.headings(GUIDES))
def test_the_code_of_a_guide_runs(section):
    assert pages.run(GUIDES, section)


@pytest.mark.many(2)
@pytest.mark.parametrize("page", WHOLE, ids=lambda page: page.name)
def test_the_code_on_a_page_runs(page):
    assert pages.run(page)


def test_a_wrong_page_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n## A\n\n```python\nassert x == 2\n```\n\n## B\n")
    assert pages.run(page, "B") == {"x": 1}
    with pytest.raises(AssertionError):
        pages.run(page, "A")
    with pytest.raises(AssertionError):
        pages.run(page)
    page.write_text("<!--- invisible-code: python\nassert not 'hidden'\n-->\n")
    with pytest.raises(AssertionError):
        pages.run(page)
