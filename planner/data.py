"""The token files candidates work on: held-out windows, calibration windows, prompts. Written once, named by content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_base.errors import BadInput
from knowledge_base.serde import digest
from knowledge_base.types import Model, Workload

if TYPE_CHECKING:
    from planner.spec import Spec

OVERLAP_LIMIT = 0.05  # more shared text than this between held-out and calibration flatters quality
FEWEST_WINDOWS = 8
REFERENCE_BYTES = 512 * 2**20  # the unchanged model's log-probabilities take at most this much disk
# Held-out windows and their length by effort: enough that a 1 % perplexity change shows, few enough to score in time.
WINDOWS = {"quick": (24, 256), "normal": (48, 512), "thorough": (128, 512)}
CALIBRATION_WINDOWS, CALIBRATION_TOKENS = 64, 256
PROMPTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Token files of one model and spec, int32 .npy of shape (windows, tokens); `id` names their content.

    `positions`: how many of the last positions of a held-out window are compared with the unchanged model, so that
    its stored log-probabilities stay within REFERENCE_BYTES.
    """

    id: str
    heldout: Path
    calibration: Path | None
    prompts: Path
    windows: int
    window_tokens: int
    positions: int
    notes: tuple[str, ...] = ()


def prepare_data(spec: Spec, model: Model, model_folder: Path, store: Path) -> Data:
    """Tokenise the spec's texts and write the token files.

    Raises:
        BadInput: a text is empty, too short, not UTF-8, or held-out text overlaps calibration text.
    """
    from planner import texts

    path = spec.quality.data if spec.quality and spec.quality.data else None
    notes = []
    if path is None:
        path = bundled("heldout")
        notes.append(
            "held-out text: the bundled default (Python library source); give quality.data for your own domain"
        )
    heldout_text = texts.read_text(path)
    heldout_ids = texts.tokenise(model_folder, heldout_text)
    effort_windows, effort_tokens = WINDOWS[spec.search.effort]
    window_tokens = min(effort_tokens, model.max_context_tokens, max(16, len(heldout_ids) // FEWEST_WINDOWS))
    windows = _windows(heldout_ids, effort_windows, window_tokens)
    if len(windows) < FEWEST_WINDOWS or window_tokens < 16:
        raise BadInput(
            f"{len(heldout_ids)} tokens are too few: quality needs at least {FEWEST_WINDOWS} windows of 16 tokens",
            where=str(path),
            hint="give more held-out text",
        )
    calibration = None
    identity = [model.digest, windows]
    if spec.calibration is not None and spec.calibration.data is not None:
        text = texts.read_text(spec.calibration.data)
        shared = texts.overlap_ratio(heldout_text, text)
        if shared > OVERLAP_LIMIT:
            raise BadInput(
                f"held-out text overlaps calibration ({shared:.0%}): quality would be flattered",
                where=str(path),
                hint="use texts that share nothing, for example different files",
            )
        calibration = calibration_windows(
            spec.calibration.data,
            model_folder,
            spec.calibration.samples or CALIBRATION_WINDOWS,
            min(CALIBRATION_TOKENS, model.max_context_tokens),
        )
        identity.append(calibration)
    prompts = _prompts(heldout_ids, spec.workload)
    identity.append(prompts)
    name = digest(identity)[:16]
    folder = store / "data" / name
    positions = max(1, min(window_tokens - 1, REFERENCE_BYTES // (2 * model.vocab_size * len(windows))))
    return Data(
        id=name,
        heldout=save_windows(folder / "heldout.npy", windows),
        calibration=save_windows(folder / "calibration.npy", calibration) if calibration else None,
        prompts=save_windows(folder / "prompts.npy", prompts),
        windows=len(windows),
        window_tokens=window_tokens,
        positions=positions,
        notes=tuple(notes),
    )


def calibration_windows(path: Path, model_folder: Path, samples: int, tokens: int) -> list[list[int]]:
    """Return up to `samples` windows of `tokens` ids of a calibration text.

    Raises:
        BadInput: the text is shorter than one window.
    """
    from planner import texts

    rows = _windows(texts.tokenise(model_folder, texts.read_text(path)), samples, tokens)
    if not rows:
        raise BadInput(f"fewer than {tokens} tokens: nothing to calibrate on", where=str(path), hint="give more text")
    return rows


def bundled(name: str) -> Path:
    """Return the path of a text that ships with the package: "heldout" or "calib"."""
    import knowledge_base.data

    return Path(str(knowledge_base.data.__file__)).parent / "texts" / f"{name}.txt"


def _windows(ids: Sequence[int], count: int, tokens: int) -> list[list[int]]:
    """Return up to `count` disjoint windows spread evenly over the whole text."""
    possible = len(ids) // tokens
    count = min(count, possible)
    starts = [(i * possible // count) * tokens for i in range(count)] if count else []
    return [list(ids[s : s + tokens]) for s in starts]


def _prompts(ids: Sequence[int], workload: Workload) -> list[list[int]]:
    """Return PROMPTS windows of the longest prompt, at different places of the text; a short text is repeated."""
    length = workload.prompt_tokens_p95 or workload.prompt_tokens
    long_enough = list(ids) * (1 + (length + PROMPTS) // max(1, len(ids)))
    stride = max(1, (len(long_enough) - length) // PROMPTS)
    return [long_enough[i * stride : i * stride + length] for i in range(PROMPTS)]


def save_windows(path: Path, rows: list[list[int]]) -> Path:
    """Write token windows as .npy of int32 (windows, tokens) unless they are there, and return the resolved path."""
    import io

    import numpy

    from knowledge_base.serde import write_atomic

    if not path.exists():
        buffer = io.BytesIO()
        numpy.save(buffer, numpy.array(rows, dtype=numpy.int32), allow_pickle=False)
        write_atomic(path, buffer.getvalue())
    return path.resolve()
