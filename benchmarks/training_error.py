"""How far predicted training memory and time were from published figures, by source; prints the table of README.md.

    python benchmarks/training_error.py            # a second; --rows prints every figure

Figures come from the evidence of the knowledge base and from training_rows.csv (rows of LitGPT and PEFT, Apache-2.0,
that the evidence lacks). What each source says of its runs is in this file; a run whose batch or length nobody states is left out.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cost_models.catalogue import find_machine
from cost_models.distributed import Cluster, Layout, Link, distributed_cost, rank_memory
from cost_models.training import MATRICES, TrainingSetup
from knowledge_base.field import field as knowledge
from knowledge_base.field.entries import EvidenceRow
from knowledge_base.types import Model

GB, GIB = 1e9, 2.0**30

# Layers, hidden size, heads, key-value heads, head size, feed-forward size, vocabulary, gated, tied; from config.json.
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool, bool]] = {
    "Llama-3.2-1B": (16, 2048, 32, 8, 64, 8192, 128256, True, True),
    "Llama-3.2-3B": (28, 3072, 24, 8, 128, 8192, 128256, True, True),
    "Llama-3-8B": (32, 4096, 32, 8, 128, 14336, 128256, True, False),
    "Llama-3.1-8B": (32, 4096, 32, 8, 128, 14336, 128256, True, False),
    "Llama-3.1-70B": (80, 8192, 64, 8, 128, 28672, 128256, True, False),
    "Llama-3.1-405B": (126, 16384, 128, 8, 128, 53248, 128256, True, False),
    "LLaMA-7B": (32, 4096, 32, 32, 128, 11008, 32000, True, False),
    "Llama-2-7B": (32, 4096, 32, 32, 128, 11008, 32000, True, False),
    "Mistral-7B": (32, 4096, 32, 8, 128, 14336, 32000, True, False),
    "Mistral-7B-v0.2": (32, 4096, 32, 8, 128, 14336, 32000, True, False),
    "TinyLlama-1.1B": (22, 2048, 32, 4, 64, 5632, 32000, True, False),
    "Gemma-2B": (18, 2048, 8, 1, 256, 16384, 256000, True, True),
    "Gemma-7B": (28, 3072, 16, 16, 256, 24576, 256000, True, True),
    "Gemma-2-2B": (26, 2304, 8, 4, 256, 9216, 256000, True, True),
    "Gemma-2-9B": (42, 3584, 16, 8, 256, 14336, 256000, True, True),
    "Phi-2": (32, 2560, 32, 32, 80, 10240, 51200, False, False),
    "Phi-3-mini-4k-instruct": (32, 3072, 32, 32, 96, 8192, 32064, True, False),
    "Falcon-7B": (32, 4544, 71, 1, 64, 18176, 65024, False, True),
    "StableLM-3B": (16, 4096, 32, 32, 128, 16384, 50688, False, False),
    "StableLM-base-alpha-3B": (16, 4096, 32, 32, 128, 16384, 50688, False, False),
    "Qwen-1.8B": (24, 2048, 16, 16, 128, 5504, 151936, True, False),
    "Qwen-7B": (32, 4096, 32, 32, 128, 11008, 151936, True, False),
    "Qwen-14B": (40, 5120, 40, 40, 128, 13696, 152064, True, False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One published figure: bytes (`counts` says which of the device's) or tokens for each second."""

    source: str
    model: Model
    setup: TrainingSetup
    figure: float
    counts: str  # "allocated" | "reserved" | "device" | "tokens_per_s"
    machine: str = ""
    layout: Layout = field(default_factory=Layout)


class LeftOut(Exception):
    """Why a published figure is not compared."""


def model_of(name: str, *, tied: bool | None = None) -> Model:
    """Return a model of SHAPES, weights in bfloat16; `tied` overrides what config.json says."""
    if name not in SHAPES:
        raise LeftOut("not a causal language model of known shape")
    layers, hidden, heads, kv_heads, head, ffn, vocab, gated, ties = SHAPES[name]
    ties = ties if tied is None else tied
    linear = layers * hidden * (2 * heads * head + 2 * kv_heads * head + (3 if gated else 2) * ffn)
    total = linear + vocab * hidden * (1 if ties else 2)
    return Model(
        name=name, source=name, architecture="llama", layers=layers, hidden_size=hidden, heads=heads, kv_heads=kv_heads,
        head_size=head, ffn_size=ffn, vocab_size=vocab, max_context_tokens=131072, params_total=total,
        params_active=total, linear_params=linear, embedding_params=vocab * hidden, tied_embeddings=ties,
        gated_ffn=gated, attention_layers=layers, weight_dtype="bfloat16", weight_bytes=2 * total,
    )  # fmt: skip


def _targets(model: Model, names: Iterable[str] = MATRICES) -> tuple[str, ...]:
    return tuple(name for name in names if model.gated_ffn or name != "gate")


# ---------------------------------------------------------------- what each source ran

# LitGPT keeps embedding and head apart, repeats keys and values, has one matrix for queries, keys and values, drops out
# before adapters and keeps these in bfloat16. It cuts the loss into chunks, but each chunk's log-probabilities stay for the
# backward pass, so nothing is saved. Its figure is the allocator's maximum, in GB.
LITGPT: dict[str, Any] = dict(adapter_dtype="bfloat16", adapter_dropout=True, fused_qkv=True)
EVERY_MATRIX = ("TinyLlama-1.1B", "Gemma-2B", "Gemma-7B", "Gemma-2-2B", "Gemma-2-9B", "Phi-2", "Phi-3-mini-4k-instruct")


def litgpt_hub(row: EvidenceRow) -> Run:
    """The configurations of config_hub/finetune: 512 tokens, adapters where their YAML says."""
    found = re.fullmatch(r"(full|lora|qlora), micro-batch (\d+), epochs \d+", row.setting)
    if not found or row.metric != "peak_train_memory_gb":
        raise LeftOut("mean length of the samples not stated, so no time can be told")
    if "4xA10G" in row.hardware:
        raise LeftOut("sharded over 4 GPUs, or a repetition of the row for one")
    method, batch = found[1], int(found[2])
    model = model_of(row.model, tied=False)
    figure = row.value * GB
    if method == "full" and 8 * model.params_total > figure:
        raise LeftOut("below weights, gradients and AdamW states in bfloat16, which the configuration asks for")
    every = row.model in EVERY_MATRIX
    setup = TrainingSetup(
        method=method, batch=batch, rank=32 if not every else 16, frozen_input_bytes=4 if method == "qlora" else 0,
        gradient_accumulation=8 // batch, targets=_targets(model) if every else ("q", "v"), **LITGPT,
    )  # fmt: skip
    return Run(source="LitGPT configurations", model=model, setup=setup, figure=figure, counts="allocated")


LONGEST_TOKENS = {"StableLM-3B": 1034, "Llama-2-7B": 1304}  # of Alpaca, said beside the table


def litgpt_tutorial(row: EvidenceRow) -> Run:
    """The tutorial's runs of 2023: rank 8 on queries and values, bitsandbytes 0.41.1, which keeps packed layers' inputs."""
    if row.metric != "peak_train_memory_gb":
        raise LeftOut("mean length of the samples not stated, so no time can be told")
    return litgpt_table(row.model, "LoRA", row.setting.split(" vs ")[0], 1, row.value)


def litgpt_table(name: str, kind: str, dtype: str, batch: int, gigabytes: float) -> Run:
    base = "nf4_double" if dtype.endswith("nf4-dq") else "nf4" if dtype.endswith("nf4") else None
    method = {"LoRA": "qlora" if base else "lora", "Adapter": "prompt", "Adapter-v2": "scale"}[kind]
    model = model_of(name, tied=False)
    setup = TrainingSetup(
        method=method, base_format=base, batch=batch, sequence_tokens=LONGEST_TOKENS[name], rank=8,
        targets=("q", "v") if kind == "LoRA" else _targets(model), frozen_input_bytes=2,
        **{**LITGPT, "adapter_dropout": kind == "LoRA"},
    )  # fmt: skip
    return Run(source="LitGPT tables", model=model, setup=setup, figure=gigabytes * GB, counts="allocated")


TORCHTUNE = TrainingSetup(batch=2, sequence_tokens=4096)
_STACK: list[tuple[str, dict[str, Any]]] = [  # what each row of the cumulative table adds
    ("+ packed dataset", {}),
    ("+ compile", {"compiled": True}),
    ("+ chunked cross entropy", {"chunked_cross_entropy": True}),
    ("+ activation checkpointing", {"checkpointing": True}),
    ("+ optimizer step fused", {"fused_optimiser": True}),
    ("+ activation offloading", {"offload_activations": True}),
    ("+ 8-bit AdamW", {"optimiser": "adam_8bit"}),
    ("LoRA", {"method": "lora", "optimiser": "adamw", "fused_optimiser": False, "adapter_dtype": "bfloat16", "targets": ("q", "v", "o")}),
    ("QLoRA", {"method": "qlora", "base_format": "nf4_double"}),
]  # fmt: skip


def torchtune(row: EvidenceRow) -> Run | Iterator[Run]:
    """The cumulative table of torchtune's README: Llama-3.2-3B, batch 2, packed to 4096 tokens, active GiB."""
    if row.task != "full fine-tuning, bs2, seq 4096":
        return torchtune_recipe(row)
    at = next(i for i, (name, _) in enumerate(_STACK) if row.setting.startswith(name))
    setup = TORCHTUNE
    for _, change in _STACK[: at + 1]:
        setup = replace(setup, **change)
    timed = row.metric == "train_tokens_per_s"
    return Run(
        source="torchtune", model=model_of("Llama-3.2-3B"), setup=setup, figure=row.value * (1 if timed else GIB),
        counts="tokens_per_s" if timed else "allocated", machine="a100-sxm" if timed else "",
    )  # fmt: skip


# The README's other table: batch 2, packed to 2048 tokens, compiled; the rest as the recipes' YAML files say.
RECIPE = TrainingSetup(
    batch=2, sequence_tokens=2048, compiled=True, checkpointing=True, chunked_cross_entropy=True,
    adapter_dtype="bfloat16", targets=("q", "v", "o", "gate", "up", "down"),
)  # fmt: skip
_RECIPES: dict[str, dict[str, Any]] = {
    "full": {"optimiser": "adam_8bit", "offload_states": True, "fused_optimiser": True},  # paged out by the driver
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora", "base_format": "nf4_double"},
}
NVLINK = Link(name="NVLink 3", bytes_per_s=300e9, latency_s=3e-6)


def torchtune_recipe(row: EvidenceRow) -> Iterator[Run]:
    """One GPU, or eight under FSDP, which splits everything over them."""
    if "A6000" in row.hardware:
        raise LeftOut("twice the memory of the same recipe on another GPU, so not the recipe")
    timed, sharded = row.metric == "train_tokens_per_s", row.hardware.startswith("8x")
    for recipe, figure in ((row.steps[0].technique, row.value), ("full", row.baseline)):
        if figure is None or (recipe == "full" and sharded):  # weights in the host's memory
            continue
        yield Run(
            source="torchtune recipes", model=model_of(row.model), setup=replace(RECIPE, **_RECIPES[recipe]),
            figure=figure * (1 if timed else GIB), counts="tokens_per_s" if timed else "allocated",
            machine="a100-sxm" if sharded else "rtx-4090", layout=Layout(data=8, zero_stage=3) if sharded else Layout(),
        )  # fmt: skip


_PEFT: dict[str, dict[str, Any]] = {
    "lr_0.00001 (full-finetuning)": {"method": "full"},
    "rank32 (lora)": {"method": "lora", "rank": 32},
    "rank64 (lora)": {"method": "lora", "rank": 64},
    "rank64-rslora (lora)": {"method": "lora", "rank": 64},
    "rank32-dora (lora)": {"method": "lora", "rank": 32, "magnitudes": True},
    "rank10-target-mlp (lora)": {"method": "lora", "rank": 10, "targets": ("gate", "up", "down")},
    "default (ia3)": {"method": "scale", "targets": ("k", "v", "up")},  # down's input is up's product
    "lr_0.001 (ia3)": {"method": "scale", "targets": ("k", "v", "up")},
    "default (ln_tuning)": {"method": "norm"},
    "target-v_proj (beft)": {"method": "bias", "targets": ("v",)},
    "lr_0.0005 (adaptionprompt)": {"method": "prompt"},
    "lr_0.001 (prefixtuning)": {"method": "prompt", "virtual_tokens": 200},
    "lr_0.005_zero_init (prefixtuning)": {"method": "prompt", "virtual_tokens": 200},
    "tokens50-init_prefix-lr_0.005 (prefixtuning)": {"method": "prompt", "virtual_tokens": 50},
    "lr_0.001 (prompt_tuning)": {"method": "soft_prompt", "virtual_tokens": 200, "sequence_tokens": 968},
    "sample_vocab-lr_0.001 (prompt_tuning)": {"method": "soft_prompt", "virtual_tokens": 200, "sequence_tokens": 968},
}


def peft(row: EvidenceRow) -> Run:
    """PEFT's comparison on MetaMathQA: batch 4, at most 768 tokens, bfloat16, adapters in float32; reserved memory."""
    if row.metric != "peak_train_memory_gb":
        raise LeftOut("mean length of the samples not stated, so no time can be told")
    if row.setting not in _PEFT:
        raise LeftOut("a kind of adapter without a formula here")
    return peft_result(row.model, row.setting, row.value)


def peft_result(name: str, setting: str, gigabytes: float) -> Run:
    setup = TrainingSetup(**{"batch": 4, "sequence_tokens": 768, **_PEFT[setting]})
    return Run(
        source="PEFT comparison", model=model_of(name), setup=setup, figure=gigabytes * GB, counts="reserved"
    )  # fmt: skip


def lomo(row: EvidenceRow) -> Iterator[Run]:
    """LOMO's profile: DeepSpeed, float32 master copies and states, no fused attention; the sum of each part's peak, GiB."""
    if row.steps[0].technique != "lomo":
        raise LeftOut("the same table again, as the effect of checkpointing")
    common = TrainingSetup(
        batch=8, flash_attention=False, checkpointing="no activation" not in row.setting, master_weights=True,
        state_dtype="float32", gradient_buckets=True,
    )  # fmt: skip
    runs = {"LOMO": (row.value, replace(common, method="lomo", gradient_buckets=False, master_weights=False))}
    for name, optimiser in (("AdamW", "adamw"), ("SGD", "sgd")):
        if f"vs {name}" in row.setting and row.baseline:
            runs[name] = (row.baseline, replace(common, optimiser=optimiser))
    for gib, setup in runs.values():
        yield Run(source="LOMO", model=model_of(row.model), setup=setup, figure=gib * GIB, counts="allocated")


def qwen(row: EvidenceRow) -> Run:
    """Qwen's profile: one A100, batch 1, 8 accumulated, rank 64 on every matrix, checkpointing, fused attention."""
    found = re.fullmatch(r"fine-tuning, seq (\d+), bs1 ga8", row.task)
    if not found:
        raise LeftOut("trained by DeepSpeed on several GPUs, whose buffers are not stated")
    model = model_of(row.model)
    setup = TrainingSetup(
        method=row.steps[0].technique, base_format="int4" if row.steps[0].technique == "qlora" else None,
        sequence_tokens=int(found[1]), gradient_accumulation=8, rank=64, targets=_targets(model), checkpointing=True,
        fused_qkv=True,
    )  # fmt: skip
    timed = row.metric == "seconds_per_iter"
    figure = 8 * setup.tokens / row.value if timed else row.value * GB
    return Run(
        source="Qwen profile", model=model, setup=setup, figure=figure, counts="tokens_per_s" if timed else "device",
        machine="a100-sxm" if timed else "",
    )  # fmt: skip


SOURCES: dict[str, Callable[[EvidenceRow], Run | Iterator[Run]]] = {
    "LitGPT config_hub": litgpt_hub,
    "LitGPT tutorial: finetune_lora": litgpt_tutorial,
    "torchtune README": torchtune,
    "PEFT method_comparison": peft,
    "Full Parameter Fine-tuning": lomo,
    "Qwen (1) README": qwen,
}
UNREAD = {  # sources none of whose runs can be compared
    "PEFT README": "batch and lengths not stated",
    "PEFT VeLoRA": "model not stated",
    "torchao": "batch and lengths not stated (the states it saves are checked in tests/unit/test_training.py)",
    "Long Range Arena": "not a language model: a small encoder with other kinds of attention",
    "QLoRA": "a bound, not a figure",
    "BAdam": "a bound, not a figure",
    "LLM-Shearing": "several GPUs, batch not stated",
    "FlashAttention": "an encoder, trained to a quality",
}
METRICS = (
    "peak_train_memory_gb", "peak_memory_gib", "peak_memory_per_gpu_gib", "train_tokens_per_s", "train_time_s",
    "train_time_min",
)  # fmt: skip


def runs() -> tuple[list[Run], Counter[str]]:
    """Return every comparable figure once, and how many were left out for each reason."""
    kept: dict[Any, Run] = {}
    left: Counter[str] = Counter()
    for row in knowledge().evidence:
        tuned = row.metric == "memory_gb" and row.task.startswith("fine-tuning,")
        timed = row.metric == "seconds_per_iter" and row.task.startswith("fine-tuning,")
        if row.metric not in METRICS and not tuned and not timed:
            continue
        reader = next((r for title, r in SOURCES.items() if row.title.startswith(title)), None)
        try:
            if reader is None:
                raise LeftOut(next((why for title, why in UNREAD.items() if row.title.startswith(title)), row.title))
            found = reader(row)
            for run in [found] if isinstance(found, Run) else found:
                kept[run.source, run.model.name, run.setup, run.counts, run.figure] = run
        except LeftOut as reason:
            left[str(reason)] += 1
    with (Path(__file__).parent / "training_rows.csv").open(newline="") as file:
        for cells in csv.DictReader(file):
            name, method, figure = cells["model"], cells["method"], float(cells["peak_gb"])
            if method in _PEFT:
                run = peft_result(name, method, figure)
            else:
                run = litgpt_table(name, method, cells["weight_dtype"], int(cells["batch"]), figure)
            kept[run.source, run.model.name, run.setup, run.counts, run.figure] = run
    return list(kept.values()), left


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True, slots=True)
class Miss:
    """One comparison. `ratio`: predicted over published."""

    run: Run
    ratio: float
    inside: bool


def compare(run: Run) -> Miss:
    """Return how far the prediction is; the interval is that of the whole, whichever part the source counts."""
    if run.counts == "tokens_per_s":
        cluster = Cluster(devices_per_machine=8, inside=NVLINK, between=NVLINK)
        machine = find_machine(run.machine)
        told = distributed_cost(run.model, run.setup, machine, run.layout, cluster, tokens=1e9).cost.time.tokens_per_s
        return Miss(run, told.mid / run.figure, told.low <= run.figure <= told.high)
    memory = rank_memory(run.model, run.setup, run.layout)
    runtime = memory.parts["runtime"].mid
    told_bytes = {
        "allocated": memory.allocated_bytes,
        "reserved": memory.total.mid - runtime,
        "device": memory.total.mid,
    }[run.counts]
    low, high = memory.total.low / memory.total.mid, memory.total.high / memory.total.mid
    return Miss(run, told_bytes / run.figure, told_bytes * low <= run.figure <= told_bytes * high)


def summary(misses: list[Miss]) -> dict[str, float]:
    """Return n, quartiles of the absolute error, the signed median and the share inside the 80 % interval."""
    errors = sorted(abs(m.ratio - 1) for m in misses)
    quarters = statistics.quantiles(errors, n=4, method="inclusive") if len(errors) > 1 else errors * 3
    return {
        "n": len(errors), "q1": quarters[0], "median": quarters[1], "q3": quarters[2], "worst": errors[-1],
        "bias": statistics.median(m.ratio - 1 for m in misses), "inside": statistics.mean(m.inside for m in misses),
    }  # fmt: skip


def main() -> dict[str, dict[str, float]]:
    """Print the tables; return their rows by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", action="store_true", help="print every comparison")
    every = parser.parse_args().rows
    kept, left = runs()
    misses = [compare(run) for run in kept]
    result = {}
    for what, wanted in (("memory", False), ("tokens/s", True)):
        chosen = [m for m in misses if (m.run.counts == "tokens_per_s") is wanted]
        for name in ["all", *dict.fromkeys(m.run.source for m in chosen)]:
            result[f"{what}: {name}"] = summary([m for m in chosen if name in ("all", m.run.source)])
    print("| what | figures | error, median | quartiles | worst | bias | inside |\n|---|---|---|---|---|---|---|")
    for name, s in result.items():
        print(
            f"| {name} | {s['n']} | {s['median']:.1%} | {s['q1']:.1%} to {s['q3']:.1%} | {s['worst']:.0%} | {s['bias']:+.1%} | {s['inside']:.0%} |"
        )
    print("\nLeft out:")
    for reason, count in left.most_common():
        print(f"- {count}: {reason}")
    if every:
        for m in sorted(misses, key=lambda m: (m.run.counts, m.run.source, m.ratio)):
            print(
                f"{m.run.source:22} {m.run.model.name:24} {m.run.setup.method:6} {m.run.setup.tokens:6} {m.run.counts:13} {m.run.figure:14.4g} {m.ratio:6.2f} {'' if m.inside else 'outside'}"
            )
    return result


if __name__ == "__main__":
    main()
