"""The benchmark of peers: their rules worked out by hand, the driver's protocol, and that both are judged on the same rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers as pr
from benchmarks.peer_rules import accelerate, aiconfigurator, bandwidth, gguf_parser, llm_viewer, llmfit
from benchmarks.peer_rules._asked import Answer, Asked
from benchmarks.public_rows import committed, usable

LIVE = pytest.mark.skipif(
    aiconfigurator.recorded(pr.FOLDER), reason="aiconfigurator is not installed: python benchmarks/peers.py --install"
)
GIB = 2.0**30


def asked(**changes: str) -> Asked:
    record = {
        "source_url": "https://example.org/rows.csv", "licence": "MIT", "model": "meta-llama/Llama-3.1-8B-Instruct",
        "hardware": "NVIDIA H100 SXM", "engine": "vllm 0.12.0", "weight_dtype": "bf16", "batch": "1", "prompt_tokens": "1024",
        "output_tokens": "512", "metric": "tpot_s", "value": "0.01", "notes": "[A]",
    } | changes  # fmt: skip
    kept, left = usable(iter([record]))
    assert not left, left
    return Asked(kept[0], record)


MOE = {"model": "Qwen3-30B-A3B", "hardware": "RTX 4090", "engine": "llama.cpp", "weight_dtype": "Q4_K_M"}
MEMORY = {
    "model": "mistralai/Mistral-7B-v0.1", "hardware": "RTX 4090", "engine": "AutoAWQ GEMM", "weight_dtype": "awq-int4 g128",
    "prompt_tokens": "64", "output_tokens": "64", "metric": "peak_memory_gb", "value": "4.5",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[Asked]:
    return pr.rows_of(committed())[0]


@pytest.mark.parametrize(
    ("estimate", "changes", "expected"),
    [
        # 8.03e9 parameters of 2 bytes at 0.55 of 3.35 TB/s
        (llmfit.estimate, {}, 8.03e9 * 2 / (0.55 * 3.35e12)),
        # 8 experts of 48 layers, 3 * 2048 * 768 each, at 0.58 bytes; attention, routers and two embeddings at 3.2;
        # 30.5e9 * 0.58 bytes fill 0.687 of 24 GiB, so 1 - 0.087 * 120/128 of the speed is left
        (llmfit.estimate, MOE, (1.812e9 * 0.58 + 1.541e9 * 3.2) / 1.008e12 / 0.9186),
        # 2 * 8.03e9 less the embedding table, for each of 1024 tokens at 0.35 of 989 Tflop/s
        (llmfit.estimate, {"metric": "ttft_s"}, 2 * 7.505e9 * 1024 / (0.35 * 989e12)),
        # 7.25e9 * 0.5, a cache of 2 * 2 * 32 * 8 * 128 bytes a token, half a gigabyte
        (llmfit.estimate, MEMORY, 7.248e9 * 0.5 + 131072 * 128 + 0.5e9),
        # all but the embedding table is read once for each token
        (bandwidth.estimate, {}, 7.505e9 * 2 / 3.35e12),
        (bandwidth.estimate, {"hardware": "NVIDIA H100 SXM x2"}, 7.505e9 * 2 / 3.35e12 / 2),
        # 8.03e9 * 4.85 / 8 bytes and 1280 tokens of a cache of 131072 bytes at 1.008 TB/s
        (gguf_parser.estimate, {"hardware": "RTX 4090", "engine": "llama.cpp", "weight_dtype": "Q4_K_M"}, (4.868e9 + 1.678e8) / 1.008e12),
    ],
)  # fmt: skip
def test_rules_give_what_a_hand_gets(estimate: object, changes: dict[str, str], expected: float) -> None:
    assert estimate(asked(**changes)) == pytest.approx(expected, rel=2e-3)  # type: ignore[operator]


def test_the_roofline_of_a_small_layer_is_added_up_by_hand() -> None:
    sizes = {"hidden_size": 4.0, "heads": 2.0, "kv_heads": 1.0, "ffn_size": 8.0, "gated": 1.0}
    layer = list(llm_viewer._layer(sizes, batch=1, new=1, seen=3, weight_bytes=2))
    linear = 2 * (4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8)
    assert sum(operations for operations, *_ in layer) == linear + 24 + 24 + 30 + 28 + 28 + 4 + 4 + 8
    assert sum(weights for _, weights, *_ in layer) == linear  # as many bytes as operations: one token, two bytes
    assert sum(written for *_, written in layer) == 2 * (4 + 2 + 2 + 4 + 8 + 8 + 4 + 6 + 4 + 6 + 5 * 4)


def test_the_roofline_of_a_decoding_model_is_its_weights_and_a_little() -> None:
    weights_s = 7.505e9 * 2 / 3.35e12
    assert weights_s < llm_viewer.estimate(asked()) < 1.05 * weights_s
    assert llm_viewer.estimate(asked(prompt_tokens="60000")) > 1.3 * weights_s


def test_accelerate_is_the_real_library() -> None:
    without_head = (7.248e9 - 32768 * 4096) * 4  # in 32 bits
    assert accelerate.estimate(asked(**MEMORY)) == pytest.approx(without_head / 8, rel=2e-3)
    found = accelerate.estimate(asked(**MEMORY | {"weight_dtype": "fp16", "value": "15"}))
    assert found == pytest.approx(without_head / 2, rel=2e-3)


@pytest.mark.parametrize(
    ("estimate", "changes", "why"),
    [
        (llmfit.estimate, {"hardware": "NVIDIA H100 SXM x2"}, "one device"),
        (llmfit.estimate, {"batch": "8"}, "one request"),
        (llmfit.estimate, MOE | {"engine": "ExLlamaV2", "weight_dtype": "EXL2 4.0 bpw"}, "weight format"),
        (llm_viewer.estimate, MOE, "no such architecture"),
        (gguf_parser.estimate, {}, "GGUF"),
        (bandwidth.estimate, {"metric": "ttft_s"}, "decoding only"),
        (accelerate.estimate, {}, "memory only"),
        (accelerate.estimate, MEMORY | {"model": "mosaicml/mpt-7b"}, "architecture"),
        (accelerate.estimate, MEMORY | {"weight_dtype": "Q6_K", "engine": "llama.cpp"}, "32, 16, 8 and 4 bits"),
        (aiconfigurator.question, {"hardware": "RTX 4090"}, "tables of the device"),
        (aiconfigurator.question, {"engine": "vLLM 0.6.1"}, "another generation"),
        (aiconfigurator.question, {"model": "google/gemma-3-12b-it"}, "config of the model"),
    ],
)
def test_what_a_peer_cannot_answer_has_a_reason(estimate: object, changes: dict[str, str], why: str) -> None:
    found = estimate(asked(**changes))  # type: ignore[operator]
    assert isinstance(found, str)
    assert why in found


@pytest.mark.parametrize(
    ("changes", "candidates"),
    [
        ({}, [("meta-llama/Llama-3.1-8B-Instruct", None, None), ("meta-llama/Meta-Llama-3.1-8B", None, None)]),
        ({"weight_dtype": "fp8/moe fp8", "model": "meta-llama/Llama-3.1-70B"}, [("meta-llama/Llama-3.1-70B", "fp8", "fp8"), ("meta-llama/Meta-Llama-3.1-70B", "fp8", "fp8")]),
        ({"weight_dtype": "nvfp4/moe nvfp4", "model": "openai/gpt-oss-120b", "hardware": "NVIDIA B200 SXM"}, [("openai/gpt-oss-120b", None, None)] * 2),
    ],
)  # fmt: skip
def test_a_model_is_asked_for_by_its_own_name_first(changes: dict[str, str], candidates: list[object]) -> None:
    found = aiconfigurator.question(asked(**changes))
    assert isinstance(found, dict)
    assert found["candidates"] == candidates


def test_every_question_of_the_committed_rows_has_a_recorded_answer(rows: list[Asked], tmp_path: Path) -> None:
    found = list(aiconfigurator.answers(rows, tmp_path))
    assert len(found) == len(rows)
    assert not [a for a in found if isinstance(a, str) and "no answer recorded" in a]
    assert sum(not isinstance(a, str) for a in found) > 2500


@LIVE
def test_the_driver_answers_what_was_recorded(
    rows: list[Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [one for one in rows if one.row.concurrent and one.row.family == "tensorrt_llm"][:4]
    recorded = list(aiconfigurator.answers(chosen, tmp_path))
    monkeypatch.setattr(aiconfigurator, "RECORD", tmp_path / "record.csv")
    live = list(aiconfigurator.answers(chosen, pr.FOLDER))
    assert live == pytest.approx(recorded, rel=1e-4)
    assert list(aiconfigurator.answers(chosen, tmp_path)) == pytest.approx(live, rel=1e-4)


def test_a_driver_that_ends_says_why_and_records_nothing(
    rows: list[Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = aiconfigurator.python(tmp_path)  # an interpreter without the package
    empty.parent.mkdir(parents=True)
    empty.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    empty.chmod(0o755)
    monkeypatch.setattr(aiconfigurator, "RECORD", tmp_path / "record.csv")
    with pytest.raises(RuntimeError, match="No module named 'aiconfigurator"):
        list(aiconfigurator.answers(rows, tmp_path))
    assert not (tmp_path / "record.csv").exists()


def test_errors_are_told_as_shares_of_what_was_measured() -> None:
    rows = [asked(value=str(value)) for value in (0.010, 0.011, 0.012, 0.013, 0.014)]
    found = pr.fared(rows, np.array([0.010, 0.0121, 0.012, 0.026, 0.0168]))
    assert found == {
        "median": 0.1, "lower_quartile": 0.0, "upper_quartile": 0.2, "bias": 0.1, "within": 0.8, "rank": 0.8,
    }  # fmt: skip


def test_ours_is_judged_on_the_rows_the_peer_answered(rows: list[Asked]) -> None:
    answers: list[Answer] = [one.row.value * 2 if i % 3 else "no" for i, one in enumerate(rows)]
    ours = np.array([one.row.value * (1.1 if i % 3 else 100) for i, one in enumerate(rows)])
    found = pr.compared(rows, answers, ours)
    assert sum(row["n"] for row in found["unanswered"]) == answers.count("no")
    for row in found["quantities"].values():
        assert row["answered"] < row["rows"]
        assert (row["peer"]["median"], row["ours"]["median"]) == (1.0, 0.1)


def test_a_peer_alone_takes_seconds_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = pr.RESULTS.read_bytes(), pr.README.read_bytes()
    pr.main(["--peer", "llmfit", "--peers-only"])
    assert "| decode, batch 1, dense | llmfit |" in capsys.readouterr().out
    assert before == (pr.RESULTS.read_bytes(), pr.README.read_bytes())


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pr.main(["--peer", "vidur"])
    assert ended.value.code == 2
    assert "llm_viewer" in capsys.readouterr().err


def test_reasons_cannot_break_the_table() -> None:
    reasons = [{"metric": "tpot", "why": "a | b <img src=x> `c`\n[d](e)", "n": 2}]
    told = {"how": "rule", "source": "https://example.org", "seconds": None, "quantities": {}, "unanswered": reasons}
    line = next(
        line
        for line in pr.as_markdown({"our_seconds": 0.1, "peers": {"p": told}}).splitlines()
        if "example.org" in line
    )
    assert line.count("|") == 5
    assert "<" not in line and "`" not in line and "](e)" not in line


def test_the_readme_has_the_tables_of_the_figures() -> None:
    kept = json.loads(pr.RESULTS.read_text(encoding="utf-8"))
    readme = pr.README.read_text(encoding="utf-8")
    assert pr.with_tables(readme, kept) == readme, "python benchmarks/peers.py writes both"
    assert all(pr.as_markdown(found) in readme for found in kept.values())


def test_every_peer_says_what_it_is() -> None:
    found = pr.peers().values()
    assert len({peer.name for peer in found}) == len(found) >= 6
    assert all(peer.how and peer.source.startswith("https://") for peer in found)
