"""OpenVINO's package without its telemetry, and what the writer and the reader of an artefact agree on.

Importing openvino tells a server so in every program. Nothing here imports torch.
"""

from __future__ import annotations

import sys
from typing import Any

FILE = "openvino_model.xml"  # the names OpenVINO GenAI and its model server look for
WEIGHTS = "openvino_model.bin"
HEAD = "lm_head"  # the product that makes logits, by this name in the graph
INFO = "leanplan"  # where the graph keeps what its operators do not tell: CONTEXT, DTYPE
CONTEXT = "context_tokens"
DTYPE = "dtype"  # of the model before its weights were stored in fewer bits: "float32", "bfloat16" or "float16"


def openvino() -> Any:
    """Return the openvino package; its telemetry package counts as not installed, which openvino and nncf allow for."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # None: importing it fails
    import openvino
    import openvino.opset15

    return openvino


def sentence(error: Exception) -> str:
    """Return the last line of an error, which says what is wrong; those before say where in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
