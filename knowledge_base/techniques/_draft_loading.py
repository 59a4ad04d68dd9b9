"""A draft model as it is taken in: loaded, and refused where it does not mean the same by a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from knowledge_base.engines._torch_drafting import DraftModel, read_model
from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Session

ROWS = 8  # of calibration text, to judge a draft by


def load_draft(session: Session) -> tuple[Path, Any]:
    """Return the folder and the model of the session's draft.

    Raises:
        CandidateFailed: "build_error", there is none or it cannot be loaded; "unsupported", another tokenizer or
            vocabulary, or an architecture whose drafts cannot be taken back.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    if session.facts.draft is None:
        raise CandidateFailed("build_error", f"`{session.facts.name}` has no draft that can be used")
    folder = Path(session.facts.draft.source)
    try:
        its = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_vocab()
        draft = read_model(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CandidateFailed("build_error", f"the draft `{folder.name}` cannot be loaded: {_line(error)}") from error
    if session.tokenizer is None or its != session.tokenizer.get_vocab():
        raise CandidateFailed(
            "unsupported", f"the draft `{folder.name}` has another tokenizer than the model: its tokens mean other text",
            hint="give a draft of the same tokenizer, or plan without draft_model",
        )  # fmt: skip
    draft = draft.to(session.model.device)
    DraftModel(session.model, draft)  # refuses
    return folder, draft


@torch.no_grad()
def accepted_ratio(session: Session, draft: Any) -> float:
    """Return how often the draft's first choice is the model's on calibration text: the chance a drafted token is kept."""
    rows = session.calibration[:ROWS].to(session.model.device)
    same = [
        (model_logits.argmax(-1) == draft(input_ids=row[None], use_cache=False).logits.argmax(-1)).float().mean()
        for row in rows
        for model_logits in [session.model(input_ids=row[None], use_cache=False).logits]
    ]
    return torch.stack(same).mean().item()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
