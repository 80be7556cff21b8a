"""What a release holds, and what it says of itself."""

import re
import tarfile
import zipfile
from email.parser import Parser

import pytest
from folders import ROOT

import emaopt


builders = pytest.importorskip("hatchling.builders.wheel")
sources = pytest.importorskip("hatchling.builders.sdist")
pytest.importorskip("hatch_fancy_pypi_readme")
VERSION = emaopt.__version__


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source archive, unpacked."""
    place = tmp_path_factory.mktemp("source")
    (path,) = sources.SdistBuilder(str(ROOT)).build(directory=str(place))
    with tarfile.open(path) as packed:
        packed.extractall(place, filter="data")
    return place / f"emaopt-{VERSION}"


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory):
    """The wheel, built from the source archive as package indexes do."""
    directory = str(tmp_path_factory.mktemp("dist"))
    (path,) = builders.WheelBuilder(str(archive)).build(directory=directory)
    with zipfile.ZipFile(path) as packed:
        yield packed


@pytest.fixture(scope="module")
def metadata(wheel):
    return Parser().parsestr(wheel.read(f"emaopt-{VERSION}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "emaopt").rglob("*.py")}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    want = package | {"emaopt/py.typed"} | {f"emaopt-{VERSION}.dist-info/{name}" for name in about}
    assert set(wheel.namelist()) == want


def test_the_source_archive_holds_the_package_and_its_papers(archive):
    files = {str(path.relative_to(archive)) for path in archive.rglob("*") if path.is_file()}
    papers = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"}
    build = {"PKG-INFO", "pyproject.toml", ".gitignore"}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "emaopt").rglob("*.py")}
    assert files == package | {"emaopt/py.typed"} | papers | build


def test_it_is_for_every_platform(wheel):
    assert b"Tag: py3-none-any" in wheel.read(f"emaopt-{VERSION}.dist-info/WHEEL")


def test_the_license_is_the_license(wheel, metadata):
    license_file = wheel.read(f"emaopt-{VERSION}.dist-info/licenses/LICENSE")
    assert license_file == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_first_heading_of_the_changelog_is_this_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == VERSION


def test_the_citation_is_of_this_version():
    cited = dict(re.findall(r"^([\w-]+): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert (cited["version"], cited["license"]) == (VERSION, "Apache-2.0")


def test_the_description_is_the_readme_without_links_that_lead_nowhere(metadata):
    description, readme = metadata.get_payload(), (ROOT / "README.md").read_text()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert not re.search(r"\]\((?!https?:|#)|src=\"(?!https?:)", description)
    plain = re.sub(r"!?\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", readme)
    assert description.replace("*", "") == plain.replace("*", "")


def test_the_checks_before_a_commit_are_those_of_the_extra_test():
    wanted = re.findall(r'"(ruff==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"ruff==[\d.]+", hooks) == 2 * wanted


def test_the_pythons_are_those_that_ci_has(metadata):
    said = {c.rpartition(" ")[2] for c in metadata.get_all("Classifier") if ":: 3." in c}
    ci = (ROOT / ".ci" / "run").read_text()
    assert said == set(re.findall(r"^environment \w+ (3\.\d+)", ci, re.M))
    assert metadata["Requires-Python"] == f">={min(said)}"


def test_every_extra_that_is_named_exists(metadata):
    files = [*(ROOT / "emaopt").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {
        extra
        for path in files
        for extra in re.findall(r"(?:emaopt|\"\.)\[([a-z0-9,]+)\]", path.read_text())
    }
    assert {e for extras in named for e in extras.split(",")} <= set(
        metadata.get_all("Provides-Extra")
    )


def test_the_command_is_installed(wheel):
    entry = wheel.read(f"emaopt-{VERSION}.dist-info/entry_points.txt").decode()
    assert entry.split() == ["[console_scripts]", "emaopt", "=", "emaopt.__main__:main"]
