"""docs/conf.py: which links it calls broken, and what stays on one line."""

import runpy

import pytest
from folders import DOCS


@pytest.fixture(scope="module")
def conf():
    return runpy.run_path(str(DOCS / "conf.py"))


def test_a_link_leads_to_a_file_and_an_anchor(conf, tmp_path):
    (tmp_path / "a b.html").write_text('<p id="here">')
    (tmp_path / "c.html").write_text(
        '<a href="a%20b.html#here"><a href="#nowhere"><a href="a%20b.html?x#gone">'
        '<img src="lost.png"><a href="https://elsewhere/x"><a href="//elsewhere">'
    )
    want = ["c.html: #nowhere", "c.html: a%20b.html?x#gone", "c.html: lost.png"]
    assert conf["broken"](tmp_path) == want


def test_a_number_is_one_piece(conf):
    pieces = conf["NUMBER"].split("from 1.2e-6 to 0.6-0.8, on ResNet-50 or float32")
    assert pieces == ["from ", "1.2e-6", " to ", "0.6-0.8,", " on ResNet-50 or float32"]
