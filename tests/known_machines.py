"""Made-up machines whose truth is known, and what would be measured on them. For tests of calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from tests_support import TOY_MACHINE, TOY_MODEL

from cost_models.calibrate import Group
from cost_models.case import case_of
from cost_models.demand import chains
from cost_models.laws import TELLS, bent
from cost_models.predict import Figures, predict_term
from cost_models.terms import terms
from knowledge_base.types import Figure, Measurement, Model, Plan, Step, Workload

LOAD = Workload(prompt_tokens=128, output_tokens=17)
FORMATS: dict[str, tuple[str, tuple[Step, ...]]] = {
    "transformers/float32": ("transformers", ()),
    "transformers/bfloat16": ("transformers", (Step("weight_dtype", {"dtype": "bfloat16"}),)),
    "transformers/int8": ("transformers", (Step("weight_int8", {}),)),
    "llama_cpp/float32": ("llama_cpp", ()),
    "llama_cpp/q8_0": ("llama_cpp", (Step("weight_gguf", {"type": "q8_0"}),)),
    "llama_cpp/q4_k": ("llama_cpp", (Step("weight_gguf", {"type": "q4_k"}),)),
}
SLOWER = {"read": -0.4, "flop": 0.3, "overhead": 0.7, "runtime": 0.2}  # a machine unlike its tables, in log space


def model_of(hidden_size: int, layers: int) -> Model:
    linear = layers * 9 * hidden_size**2
    embedding = 4096 * hidden_size
    return replace(
        TOY_MODEL, digest=f"{hidden_size}x{layers}", layers=layers, attention_layers=layers, hidden_size=hidden_size,
        heads=hidden_size // 32, kv_heads=hidden_size // 64, ffn_size=2 * hidden_size, linear_params=linear,
        embedding_params=embedding, params_total=linear + embedding, params_active=linear + embedding,
        weight_bytes=4 * (linear + embedding),
    )  # fmt: skip


SMALL, LARGE, HUGE = model_of(256, 8), model_of(1024, 6), model_of(2048, 16)


def plans(model: Model, formats: Sequence[str] = tuple(FORMATS)) -> list[Plan]:
    return [Plan(model_digest=model.digest, engine=FORMATS[f][0], steps=FORMATS[f][1]) for f in formats]


def truth(model: Model, shifts: Mapping[str, object], formats: Sequence[str] = tuple(FORMATS)) -> dict[str, np.ndarray]:
    """Return what a machine gives whose rates are the tables' times exp(shift)."""
    nodes = [chains(model, LOAD).node(plan) for plan in plans(model, formats)]
    case, found = bent(case_of(nodes, LOAD, TOY_MACHINE), dict(shifts)), Figures()
    for name in ("weights_bytes", "kv_cache_bytes", *TELLS):
        found[name] = predict_term(terms.get(name), case, found)
    return {name: np.broadcast_to(found[name].mid, (len(nodes),)) for name in TELLS}


def measured(
    model: Model, values: Mapping[str, np.ndarray], formats: Sequence[str] = tuple(FORMATS), **protocol: float
) -> Group:
    taken = [
        Measurement(
            plan=plan, key=plan.id, hardware_fingerprint="toy", protocol=protocol,
            figures={n: Figure(value=float(v[i]), low=float(v[i]), high=float(v[i]), n=5) for n, v in values.items()},
        )
        for i, plan in enumerate(plans(model, formats))
    ]  # fmt: skip
    return taken, model, LOAD


def noisy(values: Mapping[str, np.ndarray], seed: int, sd: float = 0.03) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: v * np.exp(draw.normal(0, sd, len(v))) for name, v in values.items()}
