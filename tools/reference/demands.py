"""What a technique makes of a model's demand, computed on models of a few shapes."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.reference.markdown import code, inline, table

if TYPE_CHECKING:
    from knowledge_base.types import Model, Plan, Workload


# Sizes as the models' config.json have them.
_DENSE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_SHAPES = {
    "a Llama of 8 B parameters": _DENSE,
    "a Llama of 1 B parameters, tied embeddings, float32": _DENSE | {
        "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True,
        "torch_dtype": "float32",
    },
    "a Mixtral of 8 experts, 47 B parameters": _DENSE | {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip


def legal_plans() -> dict[str, list[tuple[Model, Workload, list[Plan]]]]:
    """Return some settings of each technique as legal plans, on each of the shapes it can be used on, and for what load."""
    from benchmarks import techniques as measured
    from cost_models.catalogue import find_machine
    from knowledge_base.registry import engines as engine_registry
    from knowledge_base.types import Workload
    from planner.reading import read_model
    from search.space import build_space

    found: dict[str, list[tuple[Model, Workload, list[Plan]]]] = {}
    alone = Workload(prompt_tokens=512, output_tokens=128, concurrency=32)
    loaded = Workload(prompt_tokens=512, output_tokens=128, requests_per_s=1.0, shared_prefix_tokens=256, turns=2)
    processor = dataclasses.replace(find_machine("epyc-9554:384GB"), disk_bytes_per_s=3e9)
    models = []
    for title, config in _SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(config), encoding="utf-8")
            models.append(dataclasses.replace(read_model(str(path), weights="optional").model, name=title))
    models.append(
        read_model(str(Path(__file__).resolve().parents[2] / "models" / "tiny-lm")).model
    )  # the one with a draft beside it
    for machine, workload in ((processor, alone), (find_machine("h100-sxm"), alone), (processor, loaded)):
        for model in models:
            space = build_space(model, workload, machine, engine_names=engine_registry.names(), executable=False)
            for name, plans in measured.plans_of(space, space.refused)[0].items():
                if (machine, workload) == (processor, alone) or name not in found:
                    found.setdefault(name, []).append((model, dataclasses.replace(workload, concurrency=1), plans))
    return found


def demands(name: str, plans: Sequence[tuple[Model, Workload, Sequence[Plan]]]) -> str:
    """Return what a technique makes of the demand of the first of the models on which it changes anything."""
    told = next(filter(None, (_demand(name, *found) for found in plans)), None)
    return told or "Nothing in what the models tried here ask of a machine.\n"


def _demand(name: str, model: Model, workload: Workload, plans: Sequence[Plan]) -> str | None:
    """Return as a table what a technique makes of a model's demand, from which everything is predicted; None: nothing."""
    from cost_models.demand import demand_chain
    from knowledge_base.types import Demand
    from planner.schemas import _remarks

    columns, told = {}, {}
    for plan in plans:
        number = next(i for i, step in enumerate(plan.steps) if step.technique == name)
        before, after = (demand for _, demand in demand_chain(plan, model, workload)[number : number + 2])
        setting = ", ".join(f"{k}={v}" for k, v in plan.steps[number].knobs.items()) or name
        columns[setting] = (before, after)
        told[setting] = "; ".join(after.because[len(before.because) :])
    beside = " + ".join(str(step) for step in plans[0].steps if step.technique != name)
    rows = []
    for field in (f.name for f in dataclasses.fields(Demand)):
        pairs = [(getattr(b, field), getattr(a, field)) for b, a in columns.values()]
        if isinstance(pairs[0][1], float | int | str) and any(b != a for b, a in pairs):
            changes = [_change(field, *pair) for pair in pairs]
            rows.append((code(field), inline(_remarks(Demand).get(field, "")), _amount(field, pairs[0][0]), *changes))
    if not rows:
        return None
    heads = ("demand", "meaning", "before", *(inline(setting) for setting in columns))
    of = f"Of what {inline(model.name)} asks of any machine ([what is predicted](../../concepts/predicting.md))"
    lines = [f"- {inline(setting)}: {inline(why)}" for setting, why in told.items() if why]
    return f"{of}{f', beside {code(beside)}' if beside else ''}:\n\n{table(heads, rows)}\n" + "\n".join([*lines, ""])


def _amount(field: str, value: Any) -> str:
    from knowledge_base import units

    if value is None or isinstance(value, str):
        return code(value or "none")
    return units.format(value, "bytes") if "bytes" in field else f"{value:.3g}"


def _change(field: str, before: Any, after: Any) -> str:
    if before == after:
        return "="
    if isinstance(before, float | int) and isinstance(after, float | int) and before:
        ratio = f"{after / before:.3g}"
        return "=" if ratio == "1" else f"×{ratio}"
    return _amount(field, after)
