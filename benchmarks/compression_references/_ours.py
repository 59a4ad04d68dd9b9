"""Ours, run as the references are: the techniques' own `execute` on a session, and the engine's own export."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

_FOLDER = tempfile.TemporaryDirectory(prefix="leanplan-compression-")


def prepare(method: str) -> None:
    """Import what techniques import inside."""
    import torchao.quantization.quant_primitives  # noqa: F401

    from knowledge_base import registry
    from knowledge_base.engines import _torch_artefact  # noqa: F401
    from knowledge_base.techniques import _blocks, _folding, _kinds, _packed, _static_module  # noqa: F401

    registry.techniques.names()


def load(folder: Path, method: str, setting: dict[str, Any]) -> Any:
    """Return a session on the model, without its calibration text yet."""
    from knowledge_base.techniques import _loading
    from planner.reading import read_model

    facts = read_model(str(folder)).model
    return _loading.load_session(folder, facts, calibration=None, seed=0, workspace=Path(_FOLDER.name), dtype="float32")


def build(session: Any, tokens: Any, method: str, setting: dict[str, Any]) -> Any:
    """Execute the steps of `setting`: pairs of a technique and its knobs."""
    from knowledge_base import registry

    session.calibration = tokens
    for technique, knobs in setting["steps"]:
        registry.techniques.get(technique).execute(session, **knobs)
    return session


def save(session: Any, folder: Path) -> None:
    """Write the artefact."""
    from knowledge_base import registry

    registry.engines.get("transformers").export(session, folder)


def plain(session: Any) -> Any:
    """Return the weights as they would be multiplied, or the model itself where its shapes are others."""
    packed = {name: module for name, module in session.model.named_modules() if hasattr(module, "dequantised")}
    if not packed:
        return session.model
    kept = {
        name: tensor
        for name, tensor in session.model.state_dict().items()
        if not any(name.startswith(f"{module}.") for module in packed)
    }
    biases = {f"{name}.bias": module.bias for name, module in packed.items() if module.bias is not None}
    return kept | biases | {f"{name}.weight": module.dequantised() for name, module in packed.items()}


def runnable(session: Any) -> Any:
    """Return the model where its matrices round what enters them."""
    rounds = any(getattr(module, "kind", "") in ("int8_dynamic", "int8_static") for module in session.model.modules())
    return session.model if rounds else None
