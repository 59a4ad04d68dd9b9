"""`leanplan report [RUN]`: a finished run as one HTML file for people, or as Markdown, JSON or CSV."""

from __future__ import annotations

import argparse
from typing import Any, TypedDict

FORMATS = {"html": "html", "md": "markdown", "json": "json", "csv": "csv"}  # as typed: its file in planner/reports

HELP = "write a run's report: one HTML file that opens from disk; or Markdown, JSON, CSV on stdout"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="run folder, run name or result.json (default: the newest finished run)"
    )
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default="html", help="default html, written beside the run's result.json"
    )


class Written(TypedDict):
    """Where the report is."""

    written: str


def output() -> Any:
    from planner import schemas

    return Written | schemas.result()


def run(options: argparse.Namespace) -> int:
    import importlib
    from pathlib import Path

    from knowledge_base.errors import ExitCode
    from planner.cli._talk import emit, say
    from planner.finding import find_run, runs_root
    from planner.results import load

    given = Path(options.run) if options.run else None
    if given is not None and given.is_file():
        answer, beside = load(given), given.with_suffix(".html")
        page = beside if given.name != "result.json" else given.with_name("report.html")
    else:
        answer = find_run(options.run, runs_root(options))
        folder = given if given is not None and given.is_dir() else Path(answer.folder or ".")
        page = folder / "report.html"
    form = "json" if options.json and options.format != "html" else options.format
    text = importlib.import_module(f"planner.reports.{FORMATS[form]}").render(answer)
    if form != "html":
        emit(argparse.Namespace(output_file=options.output_file), None, text)
        return ExitCode.DONE
    page = Path(options.output_file or page)
    emit(argparse.Namespace(output_file=str(page)), None, text)
    emit(argparse.Namespace(json=options.json), Written(written=str(page)), str(page))
    say("next: open it in a browser; it needs nothing else", quiet=options.quiet)
    return ExitCode.DONE
