"""The knowledge of the field as shipped obeys every law, holds what it promises, and is asked without heavy libraries."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from knowledge_base.field import OURS, field
from knowledge_base.field.checking import problems, techniques_of
from knowledge_base.field.entries import EFFECTS, STATUSES

ROOT = Path(__file__).resolve().parent.parent.parent
PUBLISHED = ROOT.parent / "shared" / "data" / "evidence.csv"


@pytest.fixture(scope="module")
def converter():
    spec = importlib.util.spec_from_file_location("import_evidence", ROOT / "tools" / "import_evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_entry_obeys_every_law():
    found = [*problems(field()), *techniques_of(field())]
    assert not found, "\n".join(map(str, found))


def test_every_file_of_the_folder_is_read():
    from knowledge_base.field.reading import KINDS

    read = {path for kind in KINDS.values() for path in OURS.glob(kind.files)}
    others = {path.name for path in OURS.rglob("*") if path.is_file()} - {path.name for path in read}
    assert others <= {"quality_fits.json", "quality_compositions.csv"}


def test_evidence_is_whole():
    rows = field().evidence
    assert len(rows) == 2255
    assert sum(row.seed_reference for row in rows) == 618
    assert len({step.technique for row in rows for step in row.steps}) >= 130
    assert sum(len(row.steps) > 1 for row in rows) == 42
    assert sum(row.family != "" for row in rows) > 2100
    assert all(row.source and row.title and row.model for row in rows)


def test_every_metric_of_evidence_is_used_and_described():
    used = Counter(row.metric for row in field().evidence)
    assert used.keys() == field().evidence_metrics.keys()
    assert len(used) == 72
    assert {metric.resource for metric in field().evidence_metrics.values()} == set(EFFECTS)


def test_strengths_that_quality_is_told_from_are_numbers():
    for row in field().evidence:
        for step in row.steps:
            for knob in ("bits", "activation_bits", "kv_bits", "group_size", "sparsity", "compression", "rank"):
                assert isinstance(step.knobs.get(knob, 0), int | float), f"{row.where}: {step}"
            for knob in ("sparsity", "compression", "keep", "ratio"):
                assert 0 < step.knobs.get(knob, 0.5) < 1, f"{row.where}: {step}"


def test_knobs_of_methods_hold_every_value_that_evidence_has():
    missing = {
        f"{step.technique}.{knob}={value}"
        for row in field().evidence
        for step in row.steps
        for knob, value in step.knobs.items()
        if value not in field().methods[step.technique].knobs[knob]
    }
    assert not missing


def test_every_method_has_a_status_and_a_place():
    known = field()
    counts = Counter(known.status(method) for method in known.methods)
    assert counts.keys() <= set(STATUSES) and counts["executable"] > 10
    for method in known.methods.values():
        assert len(known.path(method.topic)) >= 2, method.id


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the table of published figures is not beside the repository")
def test_evidence_is_what_the_converter_makes_of_the_published_table(converter):
    with PUBLISHED.open(encoding="utf-8", newline="") as table:
        made = [converter.convert(row) for row in csv.DictReader(table)]
    with converter.HERE.open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == made


@pytest.mark.parametrize(
    ("technique", "setting", "steps"),
    [
        ("gptq_w4a4", "W4A4KV4", "gptq(bits=4, activation_bits=4, kv_bits=4)"),
        ("gptq", "3-bit g128 + reorder (act-order)", "gptq(bits=3, group_size=128, act_order=yes)"),
        ("gptq", "GPTQ-128g, 4.15 bits/weight, memory 8589 MiB", "gptq(bits=4, group_size=128)"),
        ("rtn_int4", "W4A16KV16", "rtn(bits=4)"),
        ("gguf_q4_k_m", "q4_K_M, imatrix WT 10m, size 4.58 GiB", "gguf(type=q4_k_m, imatrix=yes)"),
        ("semi_structured_4_8", "4:8 wanda", "wanda(pattern=4:8)"),
        ("sparsegpt+gptq", "50% + 4-bit joint", "sparsegpt(sparsity=0.5) + gptq(bits=4)"),
        ("structured_pruning_width", "SliceGPT ratio 0.25", "slicegpt(sparsity=0.25)"),
        ("structured_pruning_width", "SliceGPT 26-27%", "slicegpt"),
        ("layer_drop", "SLEB, 7 of 32 blocks removed (21.9%)", "sleb(sparsity=0.219)"),
        ("loftq", "2.25 bits, LoftQ init + LoRA", "loftq(bits=2.25)"),
        ("lora", "rank64-rslora (lora)", "rslora(rank=64)"),
        ("kv_cache_quant", "RPTQ W4A3KV (KV cache only at activation bits)", "rptq(bits=4, kv_bits=3)"),
        ("tensor_parallel", "TP8 vs TP2", "tensor_parallel(devices=8)"),
        ("tensor_parallel", "2 -> 4 GPUs", "tensor_parallel(devices=4)"),
        ("dora", "rank32-dora (lora)", "dora(rank=32)"),
        ("something_new", "as it came", "something_new"),
    ],
)
def test_settings_become_steps(converter, technique, setting, steps):
    assert converter.steps(technique, setting) == steps


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("LLaMA-7B", "llama"), ("LLaMA-1B", "llama-on-c4"), ("CodeLlama-34B", "llama-2"), ("Llama-3.1-8B", "llama-3"),
        ("TinyLlama-1.1B", "tinyllama"), ("OPT-6.7B", "opt"), ("bloomz-7b1", "bloom"), ("Qwen2.5-7B-Instruct", "qwen2.5"),
        ("Qwen-7B", "qwen"), ("Gemma-2B", "gemma"), ("Gemma-2-2B", "gemma-2"), ("gemma-3-12b-it", "gemma-3"),
        ("generic 7B", ""), ("OPT/BLOOM/LLaMA/Pythia 125M-13B mean", ""),
    ],
)  # fmt: skip
def test_models_of_one_recipe_are_one_family(converter, model, family):
    assert converter.family(model) == family


def test_asking_loads_nothing_heavy():
    script = (
        "import sys\n"
        "from knowledge_base.field import field\n"
        "field().select(saves='energy', needs='no-training', status='known')\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'numpy', 'sklearn', 'scipy', 'networkx', 'optuna'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
