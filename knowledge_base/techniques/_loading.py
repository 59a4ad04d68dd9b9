"""The model as it came, loaded whole and checked, as the Session that steps rewrite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput, CandidateFailed
from knowledge_base.types import Model, Session

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_session(
    model_folder: Path,
    facts: Model,
    *,
    calibration: Any,
    seed: int,
    workspace: Path,
    dtype: str | None = None,
    allow_pickle: bool = False,
) -> Session:
    """Return a Session with the folder's model in its own dtype (or `dtype`), on the GPU if there is one.

    No code of the model's own runs and nothing is downloaded. `allow_pickle` also reads `.bin` weights, with
    torch's `weights_only`. The tokenizer is None where the folder has none.

    Raises:
        BadInput: a weight is missing, left over, of another shape or not finite, or a file is damaged.
        CandidateFailed: "unsupported", the weights are in a format this loader does not start from.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    name = dtype or facts.weight_dtype
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if wanted is None:
        raise CandidateFailed(
            "unsupported",
            f"{facts.name}: weights are stored as {name}",
            hint="use float32, bfloat16 or float16 weights",
        )
    model: Any
    found: Any
    try:
        with reading_unmapped():
            model, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, with the loading info
                model_folder,
                dtype=wanted,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported below, with the others
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=None if allow_pickle else True,
            )
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise BadInput(
            f"{facts.name}: the model cannot be loaded: {error}",
            hint="check or download the model again",
            where=str(model_folder),
        ) from error
    # transformers fills what is missing with random numbers and only warns.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if problems := sorted(map(str, found.get(kind, ()))):
            raise BadInput(
                f"{facts.name}: {kind.replace('_', ' ')} in the weights: {', '.join(problems[:3])}"
                + (f" and {len(problems) - 3} more" if len(problems) > 3 else ""),
                hint="config.json and the weight files must describe the same model",
                where=str(model_folder),
            )
    for tensor_name, tensor in model.named_parameters():
        if bad := int(tensor.numel() - torch.isfinite(tensor).sum()):
            raise BadInput(
                f"tensor `{tensor_name}` has {bad} non-finite value{'s' if bad > 1 else ''}",
                hint="the checkpoint is damaged or training diverged; use another one",
                where=str(model_folder),
            )
    if torch.cuda.is_available():
        model = model.to("cuda")
    return Session(
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer_of(model_folder),
        facts=facts,
        calibration=calibration,
        seed=seed,
        workspace=workspace,
    )


def tokenizer_of(model_folder: Path) -> Any:
    """Return the folder's tokenizer; None where it has none."""
    from transformers import AutoTokenizer

    if not any((model_folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def reading_unmapped() -> Iterator[None]:
    """Within the block transformers reads weights instead of mapping their files.

    Pages of a mapped file count as the process's memory once read, so a model would be in memory twice while it loads.
    """
    from transformers import modeling_utils

    mapping = modeling_utils.safe_open
    modeling_utils.safe_open = lambda *args, **options: mapping(*args, **(options | {"backend": "pread"}))  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        modeling_utils.safe_open = mapping  # type: ignore[misc]
