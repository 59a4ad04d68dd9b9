"""`leanplan build PLAN -o DIR`: make a plan's artefact again."""

from __future__ import annotations

import argparse
from typing import Any, TypedDict

HELP = "build the artefact of a plan.json (or a measured plan's id) into a folder, and check its digest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", help="plan.json, or the start of a plan id")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="new folder for the artefact")
    parser.add_argument(
        "--model", metavar="SOURCE", help="folder or hub id to build from (default: the one in the plan)"
    )
    parser.add_argument(
        "--draft", metavar="SOURCE", help="folder or hub id of the model that drafts (default: the one in the plan)"
    )
    parser.add_argument("--calibration", metavar="FILE", help="calibration text (default: the one in the plan)")


class Built(TypedDict):
    """An artefact that was built."""

    folder: str
    bytes: int  # of all its files
    digest: str  # SHA-256
    same: bool | None  # as the measured one; null: no digest to compare with


def output() -> Any:
    return Built


def run(options: argparse.Namespace) -> int:
    from dataclasses import replace
    from pathlib import Path

    from knowledge_base import units
    from knowledge_base.errors import BadInput, ExitCode
    from planner.cli._talk import emit, say
    from planner.finding import find_plan, runs_root
    from planner.progress import Progress
    from planner.recipe import read_recipe
    from planner.validation import rebuild

    path = Path(options.plan)
    if not path.is_file():
        answer, result = find_plan(options.plan, runs_root(options))
        path = Path(answer.folder or ".") / "plans" / result.plan.id / "plan.json"
    recipe = read_recipe(path)
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput("exists and is not empty", where=str(out), hint="give a new folder with -o")
    if options.model:
        recipe = replace(recipe, model=options.model)
    if options.draft:
        if recipe.draft is None:
            raise BadInput("no step of the plan uses a draft", hint="leave --draft out", where="--draft")
        recipe = replace(recipe, draft=options.draft)
    if options.calibration:
        recipe = replace(recipe, calibration=options.calibration)
    progress = Progress(quiet=bool(options.quiet), live=False if options.no_progress else None)
    built = rebuild(recipe, out, store=Path(options.store or ".leanplan"), progress=progress, offline=options.offline)
    same = None if recipe.artefact_digest is None else built.digest == recipe.artefact_digest
    verdict = {
        True: "the same as the measured one",
        False: "not the one that was measured",
        None: "no digest to compare",
    }[same]
    text = f"{out}: {units.format(built.bytes, 'bytes')}, sha256 {built.digest}\n{verdict}"
    emit(options, Built(folder=str(out), bytes=built.bytes, digest=built.digest, same=same), text)
    if same is False:
        say(
            "hint: other library versions, another calibration text or another kind of processor give other bytes; see plan.json"
        )
    return ExitCode.INCONCLUSIVE if same is False else ExitCode.DONE
