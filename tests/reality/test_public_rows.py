"""Uncalibrated predictions against published batch-1 decode and prefill rates of dense Llama-like models in llama.cpp.

The rows are not part of the repository (some have no licence to ship): LEANPLAN_PUBLIC_ROWS names the CSV, or it lies
in ../shared/data. Without it the test is skipped. Errors may only go down: lower the bounds when they do.

    python tests/reality/test_public_rows.py      # the table, by format and device
"""

from __future__ import annotations

import csv
import math
import os
import re
import statistics
from pathlib import Path

import pytest

from cost_models.catalogue import find_machine
from cost_models.error_report import spearman
from cost_models.predict import estimate
from knowledge_base.errors import LeanplanError
from knowledge_base.types import Model, Plan, Step, Workload

ROWS = Path(
    os.environ.get("LEANPLAN_PUBLIC_ROWS") or Path(__file__).resolve().parents[3] / "shared/data/ground_truth.csv"
)

# name pattern, then layers, hidden, heads, KV heads, head size, feed-forward, vocabulary, tied embeddings
SHAPES = (
    (r"llama.?3(\.1)?.8b", 32, 4096, 32, 8, 128, 14336, 128256, False),
    (r"llama.?3(\.[13])?.70b", 80, 8192, 64, 8, 128, 28672, 128256, False),
    (r"llama.?3\.2.3b", 28, 3072, 24, 8, 128, 8192, 128256, True),
    (r"llama.?3\.2.1b", 16, 2048, 32, 8, 64, 8192, 128256, True),
    (r"llama.?2?.7b", 32, 4096, 32, 32, 128, 11008, 32000, False),
    (r"llama.?2?.13b", 40, 5120, 40, 40, 128, 13824, 32000, False),
    (r"llama.?2.70b", 80, 8192, 64, 8, 128, 28672, 32000, False),
    (r"mistral.7b", 32, 4096, 32, 8, 128, 14336, 32768, False),
    (r"qwen2\.5.(coder.)?7b", 28, 3584, 28, 4, 128, 18944, 152064, False),
    (r"phi.4 14b", 40, 5120, 40, 10, 128, 17920, 100352, False),
    (r"qwen2\.5.(coder.)?14b", 48, 5120, 40, 8, 128, 13824, 152064, False),
)
# hardware pattern (one device only) -> catalogue name
DEVICES = (
    (r"A100 SXM 80", "a100-sxm"), (r"A100 PCIe 80", "a100-pcie"), (r"H100 PCIe", "h100-pcie"), (r"L40S", "l40s"), (r"\bA40\b", "a40"),
    (r"A6000", "rtx-a6000"), (r"6000 Ada", "rtx-6000-ada"), (r"5000 Ada", "rtx-5000-ada"), (r"4000 Ada", "rtx-4000-ada"),
    (r"5090", "rtx-5090"), (r"5080", "rtx-5080"), (r"5070 Ti", "rtx-5070-ti"), (r"5070", "rtx-5070"), (r"4090", "rtx-4090"),
    (r"4080", "rtx-4080"), (r"4070 Ti(?! Super)", "rtx-4070-ti"), (r"4070 Ti Super", "rtx-4070-ti-super"), (r"4070", "rtx-4070"), (r"3090 Ti", "rtx-3090-ti"), (r"3090", "rtx-3090"),
    (r"3080 Ti", "rtx-3080-ti"), (r"3080 10GB", "rtx-3080"), (r"3070", "rtx-3070"), (r"3060 12GB", "rtx-3060-12gb"),
    (r"7900 XTX", "rx-7900-xtx"), (r"M2 Ultra", "apple-m2-ultra:192GB"), (r"M3 Max", "apple-m3-max:64GB"), (r"M1 Max", "apple-m1-max:64GB"),
)  # fmt: skip
FORMATS = {"Q4_K_M": "q4_k", "fp16": "f16", "F16": "f16", "Q8_0": "q8_0", "Q6_K": "q6_k", "Q4_0": "q4_0"}


def model_of(name: str) -> Model | None:
    """Return a model with the shapes the name stands for; None when it is none of ours."""
    for pattern, layers, hidden, heads, kv_heads, head, ffn, vocab, tied in SHAPES:
        if re.search(pattern, name, re.IGNORECASE):
            linear = layers * (2 * hidden * heads * head + 2 * hidden * kv_heads * head + 3 * hidden * ffn)
            total = linear + vocab * hidden * (1 if tied else 2)
            return Model(
                name=pattern, source="published shapes", digest=pattern, architecture="llama", layers=layers, hidden_size=hidden,
                heads=heads, kv_heads=kv_heads, head_size=head, ffn_size=ffn, vocab_size=vocab, max_context_tokens=8192,
                params_total=total, params_active=total, linear_params=linear, embedding_params=vocab * hidden,
                tied_embeddings=tied, attention_layers=layers, weight_dtype="bfloat16", weight_bytes=2 * total,
            )  # fmt: skip
    return None


def read_pairs(metric: str = "decode_tokens_per_s") -> list[dict]:
    """Return predicted and measured tokens/s, of decode or prefill, of every row that can be matched."""
    pairs = []
    with ROWS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] != metric or not re.search("llama|ollama", row["engine"], re.IGNORECASE):
                continue
            if row["batch"] not in ("", "1", "1.0") or re.search("SUSPECT|spec_decoding=True", row["notes"]):
                continue
            if re.search(r"\* ?\d|x\d|\+|CM5|\[CPU\]|laptop|mobile", row["hardware"], re.IGNORECASE):
                continue
            device = next((name for pattern, name in DEVICES if re.search(pattern, row["hardware"])), None)
            model, kind = model_of(row["model"]), FORMATS.get(row["weight_dtype"])
            if device is None or model is None or kind is None:
                continue
            workload = Workload(
                prompt_tokens=int(float(row["prompt_tokens"] or 0)) or 1,
                output_tokens=max(int(float(row["output_tokens"] or 0)), 128),
            )
            plan = Plan(model_digest=model.digest, engine="llama_cpp", steps=(Step("weight_gguf", {"type": kind}),))
            machine = find_machine(device)
            try:
                values = estimate(plan, model, workload, machine).values
            except LeanplanError:
                continue  # the catalogue lacks a fact; other rows judge the arithmetic
            if values["weights_bytes"].mid > machine.memory_limit_bytes:
                continue  # ran partly from the host's memory
            decode = metric == "decode_tokens_per_s"
            value, tokens = (values["tpot_s"], 1) if decode else (values["ttft_s"], workload.prompt_tokens)
            pairs.append(dict(
                device=device, model=model.name, kind=kind, licence=row["licence"], measured=float(row["value"]),
                predicted=tokens / value.mid, low=tokens / value.high, high=tokens / value.low, bytes=values["weights_bytes"].mid,
                bandwidth=machine.device.memory_bytes_per_s,
            ))  # fmt: skip
    return pairs


def error(pair: dict) -> float:
    return abs(pair["predicted"] / pair["measured"] - 1)


@pytest.mark.skipif(not ROWS.is_file(), reason=f"published rows are not here ({ROWS.name}); set LEANPLAN_PUBLIC_ROWS")
def test_decode_rates_of_unseen_devices() -> None:
    pairs = read_pairs()
    assert len(pairs) > 150
    errors = [error(p) for p in pairs]
    covered = statistics.mean(p["low"] <= p["measured"] <= p["high"] for p in pairs)
    by_bandwidth = [abs(0.55 * p["bandwidth"] / p["bytes"] / p["measured"] - 1) for p in pairs]
    assert statistics.mean(errors) < statistics.mean(by_bandwidth), "no better than 0.55 x bandwidth / weights"
    assert statistics.mean(errors) < 0.13
    assert 0.8 < covered < 0.97


@pytest.mark.skipif(not ROWS.is_file(), reason=f"published rows are not here ({ROWS.name}); set LEANPLAN_PUBLIC_ROWS")
def test_prefill_rates_of_unseen_devices() -> None:
    pairs = read_pairs("prefill_tokens_per_s")
    assert len(pairs) > 100
    assert statistics.median(error(p) for p in pairs) < 0.16
    assert 0.8 < statistics.mean(p["low"] <= p["measured"] <= p["high"] for p in pairs) < 0.97


def main() -> None:
    import numpy as np

    pairs = read_pairs()
    for title, key in (("format", "kind"), ("device", "device"), ("model", "model"), ("licence", "licence")):
        print(f"\n{title:36} {'n':>4} {'mean':>7} {'median':>7} {'bias':>7} {'covered':>7}")
        for value in sorted({p[key] for p in pairs}):
            chosen = [p for p in pairs if p[key] == value]
            bias = statistics.median(math.log(p["predicted"] / p["measured"]) for p in chosen)
            covered = statistics.mean(p["low"] <= p["measured"] <= p["high"] for p in chosen)
            errors = [error(p) for p in chosen]
            print(
                f"{value[:36]:36} {len(chosen):4} {statistics.mean(errors):7.1%} {statistics.median(errors):7.1%} {math.expm1(bias):+7.1%} {covered:7.0%}"
            )
    errors = [error(p) for p in pairs]
    rule = [abs(0.55 * p["bandwidth"] / p["bytes"] / p["measured"] - 1) for p in pairs]
    rank = spearman(np.array([p["predicted"] for p in pairs]), np.array([p["measured"] for p in pairs]))
    print(
        f"\nall {len(pairs)} rows: mean {statistics.mean(errors):.1%}, median {statistics.median(errors):.1%}, rank {rank:.3f}; "
        f"0.55 x bandwidth / weights: mean {statistics.mean(rule):.1%}, median {statistics.median(rule):.1%}"
    )


if __name__ == "__main__":
    main()
