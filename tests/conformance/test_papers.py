"""The papers of the four seed surveys: none dropped, none twice, each attached to the field or with a reason why not."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from knowledge_base.field import OURS, load
from knowledge_base.field.entries import Paper
from knowledge_base.field.reading import KINDS, read
from tools import import_papers
from tools.import_papers import SEEDS, Mention, Row, mentions, merge, squash

PAPERS: tuple[Paper, ...] = tuple(read(KINDS["papers"], (OURS,)).values())
# Papers at each place of each seed; a paper the survey cites in several sections counts in each.
PLACES = {
    "000 Header": 2,
    "000 LLM Architecture Design/Non-transformer Architecture": 10,
    "000 LLM Pre-Training/Memory Efficiency/Distributed Training": 9,
    "000 LLM Pre-Training/Memory Efficiency/Mixed precision training": 3,
    "000 LLM Fine-Tuning/Parameter-Efficient Fine-Tuning": 5,
    "000 LLM Inference/Model Compression/Pruning": 8,
    "000 LLM Inference/Model Compression/Quantization": 17,
    "000 LLM Inference/Dynamic Acceleration/Input Pruning": 8,
    "000 Resource-Efficiency Evaluation Metrics & Benchmarks/Computation Metrics": 8,
    "000 Resource-Efficiency Evaluation Metrics & Benchmarks/Memory Metrics": 2,
    "000 Resource-Efficiency Evaluation Metrics & Benchmarks/Energy Metrics": 6,
    "000 Resource-Efficiency Evaluation Metrics & Benchmarks/Network Communication Metric": 1,
    "000 Resource-Efficiency Evaluation Metrics & Benchmarks/Other Metrics": 6,
    "001 Header": 1,
    "001 Model-Centric/Model Compression/Quantization/Weight-Only Quantization": 8,
    "001 Model-Centric/Model Compression/Quantization/Weight-Activation Co-Quantization": 9,
    "001 Model-Centric/Model Compression/Quantization/Quantization-Aware Training": 3,
    "001 Model-Centric/Model Compression/Parameter Pruning/Structured Pruning": 4,
    "001 Model-Centric/Model Compression/Parameter Pruning/Unstructured Pruning": 3,
    "001 Model-Centric/Model Compression/Low-Rank Approximation": 3,
    "001 Model-Centric/Model Compression/Knowledge Distillation/White-Box KD": 7,
    "001 Model-Centric/Model Compression/Knowledge Distillation/Black-Box KD": 12,
    "001 Model-Centric/Efficient Pre-Training/Mixed Precision Training": 5,
    "001 Model-Centric/Efficient Pre-Training/Scaling Models": 6,
    "001 Model-Centric/Efficient Pre-Training/Initialization Techniques": 7,
    "001 Model-Centric/Efficient Pre-Training/Training Optimizers": 2,
    "001 Model-Centric/Efficient Fine-Tuning/Parameter-Efficient Fine-Tuning/Adapter-based Tuning": 7,
    "001 Model-Centric/Efficient Fine-Tuning/Parameter-Efficient Fine-Tuning/Low-Rank Adaptation": 8,
    "001 Model-Centric/Efficient Fine-Tuning/Parameter-Efficient Fine-Tuning/Prefix Tuning": 2,
    "001 Model-Centric/Efficient Fine-Tuning/Parameter-Efficient Fine-Tuning/Prompt Tuning": 8,
    "001 Model-Centric/Efficient Fine-Tuning/Memory-Efficient Fine-Tuning": 8,
    "001 Model-Centric/Efficient Inference/Speculative Decoding": 9,
    "001 Model-Centric/Efficient Inference/KV-Cache Optimization": 5,
    "001 Model-Centric/Efficient Architecture/Efficient Attention/Sharing-based Attention": 2,
    "001 Model-Centric/Efficient Architecture/Efficient Attention/Feature Information Reduction": 3,
    "001 Model-Centric/Efficient Architecture/Efficient Attention/Kernelization or Low-Rank": 8,
    "001 Model-Centric/Efficient Architecture/Efficient Attention/Fixed Pattern Strategies": 7,
    "001 Model-Centric/Efficient Architecture/Efficient Attention/Learnable Pattern Strategies": 6,
    "001 Model-Centric/Efficient Architecture/Mixture of Experts/MoE-based LLMs": 7,
    "001 Model-Centric/Efficient Architecture/Mixture of Experts/Algorithm-Level MoE Optimization": 5,
    "001 Model-Centric/Efficient Architecture/Long Context LLMs/Extrapolation and Interpolation": 11,
    "001 Model-Centric/Efficient Architecture/Long Context LLMs/Recurrent Structure": 6,
    "001 Model-Centric/Efficient Architecture/Long Context LLMs/Segmentation and Sliding Window": 7,
    "001 Model-Centric/Efficient Architecture/Long Context LLMs/Memory-Retrieval Augmentation": 6,
    "001 Model-Centric/Efficient Architecture/Transformer Alternatives/State Space Models": 7,
    "001 Model-Centric/Efficient Architecture/Transformer Alternatives/Other Sequential Models": 4,
    "001 Data-Centric/Data Selection/Pre-Training": 3,
    "001 Data-Centric/Data Selection/Fine-Tuning": 9,
    "001 Data-Centric/Prompt Engineering/Demonstration Selection": 12,
    "001 Data-Centric/Prompt Engineering/Demonstration Ordering": 1,
    "001 Data-Centric/Prompt Engineering/Instruction Generation": 5,
    "001 Data-Centric/Prompt Engineering/Multi-Step Reasoning": 10,
    "001 Data-Centric/Prompt Engineering/Prompt Compression": 6,
    "001 Data-Centric/Prompt Engineering/Prompt Generation": 3,
    "001 System-Level/Pre-Training Efficiency": 15,
    "001 System-Level/Inference Efficiency": 16,
    "001 System-Level/Hardware Co-Design": 8,
    "001 System-Level/LLM Frameworks": 16,
    "002 Header": 1,
    "002 Foundation Model Overview/Language Foundation Models": 21,
    "002 Foundation Model Overview/Vision Foundation Models": 12,
    "002 Foundation Model Overview/Multimodal Large FMs": 31,
    "002 Resource-efficient Architectures/Efficient Attention": 28,
    "002 Resource-efficient Architectures/Dynamic Neural Network": 15,
    "002 Resource-efficient Architectures/Diffusion-specific Optimization": 23,
    "002 Resource-efficient Architectures/ViT-specific Optimizations": 5,
    "002 Resource-efficient Algorithms/Pre-training Algorithms": 20,
    "002 Resource-efficient Algorithms/Finetuning Algorithms": 40,
    "002 Resource-efficient Algorithms/Inference Algorithms": 45,
    "002 Resource-efficient Algorithms/Model Compression": 73,
    "002 Resource-efficient Systems/Distributed Training": 39,
    "002 Resource-efficient Systems/Federated Learning": 21,
    "002 Resource-efficient Systems/Serving on Cloud": 17,
    "002 Resource-efficient Systems/Serving on Edge": 8,
    "003 §1": 24,
    "003 §1.1": 17,
    "003 §2.1.1": 1,
    "003 §2.1.2": 3,
    "003 §3.1.1": 18,
    "003 §3.1.2": 7,
    "003 §3.2.1": 7,
    "003 §3.2.2": 8,
    "003 §4.1.1": 11,
    "003 §4.1.2": 3,
    "003 §4.2": 1,
    "003 §4.2.1": 10,
    "003 §4.2.2": 5,
    "003 §4.2.3": 5,
    "003 §5.1": 18,
    "003 §5.2": 11,
    "003 §6.1.1": 11,
    "003 §6.1.2": 19,
    "003 §6.1.3": 13,
    "003 §6.1.4": 14,
    "003 §6.2.1": 12,
    "003 §6.2.2": 12,
    "003 §6.2.3": 4,
    "003 §7.1": 8,
    "003 §7.2": 27,
    "003 §7.3": 2,
    "003 §8.4": 1,
    "003 §9.1.1": 11,
    "003 §9.1.2": 5,
    "003 §9.1.3": 7,
    "003 §9.1.4": 1,
    "003 §9.1.5": 1,
    "003 §9.1.6": 11,
    "003 §9.2": 16,
    "003 §10.1": 7,
    "003 §10.2": 3,
    "003 §10.3": 2,
    "003 §10.4": 2,
    "003 §10.5": 7,
    "003 §10.6": 3,
    "003 Header": 1,
}
# Titles and references in the text of each seed, whatever they are titles of, and its own.
TITLES = {"000": 88, "001": 301, "002": 401, "003": 296}
seeds_are_here = pytest.mark.skipif(not SEEDS.exists(), reason="the seed surveys are not beside the repository")


def place_of(seed: str) -> str:
    return seed.partition(" [")[0]


# ---------------------------------------------------------------- the table alone


def test_each_place_of_each_seed_has_its_papers() -> None:
    found = Counter(place for paper in PAPERS for place in {place_of(seed) for seed in paper.seeds})
    assert found == PLACES


def test_every_reference_of_the_fourth_seed_is_one_paper() -> None:
    numbers = [int(n) for paper in PAPERS for n in {s.partition("[")[2][:-1] for s in paper.seeds if "[" in s}]
    assert sorted(numbers) == list(range(1, 296))


def test_no_paper_is_there_twice() -> None:
    titles = Counter(squash(paper.title) for paper in PAPERS)
    numbers = Counter(link for paper in PAPERS for link in paper.links if link.startswith("arXiv:"))
    assert not [key for key, times in (titles | numbers).items() if times > 1]


def test_a_paper_has_one_number_at_arxiv() -> None:
    assert not [p.where for p in PAPERS if sum(link.startswith("arXiv:") for link in p.links) > 1]


def test_every_paper_is_attached_or_says_why_not() -> None:
    assert [p.where for p in PAPERS if bool(p.about) == bool(p.not_yet)] == []
    assert [p.where for p in PAPERS if p.not_yet and len(p.not_yet.split()) < 5] == [], "a reason is a sentence"


def test_papers_are_attached_to_what_there_is_and_never_to_what_lies_above_it() -> None:
    field = load((OURS,))
    for paper in PAPERS:
        assert [a for a in paper.about if a not in field.methods and a not in field.topics] == [], paper.where
        above = {
            topic
            for about in paper.about
            for topic in (
                field.upwards(field.methods[about].topic) if about in field.methods else field.upwards(about)[1:]
            )
        }
        assert not above.intersection(paper.about), paper.where


def test_titles_are_readable() -> None:
    assert [p.where for p in PAPERS if p.title != " ".join(p.title.split())] == []
    glued = r"[^\W\d_]{22}|[a-z][:?][A-Z]|[a-z]- (?!and)[a-z]"
    assert [p.title for p in PAPERS if re.search(glued, p.title)] == []


def test_links_have_one_form() -> None:
    form = r"https://[^\s|]+|arXiv:\d{4}\.\d{4,5}"
    assert [p.where for p in PAPERS if not all(re.fullmatch(form, link) for link in p.links)] == []


def test_years_are_plausible() -> None:
    assert [p.where for p in PAPERS if p.year is None and p.venue != "software"] == []
    assert [p.where for p in PAPERS if p.year is not None and not 1960 < p.year < 2025] == []
    for paper in PAPERS:
        for link in paper.links:
            if (found := re.match(r"arXiv:(\d\d)", link)) and paper.year:  # some are put there after, most before
                assert -1 <= paper.year - (2000 + int(found[1])) <= 3, paper.where


# ---------------------------------------------------------------- against the seeds


@seeds_are_here
def test_the_seeds_have_as_many_titles_as_a_plain_count_finds() -> None:
    text = {path.name[:3]: path.read_text(encoding="utf-8") for path in SEEDS.glob("*.txt")}
    header = 1  # each seed is a paper itself, or the list of one
    plain = {
        "000": header + len(re.findall(r"^\| *\d{4}|\[\\\[|> - \[", text["000"], re.M)),
        "001": header + len(re.findall(r"^- .*\[|\[Code\] \|", text["001"], re.M)),
        "002": header + len(re.findall(r"\[\[Paper\]\]|\[\[URL\]\]", text["002"])),
        "003": header + max(int(n) for n in re.findall(r"^\[(\d+)\] ", text["003"], re.M)),
    }
    assert plain == TITLES == Counter(mention.seed for mention in mentions())


@seeds_are_here
def test_every_title_of_the_seeds_is_there_under_its_place() -> None:
    by_title = {squash(paper.title): paper for paper in PAPERS}
    by_link = {link: paper for paper in PAPERS for link in paper.links}
    for mention in mentions():
        written = import_papers.SAME.get(mention.title or mention.links[0], mention.title)
        key = import_papers.nearest(squash(written), by_title)
        paper = by_title[key] if key else by_link[mention.links[0]]
        assert set(mention.places) <= set(paper.seeds), f"{paper.where}: {written} stands at {mention.places}"
        assert set(mention.links) <= set(paper.links), f"{paper.where}: a link of the seed is gone"


@seeds_are_here
def test_no_paper_claims_a_place_it_does_not_have() -> None:
    places = {place for mention in mentions() for place in mention.places}
    assert {seed for paper in PAPERS for seed in paper.seeds} == places


@seeds_are_here
def test_the_table_is_what_the_tool_makes_of_the_seeds() -> None:
    assert import_papers.changes() == ()


@seeds_are_here
def test_references_are_numbered_and_cited_in_sections_that_exist() -> None:
    cited = [m for m in mentions() if m.seed == "003" and "[" in m.places[0]]
    assert all("§" in place for mention in cited for place in mention.places), "a reference nobody cites"
    first = [[int(n) for n in re.findall(r"\d+", m.places[0].partition("§")[2].partition(" ")[0])] for m in cited]
    assert all(a <= b for a, b in pairwise(first)), "references are numbered in the order they are first cited"


# ---------------------------------------------------------------- the tool


def test_what_a_person_decided_survives_the_tool() -> None:
    mine = Row(
        "x_2020", "A Readable Title: of Something", "2020", "ICLR", ("https://mine.example/x",), (), ("gptq",), ""
    )
    read = Mention(("003 §1 [7]",), "Areadabletitle:ofsomethimg", 2019, "", ("arXiv:2001.00001",))
    (row,) = merge([read], [replace(mine, seeds=("003 §9 [7]",))])
    assert row == replace(mine, seeds=read.places, links=(*mine.links, *read.links))
    assert merge([read], [row]) == [row]


def test_a_title_nobody_decided_about_becomes_a_row_without_attachment() -> None:
    (row,) = merge([Mention(("002 A/B",), "Tiny: a Thing", 2021, "ICML", ("arXiv:2101.00001",))], [])
    assert row == Row("tiny_2021", "Tiny: a Thing", "2021", "ICML", ("arXiv:2101.00001",), ("002 A/B",))


def test_a_bare_link_is_the_paper_that_has_it() -> None:
    titled = Mention(("002 A/B",), "Tiny: a Thing", 2021, "ICML", ("arXiv:2101.00001",))
    (row,) = merge([Mention(("000 Metrics",), "", None, "", titled.links), titled], [])
    assert row.seeds == ("002 A/B", "000 Metrics")


def test_titles_that_are_only_alike_stay_apart() -> None:
    context = "Extending Context Window of Large Language Models via "
    alike = [
        Mention(("001 A",), context + how, 2023, "", ()) for how in ("Positional Interpolation", "Semantic Compression")
    ]
    assert len(merge(alike, [])) == 2


def test_the_file_is_read_back_as_written(tmp_path: Path) -> None:
    rows = [Row("b_2020", 'He said "no", twice', "2020", "", (), ("000 A",), ("gptq", "awq")), Row("a", "Ä|B", "", "")]
    import_papers.write(rows, tmp_path / "papers.csv")
    assert import_papers.read(tmp_path / "papers.csv") == sorted(rows, key=lambda r: r.id)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://arxiv.org/pdf/2310.06825.pdf]]%3E", "arXiv:2310.06825"),
        ("https://ar5iv.labs.arxiv.org/html/2309.10400", "arXiv:2309.10400"),
        ("http://proceedings.mlr.press/v139/jaegle21a/jaegle21a.pdf", "https://proceedings.mlr.press/v139/jaegle21a/jaegle21a.pdf"),
        ("https://github.com/getao/icae.", "https://github.com/getao/icae"),
        ("https://github.com/", None),
        ("https://www.bing.com/search?q=x", None),
        ("javascript:alert(1)", None),
    ],
)  # fmt: skip
def test_links_take_one_form(url: str, expected: str | None) -> None:
    assert import_papers.link(url) == expected
