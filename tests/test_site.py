"""docs/conf.py: how docstrings become pages, and which links it calls broken."""

import runpy
from pathlib import Path

import pytest

import emaopt
from emaopt.checkpoint._stored import Stored


@pytest.fixture(scope="module")
def conf():
    return runpy.run_path(str(Path(__file__).parents[1] / "docs" / "conf.py"))


LINKS = {"power": "emaopt.power", "checkpoint.save": "emaopt.checkpoint.save"}


@pytest.mark.parametrize(
    ("docstring", "page"),
    [
        ("a `decay(t)`, b", "a ``decay(t)``, b"),
        (
            "`power` and `power(0)`",
            ":py:obj:`power <emaopt.power>` and :py:obj:`power(0) <emaopt.power>`",
        ),
        ("`checkpoint.save`s", ":py:obj:`checkpoint.save <emaopt.checkpoint.save>`\\ s"),
        ("a * b, w_1 |x| of *words*", "a \\* b, w\\_1 \\|x\\| of *words*"),
        (">>> a * `b`\n1", ">>> a * `b`\n1"),
        (
            "Like:\n\n    a = `b`\n\n    c\n\nEnd",
            "Like:\n\n.. code-block:: python\n\n    a = `b`\n\n    c\n\nEnd",
        ),
    ],
)
def test_a_docstring_is_text_with_code_and_links(conf, docstring, page):
    assert conf["rst"](docstring, LINKS) == page


def test_the_nearest_of_several_names_is_meant(conf):
    in_presets, in_tf1 = conf["targets"]("emaopt.presets"), conf["targets"]("emaopt.tf1")
    assert (in_presets["tf1"], in_presets["power"]) == ("emaopt.presets.tf1", "emaopt.power")
    assert (in_tf1["save"], in_tf1["checkpoint.save"]) == (
        "emaopt.tf1.save",
        "emaopt.checkpoint.save",
    )


def test_a_signature_is_what_the_source_says(conf):
    assert conf["written"](emaopt.average_name) == ("(name: str)", "str")
    assert conf["written"](emaopt.HealState) == ("(healed: Tree, state: Tree)", "")
    assert conf["written"](Stored) == ("(path: Path)", "")


def test_a_link_leads_to_a_file_and_an_anchor(conf, tmp_path):
    (tmp_path / "a b.html").write_text('<p id="here">')
    (tmp_path / "c.html").write_text(
        '<a href="a%20b.html#here"><a href="#nowhere"><a href="a%20b.html?x#gone">'
        '<img src="lost.png"><a href="https://elsewhere/x"><a href="//elsewhere">'
    )
    want = ["c.html: #nowhere", "c.html: a%20b.html?x#gone", "c.html: lost.png"]
    assert conf["broken"](tmp_path) == want
