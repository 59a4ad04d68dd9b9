"""`leanplan advise MODEL`: which resource binds, what helps, what conflicts; predicted in about a second, nothing is run."""

from __future__ import annotations

import argparse

HELP = "what binds a model on a machine, what helps, what conflicts, the best predicted plans; nothing is run"
QUALITY = "5 %"  # loss of quality the advice stays within


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder or a hub id; weights are not needed")
    parser.add_argument(
        "--on", default="local", metavar="HARDWARE", help="local, a saved profile, or a name of: leanplan ls machines"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="length of a prompt (default 512)")
    parser.add_argument("--output-tokens", type=int, default=128, metavar="N", help="length of an answer (default 128)")
    parser.add_argument("--concurrency", type=int, default=1, metavar="N", help="requests at a time (default 1)")


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from knowledge_base.errors import ExitCode
    from planner import spec as specs
    from planner.advising import advice, as_text
    from planner.cli._talk import emit, say
    from planner.data import bundled
    from planner.forecast import Forecast

    spec = specs.from_mapping(
        {
            "model": {"source": options.model},
            "hardware": options.on,
            "workload": {name: getattr(options, name) for name in ("prompt_tokens", "output_tokens", "concurrency")},
            "budgets": {"quality_loss": QUALITY},
            "calibration": {"data": str(bundled("calib"))},  # so that techniques that need such text are told of
        }
    )
    forecast = Forecast(
        Path(options.store or ".leanplan"), options.offline, options.trust_remote_code, options.allow_pickle
    )
    found = advice(forecast.outlook(spec))
    emit(options, found, as_text(found))
    say("next: leanplan alone asks for budgets; leanplan init writes a spec to edit", quiet=options.quiet)
    return ExitCode.DONE
