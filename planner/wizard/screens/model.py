"""Screen 2: which model."""

from __future__ import annotations

from pathlib import Path

from knowledge_base import units
from knowledge_base.errors import BadInput
from planner import hub
from planner.wizard.answers import Answers
from planner.wizard.model_card import licence
from planner.wizard.screens._screen import Grid, Screen, View
from planner.wizard.screens._typed import is_folder, numbered, path_of

SHOWN_MODELS = 6


def local_models(folder: Path) -> tuple[str, ...]:
    """Return the model folders here and one or two levels below, as paths from here; those a spec can name."""
    found = [folder, *sorted(folder.glob("*")), *sorted(folder.glob("models/*"))]
    paths = [p.relative_to(folder).as_posix() for p in found if _is_model(p)]
    return tuple(path for path in paths if path.isprintable())


def _is_model(folder: Path) -> bool:
    """Whether a folder's config.json is that of a model: other programs have files of that name too."""
    from planner.config_facts import read_config

    try:
        return (folder / "config.json").is_file() and bool(read_config(folder / "config.json"))
    except (OSError, BadInput):
        return False


def is_hub_id(source: str) -> bool:
    """Whether a text has the form org/name; a bare name is more often a folder mistyped."""
    return "/" in source and hub.is_id(source)


def _grid(view: View) -> Grid:
    source = view.answers.spec["model"]["source"]
    names = list(view.models[:SHOWN_MODELS])
    names += [] if source in names else [source]
    rows = [(str(i), name, "" if is_folder(Path(name)) else "from the hub") for i, name in enumerate(names, 1)]
    return Grid(rows=rows, chosen=frozenset({names.index(source)}))


def _change(view: View, text: str) -> Answers:
    source, _, revision = numbered(text, view.models[:SHOWN_MODELS]).partition("@")
    source = str(path_of(source)) if source.startswith("~") else source
    if not is_folder(Path(source)) and not is_hub_id(source):
        raise BadInput(
            f"{units.quote(source)} is neither a folder here nor a hub id",
            hint="type a folder with config.json, or an id such as org/name or org/name@commit",
        )
    return view.answers.with_key("model", {"source": source, **({"revision": revision} if revision else {})})


def parameters(count: int) -> str:
    """Return a number of parameters in words."""
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _remarks(view: View) -> list[str]:
    """Return what config.json, the headers and the model's card say, and what is worth a warning."""
    hidden = len(view.models) - SHOWN_MODELS
    lines = [f"and {hidden} more here: Tab lists them"] if hidden > 0 else []
    if view.outlook is None:
        return lines
    model = view.outlook.model
    experts = f", {model.experts_active} of {model.experts} experts at a time" if model.experts else ""
    return [
        *lines,
        f"{model.architecture}: {parameters(model.params_total)} parameters{experts}, "
        f"{units.format(model.weight_bytes, 'bytes')} in {model.weight_dtype}",
        f"{model.layers} layers of width {model.hidden_size}, {model.heads} heads ({model.kv_heads} of keys and values); "
        f"context {model.max_context_tokens:,} tokens",
        f"licence: {licence(Path(model.source))}",
        *view.outlook.model_notes,
        *warnings(view),
    ]


def warnings(view: View) -> list[str]:
    """Return why the model can be priced but not run here."""
    if view.outlook is None or view.outlook.weights_here:
        return []
    return ["✗ no weights here, only config.json: plans can be priced (leanplan plan --predict), none measured"]


SCREEN = Screen(
    name="model",
    title="Which model?",
    why="Its shapes decide what it costs; only config.json and the headers of its weights are read.",
    ask="a number, a folder (Tab completes), or a hub id such as org/name",
    grid=_grid,
    change=_change,
    remarks=_remarks,
    more="A folder holds config.json, *.safetensors and tokenizer.json. A hub id is fetched when it is needed; "
    "`org/name@commit` pins it. Models you planned before are listed first. A model that brings its own code, or weights "
    "as pickle files, is refused unless leanplan was started with --trust-remote-code or --allow-pickle. The licence is "
    "what the model's own files say; nobody checks it.",
)
