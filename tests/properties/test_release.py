"""What a release holds, and what it says of itself."""

import re
import zipfile
from email.parser import Parser

import pytest
from folders import ROOT

import emaopt


builders = pytest.importorskip("hatchling.builders.wheel")
VERSION = emaopt.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    (path,) = builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")))
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    return Parser().parsestr(wheel.read(f"emaopt-{VERSION}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "emaopt").rglob("*.py")}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    want = package | {"emaopt/py.typed"} | {f"emaopt-{VERSION}.dist-info/{name}" for name in about}
    assert set(wheel.namelist()) == want


def test_it_is_for_every_platform(wheel):
    assert b"Tag: py3-none-any" in wheel.read(f"emaopt-{VERSION}.dist-info/WHEEL")


def test_the_license_is_the_license(wheel, metadata):
    license_file = wheel.read(f"emaopt-{VERSION}.dist-info/licenses/LICENSE")
    assert license_file == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_first_heading_of_the_changelog_is_this_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == VERSION


def test_the_readme_is_the_description(metadata):
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    assert metadata["Description-Content-Type"] == "text/markdown"


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
