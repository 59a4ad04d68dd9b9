"""A model's draft: the smaller model that guesses its next tokens; found, compared with it, and part of what plans are known by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base import units
from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.registry import techniques
from knowledge_base.techniques._drafts import why_unfit
from knowledge_base.types import Model, Plan
from planner.config_facts import read_json
from planner.reading import LONGEST_TOKENIZER_BYTES

if TYPE_CHECKING:
    from planner.reading import ReadResult

NEEDED = "draft_model"  # the capability a technique asks for that drafts with another model
HINT = "give a smaller model with the same tokenizer, or leave the draft out"


def with_draft(read: ReadResult, given: str | None, open_: Callable[[str], ReadResult]) -> ReadResult:
    """Return what was read of a model with its draft: the one that was given, else the one beside it, if there is one.

    One beside it that cannot be used is left out with a note.

    Args:
        open_: reads a model without looking for its draft.

    Raises:
        BadInput: the draft that was given cannot be read, is the model itself, no smaller, or of another tokenizer.
        EnvironmentProblem: it is on the hub, and cannot be had from there.
    """
    source = given or beside(read.model.source)
    if source is None:
        return read
    try:
        draft = open_(source)
        model = replace(draft.model, source=str(draft.folder.resolve()) if draft.folder else draft.model.source)
        if given and (why := why_unfit(read.model, model)):
            raise BadInput(why, hint=HINT, where=given)
        _require_one_tokenizer(read, draft)
    except (BadInput, EnvironmentProblem) as error:
        if given is None:
            return replace(read, notes=(*read.notes, f"`{Path(source).name}` does not draft: {error.message}"))
        if error.where == "model":
            raise type(error)(error.message, hint=error.hint, where="draft") from error
        raise
    return replace(read, model=replace(read.model, draft=model))


def beside(source: str) -> str | None:
    """Return the folder NAME-draft beside a model's folder, or `draft` in it, if it holds a config.json."""
    try:
        folder = Path(source).expanduser().resolve()
        places = (folder.with_name(f"{folder.name}-draft"), folder / "draft") if folder.name else ()
        return next((str(place) for place in places if (place / "config.json").is_file()), None)
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, no such user's home
        return None


def draft_for(plan: Plan, model: Model) -> Model | None:
    """Return the draft that steps of a plan use, on which its artefact and its figures depend; None: they use none."""
    asked = any(NEEDED in techniques.get(step.technique).TECHNIQUE.needs for step in plan.steps)
    return model.draft if asked else None


def _require_one_tokenizer(read: ReadResult, draft: ReadResult) -> None:
    """Refuse a draft whose tokens are other text. Where a vocabulary is in no file of JSON, it is compared as it is loaded.

    Raises:
        BadInput: naming a token that differs.
    """
    ours, its = (_vocabulary(Path(r.folder or r.model.source)) for r in (read, draft))
    if ours is None or its is None or ours == its:
        return
    text, _ = min(ours.items() - its.items() or its.items() - ours.items(), key=lambda item: item[1])
    raise BadInput(
        f"the draft has another tokenizer than the model: {units.quote(text)} is token {ours.get(text, 'none')} of the model "
        f"and token {its.get(text, 'none')} of the draft", hint=HINT, where=str(draft.folder or draft.model.source),
    )  # fmt: skip


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Return the tokens of a folder's tokenizer.json with their numbers; None where there is none of a known form."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    facts = read_json(path, LONGEST_TOKENIZER_BYTES)
    model, added = facts.get("model"), facts.get("added_tokens") or []
    listed: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, list):  # pairs of a token and its score, in the order of their numbers
        listed = {pair[0]: number for number, pair in enumerate(listed) if isinstance(pair, list) and pair}
    if not isinstance(listed, dict) or not isinstance(added, list):
        return None
    extra = {token.get("content"): token.get("id") for token in added if isinstance(token, dict)}
    return {str(text): number for text, number in {**listed, **extra}.items() if type(number) is int}
