"""`leanplan init [DIR]`: a commented spec to start from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypedDict

HELP = "write a commented leanplan.yaml to start from, and what git should ignore"

EXAMPLE_MODEL = "HuggingFaceTB/SmolLM2-135M"  # a small real model, named where no model folder is found
IGNORED = (".leanplan/", "runs/")
TEMPLATES = Path(__file__).with_name("templates")
CI = {  # template -> where it goes in the repository
    "github": {"github_check.yml": ".github/workflows/leanplan.yml", "github_comment.yml": ".github/workflows/leanplan-comment.yml"},
    "gitlab": {"gitlab.yml": ".gitlab/leanplan.yml"},
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help="where to write (default: here)")
    parser.add_argument(
        "--model", metavar="PATH", help="model folder or hub id (default: the first model folder found in DIR)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")
    parser.add_argument("--ci", choices=tuple(CI), help="write what runs leanplan check on pull requests as well")


class Started(TypedDict):
    """What was written."""

    written: list[str]
    model: str  # as the spec names it


def output() -> Any:
    return Started


def run(options: argparse.Namespace) -> int:
    import json

    from knowledge_base.errors import BadInput
    from knowledge_base.serde import write_atomic
    from planner import _yaml
    from planner import spec as specs
    from planner.cli._talk import emit, say

    folder = Path(options.folder)
    if folder.exists() and not folder.is_dir():
        raise BadInput("not a folder", hint="leanplan init DIR", where=str(folder))
    model = _model(folder, options.model)
    text = specs.template(json.dumps(model, ensure_ascii=False) if _needs_quotes(model) else model)
    specs.spec_of(
        _yaml.parse_yaml(text, "leanplan.yaml"), folder.resolve()
    )  # a bad --model is refused before anything is written
    files = {folder / "leanplan.yaml": text}
    for name, target in CI.get(options.ci, {}).items():
        files[folder / target] = _pinned((TEMPLATES / name).read_text(encoding="utf-8"))
    if (there := [path for path in files if path.exists()]) and not options.force:
        raise BadInput("is there already", hint="--force overwrites it", where=str(there[0]))
    files[folder / ".leanplan/spec.schema.json"] = json.dumps(specs.schema(), indent=1, ensure_ascii=False) + "\n"
    ignore = folder / ".gitignore"
    if missing := _not_ignored(ignore):
        before = ignore.read_text(encoding="utf-8") if ignore.is_file() else ""
        files[ignore] = (
            before + ("\n" if before and not before.endswith("\n") else "") + "".join(f"{line}\n" for line in missing)
        )
    for path, content in files.items():
        write_atomic(path, content)
    path = folder / "leanplan.yaml"
    emit(options, Started(written=[str(p) for p in files], model=model), "\n".join(f"wrote {p}" for p in files))
    say(f"next: edit the budgets in {path}; leanplan validate {path}; leanplan plan {path}", quiet=options.quiet)
    return 0


def _pinned(template: str) -> str:
    """Return a template that installs this version: one that judges otherwise is then a change someone made."""
    from importlib.metadata import version

    return template.replace("pip install leanplan", f"pip install leanplan=={version('leanplan')}")


def _needs_quotes(text: str) -> bool:
    import re

    return (
        not re.fullmatch(r"[A-Za-z0-9._/][A-Za-z0-9._/-]*", text)
        or re.fullmatch(r"[0-9.eE+]+|true|false|null|", text.lower()) is not None
    )


def _model(folder: Path, given: str | None) -> str:
    """Return the model to name in the spec: a path from its folder, or a hub id."""
    import os

    if given and not Path(given).is_dir():
        return given
    found = [folder, *sorted(folder.glob("*")), *sorted(folder.glob("models/*"))] if folder.is_dir() else []
    model = Path(given) if given else next((p for p in found if (p / "config.json").is_file()), None)
    return EXAMPLE_MODEL if model is None else Path(os.path.relpath(model, folder)).as_posix()


def _not_ignored(ignore: Path) -> list[str]:
    there = ignore.read_text(encoding="utf-8").splitlines() if ignore.is_file() else []
    return [line for line in IGNORED if line not in (t.strip() for t in there)]
