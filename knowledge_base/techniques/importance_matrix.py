"""Round columns that meet large activations more carefully, when llama.cpp's block formats are written.

llama.cpp's importance matrix: for each input column of a matrix the mean square of what enters it on calibration text.
The scales of each block then minimise the rounding error weighted by it, which is the expected error of the output where
columns are independent. Bytes and speed stay as they are. It is taken while the file is written, of the model as it then is.
"""

from __future__ import annotations

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import eased
from knowledge_base.types import Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="an importance matrix from calibration text for llama.cpp's block formats",
    stage="quantise",
    family="importance",
    implements=("imatrix",),
    spends=("build_s",),
    needs=frozenset({"gguf"}),
    needs_calibration=True,
    modules=("xllamacpp", "gguf"),
    sources=("https://github.com/ggml-org/llama.cpp/pull/4861",
             "https://github.com/ggml-org/llama.cpp/blob/master/tools/imatrix/README.md"),
)  # fmt: skip

EVIDENCE: tuple[Evidence, ...] = ()

CALIBRATION_TOKENS = 16_384
# Share of the loss of rounding that stays, geometric mean over eight types from q2_k to q6_k on the shipped model: 0.85 alone,
# 0.82 after scale_awq, which eases by other means; with a few channels made twenty times as large 0.1 alone, 0.91 after.
_LEFT = 0.8


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_watched(model)


def rewrite(demand: Demand) -> Demand:
    """Return the demand as it was, with less to lose for the block format written after; and one pass over the text."""
    return eased(demand, **{"weights:columns": _LEFT}).but(
        build_flop=demand.build_flop + 4 * CALIBRATION_TOKENS * demand.linear_params,
        because=(*demand.because, "columns with large activations are rounded more carefully"),
    )


def execute(session: Session) -> None:
    """Ask the engine's export to weigh columns by what enters them."""
    session.storage["gguf_importance"] = True
