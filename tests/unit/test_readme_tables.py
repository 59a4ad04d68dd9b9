"""Tables go between their marks and nowhere else; nothing of another program's words can write the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.readme_tables import placed, plain

README = Path(__file__).resolve().parents[2] / "benchmarks" / "README.md"
PAGE = "before\n<!-- a: begin -->\nold\n<!-- a: end -->\n<!-- b: begin -->\nkept\n<!-- b: end -->\nafter\n"


def test_a_table_goes_between_its_own_marks():
    new = placed(PAGE, "a", "| \\1 |\n")
    assert new == PAGE.replace("old", "| \\1 |")
    assert placed(new, "a", "| \\1 |\n") == new


@pytest.mark.parametrize("page", ["no marks", "<!-- a: begin -->\nnever closed", "<!-- a: end -->\n<!-- a: begin -->"])
def test_a_page_without_the_marks_stays_as_it_is(page):
    assert placed(page, "a", "x") == page


def test_every_mark_of_the_page_is_closed():
    page = README.read_text(encoding="utf-8")
    opened, closed = (re.findall(rf"<!-- (.+?): {mark} -->", page) for mark in ("begin", "end"))
    assert opened == closed
    assert len(opened) == len(set(opened)) > 3


def test_other_programs_words_mean_nothing_in_a_table():
    assert plain("bad <script> | a [link](x) `code`\nnext\x1b") == "bad  script    a  link (x)  code  next "
