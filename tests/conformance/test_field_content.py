"""What the knowledge of the field must hold, and that it says what the survey's own text says where that is at hand."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest

from knowledge_base.field import OURS, load
from knowledge_base.field.entries import RESOURCES, Topic
from knowledge_base.registry import techniques

ROOT = Path(__file__).resolve().parent.parent.parent
SURVEY = next(iter((ROOT.parent / "shared" / "seeds").glob("003*.txt")), None)
FIELD = load((OURS,))
TABLE_2 = {t.id: t for t in FIELD.topics.values() if t.origin == "003 table 2"}
TECHNIQUES = {name: module.TECHNIQUE for name, module in techniques.all().items()}

LEAVES_OF_FIGURE_1 = (  # the figure shows Pruning, Quantization and Distributed Training whole; Table 2 divides them
    "approximated_attention", "hardware_aware_attention", "modular_network", "other_architecture", "distributed_training",
    "mixed_precision_training", "importance_sampling", "data_augmentation", "training_objective",
    "adapter_based_fine_tuning", "masking_based_fine_tuning", "full_parameter_fine_tuning", "pruning", "quantisation",
    "knowledge_distillation", "low_rank_approximation", "early_exit", "input_pruning", "token_parallelism",
    "hardware_offloading", "collaborative_inference", "libraries", "edge_devices", "other_systems",
)  # fmt: skip
DIVIDED_BY_TABLE_2 = (
    "data_parallelism", "model_parallelism", "unstructured_pruning", "structured_pruning", "contextual_pruning",
    "weight_quantisation", "activation_quantisation", "fixed_point_quantisation", "white_box_distillation",
    "black_box_distillation",
)  # fmt: skip
METRICS_OF_9_1 = {
    "flops", "training_time", "latency_end_to_end", "latency_per_token", "throughput_tokens", "throughput_queries",
    "speed_up_ratio", "parameters", "model_size", "peak_memory", "energy", "carbon", "dollars_per_parameter",
    "communication_volume", "compression_ratio", "loyalty", "fidelity", "after_attack_accuracy", "query_number",
    "pareto_optimality", "dynascore",
}  # fmt: skip


def test_counts() -> None:
    assert len(TABLE_2) == 26, "rows of Table 2"
    assert len(FIELD.attention) == 10, "rows of Table 1"
    assert set(FIELD.survey_metrics) == METRICS_OF_9_1
    assert [b.name for b in FIELD.benchmarks.values()] == [
        "Dynaboard", "EfficientQA", "SustaiNLP 2020 shared task", "ELUE", "VLUE", "Long Range Arena",
        "Efficiency-aware MS MARCO",
    ]  # fmt: skip
    assert [c.section for c in FIELD.challenges.values()] == [f"§10.{n}" for n in range(1, 8)]


def test_the_whole_of_figure_1_and_table_2_is_there() -> None:
    assert set(LEAVES_OF_FIGURE_1) | set(DIVIDED_BY_TABLE_2) <= set(FIELD.topics)
    assert set(TABLE_2) <= set(LEAVES_OF_FIGURE_1) | set(DIVIDED_BY_TABLE_2)
    for topic in LEAVES_OF_FIGURE_1 + DIVIDED_BY_TABLE_2:
        assert FIELD.below(topic), f"`{topic}` has no method"
        assert FIELD.upwards(topic)[-1] in (
            "architecture_design",
            "pre_training",
            "fine_tuning",
            "inference",
            "system_design",
        )


@pytest.mark.parametrize("topic", TABLE_2.values(), ids=lambda topic: topic.id)
def test_a_doubtful_cell_could_be_read_otherwise(topic: Topic) -> None:
    """The marks of a row keep their order, and money is indirect everywhere (§8.4): what else could the row say?"""
    assert topic.note or topic.effects.keys() == {"computation", "memory", "energy"}, "say how the row was decided"
    marks = [topic.effects[r] for r in RESOURCES if r in topic.effects]
    readings = [dict(zip(places, marks)) for places in combinations(RESOURCES, len(marks))]
    certain = set(RESOURCES) - set(topic.uncertain)
    readings = [
        reading
        for reading in readings
        if reading.get("money") != "direct" and all(reading.get(r) == topic.effects.get(r) for r in certain)
    ]
    assert topic.effects in readings
    for resource in topic.uncertain:
        assert any(reading.get(resource) != topic.effects.get(resource) for reading in readings), resource


# Techniques that execute a part of a method, which other steps complete: AWQ is scaling, then rounding.
PARTS = {"scale_awq": "awq", "smooth_quant": "smoothquant", "rotate": "quarot", "prune_hidden": "slicegpt"}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_and_the_methods_it_executes_agree(name: str) -> None:
    technique = TECHNIQUES[name]
    assert technique.implements
    for method in map(FIELD.method, technique.implements):
        assert method.stage == technique.stage
        if PARTS.get(name) != method.id:  # what does a part of a method is no alternative to others of its family
            assert method.family == technique.family
            assert method.provides == technique.provides
        for knob, choice in technique.knobs.items():
            assert set(choice.options) <= set(method.knobs[knob]), knob


def test_a_technique_and_a_method_of_one_name_are_the_same_thing() -> None:
    for name in TECHNIQUES.keys() & FIELD.methods.keys():
        assert TECHNIQUES[name].implements == (name,)


def test_evidence_stays_within_the_settings_a_method_names() -> None:
    for row in FIELD.evidence:
        for step in row.steps:
            for knob, value in step.knobs.items():
                assert value in FIELD.methods[step.technique].knobs[knob], f"{row.where}: {step}"


def test_the_files_of_every_answer_exist() -> None:
    for challenge in FIELD.challenges.values():
        assert challenge.files
        for file in challenge.files:
            assert (ROOT / file).exists(), f"{challenge.where}: {file}"


def test_rows_of_table_1_are_methods() -> None:
    assert set(FIELD.attention) - set(FIELD.methods) == {"standard_attention"}


# ---------------------------------------------------------------- against the survey's own text

needs_survey = pytest.mark.skipif(SURVEY is None, reason="the survey's text is not beside this checkout")


def between(start: str, end: str) -> list[str]:
    """Return the lines of the survey's text from the one that begins with `start` to the one that begins with `end`."""
    text = SURVEY.read_text(encoding="utf-8")
    return text[text.index(f"\n{start}") : text.index(f"\n{end}")].splitlines()


def squeezed(name: str) -> str:
    """Return a name without blanks, hyphens, section numbers and American spelling: the conversion dropped blanks at will."""
    return re.sub(r"[^a-z]", "", re.sub(r"§[\d.]+", "", name).lower().replace("z", "s"))


@needs_survey
def test_rows_of_table_2_have_the_marks_of_the_text() -> None:
    names = {squeezed(t.name): t for t in TABLE_2.values()}
    names["parameterefficient" + squeezed("Adapter-based fine-tuning")] = TABLE_2["adapter_based_fine_tuning"]
    seen = set()
    for line in between("MainCategoryTechnique Sub-Category", "Table 2 Mapping"):
        if found := re.fullmatch(r"(.+?)((?: (?:XXX|X))+)", line):
            topic = names[squeezed(found[1])]
            marks = ["direct" if mark == "XXX" else "indirect" for mark in found[2].split()]
            assert [topic.effects[r] for r in RESOURCES if r in topic.effects] == marks, line
            seen.add(topic.id)
    assert seen == TABLE_2.keys()


@needs_survey
def test_rows_of_table_1_are_those_of_the_text() -> None:
    rows = {}
    for line in between("Approach Time Complexity Memory Complexity", "Table 1 Overview"):
        if found := re.fullmatch(r"(.+?) ?\[(\d+)\] O\((.+)\) O\((.+)\)", line):
            rows[squeezed(found[1])] = (found[2], found[3].replace(" ", ""), found[4].replace(" ", ""))
    ours = {
        squeezed(row.name): (row.reference.split("[")[1][:-1], *(_as_printed(f) for f in (row.time, row.memory)))
        for row in FIELD.attention.values()
    }
    assert ours == rows


def _as_printed(formula: str) -> str:
    return re.sub(r"[ *^()]", "", formula)


@needs_survey
def test_leaves_of_figure_1_are_named_in_the_figure() -> None:
    figure = squeezed(" ".join(between("sMLL", "Fig. 1 A")))
    for topic in LEAVES_OF_FIGURE_1:
        assert squeezed(FIELD.topics[topic].name) in figure, topic


@needs_survey
def test_metrics_and_benchmarks_are_named_in_their_sections() -> None:
    metrics = squeezed(" ".join(between("9.1 Evaluation metrics", "10 Open challenges")))
    for entry in (*FIELD.survey_metrics.values(), *FIELD.benchmarks.values()):
        words = squeezed(entry.name.split(" in ")[0])
        assert words in metrics, entry.name
    challenges = squeezed(" ".join(between("10 Open challenges", "11 Conclusion")))
    for challenge in FIELD.challenges.values():
        assert squeezed(f"{challenge.section[1:]} {challenge.name}") in challenges, challenge.name
