"""Write a transformers causal language model as OpenVINO's two files. Equal models give equal bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from knowledge_base.engines import _openvino_graph
from knowledge_base.engines._openvino_library import CONTEXT, DTYPE, INFO, openvino
from knowledge_base.types import Session


def write(session: Session, path: Path) -> None:
    """Write `session`'s model to `path` and the .bin beside it, its matrices as session.storage["openvino"] asks.

    Raises:
        CandidateFailed: "unsupported", the structure has no form in the graph.
    """
    model = session.model
    session.progress("write openvino_model.xml", 0.0)
    graph, held = _openvino_graph.build(model)
    if choice := session.storage.get("openvino"):
        graph = _compressed(graph, **choice)
    _name(graph)
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    graph.set_rt_info(str(model.config.max_position_embeddings), [INFO, CONTEXT])
    graph.set_rt_info(dtype, [INFO, DTYPE])
    openvino().save_model(graph, path, compress_to_fp16=False)
    del held  # not before: the graph's constants stand in it
    session.progress("write openvino_model.xml", 1.0)


def _compressed(graph: Any, *, bits: int, group_size: int | None = None) -> Any:
    """Return the graph with its matrices rounded to nearest by nncf: 8 bits by row, or 4 bits in groups and tables in 8.

    A row that the group size does not divide takes the largest power of two that does; below 32 it stays as it is.
    """
    openvino()  # before nncf: it would send telemetry of its own
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, GroupSizeFallbackMode

    nncf.set_log_level("ERROR")
    settings: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    if bits == 4:
        smaller = AdvancedCompressionParameters(group_size_fallback_mode=GroupSizeFallbackMode.ADJUST)
        settings = {
            "mode": nncf.CompressWeightsMode.INT4_ASYM, "ratio": 1.0, "group_size": group_size,
            "advanced_parameters": smaller,
        }  # fmt: skip
    kept = nncf.IgnoredScope(names=[_openvino_graph.POSITIONS], validate=False)
    return nncf.compress_weights(graph, ignored_scope=kept, **settings)


def _name(graph: Any) -> None:
    """Give the operators names that follow from the graph: those OpenVINO and nncf give count all made in the process."""
    seen: Counter[str] = Counter()
    for node in graph.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        stem, _, number = name.rpartition("_")
        if number.isdigit() and stem in (kind, kind.partition("-")[0]):
            node.set_friendly_name(f"{kind}.{seen[kind]}")
            seen[kind] += 1
