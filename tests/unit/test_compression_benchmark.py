"""The benchmark of compression: which rows are due, which are kept, how they are told, and that its driver measures what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compression as cb
from benchmarks.compression_references import _driver
from benchmarks.compression_references._reference import Reference
from knowledge_base import registry

LIBRARIES = set(cb.references())


def row(case: cb.Case, build: cb.Build, model: str = "m", **changes: Any) -> dict[str, Any]:
    return {
        "model": model, "case": case.name, "by": build.by, "how": build.how, "version": "", "build_s": 1.0, "build_cpu_s": 0.9,
        "peak_bytes": 2_000_000, "artefact_bytes": 3_000_000, "bits_per_weight": 4.25, "zeros_share": 0.0, "removed_share": 0.0,
        "ppl_ratio": 1.01, "threads": 1,
    } | changes  # fmt: skip


# ---------------------------------------------------------------- the cases


def test_every_case_is_done_by_us_and_by_somebody_else() -> None:
    for case in cb.CASES:
        by = [build.by for build in case.builds]
        assert cb.OURS in by and set(by) - {cb.OURS} <= LIBRARIES and len(set(by)) > 1, case.name


def test_rows_have_names_of_their_own() -> None:
    names = [cb.key("m", case, build) for case in cb.CASES for build in case.builds]
    assert len(set(names)) == len(names)


def test_our_steps_are_techniques_with_knobs_they_have() -> None:
    for case in cb.CASES:
        for build in case.builds:
            for technique, knobs in build.setting.get("steps", ()):
                assert set(knobs) <= set(registry.techniques.get(technique).TECHNIQUE.knobs), (case.name, technique)


def test_nobody_gets_another_group_size_number_of_bits_or_share_of_zeros_than_we_do() -> None:
    for case in cb.CASES:
        said: dict[str, set[Any]] = {}
        for build in (build for build in case.builds if build.how != cb.WIDER):
            steps = [knobs for _, knobs in build.setting.get("steps", ())]
            for knobs in steps or [build.setting]:
                for knob in {"bits", "group_size", "sparsity", "keep"} & set(knobs):
                    said.setdefault(knob, set()).add(knobs[knob])
        assert all(len(values) == 1 for values in said.values()), (case.name, said)


# ---------------------------------------------------------------- what is due and what is kept


def test_a_row_is_due_until_it_is_kept() -> None:
    case = cb.CASES[0]
    kept = [row(case, case.builds[0])]
    todo = cb.due("m", kept, LIBRARIES, again=False)
    assert (case, case.builds[0]) not in todo and (case, case.builds[1]) in todo
    assert len(cb.due("m", kept, LIBRARIES, again=True)) == len(todo) + 1
    assert len(cb.due("another", kept, LIBRARIES, again=False)) == len(todo) + 1


def test_ours_is_due_beside_the_chosen_library_alone() -> None:
    by = {build.by for _, build in cb.due("m", [], {"hqq"}, again=False)}
    assert by == {cb.OURS, "hqq"}
    assert {case.name for case, _ in cb.due("m", [], LIBRARIES, again=False, named="wanda")} == {
        "Wanda, 50% zeros",
        "Wanda, 2:4",
    }


def test_the_large_model_gets_few_cases() -> None:
    large = {case.name for case, _ in cb.due(cb.LARGE, [], LIBRARIES, again=False)}
    assert large == {case.name for case in cb.CASES if case.large} and 0 < len(large) < len(cb.CASES) / 2


def test_a_new_row_takes_the_place_of_the_one_of_its_name_in_the_order_of_the_cases() -> None:
    first, second = cb.CASES[0], cb.CASES[1]
    kept = cb.merged([], row(second, second.builds[0]))
    kept = cb.merged(kept, row(first, first.builds[0], ppl_ratio=1.5))
    kept = cb.merged(kept, row(first, first.builds[0], ppl_ratio=1.2))
    assert [(one["case"], one["ppl_ratio"]) for one in kept] == [(first.name, 1.2), (second.name, 1.01)]


def test_a_row_of_a_case_that_is_no_more_is_dropped() -> None:
    old = {**row(cb.CASES[0], cb.CASES[0].builds[0]), "case": "of last year"}
    assert [one["case"] for one in cb.merged([old], row(cb.CASES[1], cb.CASES[1].builds[0]))] == [cb.CASES[1].name]


# ---------------------------------------------------------------- the table


def test_ours_is_bold_where_nobody_is_better() -> None:
    case = cb.CASES[0]
    theirs = next(build for build in case.builds if build.by != cb.OURS)
    for ratio, bold in ((1.0095, True), (1.0104, True), (1.0106, False)):
        rows = [row(case, case.builds[0], ppl_ratio=ratio), row(case, theirs, ppl_ratio=1.01)]
        told = cb.as_markdown({"rows": rows, "left_out": []})
        assert (f"**{ratio:.4f}**" in told) == bold, ratio


def test_the_table_tells_bits_zeros_or_parameters_and_no_perplexity_of_random_weights() -> None:
    case = cb.CASES[0]
    rows = [
        row(case, case.builds[0]),
        row(case, case.builds[1], bits_per_weight=32.0, zeros_share=0.5),
        row(case, case.builds[2], bits_per_weight=None, removed_share=0.161),
        row(case, case.builds[0], model=cb.LARGE, ppl_ratio=None),
    ]
    lines = cb.as_markdown({"rows": rows, "left_out": []}).splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines] == [
        "4.25 bits",
        "50.0% zeros",
        "16.1% of the parameters removed",
        "4.25 bits",
    ]
    assert lines[3].split(" | ")[4] == "-"


def test_reasons_of_other_programs_cannot_write_the_page() -> None:
    why = "bad <script> | a [link](x) `code`\nnext"
    told = cb.as_markdown({"rows": [], "left_out": [{"model": "m", "case": "c", "by": "hqq", "why": why}]})
    assert (
        not set("<>[]`\\") & set(told)
        and told.count("\n") == cb.as_markdown({"rows": [], "left_out": []}).count("\n") + 4
    )


# ---------------------------------------------------------------- environments and measuring


def test_an_environment_counts_when_it_has_this_version(tmp_path: Path) -> None:
    reference = Reference(name="some", package="some-thing", version="1.2", source="")
    assert not reference.installed(tmp_path)
    site = tmp_path / "some/lib/python3.11/site-packages"
    (site / "Some_Thing-1.1.dist-info").mkdir(parents=True)
    assert not reference.installed(tmp_path)
    (site / "Some_Thing-1.2.dist-info").mkdir()
    assert reference.installed(tmp_path)


def test_a_library_without_a_package_runs_where_we_do(tmp_path: Path) -> None:
    reference = Reference(name="some", version="1", source="")
    assert reference.installed(tmp_path) and reference.python(tmp_path) == Path(sys.executable)


def test_no_file_of_a_library_imports_it_before_it_is_asked() -> None:
    code = (
        "import sys; from benchmarks import compression; compression.references()\n"
        "print(*{'torch', 'transformers', 'llmcompressor', 'gptqmodel', 'hqq'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cb.ROOT, check=True)
    assert told.stdout.strip() == ""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc of Linux")
def test_peak_memory_is_what_was_held_at_once_and_not_before() -> None:
    # In a process of its own: what an allocator kept of earlier work would be used again, and not counted.
    work = """
from benchmarks.compression_references._driver import peak_memory
before = b"x" * 64_000_000
del before
with peak_memory() as peak:
    held = b"x" * 32_000_000
    del held
    after = b"x" * 8_000_000
print(peak[0])
"""
    told = subprocess.run([sys.executable, "-c", work], cwd=cb.ROOT, capture_output=True, text=True, check=True)
    assert 30e6 < int(told.stdout) < 38e6


def test_stored_bits_are_counted_from_what_lies_under_the_matrices_names(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "model.layers.0.up.packed": torch.zeros(16, 8, dtype=torch.uint8),
        "model.layers.0.up.scales": torch.zeros(16, dtype=torch.bfloat16),
        "model.layers.0.up.bias": torch.zeros(16),
        "model.embed.weight": torch.zeros(100, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert _driver._stored_bytes(None, tmp_path, ["model.layers.0.up"]) == 128 + 32
