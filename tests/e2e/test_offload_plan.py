"""Less memory than the model needs: the planner leaves weights on disk, and what it promised is measured."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from planner import estimate, plan

WORKLOAD = {"prompt_tokens": 32, "output_tokens": 8}
SEARCH = {"effort": "quick", "time_limit": "8 min", "max_measured": 4, "seed": 0}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_that_needs_more_memory_than_there_is_budget_for(machine: Path, tmp_path: Path) -> None:
    from planner.tiny_models import make_tiny_model

    store = shutil.copytree(machine, tmp_path / "store")
    model = make_tiny_model(tmp_path / "model", hidden_size=512, layers=12, vocab_size=2048)  # 118 MB
    # Two parts of 24 are in memory while they are read, so a fifth of what the process takes can go.
    answer = plan(
        model, budgets={"peak_memory": {"max": "0.88x baseline"}}, workload=WORKLOAD, objectives=["tpot_p50"], store=store,
        run_dir=tmp_path / "runs", engines=["transformers"], techniques={"only": ["offload"]}, search=SEARCH,
        quality={"data": "bundled"},
    )  # fmt: skip
    assert answer.recommended is not None and answer.baseline is not None, answer.conflicts
    chosen, unchanged = answer.recommended.measurement, answer.baseline.measurement
    assert chosen is not None and unchanged is not None and chosen.failure is None
    (step,) = answer.recommended.plan.steps
    assert step.technique == "offload"
    now, before = chosen.figures, unchanged.figures
    assert now["peak_memory_bytes"].value <= 0.88 * before["peak_memory_bytes"].value
    assert now["artefact_bytes"].value == before["artefact_bytes"].value
    assert now["tpot_s"].value > before["tpot_s"].value
    assert now["quality_loss_ratio"].value < 1e-3
    promised = estimate(model, [step], store=store, **WORKLOAD).values
    for name in ("weights_bytes", "peak_memory_bytes", "artefact_bytes"):
        assert promised[name].low <= now[name].value <= promised[name].high, name
    built = float(chosen.protocol["build_peak_bytes"])
    assert built < before["peak_memory_bytes"].value + before["artefact_bytes"].value  # never the weights twice


TEXT = "A model that is larger than memory is read from disk, layer by layer, each time it is asked for a token. " * 24


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_larger_than_the_limit_is_planned_for_within_it(
    machine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No process may take 500 MiB, which the model and the framework do together: all of it, the unchanged model's too."""
    from planner.building import verify
    from planner.tiny_models import make_tiny_model

    limit = 500 << 20
    store = shutil.copytree(machine, tmp_path / "store")
    model = make_tiny_model(tmp_path / "model", hidden_size=768, layers=18, vocab_size=2048)  # 389 MB
    (tmp_path / "text.txt").write_text(TEXT)
    answer = plan(
        model, budgets={"peak_memory": "500 MiB"}, workload=WORKLOAD, objectives=["tpot_p50"], store=store,
        run_dir=tmp_path / "runs", engines=["transformers"], techniques={"only": ["offload", "weight_int8"]},
        search=SEARCH | {"max_measured": 2}, quality={"data": str(tmp_path / "text.txt")}, limits={"memory": "500 MiB"},
        progress=True,
    )  # fmt: skip
    said = capsys.readouterr().err
    assert "500 MiB is allowed: it runs as offload(resident=" in said
    first, other = answer.results
    assert first.measurement is not None and first.measurement.failure is None
    for result in (first, other):
        (step,) = result.plan.steps
        measured = result.measurement
        assert step.technique == "offload" and measured is not None
        if measured.failure:  # predicted to fit, near the limit: it is stopped there, and says so
            assert measured.failure.kind == "oom_host" and "of the 500 MiB limit" in measured.failure.message
            continue
        assert measured.figures["peak_memory_bytes"].value <= limit
        assert measured.protocol["build_peak_bytes"] <= limit
        assert measured.figures["quality_loss_ratio"].value == pytest.approx(0, abs=1e-3)
        assert result.artefact is not None and answer.folder is not None
        assert verify(Path(answer.folder) / result.artefact) == []
    assert any("every plan is compared with that" in warning for warning in answer.provenance["warnings"])
    refused = {r.why: r.count for r in answer.rejected if r.kind == "predicted"}
    assert refused["predicted beyond limits.memory (500 MiB)"] >= 2  # the whole model, and weight_int8, which loads it
    assert answer.recommended in (first, other) and not answer.recommended.measurement.failure  # type: ignore[union-attr]
