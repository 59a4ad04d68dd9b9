"""`leanplan verify DIR`: is the artefact the one that was built?"""

from __future__ import annotations

import argparse
from typing import Any, TypedDict

HELP = "check every file of an artefact against the digests in its leanplan.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="artefact folder")
    parser.add_argument("--digest", metavar="SHA256", help="digest it must have, e.g. from plan.json or leanplan.lock")


class Intact(TypedDict):
    """An artefact whose files are all as its digests say."""

    folder: str
    digest: str  # SHA-256
    intact: bool


def output() -> Any:
    return Intact


def run(options: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from knowledge_base.errors import BadInput, ExitCode
    from planner.building import verify
    from planner.cli._talk import emit

    folder = Path(options.folder)
    problems = list(verify(folder))
    digest = "" if problems else json.loads((folder / "leanplan.json").read_text(encoding="utf-8"))["digest"]
    if digest and options.digest and digest != options.digest:
        problems.append(f"digest is {digest}, expected {options.digest}")
    if problems:
        raise BadInput("; ".join(problems), where=str(folder), hint="build it again: leanplan build PLAN -o DIR")
    emit(options, Intact(folder=str(folder), digest=digest, intact=True), f"{folder}: intact, sha256 {digest}")
    return ExitCode.DONE
