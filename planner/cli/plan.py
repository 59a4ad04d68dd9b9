"""`leanplan plan [SPEC]`: search, measure, answer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.spec import Spec

HELP = "search for plans that fit the spec's budgets, measure the promising ones here, print the Pareto set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec", nargs="?", default="leanplan.yaml", help="spec file, or - for stdin (default leanplan.yaml)"
    )
    parser.add_argument("--predict", action="store_true", help="price plans only; nothing is run")
    parser.add_argument(
        "--time-limit",
        metavar="TIME",
        help='wall time of search and measurements, e.g. "10 min" (default: the spec\'s)',
    )
    parser.add_argument(
        "--max-measured", type=int, metavar="N", help="candidates to measure at most (default: the spec's)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="a new run that measures again what the store already holds"
    )
    parser.add_argument(
        "--resume", metavar="RUN", help="finish this interrupted run (the same command finds it by itself)"
    )
    parser.add_argument(
        "--lock", action="store_true", help="write leanplan.lock beside the spec for the recommended plan"
    )
    parser.add_argument("--format", choices=("terminal", "markdown", "json"), help="what to print (default terminal)")


def output() -> Any:
    from planner import schemas

    return schemas.result()


def run(options: argparse.Namespace) -> int:
    from planner import spec as specs

    return run_spec(specs.load(options.spec), options)


def run_spec(spec: Spec, options: argparse.Namespace) -> int:
    """Plan a spec as the options say, print the answer, and return the exit code."""
    import sys
    from dataclasses import replace
    from pathlib import Path

    from knowledge_base import units
    from knowledge_base.errors import BadInput, ExitCode
    from planner.cli._talk import emit
    from planner.finding import runs_root
    from planner.loop import Settings, run
    from planner.progress import progress_of
    from planner.results import as_mapping

    search = spec.search
    if options.time_limit:
        search = replace(search, time_limit_s=units.parse(options.time_limit, "time", field="--time-limit"))
    if options.max_measured is not None:
        if options.max_measured < 1:
            raise BadInput(
                f"--max-measured must be at least 1, got {options.max_measured}", hint="--predict measures nothing"
            )
        search = replace(search, max_measured=options.max_measured)
    if options.seed is not None:
        search = replace(search, seed=options.seed)
    spec = replace(spec, search=search)
    settings = Settings(
        run_root=runs_root(options),
        store_root=Path(options.store or ".leanplan"),
        predict=options.predict,
        fresh=options.fresh,
        resume=options.resume,
        offline=options.offline,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
    )
    progress = progress_of(spec, quiet=bool(options.quiet), live=False if options.no_progress else None)
    try:
        answer = run(spec, settings, progress)
    finally:
        progress.done()
    if options.lock and answer.recommended:
        from planner.checking import lock_of, lock_path
        from planner.lock import write_lock

        write_lock(lock_path(spec), lock_of(answer))
        progress.line(f"wrote {lock_path(spec)}")
    colour = options.color == "always" or (options.color == "auto" and sys.stdout.isatty() and not _no_colour())
    emit(options, as_mapping(answer), _rendered(answer, options.format, colour))
    if answer.folder:
        progress.line(f"run folder: {answer.folder}, with report.html")
        if answer.recommended and (options.json or options.format in ("json", "markdown")):  # the table says it itself
            progress.line(
                f"next: leanplan explain {answer.recommended.plan.id}; leanplan build {answer.recommended.plan.id} -o DIR"
            )
    if answer.recommended:
        return ExitCode.DONE
    undecided = any(
        r.verdicts and all(v.outcome != "not met" for v in r.verdicts if v.budget.level == "error")
        for r in answer.results
    )
    return ExitCode.INCONCLUSIVE if undecided and answer.measured else ExitCode.BUDGET_NOT_MET


def _rendered(answer, form: str | None, colour: bool) -> str:  # type: ignore[no-untyped-def]
    from planner.reports import json, markdown, terminal

    if form == "json":
        return json.render(answer)
    return markdown.render(answer) if form == "markdown" else terminal.render(answer, color=colour)


def _no_colour() -> bool:
    import os

    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
