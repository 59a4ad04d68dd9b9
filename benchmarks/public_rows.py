"""Published measurements as deployments a cost model can price: names mapped to shapes, devices and engine families.

`benchmarks/data/public_rows.csv` holds the rows under Apache, MIT or BSD licences, `public_sources.csv` where each was
read. Where ../shared/data/ground_truth.csv is there, its other rows serve in development and are never committed.

    python benchmarks/public_rows.py            # how many rows of each source are usable, and why the others are not
    python benchmarks/public_rows.py --write    # the committed files, anew from ../shared
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cost_models.efficiency import read_rows
from cost_models.serving import NO_LINK_BYTES_PER_S, POOLED, Deployments, cache_bytes, hardware_kind, vector_rate
from cost_models.serving_fit import Observed

DATA = Path(__file__).resolve().parent / "data"
SHARED = Path(__file__).resolve().parents[2] / "shared/data/ground_truth.csv"
OPEN_LICENCES = ("Apache-2.0", "Apache-2.0 (benchmark repo)", "MIT", "BSD-3-Clause")
DISPUTED = 2.0  # between reports of the same configuration; drivers and versions explain less
MILLIONS = r"(?<![\d.a-z])(\d+(?:\.\d+)?)m\b"  # of parameters, in the name of a model
BILLIONS = r"\d+b\b"
TINY_MILLIONS = 30  # a model of fewer parameters takes next to nothing
ALL_THAT_RUNS = "memory of all that runs on the device: a model of next to none takes a GB there"
SHARED_BYTES = 1e9  # beyond an engine and its context: what else runs on the device
MULTI_NODE = 8  # devices; beyond, the layouts of the rows are not told

# What the metric is of, from the names the rows use.
METRICS = {
    "decode_tokens_per_s": "tpot", "tpot_s": "tpot", "ttft_s": "ttft", "prefill_tokens_per_s": "ttft",
    "throughput_tokens_per_s": "tpot", "request_output_tokens_per_s": "request", "request_total_tokens_per_s": "request",
    "peak_memory_gb": "memory", "energy_j_per_token": "energy", "energy_j_per_request": "energy", "avg_power_w": "power",
}  # fmt: skip
FAMILIES = (
    (r"t-mac|hipfire|petals|awq \(hf generator|huggingface|hf transformers fp16|deepspeed|litert|npu", ""),
    (r"ml\.energy v2|^vllm 0\.[0-6]\.", "vllm_v0"), (r"vllm", "vllm"), (r"sglang", "sglang"), (r"trtllm|tensorrt", "tensorrt_llm"),
    (r"tinychat", "tinychat"), (r"autoawq.*gemv", "awq_gemv"), (r"autoawq", "awq"), (r"exllama", "exllama"), (r"gpt-fast", "gpt_fast"), (r"mlc", "mlc"), (r"mlx", "mlx"),
    (r"litgpt|transformers|\bhf\b", "transformers"), (r"llama\.?cpp|ollama|lm ?studio", "llama_cpp"),
)  # fmt: skip
DEVICES = (
    (r"GB200", "gb200-sxm"), (r"B300", "b300-sxm"), (r"B200", "b200-sxm"), (r"H20\b", "h20"), (r"H200", "h200-sxm"),
    (r"H100 PCIe", "h100-pcie"), (r"H100 NVL", "h100-nvl-94gb"), (r"H100", "h100-sxm"), (r"V100", "v100-sxm2-32gb"), (r"A100-SXM4-40GB", "a100-sxm-40gb"), (r"A100 PCIe", "a100-pcie"), (r"A100", "a100-sxm"),
    (r"L40S", "l40s"), (r"\bA40\b", "a40"), (r"A6000", "rtx-a6000"), (r"6000 Ada", "rtx-6000-ada"), (r"5000 Ada", "rtx-5000-ada"),
    (r"4000 Ada", "rtx-4000-ada"), (r"A10G", "a10g"), (r"PRO 6000", "rtx-pro-6000-blackwell-server"), (r"\bT4\b", "t4"),
    (r"RTX A4000|Nvidia A4000", "rtx-a4000"), (r"5090", "rtx-5090"), (r"5080", "rtx-5080"), (r"5070 Ti", "rtx-5070-ti"), (r"5070(?! Ti)", "rtx-5070"),
    (r"4090(?! D\b)", "rtx-4090"), (r"4080(?! Super)", "rtx-4080"), (r"4070 Ti(?! Super)", "rtx-4070-ti"), (r"4070(?! Ti| Super)", "rtx-4070"),
    (r"3090 Ti", "rtx-3090-ti"), (r"3090", "rtx-3090"), (r"3080 Ti", "rtx-3080-ti"), (r"3080(?! Ti| 12GB)", "rtx-3080"),
    (r"3070(?! Ti)", "rtx-3070"), (r"3060(?! Ti)", "rtx-3060-12gb"), (r"2080 Ti", "rtx-2080-ti"), (r"1070", "gtx-1070"), (r"1050 Ti", "gtx-1050-ti"),
    (r"GB10", "gb10"), (r"7900 XTX", "rx-7900-xtx"), (r"7900 XT\b", "rx-7900-xt"), (r"9070 XT", "rx-9070-xt"), (r"8060S|Strix Halo", "radeon-8060s"),
    (r"Arc B580", "arc-b580"), (r"AGX Orin(?! CPU)", "jetson-agx-orin-64gb"),
    (r"M1 Ultra", "apple-m1-ultra"), (r"M1 Max", "apple-m1-max"), (r"\bM1 7-Core", "apple-m1"), (r"M2 Ultra", "apple-m2-ultra"),
    (r"M2 Pro", "apple-m2-pro"), (r"M3 Ultra", "apple-m3-ultra"), (r"M3 Max", "apple-m3-max"), (r"M3 Pro", "apple-m3-pro"),
    (r"M4 Max", "apple-m4-max"), (r"M4 Pro", "apple-m4-pro"), (r"\bM4\b", "apple-m4"), (r"M5 Max", "apple-m5-max"), (r"M5 Pro", "apple-m5-pro"),
    (r"EPYC 9554", "epyc-9554"),
)  # fmt: skip
OLD = r"\(.*202[34]|b741|llm-perf-bench|llm-awq"
MIXED = r"^CPU\b|\bCPU\b(?! \w)|\[CPU\]|CM5|Pi 5|Pi 500|Orion|HiFive|Thelio|MS-R1|laptop|mobile|\+ RTX|DRAM|threads|integrated|NPU|distributed|Cluster|MI250X"
BITS = (  # pattern of the weight dtype, kept bits for each weight (scales included), class
    (r"fp32|float32", 32.0, "16"), (r"nvfp4|mxfp4|^int4_wo", 4.5, "fp4"), (r"bf16|fp16|^f16", 16.0, "16"), (r"fp8", 8.0, "fp8"),
    (r"q8_0|gptq-int8|int8|^q8$|8bit", 8.5, "8"), (r"q6_k$|^q6$|6bit", 6.56, "4"), (r"q5_k|^q5", 5.7, "4"), (r"q4_k_s|iq4_nl", 4.6, "4"),
    (r"q4_k|q4_k_m", 4.85, "4"), (r"iq4_xs", 4.3, "4"), (r"q4_0", 4.55, "4"), (r"q3_k_m", 3.9, "4"),
    (r"g32", 4.6, "4"), (r"awq|gptq-int4|gptq4|^int4|^q4$|4bit|gptq", 4.15, "4"),
)  # fmt: skip
HEAD_BITS = (
    (r"^q\d_k|^iq", 6.56),
    (r"^q\d_0|exl2|^q\d|\dbit|int8 weight-only|int4 .*weight-only", 0.0),
)  # 0: as the rest; others keep 16
TASK_PROMPT_TOKENS = {
    "gpqa": 250,
    "lm-arena-chat": 100,
    "sourcegraph-fim": 1000,
    "v2": 150,
}  # prompts are not in the rows: typical of the data sets


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's shape as its config.json has it; `params` are of the whole model."""

    name: str
    layers: int
    hidden_size: int
    attention_flop_per_pair: float
    cached_values_per_token: float  # in layers that see everything
    cache_shards: float  # devices that can share them: key-value heads, 1 of latent attention
    window_values_per_token: float  # in layers with a sliding window
    window_tokens: float
    state_values: float  # recurrent state of one sequence
    dense_params: float  # read for every token, head included, embedding table not
    expert_params: float  # of all experts
    experts: int
    experts_active: int
    embedding_params: float  # stored beside the above: 0 where the head is the table
    head_params: float
    ffn_size: int


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number with everything a model needs to predict it."""

    source: str
    licence: str
    family: str
    device: str
    devices: int
    kind: str  # class of hardware: "data centre", "consumer", "apple", ...
    shape: Shape
    bits: float
    expert_bits: float
    head_bits: float  # output matrix and embedding table
    weight_class: str
    batch: float
    prompt_tokens: float
    output_tokens: float
    metric: str  # tpot, ttft, request, memory, energy, power
    what: str  # the row's own name of it
    value: float  # seconds, bytes, joules for each token, watts
    concurrent: bool  # batch is a closed loop of clients: a first token waits for others
    pcie: bool  # the devices of this row have no links of their own
    median_step: bool  # the median gap between tokens, which few other requests' prompts disturb
    old: bool  # measured before llama.cpp had kernels for matrix units on quantised weights (middle of 2024)

    @property
    def tags(self) -> frozenset[str]:
        """What coefficients may depend on."""
        age = {"before 2024-07"} if self.old else set()
        return frozenset({f"{self.weight_class} moe" if self.shape.experts else self.weight_class, self.kind, *age})


@lru_cache(maxsize=1)
def shapes() -> tuple[tuple[str, Shape], ...]:
    """Return the known shapes with the pattern of names each goes by."""
    with (DATA / "model_shapes.csv").open(encoding="utf-8", newline="") as file:
        return tuple((row["pattern"], _shape(row)) for row in csv.DictReader(file))


def _shape(row: dict[str, str]) -> Shape:
    n = {k: float(v) for k, v in row.items() if k not in ("pattern", "model", "source") and v}
    matrices = 3 if n["gated"] else 2
    ffn = matrices * n["hidden_size"]
    experts = n["moe_layers"] * n["experts"] * ffn * n["expert_ffn_size"]
    head = n["vocab_size"] * n["hidden_size"]
    table = 0.0 if n["tied"] else head
    if "params_b" in n:
        dense = n["params_b"] * 1e9 - experts - table
    else:
        attention = 2 * n["hidden_size"] * n["head_size"] * (n["heads"] + n["kv_heads"])
        dense = n["layers"] * attention + (n["layers"] - n["moe_layers"]) * ffn * n["ffn_size"]
        dense += n["moe_layers"] * ffn * n["shared_ffn_size"] + head
    values = n.get("cached_values_per_layer", 2 * n["kv_heads"] * n["head_size"])
    windowed = n.get("window_layers", 0.0)
    return Shape(
        name=row["model"], layers=int(n["layers"]), hidden_size=int(n["hidden_size"]),
        attention_flop_per_pair=4 * n["attention_layers"] * n["heads"] * n["head_size"],
        cached_values_per_token=values * (n["attention_layers"] - windowed),
        cache_shards=1.0 if "cached_values_per_layer" in n else n["kv_heads"] or np.inf, window_values_per_token=values * windowed,
        window_tokens=n.get("window_tokens", 1e12), state_values=n.get("state_values", 0.0), dense_params=dense, expert_params=experts, experts=int(n["experts"]),
        experts_active=int(n["experts_active"]), embedding_params=table, head_params=head,
        ffn_size=int(n["ffn_size"] or n["experts_active"] * n["expert_ffn_size"] + n["shared_ffn_size"]),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def find_shape(name: str) -> Shape | None:
    """Return the shape a model's name stands for, or None: `gemma3:27b` and `google/gemma-3-27b-it` are one."""
    plain = re.sub(r"[ _/:]+", "-", name.lower())
    plain = re.sub(r"\b(gemma|phi|llama|deepseek)(\d)", r"\1-\2", plain)
    return next((shape for pattern, shape in shapes() if re.search(pattern, plain)), None)


def records() -> Iterator[dict[str, str]]:
    """Yield the rows as they were published: all of ../shared where it is there, else the committed ones."""
    yield from (read(SHARED) if SHARED.is_file() else committed())


def committed() -> Iterator[dict[str, str]]:
    """Yield the committed rows, in the columns of ../shared."""
    sources = {row["source"]: row for row in read(DATA / "public_sources.csv")}
    for row in read(DATA / "public_rows.csv"):
        yield row | {k: sources[row["source"]][k] for k in ("source_url", "licence")}


def read(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def usable(rows: Iterable[dict[str, str]]) -> tuple[list[Row], Counter[tuple[str, str]]]:
    """Return the rows that can be predicted, and how many of each (metric, reason) cannot."""
    kept, left = usable_with_records(rows)
    return [row for row, _ in kept], left


def usable_with_records(
    rows: Iterable[dict[str, str]],
) -> tuple[list[tuple[Row, dict[str, str]]], Counter[tuple[str, str]]]:
    """Return the same with what each row was published as. All at once: reports contradict and explain each other."""
    kept, left = [], Counter[tuple[str, str]]()
    rows = list(rows)
    shared = _shared_devices(rows)
    for row in rows:
        if row["metric"].startswith("train") or row["metric"] in ("model_size_gb", "samples_per_s"):
            continue  # judged elsewhere
        on_shared = METRICS.get(row["metric"]) == "memory" and (row["source_url"], row["hardware"]) in shared
        found = ALL_THAT_RUNS if on_shared else _row(row)
        if isinstance(found, str):
            left[row["metric"], found] += 1
        else:
            kept.append((found, row))
    disputed = _disputed([row for row, _ in kept])
    left.update((row.what, f"reports of one configuration differ by more than {DISPUTED:g} times") for row in disputed)
    return [pair for pair in kept if pair[0] not in disputed], left


def _shared_devices(rows: Iterable[dict[str, str]]) -> set[tuple[str, str]]:
    """Return (source, hardware) of the reports of memory that count other programs in: a tiny model tells of them."""
    return {
        (row["source_url"], row["hardware"])
        for row in rows
        if METRICS.get(row["metric"]) == "memory" and _is_count(row["value"]) and not re.search(BILLIONS, row["model"].lower())
        and (named := re.search(MILLIONS, row["model"].lower())) and float(named[1]) <= TINY_MILLIONS
        and _value(row["metric"], float(row["value"] or 0), 1.0, 1.0, 1.0) > SHARED_BYTES
    }  # fmt: skip


def _disputed(rows: Sequence[Row]) -> set[Row]:
    """Return the rows of configurations of which two reports contradict each other: neither can be believed."""
    reports = defaultdict(list)
    for row in rows:
        reports[replace(row, source="", licence="", value=0.0)].append(row)
    values = {case: [row.value for row in same] for case, same in reports.items()}
    return {row for case, same in reports.items() if max(values[case]) > DISPUTED * min(values[case]) for row in same}


def _row(row: dict[str, str]) -> Row | str:
    """Return the row as a deployment, or why it is left out."""
    notes, hardware, metric = row["notes"], row["hardware"], METRICS.get(row["metric"])
    if metric is None:
        return "not a quantity that is predicted"
    if any(not _is_count(row[cell]) for cell in ("batch", "prompt_tokens", "output_tokens", "value")):
        return "a cell that should be a number is none"
    if re.search("SUSPECT|spec_decoding=True|MTP|multimodal", notes + row["model"].upper()):
        return "marked suspect, or speculative decoding"
    if "MLPerf" in row["engine"]:
        return "precision and batch not stated (MLPerf)"
    engine = "vllm 0.2" if "llm-perf-bench" in row["source_url"] and row["engine"] == "vLLM" else row["engine"].lower()
    family = next((name for pattern, name in FAMILIES if re.search(pattern, engine)), POOLED)
    if family == "":
        return "engine that is unlike any with a law"
    if re.search(MIXED, hardware):
        return "processor, mixed or slow host"
    device = find_device(hardware)
    facts = device_facts(device)
    if facts is None:
        return "device is not in the catalogue"
    shape = find_shape(row["model"])
    if shape is None:
        return "shape of the model is not known"
    devices = _devices(notes, hardware)
    if devices is None:
        return f"more than {MULTI_NODE} devices, or a layout that is not told"
    dtype = row["weight_dtype"].lower() or ("bf16" if "silicon_sample" in row["source_url"] else "")
    bits, expert_bits, weight_class = _bits(dtype)
    if not bits:
        return "weight format is not stated or not known"
    stored = shape.dense_params * bits / 8 + shape.expert_params * expert_bits / 8
    if stored > devices * facts["memory_bytes"]:
        return "weights do not fit the device: partly read from the host"
    if row["batch"] in ("", "0"):
        return "batch is not stated"
    batch, output = float(row["batch"]), float(row["output_tokens"] or 0) or 128.0
    prompt = float(row["prompt_tokens"] or 0)
    if "ML.ENERGY" in row["engine"]:
        task = re.search(r"\((gpqa|lm-arena-chat|sourcegraph-fim)\)", notes)
        if "v3" in row["engine"] and not task:
            return "images or video in the prompt"
        prompt = TASK_PROMPT_TOKENS[task[1] if task else "v2"]
    elif metric == "ttft" and not prompt:
        return "length of the prompt is not stated"
    if metric == "memory" and (held := re.search(r"\bctx (\d+)", notes)):
        output = max(float(held[1]) - prompt, 1.0)  # the cache is laid out for the whole context
    if family == "llama_cpp" and devices > 1:
        return "layers over several devices (llama.cpp)"
    value = _value(row["metric"], float(row["value"] or 0), batch, prompt, output)
    if not value > 0:
        return "no positive value"
    concurrent = "silicon_sample" in row["source_url"] or "LLMServingSim" in row["source_url"]
    return Row(
        source=row["source_url"], licence=row["licence"], family=family, device=device, devices=devices, kind=hardware_kind(device, features_of(device)),
        shape=shape, bits=bits, expert_bits=expert_bits, head_bits=_head_bits(dtype, bits), weight_class=weight_class, batch=batch, prompt_tokens=max(prompt, 1.0),
        output_tokens=output, metric=metric, what=row["metric"], value=value, concurrent=concurrent, pcie="PCIe not NVLink" in notes, median_step="v3" in row["engine"] and row["metric"] == "tpot_s",
        old=family == "llama_cpp" and bool(re.search(OLD, engine + row["source_url"])),
    )  # fmt: skip


def _is_count(cell: str) -> bool:
    try:
        return not cell or 0 <= float(cell) < float("inf")
    except ValueError:
        return False


def _value(metric: str, value: float, batch: float, prompt: float, output: float) -> float:
    """Return the number in the unit of its kind: rates of tokens become seconds."""
    if metric in ("decode_tokens_per_s", "throughput_tokens_per_s"):
        return batch / value
    if metric == "prefill_tokens_per_s":
        return batch * prompt / value
    if metric == "request_output_tokens_per_s":
        return output / value
    if metric == "request_total_tokens_per_s":
        return (prompt + output) / value
    if metric == "energy_j_per_request":
        return value / output
    return value * 2**30 if metric == "peak_memory_gb" else value


def _devices(notes: str, hardware: str) -> int | None:
    """Return how many devices share the weights; None where the layout is not told or attention has copies."""
    found = re.search(r"[x*] ?(\d+)\b(?!\s*GB)", hardware)
    devices = int(found[1]) if found else 1
    copies = re.search(r"(?:attn|\b)DP(\d+)\b", notes)
    if not 1 <= devices <= MULTI_NODE or re.search(r"DP2|x\d\.\d", hardware) or (copies and copies[1] != "1"):
        return None
    return devices


def _bits(dtype: str) -> tuple[float, float, str]:
    """Return (bits of dense weights, of experts', class), zeros where the format is not known."""
    dense, _, expert = dtype.partition("/moe ")
    if "mxfp4" in dense:
        return 16.0, 4.25, "fp4"  # only the experts are stored in four bits
    if found := re.search(r"exl2 (\d\.\d)", dense):
        return float(found[1]), float(found[1]), "4"
    known = next(((bits, name) for pattern, bits, name in BITS if re.search(pattern, dense)), None)
    if known is None:
        return 0.0, 0.0, ""
    other = next((bits for pattern, bits, _ in BITS if expert and re.search(pattern, expert)), known[0])
    return known[0], other, known[1]


def _head_bits(dtype: str, bits: float) -> float:
    found = next((kept for pattern, kept in HEAD_BITS if re.search(pattern, dtype)), 16.0)
    return found or bits


VENDOR_WORDS = frozenset(
    re.findall(r"\w+", "nvidia geforce rtx gtx sxm generation amd radeon rx instinct apple intel platinum gold")
)
# After a name: another device.
VARIANTS = frozenset(re.findall(r"\w+", "ti super max ultra pro laptop mobile nvl pcie d ada xt xtx"))


@lru_cache(maxsize=4096)
def find_device(hardware: str) -> str:
    """Return the name in the catalogue of the device some words describe, empty where none is known.

    The catalogue's longest name of which all telling words stand together, not followed by a word that makes it
    another device; else a name that sources shorten. Processors are the device where no accelerator is named.
    """
    words, best = _words(hardware), ("", (False, 0))
    for name, accelerates, wanted in _catalogue_words():
        for i in range(len(words) - len(wanted) + 1):
            rest = words[i + len(wanted) :]
            if words[i : i + len(wanted)] == wanted and VARIANTS.isdisjoint(rest[:1]):
                best = max(best, (name, (accelerates, len(wanted))), key=lambda found: found[1])
    short = "" if best[1][0] else next((name for pattern, name in DEVICES if re.search(pattern, hardware)), "")
    return short or best[0]


@lru_cache(maxsize=1)
def _catalogue_words() -> list[tuple[str, bool, list[str]]]:
    names = [
        (row["name"], row["kind"] != "cpu", _words(re.sub(r"\(.*?\)", "", row[cell])))
        for row in read_rows("devices.csv")
        for cell in ("name", "device")
    ]
    return [found for found in names if found[2]]


def _words(name: str) -> list[str]:
    """Return the telling words of a device's name, without its makers'; `16 GB` is one word."""
    joined = re.sub(r"(\d) ?gb\b", r"\1gb", name.lower())
    return [w for w in re.findall(r"[a-z0-9+.]+", joined) if re.sub(r"^sxm\d$", "sxm", w) not in VENDOR_WORDS]


@lru_cache(maxsize=256)
def device_facts(name: str) -> dict[str, float] | None:
    """Return bandwidth, rates, memory, link and power of a device of the catalogue; None where it has no bandwidth."""
    row = next((r for r in read_rows("devices.csv") if r["name"] == name), None)
    if row is None or not row["memory_bytes_per_s"]:
        return None
    cells = ("memory_bytes_per_s", "bfloat16_flop_per_s", "float16_flop_per_s", "int8_flop_per_s", "fp8_flop_per_s", "int4_flop_per_s",
             "measured_bfloat16_flop_per_s", "float32_flop_per_s", "link_bytes_per_s", "tdp_w", "idle_w", "memory_bytes")  # fmt: skip
    return {cell: float(row[cell]) if row[cell] else float("nan") for cell in cells}


@lru_cache(maxsize=256)
def features_of(device: str) -> frozenset[str]:
    """Return how a device of the catalogue is programmed, and its generation."""
    row = next(r for r in read_rows("devices.csv") if r["name"] == device)
    return frozenset({row["family"], f"sm_{row['compute_capability'].replace('.', '')}"})


def observed(rows: Sequence[Row], left: Counter[tuple[str, str]]) -> tuple[Observed, list[Row]]:
    """Return rows as columns, and the rows kept; those that lack a rate or cannot be true are counted in `left`."""
    table = _observed(rows)
    d = table.deployments
    floor = (d.dense_bytes + d.experts_active / np.maximum(d.experts, 1) * d.expert_bytes) / (d.devices * d.bytes_per_s)
    floor = floor + np.where(
        d.clients > 0, 0.0, d.batch * cache_bytes(d, d.context_tokens) / 2 / (d.devices * d.bytes_per_s)
    )
    computes = np.isin(table.quantity, ("ttft", "request", "energy", "power")) | (d.batch > 1)
    reasons = (
        ("the device's arithmetic rate is not known", computes & np.isnan(d.flop_per_s)),
        ("the device's power is not known", np.isin(table.quantity, ("energy", "power")) & np.isnan(d.power_w)),
        ("faster than the memory can be read: conditions misstated", (table.quantity == "tpot") & (table.value < 0.8 * floor)),
        ("less memory than the weights take: conditions misstated", (table.quantity == "memory") & (table.value < 0.8 * d.stored_bytes)),
        ("more memory than the device has", (table.quantity == "memory") & (table.value > 1.05 * d.devices * d.memory_bytes)),
    )  # fmt: skip
    kept = np.ones(len(rows), dtype=bool)
    for why, bad in reasons:
        for i in np.flatnonzero(bad & kept):
            left[rows[i].what, why] += 1
        kept &= ~bad
    table = table.only(kept)
    idle = np.where(np.isnan(table.deployments.flop_per_s), np.inf, table.deployments.flop_per_s)  # batch 1 reads
    table = replace(table, deployments=replace(table.deployments, flop_per_s=idle))
    return table, [row for row, ok in zip(rows, kept) if ok]


def _observed(rows: Sequence[Row]) -> Observed:
    facts = [device_facts(row.device) or {} for row in rows]

    def of(*path: str) -> np.ndarray:
        return np.array([reduce(getattr, path, row) for row in rows], dtype=float)

    def fact(name: str) -> np.ndarray:
        return np.array([f[name] for f in facts])

    bits, expert_bits, head = of("bits"), of("expert_bits"), of("shape", "head_params")
    dense, experts = of("shape", "dense_params"), of("shape", "expert_params")
    dense_bytes = ((dense - head) * bits + head * of("head_bits")) / 8
    cache = np.where([row.family == "tensorrt_llm" and row.weight_class in ("fp8", "fp4") for row in rows], 1.0, 2.0)
    link = np.array([f["link_bytes_per_s"] for f in facts])
    deployments = Deployments(
        dense_bytes=dense_bytes, expert_bytes=experts * expert_bits / 8, dense_params=dense, expert_params=experts,
        stored_bytes=dense_bytes + experts * expert_bits / 8 + of("shape", "embedding_params") * of("head_bits") / 8,
        experts=of("shape", "experts"), experts_active=of("shape", "experts_active"), layers=of("shape", "layers"),
        hidden_size=of("shape", "hidden_size"), ffn_size=of("shape", "ffn_size"),
        cache_bytes_per_token=cache * of("shape", "cached_values_per_token"),
        window_bytes_per_token=cache * of("shape", "window_values_per_token"), window_tokens=of("shape", "window_tokens"),
        state_bytes=4 * of("shape", "state_values"), attention_flop_per_pair=of("shape", "attention_flop_per_pair"),
        batch=of("batch"), prompt_tokens=of("prompt_tokens"), output_tokens=of("output_tokens"),
        clients=of("concurrent"), median_step=of("median_step"), devices=of("devices"), memory_bytes=fact("memory_bytes"),
        bytes_per_s=fact("memory_bytes_per_s"), flop_per_s=np.array([_rate(f, row.weight_class) for f, row in zip(facts, rows)]),
        link_bytes_per_s=np.where(np.isnan(link) | (of("pcie") > 0), NO_LINK_BYTES_PER_S, link), power_w=fact("tdp_w"),
        vocab_size=of("shape", "head_params") / of("shape", "hidden_size"),
        vector_flop_per_s=np.array([vector_rate(rate, features_of(row.device)) for rate, row in zip(np.nan_to_num(fact("float32_flop_per_s"), nan=np.inf), rows)]),
        idle_w=fact("idle_w"), cache_shards=of("shape", "cache_shards"),
        devices_per_machine=np.full(len(rows), float(MULTI_NODE)),
    )  # fmt: skip
    return Observed(
        deployments=deployments, quantity=np.array([row.metric for row in rows]), value=of("value"),
        family=np.array([row.family for row in rows]), tags=np.array([row.tags for row in rows], dtype=object),
        group=np.array([f"{row.family} {row.shape.name} {row.device} {row.metric}" for row in rows]),
    )  # fmt: skip


def _rate(facts: Mapping[str, float], weight_class: str) -> float:
    """Return the rate an engine computes at: a measured one before a published one, scaled to narrower types.

    Half the int8 rate where that is more: GeForce cards halve wide sums, which kernels for reading prompts avoid.
    """
    published = next(
        (facts[c] for c in ("bfloat16_flop_per_s", "float16_flop_per_s") if facts[c] == facts[c]),
        facts["float32_flop_per_s"],
    )
    measured = facts["measured_bfloat16_flop_per_s"]
    wide = measured if measured == measured else published
    narrow = {"fp8": "fp8_flop_per_s", "fp4": "int4_flop_per_s"}.get(weight_class)
    if narrow is None or facts[narrow] != facts[narrow]:
        return wide * float(np.fmax(1.0, facts["int8_flop_per_s"] / 2 / published))
    return wide * facts[narrow] / published


def write() -> None:
    """Write the committed rows from ../shared: open licences only, notes cut to what is read here."""
    columns = ("source", "model", "hardware", "engine", "weight_dtype", "batch", "prompt_tokens", "output_tokens", "metric", "value", "notes")  # fmt: skip
    numbers: dict[tuple[str, str], int] = {}
    lines = []
    for row in read(SHARED):
        if row["licence"] in OPEN_LICENCES and not row["metric"].startswith("train"):
            number = numbers.setdefault((row["source_url"], row["licence"]), len(numbers) + 1)
            told = re.findall(
                r"SUSPECT|spec_decoding=True|MTP|multimodal|PCIe not NVLink|attnDP\d+|\bDP[2-9]\d*|\bctx \d+|\((?:gpqa|lm-arena-chat|sourcegraph-fim)\)",
                row["notes"],
            )
            lines.append([number, *(row[c] for c in columns[1:-1]), " ".join(told)])
    _write("public_rows.csv", columns, lines)
    _write("public_sources.csv", ("source", "source_url", "licence"), [[n, *key] for key, n in numbers.items()])


def _write(name: str, columns: tuple[str, ...], lines: list[list[Any]]) -> None:
    with (DATA / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(lines)


def main() -> None:
    if "--write" in sys.argv[1:]:
        write()
    for title, rows in (("committed", committed()), *((("all", records()),) if SHARED.is_file() else ())):
        kept, left = usable(rows)
        print(f"{title}: {len(kept)} usable, {sum(left.values())} left out")
        for (family, metric, kind), n in sorted(Counter((r.family, r.metric, r.kind) for r in kept).items()):
            print(f"  {n:5} {family:14} {metric:8} {kind}")
        for (metric, why), n in sorted(left.items()):
            print(f"  {n:5} left out: {metric}: {why}")


if __name__ == "__main__":
    main()
