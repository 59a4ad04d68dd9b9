"""The page of each technique in the docs: all its file says, found by the file's name, nothing left out."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import techniques as measured
from benchmarks.readme_tables import figures
from knowledge_base.registry import techniques
from tools.reference import technique_pages
from tools.reference.markdown import codes, inline
from tools.reference.refusals import refusals

SECTIONS = (
    "Settings", "What it needs", "When it is refused", "What it changes", "What was published", "What was measured",
)  # fmt: skip


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return technique_pages.each()


def test_every_technique_has_a_page_and_the_overview_leads_there(pages: dict[str, str]) -> None:
    overview = technique_pages.techniques()
    assert set(pages) == set(techniques.names())
    for name in pages:
        assert f'<a id="{name}"></a>[`{name}`](techniques/{name}.md)' in overview


@pytest.mark.parametrize("name", techniques.names())
def test_a_page_says_all_that_the_file_says(name: str, pages: dict[str, str]) -> None:
    text, module = pages[name], techniques.get(name)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(SECTIONS)
    assert inline((module.__doc__ or "").split("\n\n")[0]) in text
    for knob, choice in module.TECHNIQUE.knobs.items():
        assert f"| `{knob}` | {codes(choice.options)} | `{choice.default}` |" in text
    for tag in (*module.TECHNIQUE.needs, *module.TECHNIQUE.provides, *module.TECHNIQUE.implements):
        assert f"`{tag}`" in text
    assert text.count("| demand | meaning | before |") == 1, "what it changes is shown on a model it changes"
    assert not module.EVIDENCE or f"| {inline(module.EVIDENCE[0].model)} |" in text
    assert "No model and no setting is refused" not in text, "every one says when it cannot be used"
    assert f"`leanplan explain {name}`" in text


def test_what_changes_is_what_the_file_computes(pages: dict[str, str]) -> None:
    text = pages["weight_int4"]
    (row,) = re.findall(r"^\| `linear_bytes` .*$", text, re.MULTILINE)
    assert [cell.strip() for cell in row.split("|")[3:-1]] == ["13 GiB", "×0.312", "×0.281", "×0.266"]
    assert "| group\\_size=32 | group\\_size=64 | group\\_size=128 |" in text
    assert "beside `prune_width(keep=0.5)`" in pages["recover_lora"], "with what it recovers from"
    assert "Mixtral" in pages["merge_experts"], "the first of the models it can be used on"


HASTY = '''
"""Hasty <b>technique</b>."""
from knowledge_base.techniques import _weights
from knowledge_base.errors import CandidateFailed

def rejects(model, workload, hardware):
    """..."""
    if model.experts:
        return f"{model.name} has {model.experts} experts | <script>"
    return "too long" if workload.output_tokens > 9 else _weights.why_not_again(model)

def execute(session):
    raise CandidateFailed("unsupported", "no *matrix* fits")
    raise CandidateFailed("build_error", "not a refusal")
'''


def test_refusals_are_read_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hasty_for_pages.py").write_text(HASTY, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib

    module: ModuleType = importlib.import_module("hasty_for_pages")
    found = refusals(module)
    assert set(found) == {
        "… has … experts | <script>", "too long", "no *matrix* fits",
        "weights are already stored as …; quantising twice loses far more than once",
    }  # fmt: skip
    assert inline("… has … experts | <script>") == "… has … experts \\| &lt;script&gt;"


def test_measured_rows_are_shown_with_machine_and_date(pages: dict[str, str]) -> None:
    row = {
        "technique": "weight_int8", "step": "weight_int8", "beside": [], "engine": "transformers", "plan": "a",
        "failure": None, "artefact_bytes": 2**20, "artefact_ratio": 0.25, "peak_memory_bytes": 2**28,
        "peak_memory_ratio": 0.9, "perplexity_ratio": [1.01, 1.0, 1.02], "agreement_ratio": 0.97,
        "kl_divergence_nats": 0.001, "build_s": 2.0, "build_peak_bytes": 2**28, "decode": [1.5, 1.4, 1.6],
    }  # fmt: skip
    other = row | {"technique": "weight_int4", "step": "weight_int4", "plan": "b"}
    found = {
        "model": "models/tiny-lm", "note": "", "machine": "a | machine", "date": "2026-11-22",
        "left_out": {"prune_experts": "no experts"}, "rows": {"weight_int8": [row], "weight_int4": [other]},
    }  # fmt: skip
    text = technique_pages._measured("weight_int8", {"shipped": found})
    assert "On models/tiny-lm, a \\| machine, 2026-11-22:" in text
    assert "1 MiB (0.25×)" in text and "1.50× [1.40, 1.60]" in text
    assert "weight_int4" not in text and "no experts" not in text
    assert "Not on models/tiny-lm: no experts." in technique_pages._measured("prune_experts", {"shipped": found})
    assert "Not by" in technique_pages._measured("rotate", {"shipped": found})


def test_the_pages_show_what_is_kept(pages: dict[str, str]) -> None:
    kept = figures(measured.RESULTS)
    for found in kept.values():
        for name in set(found["rows"]) & set(pages):
            assert found["date"] in pages[name] and "Not by" not in pages[name]
