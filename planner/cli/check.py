"""`leanplan check [SPEC]`: judge every budget, for CI."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import ExitCode, LeanplanError
from planner.reports import check as formats

if TYPE_CHECKING:
    from pathlib import Path

    from planner.checking import CheckResult, Stopped

HELP = "judge each budget of a spec for the locked plan: met, not met or inconclusive; for CI"
TELLING = ("changed", "failed", "always")
TOLD_ANYWAY = ("full", "concise", "json")  # formats in which an error needs no report of its own: it is printed
STEP_SUMMARY_BYTES = 2**20  # what GitHub shows of one step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec", nargs="?", default="leanplan.yaml", help="spec file, or - for stdin (default leanplan.yaml)"
    )
    parser.add_argument("--predict", action="store_true", help="judge predictions; nothing is run")
    parser.add_argument(
        "--baseline", metavar="FILE", help="lock file of the main branch, to compare with (default: the spec's own)"
    )
    parser.add_argument("--update-lock", action="store_true", help="write today's figures of the plan to the lock file")
    parser.add_argument("--exit-zero", action="store_true", help="exit 0 also when a budget is not met or inconclusive")
    parser.add_argument("--format", choices=formats.names(), default="full", help="what to print (default full)")
    parser.add_argument("--comment", metavar="FILE", help="write a comment for the pull request there, in Markdown")
    parser.add_argument(
        "--comment-when", choices=TELLING, default="changed", help="when there is a comment (default changed)"
    )


def output() -> Any:
    from planner.reports.check.json import FIELDS

    return FIELDS


def run(options: argparse.Namespace) -> int:
    from dataclasses import replace
    from pathlib import Path

    from planner import spec as specs
    from planner.checking import Stopped, check, lock_of, lock_path, name_of
    from planner.cli._talk import emit
    from planner.finding import runs_root
    from planner.lock import write_lock
    from planner.loop import Settings
    from planner.progress import Progress
    from planner.reports.check._findings import locate, place
    from planner.reports.check.json import summary

    options.json = options.json or options.format == "json"
    settings = Settings(
        run_root=runs_root(options), store_root=Path(options.store or ".leanplan"), predict=options.predict, offline=options.offline,
        trust_remote_code=options.trust_remote_code, allow_pickle=options.allow_pickle,
    )  # fmt: skip
    progress = Progress(quiet=bool(options.quiet), live=False if options.no_progress else None)
    spec_file = "" if options.spec == "-" else place(options.spec)
    name = Path(options.spec).stem
    try:
        spec = specs.load(options.spec)
        name = name_of(spec)
        baseline = Path(options.baseline) if options.baseline else None
        result = replace(check(spec, settings=settings, progress=progress, baseline=baseline), spec_file=spec_file)
    except LeanplanError as error:
        stop = Stopped(
            name=name, message=error.message, hint=error.hint, where=locate(error.where), exit_code=error.exit_code, spec_file=spec_file,
        )  # fmt: skip
        if options.format not in TOLD_ANYWAY and not options.json:
            emit(options, None, formats.render(options.format, stop))
        _tell_forge(options, stop)
        raise
    if options.update_lock and result.measured:
        write_lock(lock_path(spec), lock_of(result.answer, result.result))
        progress.line(f"wrote {lock_path(spec)}")
    emit(options, summary(result), formats.render(options.format, result))
    _tell_forge(options, result)
    code = result.exit_code
    return ExitCode.DONE if options.exit_zero and code in (ExitCode.BUDGET_NOT_MET, ExitCode.INCONCLUSIVE) else code


def _tell_forge(options: argparse.Namespace, result: CheckResult | Stopped) -> None:
    """Write the comment where it was asked for, and in GitHub Actions the step's summary."""
    import os
    from pathlib import Path

    from knowledge_base.serde import write_atomic
    from planner.cli._talk import say
    from planner.reports.check.markdown import worth_telling
    from planner.scrubbing import scrub

    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if not (options.comment or summary):
        return
    text = scrub(formats.render("markdown", result))
    if summary:
        _add_summary(Path(summary), text, quiet=options.quiet)
    if not options.comment:
        return
    if worth_telling(result, options.comment_when):
        write_atomic(Path(options.comment), text)
        say(f"wrote {options.comment}", quiet=options.quiet)
    else:
        Path(options.comment).unlink(missing_ok=True)  # of an earlier run: its verdict is not today's
        say(f"no comment: nothing to say (--comment-when {options.comment_when})", quiet=options.quiet)


def _add_summary(path: Path, text: str, *, quiet: int) -> None:
    from planner.cli._talk import say

    there = path.stat().st_size if path.exists() else 0
    if there + len(text.encode()) > STEP_SUMMARY_BYTES:
        say(f"the step summary has no room: GitHub shows {STEP_SUMMARY_BYTES:,} bytes of a step", quiet=quiet)
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
