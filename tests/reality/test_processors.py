"""Predictions for processors known by their data sheets alone, against published rates of llama.cpp.

The shares of published figures in efficiencies.csv were fitted to these rows: this holds the fit, it is no forecast.

The rows under open licences are committed (benchmarks/data); where ../shared/data is there, its others count as well.
Errors may only go down: lower the bounds when they do.

    python tests/reality/test_processors.py      # every row
"""

from __future__ import annotations

import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_public_rows import error, model_of

from benchmarks.public_rows import SHARED, committed, records
from cost_models.catalogue import find_machine
from cost_models.predict import estimate
from knowledge_base.types import Device, Model, Plan, Step, Workload

# hardware pattern -> catalogue name, channels x MT/s where the row's memory is another
PROCESSORS = (
    (r"Framework Mainboard .*\[CPU\]", "ryzen-ai-max-395", None), (r"Ryzen AI 5 340.*\[CPU\]", "ryzen-ai-5-340", None),
    (r"AmpereOne A192-32X.*\[CPU\]", "ampereone-a192-32x", None), (r"N150.*\[CPU\]", "intel-n150", None), (r"^Pi 5 - 16GB \[CPU\]", "raspberry-pi-5", None),
    (r"Surface Book 3 CPU", "i7-1065g7", None), (r"EPYC 9554", "epyc-9554", None), (r"i9-13900K, DDR5-6400", "i9-13900k", 2 * 6400e6 * 8),
    (r"155H", "core-ultra-7-155h", None),
)  # fmt: skip
FORMATS = {"Q4_K_M": "q4_k", "Q8_0": "q8_0", "Q6_K": "q6_k", "Q4_0": "q4_0", "Q4_0?": "q4_0", "W4": "q4_0"}
ALIASES = (("DeepSeek-R1-Distill-Qwen", "Qwen2.5"), ("LLaMA-7B", "Llama-2-7B"))


def read_pairs(rows: object, metric: str) -> list[dict]:
    """Return predicted and measured tokens/s of every row that can be matched."""
    pairs = []
    for row in rows:
        found = next((p for p in PROCESSORS if re.search(p[0], row["hardware"])), None)
        name = row["model"]
        for written, known in ALIASES:
            name = name.replace(written, known)
        model, kind = model_of(name), FORMATS.get(row["weight_dtype"])
        if None in (found, model, kind) or row["metric"] != metric or "T-MAC" in row["engine"]:
            continue
        threads = re.search(r", (\d+) threads", row["hardware"])
        _, machine, bandwidth = found
        pairs.append(_pair(row, machine, bandwidth, int(threads[1]) if threads else None, model, kind))
    return pairs


def _pair(
    row: dict[str, str], name: str, bandwidth: float | None, threads: int | None, model: Model, kind: str
) -> dict:
    hardware = find_machine(f"{name}:512GB")
    device: Device = hardware.device
    if bandwidth:
        hardware = replace(hardware, devices=(replace(device, memory_bytes_per_s=bandwidth),))
    steps = [Step("weight_gguf", {"type": kind})]
    if threads and threads < (device.cores or 0):
        steps.append(Step("thread_count", {"count": threads}))
    prompt = int(float(row["prompt_tokens"] or 0)) or (512 if row["metric"].startswith("prefill") else 1)
    workload = Workload(prompt_tokens=prompt, output_tokens=128)
    plan = Plan(model_digest=model.digest, engine="llama_cpp", steps=tuple(steps))
    values = estimate(plan, model, workload, hardware).values
    value, tokens = (values["ttft_s"], prompt) if row["metric"].startswith("prefill") else (values["tpot_s"], 1)
    return {
        "device": name, "model": row["model"], "kind": kind, "threads": threads, "measured": float(row["value"]),
        "predicted": tokens / value.mid, "low": tokens / value.high, "high": tokens / value.low,
    }  # fmt: skip


def test_decode_of_committed_rows() -> None:
    pairs = read_pairs(committed(), "decode_tokens_per_s")
    assert len({p["device"] for p in pairs}) >= 6
    assert statistics.median(error(p) for p in pairs) < 0.15
    assert statistics.mean(p["low"] <= p["measured"] <= p["high"] for p in pairs) > 0.85


@pytest.mark.skipif(not SHARED.is_file(), reason=f"the rows under other licences are not here ({SHARED.name})")
def test_decode_and_prefill_of_all_rows() -> None:
    decode, prefill = (read_pairs(records(), f"{phase}_tokens_per_s") for phase in ("decode", "prefill"))
    assert len(decode) > len(read_pairs(committed(), "decode_tokens_per_s"))
    assert statistics.median(error(p) for p in decode) < 0.15
    assert statistics.mean(p["low"] <= p["measured"] <= p["high"] for p in decode + prefill) > 0.85


def main() -> None:
    for metric in ("decode_tokens_per_s", "prefill_tokens_per_s"):
        pairs = read_pairs(records(), metric)
        print(f"\n{metric}: {len(pairs)} rows, median error {statistics.median(error(p) for p in pairs):.0%}")
        for p in pairs:
            inside = "" if p["low"] <= p["measured"] <= p["high"] else "  outside its interval"
            print(
                f"  {p['device']:20} {p['model'][:30]:30} {p['kind']:5} {p['threads'] or '':3} predicted {p['predicted']:8.2f}, measured {p['measured']:8.2f} {p['predicted'] / p['measured'] - 1:+6.0%}{inside}"
            )


if __name__ == "__main__":
    main()
