"""The HTML report, the notebook's table and the CSV, character for character; and that they come out the same again."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
import synthetic_answers
from goldens import accepted

from planner.reports import csv as csv_report
from planner.reports import html
from planner.reports.html import notebook
from planner.results import load

HERE = Path(__file__).parent


def page(count: int = 6) -> str:
    """Return the report without style and script, which have files of their own to be read in."""
    text = html.render(synthetic_answers.answer(count))
    text = re.sub(r"<style>.*?</style>", "<style>…</style>", text, flags=re.DOTALL)
    return re.sub(r"<script>.*?</script>", "<script>…</script>", text, flags=re.DOTALL)


RENDERED = {
    "report.html": page,
    "notebook.html": lambda: notebook.render(synthetic_answers.answer(6)),
    "plans.csv": lambda: csv_report.render(synthetic_answers.answer(6)),
}


@pytest.mark.parametrize("name", RENDERED)
def test_report_is_as_accepted(name: str) -> None:
    text = RENDERED[name]()
    assert text == accepted(HERE / name, text)


@pytest.mark.parametrize("measured", [True, False])
def test_the_same_answer_gives_the_same_bytes_after_a_trip_to_disk(tmp_path: Path, measured: bool) -> None:
    answer = synthetic_answers.answer(20, measured=measured)
    answer.save(tmp_path)
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.render(load(tmp_path)) == written == html.render(synthetic_answers.answer(20, measured=measured))


def test_the_page_asks_for_nothing() -> None:
    text = html.render(synthetic_answers.hostile())
    assert "default-src 'none'" in text
    links = set(re.findall(r'\b(?:src|href|action|data|poster|srcset)="([^"#]*)', text)) - {"", "data:,"}
    assert all(link.startswith("https://") for link in links), links  # sources, to be followed by hand
    assert "@import" not in text and "url(" not in text
    assert text.count("<script") == 2 and text.count("</script") == 2


def test_a_credential_in_an_error_text_does_not_reach_the_page() -> None:
    from dataclasses import replace

    secret = "hf_" + "a1B2c3D4" * 4
    answer = replace(synthetic_answers.answer(6), sentence=f"see https://me:{secret}@example.org", conflicts=(secret,))
    for text in (html.render(answer), notebook.render(answer), csv_report.render(answer)):
        assert secret not in text


def test_no_cell_of_the_csv_is_a_formula() -> None:
    from dataclasses import replace

    from knowledge_base.types import Plan

    answer = synthetic_answers.answer(6)
    plan = Plan(model_digest="toy", engine='=HYPERLINK("http://127.0.0.1:9/"&A1)')
    answer = replace(answer, results=(*answer.results, replace(answer.results[1], plan=plan)))
    rows = list(csv.reader(io.StringIO(csv_report.render(answer))))
    assert len(rows) == 8
    assert len({len(row) for row in rows}) == 1
    for cell in (c for row in rows for c in row if not re.fullmatch(r"-?[\d.e+-]+", c)):
        assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r"), cell
    assert rows[-1][2].startswith("'=HYPERLINK")


def test_a_notebook_shows_a_table_and_nothing_runs_in_it() -> None:
    text = synthetic_answers.hostile()._repr_html_()
    assert "<script" not in text and "<img" not in text
    assert "&lt;/script&gt;&lt;img" in text
    assert text.count("<tr") == 12  # a heading, eleven plans that have figures


def test_a_prompt_shows_the_table_of_the_terminal() -> None:
    answer = synthetic_answers.answer(6)
    assert answer.recommended is not None
    shown = repr(answer)
    assert shown.startswith(answer.sentence[:20])
    assert answer.recommended.plan.id in shown and len(shown) < 10_000


def test_a_rich_console_shows_it_as_wide_as_it_is() -> None:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=60).print(synthetic_answers.hostile(6))
    assert max(map(len, out.getvalue().splitlines())) <= 60
    assert "[/bold]" in out.getvalue() and "\x1b" not in out.getvalue()
