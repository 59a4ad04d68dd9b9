"""Screen 4: what the model will be asked to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from knowledge_base.errors import BadInput
from planner.wizard.answers import Answers
from planner.wizard.request_log import fit
from planner.wizard.screens._screen import Grid, Screen, View
from planner.wizard.screens._typed import changed, numbered, path_of, setting_rows, unknown

PRESETS = {  # prompt tokens, output tokens, requests at once
    "chat": (512, 128, 1), "rag": (3072, 256, 1), "batch": (1024, 256, 8), "code": (2048, 128, 1), "edge": (128, 64, 1),
}  # fmt: skip
KEYS = {
    "prompt": "workload.prompt_tokens",
    "output": "workload.output_tokens",
    "concurrency": "workload.concurrency",
}
DEFAULT = dict(zip(("prompt_tokens", "output_tokens", "concurrency"), PRESETS["chat"]))


def _grid(view: View) -> Grid:
    workload = view.answers.parsed.workload
    now = (workload.prompt_tokens, workload.output_tokens, workload.concurrency)
    rows: list[tuple[str, ...]] = [
        (name, f"{prompt} + {output} tokens", f"{at_once} request{'s' if at_once > 1 else ''} at a time")
        for name, (prompt, output, at_once) in PRESETS.items()
    ]
    rows.append(("log FILE", "your own requests", "JSON lines that all below is fitted to"))
    chosen = {i for i, preset in enumerate(PRESETS.values()) if preset == now and workload.prompt_tokens_p95 is None}
    return Grid(rows=[*rows, ("", "", ""), *setting_rows(view, KEYS)], chosen=frozenset(chosen))


def _change(view: View, text: str) -> Answers:
    preset = PRESETS.get(numbered(text, tuple(PRESETS)))
    if preset is not None:
        return view.answers.with_key("workload", dict(zip(DEFAULT, preset)))
    word, _, value = text.partition(" ")
    if word == "log":
        if not value.strip():
            raise BadInput("`log` needs a file", hint="type for example `log requests.jsonl`")
        model = Path(view.outlook.model.source if view.outlook else view.answers.spec["model"]["source"])
        fitted = fit(path_of(value.strip()), model)
        return replace(view.answers.with_key("workload", fitted.workload), origin=fitted.words)
    if word not in KEYS:
        raise unknown(word, [*PRESETS, *KEYS, "log"])
    return changed(view, text, KEYS)


def _remarks(view: View) -> list[str]:
    return [f"fitted to {view.answers.origin}"] if view.answers.origin else []


def is_default(answers: Answers) -> bool:
    """Return whether nobody has chosen the workload yet."""
    return answers.spec["workload"] == DEFAULT


def within(answers: Answers, context_tokens: int) -> Answers:
    """Return the answers with a workload that a model of a short context can take."""
    lengths = (max(1, context_tokens // 2), max(1, context_tokens // 8), 1)
    return answers.with_key("workload", dict(zip(DEFAULT, lengths)))


SCREEN = Screen(
    name="workload",
    title="What will it be asked to do?",
    why="Long prompts cost arithmetic, long answers cost memory bandwidth, many requests cost both.",
    ask="a preset, e.g. `prompt 2048`, or `log requests.jsonl`",
    grid=_grid,
    change=_change,
    remarks=_remarks,
    words=(*PRESETS, *KEYS, "log"),
    more="Lengths are counted in tokens, about four letters each. Requests at a time are served back to back unless a "
    "plan batches them. A log has one JSON object a line: token counts (prompt_tokens, completion_tokens, input_tokens, "
    "output_tokens, also inside usage) or texts (prompt, completion, messages, response), counted with the model's own "
    "tokenizer; with start times and durations the concurrency is fitted too. It stays here; only the numbers go into "
    "the spec.",
)
