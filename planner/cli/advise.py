"""`leanplan advise MODEL`: which resource binds, what relieves it, what conflicts; predicted in about a second, nothing is run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any

HELP = "what binds a model on a machine, what relieves it at what price, what conflicts, the best predicted plans; nothing is run"
QUALITY = "5 %"  # loss of quality the advice stays within, unless a budget says otherwise
_BUDGET = re.compile(r"\s*([A-Za-z0-9_]+)\s*(<=|>=|≤|≥)\s*(\S.*)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a model folder, a config.json or a hub id; weights are not needed")
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    parser.add_argument(
        "--hardware", "--on", default="local", metavar="HARDWARE",
        help="local, a machine file, a saved profile, or a name of: leanplan ls machines (default local)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", action="append", default=[], metavar="'METRIC<=VALUE'",
        help="a limit, e.g. 'peak_memory<=8 GiB', 'throughput>=30 tokens/s'; may be given several times",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="length of a prompt (default 512)")
    parser.add_argument("--output-tokens", type=int, default=128, metavar="N", help="length of an answer (default 128)")
    parser.add_argument("--concurrency", type=int, default=1, metavar="N", help="requests at a time (default 1)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="json is the same as --json")


def output() -> Any:
    from planner.advising import Advice

    return Advice


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from knowledge_base.errors import BadInput, ExitCode
    from planner import spec as specs
    from planner.advising import advice
    from planner.advising.telling import as_text
    from planner.cli._talk import emit, say
    from planner.forecast import Forecast

    options.json = options.json or options.format == "json"
    model = options.model or options.model_flag
    if not model or (options.model and options.model_flag):
        raise BadInput(
            "name one model", hint="leanplan advise MODEL, a folder, a config.json or a hub id", where="command line"
        )
    spec = specs.from_mapping(
        {
            "model": {"source": model},
            "hardware": options.hardware,
            "workload": {name: getattr(options, name) for name in ("prompt_tokens", "output_tokens", "concurrency")},
            "budgets": {"quality_loss": QUALITY, **budgets(options.budget)},
            "calibration": {"data": "bundled"},  # so that techniques that need such text are told of
        }
    )
    forecast = Forecast(
        Path(options.store or ".leanplan"), options.offline, options.trust_remote_code, options.allow_pickle
    )
    found = advice(forecast.outlook(spec))
    emit(options, found, as_text(found))
    say("next: leanplan alone asks for budgets; leanplan init writes a spec to edit", quiet=options.quiet)
    return ExitCode.DONE


def budgets(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return `peak_memory<=8 GiB` and its like as the budgets of a spec: `{"peak_memory": {"max": "8 GiB"}}`.

    Raises:
        BadInput: a text is not a metric, `<=` or `>=`, and a value; it asks for the worse; or two are about one metric.
    """
    from knowledge_base.errors import BadInput
    from knowledge_base.metrics import find_metric

    found: dict[str, dict[str, str]] = {}
    for text in texts:
        matched = _BUDGET.fullmatch(text)
        if matched is None:
            raise BadInput(f"`{text}` is not a budget", hint="write for example 'peak_memory<=8 GiB'", where="--budget")
        label, sign, value = matched.groups()
        if label in found:
            raise BadInput(f"two budgets on {label}", hint="give each metric one limit", where="--budget")
        bound, better = ("max", "lower") if sign in ("<=", "≤") else ("min", "higher")
        if find_metric(label)[0].better != better:
            raise BadInput(
                f"`{text}` asks for the worse",
                hint=f"write {label}{'>=' if bound == 'max' else '<='}…",
                where="--budget",
            )
        found[label] = {bound: value.strip()}
    return found
