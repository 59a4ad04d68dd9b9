"""`leanplan clean`: what would go, with sizes; --yes removes it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypedDict

HELP = "remove run folders, artefacts or the measurement store; shows what would go unless --yes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="*", choices=["artefacts", "runs", "store", []], help="what to remove (default: artefacts)"
    )
    parser.add_argument("--keep", type=int, default=1, metavar="N", help="newest runs to leave alone (default 1)")


class Target(TypedDict):
    """A folder that goes, or would go."""

    path: str
    bytes: int


class Cleaned(TypedDict):
    """What was removed, or would be."""

    removed: bool  # false: only shown; --yes removes
    targets: list[Target]
    busy: list[str]  # left alone: a run is using it


def output() -> Any:
    return Cleaned


def run(options: argparse.Namespace) -> int:
    import shutil

    from knowledge_base import units
    from planner.cli._talk import emit, say
    from planner.finding import runs, runs_root
    from planner.locks import in_use
    from planner.store import Store

    old = [e.path for e in runs(runs_root(options))][: -options.keep or None]
    targets: list[Path] = []
    for what in options.what or ["artefacts"]:
        if what == "store":
            targets.append(Path(options.store or ".leanplan"))
        else:
            targets += [p if what == "runs" else p / "artefacts" for p in old]
        if what == "artefacts":
            store = Path(options.store or ".leanplan")
            targets += [Store(store).unfinished, store / "serving"]
    targets = [p for p in dict.fromkeys(targets) if p.is_dir() and not p.is_symlink()]
    busy = [p for p in targets if in_use(p) or in_use(p.parent)]
    rows = [Target(path=str(p), bytes=_bytes(p)) for p in targets if p not in busy]
    total = units.format(sum(r["bytes"] for r in rows), "bytes") if rows else "nothing"
    if options.yes:
        for row in rows:
            shutil.rmtree(row["path"])
    lines = [f"{units.format(r['bytes'], 'bytes') if r['bytes'] else '0 B':>12}  {r['path']}" for r in rows]
    lines += [f"left alone, a run is using it: {p}" for p in busy]
    lines.append(f"removed {total}" if options.yes else f"would remove {total}")
    emit(options, Cleaned(removed=options.yes, targets=rows, busy=[str(p) for p in busy]), "\n".join(lines))
    if rows and not options.yes:
        say("to remove them: leanplan clean --yes", quiet=options.quiet)
    return 0


def _bytes(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
