"""What people see of the field's knowledge: the matrix in its forms, the card of a method, lists and their filters."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from knowledge_base.errors import BadInput
from knowledge_base.field import field
from knowledge_base.field.card import card
from knowledge_base.field.entries import RESOURCES, EvidenceMetric, EvidenceRow
from knowledge_base.field.magnitude import factor, magnitudes
from knowledge_base.field.matrix import Matrix, matrix
from knowledge_base.registry import techniques
from knowledge_base.types import Step
from planner.cli import main
from planner.reports.knowledge import card as card_text
from planner.reports.knowledge import matrix as matrix_text

HOSTILE = "<script>alert(1)</script>|`x` \x1b[31m"


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------- magnitudes


LOWER = EvidenceMetric(name="memory_gb", unit="GB", better="lower", resource="memory", meaning="")
HIGHER = EvidenceMetric(name="speedup_x", unit="x", better="higher", resource="computation", meaning="")


def row(metric: str, baseline: float | None, value: float, model: str = "m") -> EvidenceRow:
    return EvidenceRow(
        steps=(Step("gptq"),), model=model, params_b=1, family="", task="", metric=metric, baseline=baseline, value=value,
        setting="", hardware="", title="", source="arXiv:2210.17323", seed_reference=True, note="",
    )  # fmt: skip


def test_a_factor_is_what_is_left_of_what_was_needed() -> None:
    assert factor(row("memory_gb", 10, 4), LOWER) == pytest.approx(0.4)
    assert factor(row("speedup_x", 1, 2), HIGHER) == pytest.approx(0.5)
    assert factor(row("memory_gb", None, 4), LOWER) is None
    assert factor(row("memory_gb", 0, 4), LOWER) is None


def test_magnitudes_are_medians_with_their_counts() -> None:
    rows = [row("memory_gb", 10, value, model) for value, model in ((2, "a"), (4, "a"), (9, "b"))]
    found = magnitudes([*rows, row("speedup_x", 1, 2)], {"memory_gb": LOWER, "speedup_x": HIGHER})
    assert found["memory"].factor == pytest.approx(0.4)
    assert (found["memory"].rows, found["memory"].models) == (3, 2)
    assert found["memory"].low <= found["memory"].factor <= found["memory"].high
    assert found["computation"].factor == pytest.approx(0.5)


# ---------------------------------------------------------------- the matrix


def test_what_others_bring_is_not_counted_as_ones_own() -> None:
    found = field().magnitudes_of("static_kv_cache")["computation"]
    assert found.factor > 1, "alone it is slower; with torch_compile, which does the work, it is faster"
    assert found.rows < len(field().evidence_of("static_kv_cache"))
    assert "computation" in field().magnitudes_of("token_dropping"), "figures with others are better than none"


def test_every_row_of_the_matrix_has_every_resource_and_counts_its_methods() -> None:
    table = matrix()
    assert table.resources == RESOURCES
    for line in table.rows:
        assert set(line.cells) == set(RESOURCES)
        assert 0 <= line.executable <= line.methods
        assert any(cell.strength for cell in line.cells.values()), line.id
    assert sum(line.executable for line in table.rows) > 0


def test_a_topic_has_a_matrix_of_its_methods() -> None:
    table = matrix("weight_quantisation")
    assert {"gptq", "awq"} <= {line.id for line in table.rows}
    with pytest.raises(BadInput, match="did you mean `weight_quantisation`"):
        matrix("weight_quantization")


def hostile(table: Matrix) -> Matrix:
    first = table.rows[0]
    return replace(
        table, title=HOSTILE, rows=(replace(first, name=HOSTILE, group=HOSTILE, id=HOSTILE), *table.rows[1:])
    )


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert not (name in ("src", "href") and value), "the page makes no request"


def test_the_page_shows_hostile_names_and_makes_no_request() -> None:
    page = matrix_text.as_html(hostile(matrix()))
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.seen
    assert "\x1b" not in page
    assert tags.seen.count("tr") > len(matrix().rows)


def test_hostile_names_do_not_break_the_markdown_table() -> None:
    text = matrix_text.as_markdown(hostile(matrix()))
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert "<script>" not in text


def test_the_matrix_in_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Weight quantisation" in said(capsys, "matrix")
    assert said(capsys, "matrix", "--format", "md").startswith("## ")
    assert said(capsys, "matrix", "--format", "html").startswith("<!doctype html>")
    assert json.loads(said(capsys, "matrix", "--format", "json")) == json.loads(said(capsys, "matrix", "--json"))


# ---------------------------------------------------------------- lists


def listed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, str]]:
    return json.loads(said(capsys, "ls", "techniques", *argv, "--format", "json"))


def test_techniques_are_listed_by_what_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    everything = listed(capsys)
    assert {r["technique"] for r in everything} == set(field().methods)
    chosen = listed(capsys, "--saves", "energy", "--stage", "inference", "--needs", "no-training")
    assert 0 < len(chosen) < len(everything)
    for entry in chosen:
        method = field().methods[entry["technique"]]
        assert "energy" in method.saves
        assert method.lifecycle == "inference"
        assert method.requires.training.startswith(("none", "calibration-only"))


def test_techniques_that_run_here_are_listed_under_the_name_plans_use(capsys: pytest.CaptureFixture[str]) -> None:
    ours = {name for r in listed(capsys, "--status", "executable") for name in r["plans"].split(", ")}
    assert ours == set(techniques.names())


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("ls", "techniques", "--saves", "memroy"), "did you mean `memory`"),
        (("ls", "techniques", "--needs", "no-trainin"), "did you mean `no-training`"),
        (("ls", "techniques", "--topic", "prunning"), "did you mean"),
        (("ls", "runs", "--saves", "memory"), "chooses among techniques"),
        (("explain", "gptqq"), "did you mean `gptq`"),
        (("explain", "TensorRT-LLM"), "did you mean `tensorrt_llm`"),
        (("explain", "weight_quantisation"), "leanplan ls techniques --topic weight_quantisation"),
        (("matrix", "--topic", "gptq"), "leanplan explain gptq"),
        (("matrix", "--topic", "pruningg"), "did you mean"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest_ones(
    argv: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list(argv)) == 2
    shown = capsys.readouterr()
    assert told in shown.err
    assert shown.out == ""


# ---------------------------------------------------------------- cards


@pytest.mark.parametrize("name", list(field().methods))
def test_every_method_has_a_card(name: str) -> None:
    found = card(name)
    text = card_text.as_text(found)
    assert found.method.name in text
    assert found.evidence_rows == len(field().evidence_of(name))
    assert all(len(line) < 1000 for line in text.splitlines())


def test_a_card_gathers_what_every_file_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "explain", "gptq")
    for words in (
        "as weight_gptq",
        "saves:",
        "costs:",
        "expected loss",
        "risks:",
        "with others:",
        "arXiv:2210.17323",
    ):
        assert words in text
    data = json.loads(said(capsys, "explain", "gptq", "--format", "json"))
    assert data["status"] == "executable"
    assert data["evidence_rows"] > 100
    assert [p["id"] for p in data["papers"]]


def test_a_technique_of_ours_is_explained_by_its_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "explain", "weight_gptq") == said(capsys, "explain", "gptq")


def test_a_card_tells_no_more_digits_than_are_known() -> None:
    found = card("wanda")
    broken = replace(found.losses[0].loss, mid=0.46054, low=0.00012, high=9.0)
    text = card_text.as_text(replace(found, losses=(replace(found.losses[0], loss=broken),), evidence_rows=1))
    assert "1B +58% [+0.01% – beyond ×1000]" in text
    assert "of 1 published figure:" in text


def test_the_fitted_losses_of_a_card_fall_with_size() -> None:
    losses = {(e.step, e.params): e.loss.mid for e in card("gptq").losses}
    assert losses["gptq(bits=4)", 1e9] > losses["gptq(bits=4)", 70e9]
    assert losses["gptq(bits=3)", 7e9] > losses["gptq(bits=4)", 7e9]
