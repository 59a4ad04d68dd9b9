"""Laws between the files of knowledge: each edit breaks one, and is refused with the file and line of the culprit."""

from __future__ import annotations

import pytest
from small_field import read

from knowledge_base.errors import BadInput

METHODS = "methods/compression.yaml"
EVIDENCE_FOR_WANDA = (
    "no,\n",
    "no,\nwanda(sparsity=0.5),OPT-13B,13,opt,WikiText-2,perplexity,10,11,,,Wanda,arXiv:2306.11695,no,\n",
)


def test_the_unedited_files_obey(tmp_path):
    assert len(read(tmp_path).methods) == 2


@pytest.mark.parametrize(
    ("where", "edit", "expected"),
    [
        ("taxonomy.csv:4", ("weight_only,quantisation", "weight_only,rounding"), "unknown topic 'rounding'"),
        ("taxonomy.csv:2", ("inference,,Inference", "inference,weight_only,Inference"), "go round in a circle"),
        ("taxonomy.csv:2", ("inference,,Inference", "inference,inference,Inference"), "go round in a circle"),
        (f"{METHODS}:1", ("gptq:\n", "pruning:\n"), "`pruning` is a topic and a method"),
        (f"{METHODS}:1", ("topic: weight_only", "topic: weights"), "unknown topic 'weights'"),
        (f"{METHODS}:1", ("topic: weight_only", "topic: inference"), "`inference`, which has topics below it"),
        (f"{METHODS}:17", ("It needs no training!", "It is quick. It needs no training!"), "`wanda` has 3 sentences"),
        (f"{METHODS}:17", ("It needs no training!", ""), "`wanda` has 1 sentence"),
        (f"{METHODS}:1", ("memory: table 2", "network: table 2"), "`gptq` and network: Table 2 does not mark it for `weight_only`"),
        (f"{METHODS}:1", ("memory: table 2", "memory: everybody knows"), "'everybody knows' is no ground"),
        (f"{METHODS}:1", ("memory: table 2", "memory: http://example.org"), "'http://example.org' is no ground"),
        (f"{METHODS}:1", ("money: \"arXiv", "money: \"arxiv"), "is no ground"),
        (f"{METHODS}:1", ("memory: table 2", "memory: evidence"), "`gptq` and memory: no row of evidence is about it"),
        (f"{METHODS}:1", ("{quality: evidence", "{network: evidence"), "`gptq` and network: no row of evidence"),
        (f"{METHODS}:17", ("  knobs: {sparsity", "  spends: {computation: evidence}\n  knobs: {sparsity"), "`wanda` and computation"),
        (f"{METHODS}:17", ("  knobs: {sparsity", "  spends: {quality: table 2}\n  knobs: {sparsity"), "`wanda` and quality: 'table 2' is no ground"),
        ("evidence.csv:2", ("opt,WikiText-2,perplexity", "opt,WikiText-2,perplexty"), "unknown metric 'perplexty'"),
        ("evidence.csv:5", ("wanda(pattern", "wnada(pattern"), "unknown method 'wnada'"),
        ("evidence.csv:2", ("group_size=128", "group=128"), "`gptq` has no knob 'group'"),
        ("evidence.csv:5", ("pattern=2:4", "patern=2:4"), "`wanda` has no knob 'patern'"),
        ("papers.csv:2", ("gptq | quantisation", "gptq | quantization"), "unknown method or topic 'quantization'"),
        ("papers.csv:4", ("not about efficiency", ""), "neither `about` nor `not_yet`"),
        ("papers.csv:3", (",wanda,\n", ",wanda,later\n"), "both `about` and `not_yet`"),
        ("papers.csv:4", ("On Language", "GPTQ - accurate quantization"), "is there twice"),
        ("papers.csv:3", ("arXiv:2306.11695", "https://arxiv.org/pdf/2210.17323v2"), "is there twice"),
        ("metrics.yaml:1", ("[latency_s]", "[latency]"), "unknown metric of Leanplan 'latency'"),
    ],
)  # fmt: skip
def test_each_law_names_the_culprit(tmp_path, where, edit, expected):
    file, _, line = where.partition(":")
    stem = file.removesuffix(".csv").removesuffix(".yaml").rpartition("/")[2]
    with pytest.raises(BadInput) as caught:
        read(tmp_path, **{stem: edit})
    assert caught.value.where == f"{tmp_path}/{file}:{line}"
    assert expected in caught.value.message
    assert caught.value.hint


def test_one_paper_may_have_its_arxiv_number_in_two_links(tmp_path):
    edit = ("https://example.org/gptq", "arXiv:2210.17323")
    assert len(read(tmp_path, papers=edit).papers) == 3


def test_evidence_of_the_method_itself_is_ground_enough(tmp_path):
    claim = ("  knobs: {sparsity", "  spends: {quality: evidence}\n  knobs: {sparsity")
    assert read(tmp_path, compression=claim, evidence=EVIDENCE_FOR_WANDA).methods["wanda"].spends


# ---------------------------------------------------------------- what one asks of the field


def test_effects_come_from_the_nearest_row_of_table_2(tmp_path):
    field = read(tmp_path)
    assert field.effects("gptq") == {"computation": "direct", "memory": "direct", "energy": "indirect"}
    assert field.path("weight_only") == ("Inference", "Quantisation", "Weight-only")
    assert field.upwards("pruning") == ("pruning", "inference")


def test_evidence_and_papers_of_a_method_and_of_a_topic(tmp_path):
    field = read(tmp_path)
    assert [row.metric for row in field.evidence_of("gptq")] == ["perplexity", "speedup_x", "perplexity"]
    assert field.evidence_of("wanda") == field.evidence_of("pruning") == field.evidence[2:]
    assert field.evidence_of("inference") == field.evidence
    assert [paper.id for paper in field.papers_of("quantisation")] == ["gptq"]
    assert [paper.id for paper in field.papers_of("inference")] == ["gptq", "wanda"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, ["gptq", "wanda"]),
        ({"saves": "memory"}, ["gptq"]),
        ({"saves": "energy"}, []),
        ({"stage": "inference"}, ["gptq", "wanda"]),
        ({"stage": "quantise"}, ["gptq"]),
        ({"needs": "gpu"}, ["gptq"]),
        ({"needs": "no-training"}, ["gptq", "wanda"]),
        ({"needs": "no-data"}, ["wanda"]),
        ({"needs": "no-hardware"}, ["wanda"]),
        ({"topic": "pruning"}, ["wanda"]),
        ({"topic": "quantisation", "saves": "computation"}, ["gptq"]),
    ],
)
def test_select(tmp_path, asked, found):
    assert [method.id for method in read(tmp_path).select(**asked)] == found


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"saves": "memry"}, "unknown resource 'memry'; did you mean `memory`"),
        ({"stage": "inferense"}, "unknown stage 'inferense'; did you mean `inference`"),
        ({"needs": "no-trainig"}, "unknown need 'no-trainig'; did you mean `no-training`"),
        ({"status": "executble"}, "unknown status 'executble'; did you mean `executable`"),
        ({"topic": "prunning"}, "unknown topic 'prunning'; did you mean `pruning`"),
    ],
)
def test_select_refuses_what_no_method_could_answer(tmp_path, asked, said):
    with pytest.raises(BadInput) as caught:
        read(tmp_path).select(**asked)
    assert said in caught.value.message


def test_an_unknown_method_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(BadInput, match="unknown technique 'gptk'; did you mean `gptq`"):
        read(tmp_path).method("gptk")


def test_what_our_techniques_execute_is_executable(tmp_path):
    from knowledge_base.registry import techniques

    executed = {method for module in techniques.all().values() for method in module.TECHNIQUE.implements}
    field = read(tmp_path)
    assert {m for m in field.methods if field.status(m) == "executable"} == executed & {"gptq", "wanda"}
