"""Makes knowledge_base/data/field/evidence.csv from a table of published figures: `python tools/import_evidence.py TABLE`.

The table says in words what was done to a model ("4-bit g128 symmetric"). Here the words become steps of methods with
knobs: `gptq(bits=4, group_size=128, symmetric=yes)`. The steps of a row are what its value has and its baseline lacks.
Where a setting names a published method (SliceGPT, KIVI), the step is that method, not the class it belongs to.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "knowledge_base" / "data" / "field" / "evidence.csv"
COLUMNS = (
    "steps", "model", "params_b", "family", "task", "metric", "baseline", "value", "setting", "hardware", "title",
    "source", "seed_reference", "note",
)  # fmt: skip


def _share(text: str) -> str:
    return f"{float(text.rstrip('%')) / (100 if '%' in text else 1):.4g}"


def _same(text: str) -> str:
    return text.lower()


def _said(text: str) -> str:
    return "yes"


# knob -> (where it stands in "technique_id | setting", how the first group that matched becomes its value)
KNOBS: dict[str, tuple[str, Callable[[str], str]]] = {
    "activation_bits": (r"w\da([348])(?!\d)", _same),
    "act_order": (r"(act-order)", _said),
    "allocation": (r"(OWL)", _same),
    "alpha": (r"alpha (0\.\d+)", _same),
    "bits": (r"int(\d)|[ _]w(\d)[ag]|(\d(?:\.\d+)?)[-_ ]?bits?(?![a-z/])", _same),
    "compression": (r"(\d+%) compression", _share),
    "devices": (r"(?:TP=?|PP)\d -> TP(\d+)|\d+ -> (\d+) (?:GPUs|V100|Raspberry)|(?:TP=?|PP)(\d+)|(\d+) partitions", _same),
    "double_quant": (r"(double.quant|nf4-dq)", _said),
    "exit_layer": (r"exit layer (\d+)", _same),
    "format": (r"(E\dM\d)", _same),
    "group_size": (r"g(\d{2,4})\b|-(\d+)g\b|int4wo-(\d+)", _same),
    "imatrix": (r"(imatrix WT)", _said),
    "keep": (r"(\d+%)(?: KV|:)", _share),
    "kv_bits": (r"kv(\d)(?!\d)|a(\d)kv(?!\d)", _same),
    "level": (r"\b(O[123])\b", _same),
    "max_num_seqs": (r"-> (\d+)", _same),
    "micro_batches": (r"(\d+) micro-batches", _same),
    "nodes": (r"-> (\d+) nodes", _same),
    "pattern": (r"(\d):\d|(\d)_\d", lambda n: f"{n}:{2 * int(n)}"),
    "rank": (r"\br(?:ank)?(\d+)", _same),
    "ratio": (r"(?<!/)(\d+%) (?:of data|vs full)", _share),
    "scaling": (r"(rowwise|tensorwise|per-tensor|per-token|vector-wise)", lambda s: s.lower().replace("-", "_")),
    "sparsity": (r"(?<!-)\b(\d+(?:\.\d+)?%)|ratio (0\.\d+)", _share),
    "stage": (r"ZeRO(?: stage |-)([123])", _same),
    "symmetric": (r"(symmetric)", _said),
    "times": (r"(\d+)x compression|up to (\d+)x", _same),
    "to": (r"(CPU|NVMe)", _same),
    "type": (r"gguf_(\w+)", _same),
    "version": (r"EAGLE-?([123])|FlashAttention-([23])", _same),
}  # fmt: skip

_WEIGHTS = "bits, activation_bits, kv_bits, group_size"
# (technique, setting): regular expressions, the first row that matches both wins. Steps: a knob without a value is read
# with KNOBS, and left out where the row does not say it; {id} is the technique as the table has it.
RULES = (
    ("activation_quant", "RPTQ", "rptq(bits, activation_bits)"),
    ("adam_4bit|adam_8bit", "", "low_bit_adam(bits)"),
    ("approximate_attention", "Local", "local_attention"),
    ("approximate_attention", "Linformer", "linformer"),
    ("approximate_attention", "Reformer", "reformer"),
    ("approximate_attention", "Sinkhorn", "sinkhorn_attention"),
    ("approximate_attention", "Synthesizer", "synthesizer"),
    ("approximate_attention", "BigBird", "bigbird"),
    ("approximate_attention", "Linear Transformer", "linear_transformer"),
    ("approximate_attention", "Performer", "performer"),
    ("approximate_attention", "sparse attention", "sparse_attention"),
    ("aqlm_2bit", "", "aqlm(bits)"),
    ("awq", "4|3-bit", "awq(bits, group_size)"),
    ("besa", "", "besa(sparsity)"),
    ("collaborative_inference", "Raspberry", "device_cluster(devices)"),
    ("collaborative_inference", "Petals|decentralised", "petals"),
    ("contextual_sparsity", "", "contextual_sparsity(sparsity)"),
    ("continuous_batching", "max_num_seqs", "continuous_batching(max_num_seqs)"),
    ("continuous_batching", "static batching", "static_batching(batch_size=128)"),
    ("continuous_batching", "chunked prefill", "chunked_prefill"),
    ("data_parallel", r"1 -> \d+ nodes", "data_parallel(nodes)"),
    ("data_parallel", "", "data_parallel(devices)"),
    ("data_selection", r"CL \+ random-LTD|CL, .*composition", "curriculum_learning + token_dropping"),
    ("data_selection", "curriculum|CL,", "curriculum_learning"),
    ("data_selection", "", "data_selection(ratio)"),
    ("dora|boft|oft|loha|lokr|miss|adalora|lora_fa|vera", "", "{id}(rank)"),
    ("eagle", "", "eagle(version)"),
    ("early_exit", "", "layerskip(exit_layer)"),
    ("fixed_point_int8", "", "fixed_point(bits, activation_bits)"),
    ("fp4", "QLoRA", "qlora(bits=4, type=fp4)"),
    ("fp4", "", "fp4(format)"),
    ("fp8_training", "", "fp8_training(scaling)"),
    ("fp8_w8a8", "", "fp8(activation_bits=8, scaling)"),
    ("full_finetune_lomo", "", "lomo"),
    (r"gguf_\w+", "optimised RTN", "gguf(type, rounding=optimised)"),
    (r"gguf_\w+", "", "gguf(type, imatrix)"),
    ("gptq", "bits/weight", "gptq(bits=4, group_size)"),
    ("gptq(_w4a4)?", "", f"gptq({_WEIGHTS}, act_order, symmetric)"),
    ("gradient_compression", "qwZ", "gradient_compression(bits=8)"),
    ("gradient_compression", "", "gradient_compression(bits)"),
    ("hardware_aware_attention", "SageAttention", "sage_attention"),
    ("hardware_aware_attention", "FlashAttention", "flash_attention(version)"),
    ("hqq_int4", "", "hqq(bits)"),
    ("int8_dynamic_w8a8", "", "dynamic_quantisation(bits, activation_bits)"),
    ("kv_cache_eviction", "H2O", "h2o(keep)"),
    ("kv_cache_quant", "RPTQ", "rptq(bits, kv_bits)"),
    ("kv_cache_quant", "KIVI", "kivi(bits)"),
    ("kv_cache_quant", "", "kv_cache_quant(bits)"),
    ("layer_drop", "ShortGPT", "shortgpt(sparsity)"),
    ("layer_drop", "LaCo", "laco(sparsity)"),
    ("layer_drop", "SLEB", "sleb(sparsity)"),
    ("loftq", "", "loftq(bits, rank)"),
    ("lora", "rslora", "rslora(rank)"),
    ("lora", "", "lora(rank)"),
    ("low_rank_svd", "^SVD-LLM|^[2468]0% compression", "svd_llm(compression)"),
    ("low_rank_svd", "^ASVD", "asvd(compression)"),
    ("low_rank_svd", "^FWSVD", "fwsvd(compression)"),
    ("low_rank_svd", "^plain SVD", "svd(compression)"),
    ("mezo", r"MeZO \+ LoRA", "mezo + lora"),
    ("mezo", r"MeZO \+ prefix", "mezo + prefix_tuning"),
    ("mixed_precision", "bf16-true|pure_bf16", "mixed_precision(dtype=bfloat16, kind=pure)"),
    ("mixed_precision", "", "mixed_precision(dtype=float16)"),
    ("naive_w8a8", "", "rtn(bits, activation_bits)"),
    ("nf4", "", "nf4(double_quant)"),
    ("offloading", r"FlexGen \+ 4-bit", "rtn(bits=4) + kv_cache_quant(bits=4)"),
    ("offloading", "^FlexGen", "flexgen"),
    ("offloading", "", "offloading(to)"),
    ("pipeline_parallel", "", "pipeline_parallel(devices, micro_batches)"),
    ("prompt_compression", "", "prompt_compression(times)"),
    ("prompt_tuning", "ptuning", "p_tuning"),
    ("qat", "EfficientQAT", "efficientqat(bits, group_size)"),
    ("qat", "", "qat(bits)"),
    ("qlora", "NF4|nf4", "qlora(bits=4, type=nf4, double_quant)"),
    ("qlora", r"\d-bit r|\d-bit vs|int4", "qlora(bits, rank)"),
    ("qlora", "", "qlora(bits=4)"),
    ("rest_retrieval_spec", "", "rest"),
    (r"rtn_int\d_optimized", "", "rtn_optimised(bits)"),
    (r"rtn_int\d(_w4a4)?", "", f"rtn({_WEIGHTS}, scaling)"),
    ("sam_decoding", "EAGLE2", "sam_decoding(drafter=eagle_2)"),
    (r"semi_structured_2_4\+gptq", "joint|Sparse-Marlin|INT4", "semi_structured(pattern) + gptq(bits=4)"),
    (r"semi_structured_\d_\d", "SparseGPT|sparsegpt", "sparsegpt(pattern)"),
    (r"semi_structured_\d_\d", "wanda", "wanda(pattern)"),
    (r"semi_structured_\d_\d", "magnitude", "unstructured_pruning_magnitude(pattern)"),
    (r"semi_structured_\d_\d", "", "semi_structured(pattern)"),
    ("smoothquant", r"^(?!.*W\d)", "smoothquant(bits=8, activation_bits=8, level)"),
    ("smoothquant|quarot|spinquant", "", f"{{id}}({_WEIGHTS}, alpha, level)"),
    ("sparse_finetune_shira", "", "shira"),
    (r"sparsegpt\+gptq", "", "sparsegpt(sparsity) + gptq(bits=4)"),
    ("sparsegpt|wanda|unstructured_pruning_magnitude", "", "{id}(sparsity, allocation)"),
    ("structured_pruning_width", "SliceGPT|slicegpt", "slicegpt(sparsity)"),
    ("structured_pruning_width", "Taylor", "llm_pruner(importance=taylor)"),
    ("structured_pruning_width", "L2", "llm_pruner(importance=l2)"),
    ("structured_pruning_width", "LLM-Pruner|^20% pruned", "llm_pruner(sparsity)"),
    ("structured_pruning_width", "FLAP", "flap(sparsity)"),
    ("structured_pruning_width", "Wanda-sp", "wanda_sp(sparsity)"),
    ("structured_pruning_width", "training tokens|15B, 8B, 4B", "minitron"),
    ("structured_pruning_width", "continued pre-training", "sheared_llama"),
    ("tensor_parallel", "", "tensor_parallel(devices)"),
    ("torch_compile", "DeepCompile", "deepcompile"),
    ("torch_compile", r"static (KV )?cache \+", "static_kv_cache + torch_compile"),
    ("zero_sharding", "", "zero_sharding(stage)"),
    ("zeroquant_w8a8", "", "zeroquant(bits, activation_bits)"),
    (r"[a-z_]+[0-9]*", "", "{id}"),
)

# regular expression of a model's name -> family: models of one family share a training recipe
FAMILIES = (
    (r"LLaMA-(60|130|350)M|LLaMA-1B", "llama-on-c4"),
    (r"OPT-[\d.]+[MB]$|OPT family|OPT-13B/66B", "opt"),
    (r"CodeLlama|Llama-2-", "llama-2"),
    (r"LLaMA-\d+B|LLaMA family|Alpaca", "llama"),
    (r"Llama-3[.-]", "llama-3"),
    (r"Llama-4", "llama-4"),
    (r"TinyLlama", "tinyllama"),
    (r"bloomz?\b", "bloom"),
    (r"Vicuna", "vicuna"),
    (r"(Qwen[\d.]*)-", ""),
    (r"(gemma)-\d+b", ""),
    (r"(gemma-\d)-", ""),
    (r"Mistral", "mistral"),
    (r"Mixtral", "mixtral"),
    (r"(Phi-\d)", ""),
    (r"(Falcon|GLM-130B|ChatGLM2|StableLM|InternLM2|GPT-2|GPT-3|RoBERTa|DeBERTa)\b", ""),
    (r"DistilBERT|TinyBERT|BERT", "bert"),
    (r"(mt0|T0|T5|Switch|Minitron|Chinchilla)\b", ""),
    (r"Command-R", "command-r"),
    (r"(DeepSeek-V\d)", ""),
    (r"Nemotron-Nano", "nemotron-nano"),
    (r"Transformer-LM", "fairseq-lm"),
)
_ABOUT_READING = (  # how the table's makers came to the text says nothing of the figure
    (r"read in (a )?stored (full )?text( \d+| \(library file ids [\d, ]+\))?", ""),
    (r", as transcribed in a stored note", ""),
    (r"statement read in the stored abstract", "statement of the abstract"),
    (r"read in a stored llama.cpp README copy", "read in a copy of the README"),
    (r"secondary: (sentence of the seed )?survey.*", "secondary: read in a survey, not in the paper itself"),
)


def family(model: str) -> str:
    """Return the family of a model's name; nothing where the name means several or none we know."""
    if model.count("/") and "OPT-" not in model:
        return ""
    for pattern, name in FAMILIES:
        if found := re.search(pattern, model, re.IGNORECASE):
            return name or found[1].lower()
    return ""


def steps(technique: str, setting: str) -> str:
    """Return what a row did, in a plan's words.

    >>> steps("gptq_w4a4", "W4A4KV16"), steps("sparsegpt+gptq", "50% + 4-bit joint")
    ('gptq(bits=4, activation_bits=4)', 'sparsegpt(sparsity=0.5) + gptq(bits=4)')
    """
    fitting = (words for known, said, words in RULES if re.fullmatch(known, technique) and re.search(said, setting))
    words = next(fitting).format(id=technique)
    return re.sub(r"\(([^)]*)\)", lambda knobs: _knobs(knobs[1], f"{technique} | {setting}"), words)


def _knobs(names: str, text: str) -> str:
    knobs = []
    for name in names.split(", "):
        if "=" in name:
            knobs.append(name)
            continue
        pattern, value = KNOBS[name]
        if found := re.search(pattern, text, re.IGNORECASE):
            knobs.append(f"{name}={value(next(g for g in found.groups() if g))}")
    return f"({', '.join(knobs)})" if knobs else ""


def note(text: str) -> str:
    """Return a row's note without what it says about how it was read."""
    for pattern, words in _ABOUT_READING:
        text = re.sub(pattern, words, text)
    return text.strip(" ,;")


def convert(row: dict[str, str]) -> dict[str, str]:
    """Return a row of the table as a row of evidence.csv."""
    kept = {name: row[name] for name in ("model", "params_b", "metric", "setting", "hardware")}
    fits = row["baseline_value"] != "OOM"
    if row["metric"] == "speedup_x" and "ms per token" in row["note"]:  # the columns hold times, the setting the ratio
        kept["metric"] = "latency_ms_per_token"
    return kept | {
        "steps": steps(row["technique_id"], row["setting"]),
        "family": family(row["model"]),
        "task": row["dataset_or_task"],
        "baseline": row["baseline_value"] if fits else "",
        "value": row["value"].replace("OOM", "0"),  # of `fits_in_memory`, 0 or 1
        "title": row["source_title"],
        "source": row["source_url"],
        "seed_reference": row["seed_reference"],
        "note": note(row["note"]) if fits else "the baseline runs out of memory",
    }


def main() -> None:
    """Write evidence.csv from the table named on the command line."""
    with (
        Path(sys.argv[1]).open(encoding="utf-8", newline="") as table,
        HERE.open("w", encoding="utf-8", newline="") as out,
    ):
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(convert(row) for row in csv.DictReader(table))


if __name__ == "__main__":
    main()
