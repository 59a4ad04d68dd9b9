"""`leanplan matrix`: which technique saves which scarce resource, how directly, and by how much in published figures."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "which technique saves which resource, how directly, and by how much in published figures"
FORMATS = ("text", "md", "html", "json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topic", metavar="ID", help="the methods of one topic instead of the rows of the survey")
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="text (default), Markdown, one HTML page or JSON"
    )


def output() -> Any:
    from knowledge_base.field.matrix import Matrix

    return Matrix


def run(options: argparse.Namespace) -> int:
    from knowledge_base.errors import ExitCode
    from knowledge_base.field.matrix import matrix
    from planner.cli._talk import emit
    from planner.reports.knowledge import matrix as shown

    table = matrix(options.topic)
    options.json = options.json or options.format == "json"
    renderings = {"text": shown.as_text, "json": shown.as_text, "md": shown.as_markdown, "html": shown.as_html}
    emit(options, table, renderings[options.format](table))
    return ExitCode.DONE
