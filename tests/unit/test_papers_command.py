"""`leanplan papers`: what is asked for comes, oldest first, with its link, its subject and its seeds; else the nearest name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from knowledge_base.errors import ExitCode
from knowledge_base.field import field
from planner import schemas
from planner.cli import main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["papers", *argv])
    out, talk = capsys.readouterr()
    return code, out, talk


def found(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    code, out, _ = run(capsys, *argv, "--format", "json")
    assert code == ExitCode.DONE
    return json.loads(out)  # type: ignore[no-any-return]


def test_a_technique_has_its_papers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--technique", "gptq")
    assert code == ExitCode.DONE
    assert "2023  GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (ICLR)" in out
    assert "arXiv:2210.17323 · about gptq · seeds 000 001 002 003" in out


def test_a_topic_has_the_papers_of_all_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    pruning = {p["id"] for p in found(capsys, "--topic", "pruning")}
    assert {"sparsegpt_2023", "llm_pruner_2023", "deja_vu_2023"} <= pruning
    assert "gptq_2023" not in pruning
    assert pruning == {p.id for p in field().papers_of("pruning")}


def test_all_papers_come_by_year_then_title(capsys: pytest.CaptureFixture[str]) -> None:
    papers = found(capsys)
    assert len(papers) == len(field().papers)
    order = [(p["year"] or 0, p["title"].casefold()) for p in papers]
    assert order == sorted(order)


def test_filters_narrow_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    papers = found(capsys, "--survey", "003", "--year", "2020-2021", "--text", "EXIT bert")
    assert [p["id"] for p in papers] == ["bert_loses_patience_2020", "deebert_2020"]
    assert found(capsys, "--technique", "gptq", "--topic", "pruning") == []
    assert all(p["year"] == 2019 for p in found(capsys, "--year", "2019"))
    first = found(capsys, "--survey", "000")
    assert 60 < len(first) == sum(any(place.startswith("000 ") for place in p.seeds) for p in field().papers.values())


def test_a_resource_has_the_papers_of_what_saves_it(capsys: pytest.CaptureFixture[str]) -> None:
    memory = {p["id"] for p in found(capsys, "--resource", "memory")}
    assert "gptq_2023" in memory
    assert "a_survey_of_large_language_2023" not in memory
    network = {p["id"] for p in found(capsys, "--resource", "network")}
    assert network and network != memory


def test_a_paper_outside_the_field_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--text", "overfitting solutions")
    assert "no technique: general background on overfitting" in out
    assert out.endswith("1 paper\n")


def test_nothing_found_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--text", "zebra crossing") == (ExitCode.DONE, "0 papers\n", "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--technique", "gtpq"), "unknown technique 'gtpq'; did you mean `gptq`"),
        (("--topic", "prunning"), "unknown topic 'prunning'; did you mean `pruning`"),
        (("--resource", "memry"), "unknown resource 'memry'; did you mean `memory`"),
        (("--year", "2023-2020"), "`2023-2020` is neither a year nor two with the later one last: 2020-2023"),
        (("--year", "last"), "`last` is neither a year"),
        (("--survey", "004"), "invalid choice: '004'"),
    ],
)
def test_what_cannot_be_answered_says_what_can(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    code, out, talk = run(capsys, *argv)
    assert (code, out) == (ExitCode.BAD_INPUT, "")
    assert message in talk and "hint: " in talk


def test_it_prints_what_its_schema_says(capsys: pytest.CaptureFixture[str]) -> None:
    check = jsonschema.Draft202012Validator(schemas.schema("papers"))
    papers = found(capsys, "--topic", "quantisation")
    assert not list(check.iter_errors(papers))
    assert list(check.iter_errors([{**papers[0], "title": None}]))


@pytest.mark.parametrize(
    ("title", "code", "said"),
    [("[red]<b>Hostile</b>[/red]", ExitCode.DONE, "[red]<b>Hostile</b>[/red]"),
     ("Hostile \u202eeltit", ExitCode.BAD_INPUT, "papers.csv:2: error: a control character")],
)  # fmt: skip
def test_a_title_is_shown_never_obeyed(
    title: str,
    code: ExitCode,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "papers.csv").write_text(
        f"id,title,year,venue,links,seeds,about,not_yet\nmine_2031,{title},2031,,https://example.org/x,mine,gptq,\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("LEANPLAN_KNOWLEDGE", str(tmp_path))
    done, out, talk = run(capsys, "--year", "2031")
    assert done == code
    assert said in out + talk and "\u202e" not in out + talk
    assert done or "seeds mine" in out
