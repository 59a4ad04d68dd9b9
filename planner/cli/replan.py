"""`leanplan replan [RUN]`: changed budgets, judged by what was measured already; nothing is run."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "judge what a run measured under changed budgets, and say what else is worth measuring; nothing is run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="run folder or run name (default: the newest finished run)"
    )
    parser.add_argument(
        "--spec", metavar="SPEC", help="take budgets and objectives from this file (default: the run's own)"
    )
    parser.add_argument(
        "--budget", action="append", default=[], metavar="'METRIC<=VALUE'",
        help="a limit in place of the spec's on that metric, e.g. 'tpot<=3 ms'; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--objective",
        action="append",
        default=[],
        metavar="METRIC",
        help="in place of the spec's objectives, the first counts most",
    )
    parser.add_argument("--format", choices=("terminal", "markdown", "json"), help="what to print (default terminal)")


def output() -> Any:
    from planner import schemas

    return schemas.result()


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from planner import api
    from planner.cli._talk import emit
    from planner.cli.advise import budgets
    from planner.cli.plan import exit_code, rendered
    from planner.finding import runs_root
    from planner.results import as_mapping

    answer = api.replan(
        options.run, budgets=budgets(options.budget), objectives=options.objective, spec=options.spec,
        run_dir=runs_root(options), store=Path(options.store or ".leanplan"),
    )  # fmt: skip
    emit(options, as_mapping(answer), rendered(answer, options))
    return exit_code(answer)
