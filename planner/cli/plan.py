"""`leanplan plan [SPEC]`: search, measure, answer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.results import ParetoSet
    from planner.spec import Spec

HELP = "search for plans that fit the spec's budgets, measure the promising ones here, print the Pareto set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec", nargs="?", default="leanplan.yaml", help="spec file, or - for stdin (default leanplan.yaml)"
    )
    parser.add_argument(
        "--draft", metavar="SOURCE", help="folder or hub id of a smaller model that drafts (default: the spec's)"
    )
    parser.add_argument("--predict", action="store_true", help="price plans only; nothing is run")
    parser.add_argument(
        "--forecast",
        action="store_true",
        help="say what the run will take, and end; nothing is run (exit 4: it cannot be done here)",
    )
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
    from planner.run_forecast import RunForecast

    return schemas.result() | RunForecast


def run(options: argparse.Namespace) -> int:
    from planner import spec as specs

    return run_spec(specs.load(options.spec), options)


def run_spec(spec: Spec, options: argparse.Namespace) -> int:
    """Plan a spec as the options say, print the answer, and return the exit code."""
    from dataclasses import replace
    from pathlib import Path

    from knowledge_base import units
    from knowledge_base.errors import BadInput
    from planner.cli._talk import emit
    from planner.finding import runs_root
    from planner.loop import Settings, run
    from planner.progress import progress_of
    from planner.results import as_mapping
    from planner.spec import ModelRef

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
    if options.draft:
        here = Path(options.draft)  # told from the current folder, unlike what the spec says
        spec = replace(spec, draft=ModelRef(source=str(here.resolve()) if here.is_dir() else options.draft))
    if options.forecast:
        return _forecast(spec, options)
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
    emit(options, as_mapping(answer), rendered(answer, options))
    if answer.folder:
        progress.line(f"run folder: {answer.folder}, with report.html")
        if answer.recommended and (options.json or options.format in ("json", "markdown")):  # the table says it itself
            progress.line(
                f"next: leanplan explain {answer.recommended.plan.id}; leanplan build {answer.recommended.plan.id} -o DIR"
            )
    return exit_code(answer)


def exit_code(answer: ParetoSet) -> int:
    """Return what an answer ends with: done, inconclusive, or a budget that is not met."""
    from knowledge_base.errors import ExitCode

    if answer.recommended:
        return ExitCode.DONE
    undecided = any(
        r.verdicts and all(v.outcome != "not met" for v in r.verdicts if v.budget.level == "error")
        for r in answer.results
    )
    return ExitCode.INCONCLUSIVE if undecided and answer.measured else ExitCode.BUDGET_NOT_MET


def _forecast(spec: Spec, options: argparse.Namespace) -> int:
    from pathlib import Path

    from knowledge_base.errors import ExitCode
    from planner.cli._talk import emit
    from planner.finding import runs_root
    from planner.forecast import Forecast
    from planner.run_forecast import as_text

    forecasts = Forecast(
        Path(options.store or ".leanplan"), options.offline, options.trust_remote_code, options.allow_pickle
    )
    found = forecasts.run(spec, runs_root(options), fresh=options.fresh)
    emit(options, found, as_text(found, stages=True))
    return ExitCode.ENVIRONMENT if found.obstacles else ExitCode.DONE


def rendered(answer: ParetoSet, options: argparse.Namespace) -> str:
    """Return an answer in the form the options ask for."""
    import os
    import sys

    from planner.reports import json, markdown, terminal

    if options.format == "json":
        return json.render(answer)
    if options.format == "markdown":
        return markdown.render(answer)
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    colour = options.color == "always" or (options.color == "auto" and sys.stdout.isatty() and not plain)
    return terminal.render(answer, color=colour)
