"""Files of knowledge become entries, and every file that is not as it should be is refused with its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_field import read, write

from knowledge_base.errors import BadInput
from knowledge_base.field.records import is_link, mappings, parse_steps, rows
from knowledge_base.types import Step


def refused(folder: Path, name: str, **edits: tuple[str, str]) -> str:
    """Return the message with which knowledge edited so is refused; it must name the file and a line."""
    with pytest.raises(BadInput) as caught:
        read(folder, **edits)
    file, _, line = str(caught.value.where).rpartition(":")
    assert file == str(folder / name)
    assert caught.value.hint
    return f"{line}: {caught.value.message}"


def test_every_kind_of_entry_is_read(tmp_path):
    field = read(tmp_path)
    gptq, wanda = field.methods["gptq"], field.methods["wanda"]
    assert gptq.knobs == {"bits": (2, 3, 4, 8), "group_size": (32, 128), "act_order": ("yes",)}
    assert wanda.knobs == {"sparsity": (0.5,), "pattern": ("2:4", "4:8")}
    assert (gptq.requires.data, gptq.requires.training, gptq.requires.hardware) == (
        "calibration text",
        "none",
        ("gpu",),
    )
    assert (gptq.saves, gptq.provides) == ({"memory": "table 2", "computation": "evidence"}, {"quantised"})
    assert (wanda.stage, wanda.family, wanda.saves, wanda.risks) == (None, None, {}, ())
    assert field.topics["quantisation"].effects == {"computation": "direct", "memory": "direct", "energy": "indirect"}
    assert field.topics["quantisation"].uncertain == ("energy",)
    first, _, third = field.evidence
    assert first.steps == (Step("gptq", {"bits": 4, "group_size": 128}),)
    assert (first.params_b, first.baseline, first.value, first.seed_reference) == (13, 10.13, 10.31, True)
    assert third.steps == (Step("wanda", {"pattern": "2:4"}), Step("gptq", {"bits": 4}))
    assert (third.params_b, third.baseline, third.seed_reference) == (None, None, False)
    assert field.papers["gptq"].links == ("https://arxiv.org/abs/2210.17323", "https://example.org/gptq")
    assert field.papers["gptq"].about == ("gptq", "quantisation")
    assert (field.papers["other"].year, field.papers["other"].not_yet) == (None, "not about efficiency")
    assert field.survey_metrics["latency"].leanplan == ("latency_s",)
    assert field.survey_metrics["dynascore"].not_yet == "not yet"
    assert field.benchmarks["glue"].measures == ("accuracy",)
    assert field.challenges["trade_offs"].files == ("search/pareto.py",)
    assert field.attention["full"].time == "T^2*d"


def test_entries_know_their_line(tmp_path):
    field = read(tmp_path)
    assert field.methods["wanda"].where == f"{tmp_path}/methods/compression.yaml:17"
    assert [row.where.rpartition(":")[2] for row in field.evidence] == ["2", "3", "5"]  # a cell of two lines
    assert field.topics["pruning"].where == f"{tmp_path}/taxonomy.csv:5"


METHODS = "methods/compression.yaml"


@pytest.mark.parametrize(
    ("name", "edit", "expected"),
    [
        ("taxonomy.csv", ("memory,energy", "memory,enery"), "1: unknown key 'enery'"),
        ("taxonomy.csv", ("uncertain,note,origin", "uncertain,origin"), "1: `note` is missing"),
        ("taxonomy.csv", ("note,origin", "note,origin,replaces"), "1: unknown key 'replaces'"),
        ("taxonomy.csv", ("note,origin", "note,note"), "1: a column is there twice"),
        ("taxonomy.csv", ("direct,direct,indirect", "direct,strong,indirect"), "3: `memory` cannot be 'strong'"),
        ("taxonomy.csv", (",,energy,", ",,heat,"), "3: `uncertain` cannot be 'heat'"),
        ("taxonomy.csv", ("§6.1,inference", "§6.1,birth"), "5: `lifecycle` cannot be 'birth'"),
        ("taxonomy.csv", ("003 table 2\nweight", "hearsay\nweight"), "3: `origin` cannot be 'hearsay'"),
        ("taxonomy.csv", ("\nweight_only", "\nWeight only"), "4: 'Weight only' is not an id"),
        ("taxonomy.csv", ("\npruning,", "\nquantisation,"), "5: 'quantisation' is there twice"),
        ("taxonomy.csv", (",,,,,,,,003 figure 1\n", ",,,,,,,003 figure 1\n"), "2: 12 cells in a table of 13 columns"),
        ("taxonomy.csv", ('"bold, by the prose"', '"bold" by the prose'), "3: malformed CSV"),
        ("taxonomy.csv", ("Weight-only", "Weight\x00only"), "4: a control character"),
        (METHODS, ("  stage: quantise\n", "  stag: quantise\n"), "8: unknown key 'stag'"),
        (METHODS, ("  name: GPTQ\n", ""), "1: `name` is missing"),
        (METHODS, ("  name: GPTQ\n", "  name: ''\n"), "2: `name` is empty"),
        (METHODS, ("  name: GPTQ\n", "  name: [GPTQ]\n"), "2: `name` must be a text"),
        (METHODS, ("stage: quantise", "stage: squeeze"), "8: `stage` cannot be 'squeeze'"),
        (METHODS, ("lifecycle: inference", "lifecycle: life"), "7: `lifecycle` cannot be 'life'"),
        (METHODS, ("provides: [quantised]", "provides: quantised"), "10: `provides` must be a list of texts"),
        (METHODS, ("provides: [quantised]", "provides: [[quantised]]"), "10: `provides` must be a list of texts"),
        (METHODS, ("provides: [quantised]", "provides: ['']"), "10: `provides` must be a list of texts"),
        (METHODS, ("  stage: quantise\n", "  replaces: yes\n"), "8: unknown key 'replaces'"),
        (METHODS, ("knobs: {bits:", "knobs: {Bits:"), "11: 'Bits' is not an id"),
        (METHODS, ("bits: [2, 3, 4, 8]", "bits: 4"), "11: `bits` must be a list of texts"),
        (METHODS, ("requires: {data", "requires: {date"), "12: unknown key 'date'"),
        (METHODS, ("saves: {memory: table 2, computation: evidence}", "saves: [memory]"), "13: `saves` must be a mapping"),
        (METHODS, ("saves: {memory: table 2", "saves: {memory: ''"), "13: `memory` is empty"),
        (METHODS, ("saves: {memory:", "saves: {time:"), "13: unknown key 'time'"),
        (METHODS, ("[arXiv:2306.11695]", "[arxiv 2306.11695]"), "23: 'arxiv 2306.11695' is not a link"),
        (METHODS, ("\nwanda:", "\ngptq:"), "17: 'gptq' is there twice"),
        (METHODS, ("  family: weights\n", "  stage: serve\n"), "9: 'stage' is there twice"),
        (METHODS, ("name: Wanda", "name: &w Wanda"), "18: aliases and anchors are not allowed"),
        (METHODS, ("name: Wanda", "name: *w"), "18: aliases and anchors are not allowed"),
        (METHODS, ("name: Wanda", "name: !!python/object:os.system Wanda"), "18: tags are not allowed"),
        (METHODS, ("name: Wanda", "<<: {name: Wanda}"), "18: unknown key '<<'"),
        (METHODS, ("name: Wanda", "name: [[[[[[Wanda]]]]]]"), "18: nested deeper than 5 levels"),
        (METHODS, ("name: Wanda", "? [name]\n  : Wanda"), "18: a key must be plain text"),
        (METHODS, ("name: Wanda", "name: Wanda: more"), "18: malformed YAML"),
        (METHODS, ("name: Wanda", 'name: "Wan\\eda"'), "18: a control character"),
        (METHODS, ("name: Wanda", 'name: "Wan\\u202eda"'), "18: a control character"),
        (METHODS, ("name: Wanda", f"name: {'W' * 5001}"), "18: a text of 5,001 characters"),
        ("papers.csv", ("gptq,", f"gptq{'q' * 5000},"), "2: a text of 5,004 characters"),
        ("papers.csv", (",2024,", "\u2028,2024,"), "3: a control character"),
        (METHODS, ("wanda:\n", "---\nwanda:\n"), "1: not one mapping of ids"),
        (METHODS, ("gptq:\n", "id: x\ngptq:\n"), "1: 'id' must be a mapping"),
        (METHODS, ("  name: GPTQ\n", "  name: GPTQ\n  id: other\n"), "3: `id` is given by the mapping's key"),
        ("evidence.csv", ("gptq(bits=4)", "gptq(bits=4"), "3: cannot read the step 'gptq(bits=4'"),
        ("evidence.csv", ("gptq(bits=4)", "gptq(bits: 4)"), "3: cannot read the step"),
        ("evidence.csv", ("10.13,10.31", "10.13,"), "2: `value` is empty"),
        ("evidence.csv", ("10.13,10.31", "10.13,nan"), "2: `value` must be a number, got 'nan'"),
        ("evidence.csv", ("10.13,10.31", "10.13,1e999"), "2: `value` must be a number, got '1e999'"),
        ("evidence.csv", ("10.13,10.31", "10.13,OOM"), "2: `value` must be a number, got 'OOM'"),
        ("evidence.csv", ("https://arxiv.org/abs/2210.17323,yes", "http://arxiv.org,yes"), "2: 'http://arxiv.org' is not a link"),
        ("evidence.csv", ("2306.11695,no", "2306.11695,maybe"), "5: `seed_reference` cannot be 'maybe'"),
        ("evidence_metrics.csv", ("lower", "smaller"), "2: `better` cannot be 'smaller'"),
        ("papers.csv", ("arXiv:2306.11695", "arXiv:2306.1"), "3: 'arXiv:2306.1' is not a link"),
        ("papers.csv", (",2024,", ",in 2024,"), "3: `year` must be a number, got 'in 2024'"),
        ("metrics.yaml", ("leanplan: not yet", "leanplan: ''"), "2: `leanplan` is empty"),
        ("attention.csv", ("T^2*d", ""), "2: `time` is empty"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_as_it_should_be_is_refused_with_its_line(tmp_path, name, edit, expected):
    assert refused(tmp_path, name, **{Path(name).stem: edit}).startswith(expected)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (write(tmp_path) / "papers.csv").write_bytes(b"id,title\nx,\xff\n")
    with pytest.raises(BadInput, match="not UTF-8") as caught:
        list(rows(tmp_path / "papers.csv", "papers.csv"))
    assert caught.value.where == "papers.csv:2"


@pytest.mark.parametrize("text", ["", "- a\n", "a: b\n---\nc: d\n", "just words\n"])
def test_a_yaml_file_is_one_mapping(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        list(mappings(tmp_path / "x.yaml", "x.yaml"))
    assert str(caught.value.where).startswith("x.yaml:1")


def test_a_hundred_thousand_brackets_are_refused_not_obeyed(tmp_path):
    (tmp_path / "x.yaml").write_text("a: " + "[" * 100_000, encoding="utf-8")
    with pytest.raises(BadInput, match="nested deeper"):
        list(mappings(tmp_path / "x.yaml", "x.yaml"))


def test_messages_show_hostile_text_escaped(tmp_path):
    assert "\\u200b" in refused(tmp_path, METHODS, compression=("stage: quantise", 'stage: "\\u200b"'))


def test_a_text_is_one_line_however_it_is_written(tmp_path):
    edits = {
        "compression": ("name: Wanda", 'name: "Wanda\\nand\\tmore"'),
        "papers": ("GPTQ: Accurate Quantization", '"GPTQ:\nAccurate"'),
    }
    field = read(tmp_path, **edits)
    assert field.methods["wanda"].name == "Wanda and more"
    assert field.papers["gptq"].title == "GPTQ: Accurate"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_only_plain_files_are_read(tmp_path, make):
    write(tmp_path)
    (tmp_path / METHODS).unlink()
    make(tmp_path / METHODS)
    with pytest.raises(BadInput, match="not a plain file"):
        list(mappings(tmp_path / METHODS, METHODS))


@pytest.mark.parametrize(
    "text", ["https://arxiv.org/abs/2210.17323", "arXiv:2210.17323", "arXiv:1409.0473", "https://a.io"]
)
def test_links(text):
    assert is_link(text)


@pytest.mark.parametrize(
    "text", ["http://a.io", "https://", "https://a", "https://a.io/x y", "https://a.io/<b>", "ftp://a.io", "arXiv:221.17323",
             "javascript:alert(1)", "https://a.io/x\nhttps://b.io", "doi:10.1/x", ""],
)  # fmt: skip
def test_not_links(text):
    assert not is_link(text)


@pytest.mark.parametrize(
    "text", ["", "gptq(", "gptq(bits=4))", "GPTQ", "gptq + ", "gptq(bits)", "gptq(bits=4 group=2)", "a+b"]
)
def test_not_steps(text):
    with pytest.raises(ValueError):
        parse_steps(text)
