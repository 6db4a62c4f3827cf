"""docs/reading.html, the paper beside the code.   python -m pytest tests/test_reading.py"""

import re
from xml.etree import ElementTree

import pytest
from conftest import ROOT

STORED, NOTES, SOURCE = [(ROOT / name).read_text(encoding="utf-8") for name in (
    "docs/reading.html", "docs/reading.notes.html", "gumbel_distill.py")]


@pytest.fixture
def reading(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import reading
    return reading


def test_the_stored_page_is_that_of_the_code_and_of_the_notes(reading):
    assert reading.build(SOURCE, NOTES) == STORED, "run python docs/reading.py"


def test_a_note_whose_name_is_gone_fails(reading):
    with pytest.raises(SystemExit, match=r"has no Student\.draw, GumbelStudent\.draw"):
        reading.build(SOURCE.replace("def draw(", "def pick("), NOTES)


def test_code_stands_unchanged_and_each_line_once(reading):
    lines = re.findall(r'<i data-n="(\d+)"></i>(.*)', STORED)
    texts = [reading.html.unescape(re.sub("<.*?>", "", line)) for _, line in lines]
    assert texts == [SOURCE.split("\n")[int(i) - 1] for i, _ in lines]
    assert len({i for i, _ in lines}) == len(lines)


def test_formulas_are_well_formed_and_links_have_one_target_each():
    ElementTree.fromstring("<a>" + "".join(re.findall("<math.*?</math>", STORED, re.S)) + "</a>")
    anchors = re.findall(' id="(.*?)"', STORED)
    assert set(re.findall('href="#(.*?)"', STORED)) <= set(anchors)
    assert len(set(anchors)) == len(anchors)
