"""Published config.json files, read without weights: as large as published, and exactly as large as the model itself.

tests/data/public_configs.jsonl holds for each model the keys of its config.json that decide shapes, and the published
numbers of parameters in billions: `params_b` of all, `active_b` of those one token goes through, of which the label may
leave out the embedding table or that and the output matrix (`active_leaves_out`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from public_configs import ROWS, transformers_asked_here

from cost_models.demand import demand_of
from knowledge_base.engines.transformers import architectures
from knowledge_base.errors import BadInput
from knowledge_base.types import Model, Workload
from planner.architectures import FAMILIES
from planner.reading import read_model

QUICK = ("DeepSeek-V3", "granite-4.0-h-tiny", "rwkv-4-169m", "t5-small", "bert-base-uncased", "gemma-3-27b")
LABEL_RATIO = 0.012  # how far a label may be from the count it stands for


@pytest.fixture(autouse=True)
def asked_here() -> Iterator[None]:
    with transformers_asked_here():
        yield


def on_meta(config: dict[str, Any], folder: Path) -> Any:
    """Return the model transformers makes of a config.json, without weights."""
    import torch
    import transformers

    plain = {k: v for k, v in config.items() if k not in ("auto_map", "quantization_config")}
    (folder / "plain").mkdir()
    (folder / "plain" / "config.json").write_text(json.dumps(plain))
    loaded = transformers.AutoConfig.from_pretrained(folder / "plain")
    named = getattr(transformers, config["architectures"][0] or "none", None)
    if named is None:
        autos = (
            transformers.AutoModelForMaskedLM,
            transformers.AutoModelForCausalLM,
            transformers.AutoModelForSeq2SeqLM,
        )
        auto = next(
            a for a in (autos[::-1] if loaded.is_encoder_decoder else autos) if type(loaded) in a._model_mapping
        )
        named = auto.from_config
    with torch.device("meta"):
        return named(loaded)


def listed(row: dict[str, Any]) -> Any:
    """Return the row as a test of its own: quick where our tables tell, else marked slow, but for one of each kind."""
    quick = row["config"]["model_type"] in FAMILIES or row["name"] in QUICK
    return pytest.param(row, id=row["name"], marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("row", map(listed, ROWS))
def test_a_published_config_is_counted_to_the_parameter(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(row["config"]))
    model = read_model(path, weights="optional").model
    assert model.params_total == sum(p.numel() for p in on_meta(row["config"], tmp_path).parameters())
    assert model.params_total / 1e9 == pytest.approx(row["params_b"], rel=row.get("label_ratio", LABEL_RATIO))
    assert model.params_active <= model.params_total
    if "active_b" in row:
        tables = row.get("active_leaves_out", 0) * model.vocab_size * model.hidden_size
        assert (model.params_active - tables) / 1e9 == pytest.approx(row["active_b"], rel=0.06)
    else:
        assert model.params_active == model.params_total
    assert 0.2 < (model.linear_params + model.embedding_params) / model.params_total <= 1
    assert stored_bytes(model) == pytest.approx(model.weight_bytes, rel=1e-3)


def stored_bytes(model: Model) -> float:
    """Return the bytes of weights that everything is predicted from."""
    demand = demand_of(model, Workload(prompt_tokens=8, output_tokens=8), "vllm")
    return demand.linear_bytes + demand.embedding_bytes + demand.head_stored_bytes + demand.other_bytes


KINDS = sorted(kind for kind, tables in architectures().items() if tables - {"IMAGE_TEXT_TO_TEXT", "TEXT_ENCODING"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_of_transformers_is_exact_or_refused(kind: str, tmp_path: Path) -> None:
    """The defaults of a config class are seldom a sensible model, but whatever number is given must be right."""
    import transformers

    try:
        config = transformers.AutoConfig.for_model(kind)
        data = {**json.loads(config.to_json_string(use_diff=False)), "model_type": kind}
        (tmp_path / "config.json").write_text(json.dumps(data))
        whole = on_meta({**data, "architectures": data.get("architectures") or [""]}, tmp_path)
    except Exception as error:
        pytest.skip(f"transformers cannot build its own defaults: {type(error).__name__}")
    try:
        model = read_model(tmp_path / "config.json", weights="optional").model
    except BadInput as refused:
        assert "config.json" in str(refused)
        return
    assert model.params_total == sum(p.numel() for p in whole.parameters())
    assert stored_bytes(model) == pytest.approx(model.weight_bytes, rel=1e-3)
