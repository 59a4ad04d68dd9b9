"""Screen 5: how much quality may be lost, and on which text that is judged."""

from __future__ import annotations

import re

from knowledge_base import units
from knowledge_base.errors import BadInput
from planner.wizard.answers import Answers
from planner.wizard.screens._screen import Grid, Screen, View
from planner.wizard.screens._typed import is_file, path_of, setting_rows, unknown

TEXTS = {"text": "quality.data", "calibration": "calibration.data"}
WORDS = ("loss", *TEXTS)


def _grid(view: View) -> Grid:
    spec = view.answers.parsed
    loss = next((b for b in spec.budgets if b.metric == "quality_loss_ratio"), None)
    limit = f"at most {loss.text}" if loss else "any"
    text, calibration = setting_rows(view, TEXTS)
    if spec.calibration is None:
        calibration = (calibration[0], "none", "a text of the kind the model reads and writes")
    rows = [("loss", limit, "none, 1 %, 2 %, 5 %, any: of perplexity"), text]
    return Grid(rows=[*rows, calibration])


def _change(view: View, text: str) -> Answers:
    if text in ("any", "none") or re.match(r"[0-9.]", text):
        text = f"loss {text}"  # what is asked for first needs no word
    word, _, value = text.partition(" ")
    value = value.strip()
    if word not in WORDS:
        raise unknown(word, WORDS)
    if not value:
        raise BadInput(f"`{word}` needs a value", hint="type for example `loss 2 %`, or `calibration bundled`")
    if word == "loss":
        limit = {"any": None, "none": {"max": "0 %"}}.get(value, {"max": value})
        return view.answers.with_key("budgets.quality_loss", limit)
    if value == "none" or (word, value) == ("text", "bundled"):
        return view.answers.with_key(TEXTS[word] if word == "text" else "calibration", None)
    if value == "bundled":
        return view.answers.with_key(TEXTS[word], value)
    path = path_of(value)
    if not is_file(path):
        raise BadInput(f"{units.quote(value)} is not a file", hint="type the path of a text file, or `bundled`")
    return view.answers.with_key(TEXTS[word], str(path))


def _remarks(view: View) -> list[str]:
    """Return what takes no part for want of a calibration text."""
    if view.outlook is None or view.answers.parsed.calibration is not None:
        return []
    left_out = [r.why for r in view.outlook.refused if "calibration.data" in r.why]
    return [why.replace("add calibration.data", "`calibration bundled` lets them take part") for why in left_out]


SCREEN = Screen(
    name="quality",
    title="How much quality may it lose?",
    why="Every compression loses something; it is measured on text the model was not tuned on.",
    ask="e.g. `2 %`, `any`, `text FILE`, `calibration FILE` or `calibration bundled`",
    grid=_grid,
    change=_change,
    remarks=_remarks,
    words=(*WORDS, "bundled", "any", "none"),
    more="The loss is perplexity against the unchanged model's, less one; `agreement` and `kl_divergence` can be limited "
    "on the next screen. The bundled held-out text is source code of the Python library: give text of your own domain "
    "if that is not what the model writes. Calibration text lets more techniques take part; it must not overlap the "
    "held-out text.",
)
