"""`leanplan load URL|PLAN`: a service under the load of its users, and what they would meet."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import BadInput, ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from knowledge_base.types import Budget, Workload
    from planner.load.client import Endpoint
    from planner.load.driving import Protocol
    from planner.load.requests import Words
    from planner.load.telling import Seen
    from planner.load.trace import Row
    from planner.progress import Progress

HELP = "put a service of this machine, or a plan's, under load: latency percentiles, throughput, goodput"
LATENCIES = {"ttft": "time to first token", "tpot": "time per output token", "itl": "time between tokens", "latency": "end-to-end time"}  # fmt: skip
PERCENTILES = ("p50", "p95", "p99")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", help="URL of a service of this machine, or a plan to serve meanwhile, as `leanplan serve` takes it"
    )
    load = parser.add_argument_group("the load (default: one client at a time)")
    load.add_argument("--requests-per-s", metavar="RATE", help="requests that arrive by chance, e.g. 2; open loop")
    load.add_argument("--concurrency", type=int, metavar="N", help="clients that each wait for their last answer")
    load.add_argument("--trace", metavar="FILE", help="requests of a CSV or JSONL file at their times; with --requests-per-s their lengths alone")  # fmt: skip
    load.add_argument("--all-at-once", type=int, metavar="N", help="so many requests at once: throughput, MLPerf's offline scenario")  # fmt: skip
    load.add_argument("--spec", metavar="FILE", help="take workload and limits from a spec")
    load.add_argument("--prompt-tokens", metavar="N[,P95]", help="length of prompts, or their median and 95th percentile (default 128)")  # fmt: skip
    load.add_argument("--output-tokens", metavar="N[,P95]", help="length of answers, or both as above (default 64)")
    load.add_argument("--turns", type=int, metavar="N", help="requests of a conversation, each with all before it")
    load.add_argument("--shared-prefix", type=int, metavar="N", help="tokens that all prompts begin with")
    how = parser.add_argument_group("how long")
    how.add_argument("--duration", default="60 s", metavar="TIME", help="counted for at least so long (default 60 s)")
    how.add_argument("--warm-up", default="5 s", metavar="TIME", help="under load before counting (default 5 s)")
    how.add_argument("--time-limit", default="10 min", metavar="TIME", help="at the latest, however few requests were counted (default 10 min)")  # fmt: skip
    service = parser.add_argument_group("the service")
    service.add_argument("--model", metavar="NAME", help="what it calls the model (default: the first it lists)")
    service.add_argument("--tokenizer", metavar="FOLDER", help="model folder: prompts are real text (default: any tokens)")  # fmt: skip
    limits = parser.add_argument_group("limits: exit 1 where one is not met, 5 where that cannot be told")
    for name, words in LATENCIES.items():
        for p in PERCENTILES:
            limits.add_argument(f"--{name}-{p}", metavar="TIME", help=f"{p} of {words} at most, e.g. 200ms")
    limits.add_argument("--goodput", metavar="RATE", help="requests within all latency limits, each second, at least")


def output() -> Any:
    from planner.load.telling import Load

    return Load


def run(options: argparse.Namespace) -> int:
    from planner.cli._talk import emit
    from planner.load.driving import drive
    from planner.load.showing import as_text
    from planner.load.telling import Load, seen
    from planner.progress import Progress

    workload, rows, limits = _asked(options)
    protocol = _protocol(options, limits)
    progress = Progress(quiet=bool(options.quiet), live=False if options.no_progress else None)
    with _endpoint(options, progress) as (endpoint, folder):
        words = _words(options, endpoint, folder, protocol.seed)
        driven = drive(endpoint, workload, protocol, words, rows=rows, tick=progress.tick)
    progress.done()
    told = seen(driven, protocol, limits)
    emit(
        options,
        Load(service=endpoint.url, model=endpoint.model, workload=workload, seen=told),
        as_text(f"{endpoint.model} at {endpoint.url}", workload, told),
    )
    return exit_code(told)


def exit_code(told: Seen) -> ExitCode:
    """Return what a load means for a script: as `leanplan check`, and inconclusive where it was not steady."""
    errors = [v.outcome for v in told.verdicts if v.budget.level == "error"]
    if "not met" in errors:
        return ExitCode.BUDGET_NOT_MET
    return ExitCode.DONE if set(errors) <= {"met"} and told.steady and told.requests.answered else ExitCode.INCONCLUSIVE


# ---------------------------------------------------------------- what is asked


def _asked(options: argparse.Namespace) -> tuple[Workload, Sequence[Row], tuple[Budget, ...]]:
    """Return the workload, the rows of its trace, and the limits.

    Raises:
        BadInput: flags that do not go together, or one that cannot be read.
    """
    from dataclasses import replace
    from pathlib import Path

    from planner import spec as specs
    from planner.load.trace import read_trace

    given = {
        "prompt_tokens": _lengths(options.prompt_tokens, "--prompt-tokens"),
        "output_tokens": _lengths(options.output_tokens, "--output-tokens"),
        "concurrency": options.concurrency, "turns": options.turns, "shared_prefix": options.shared_prefix,
        "trace": options.trace and str(Path(options.trace).resolve()),
        "arrival_rate": _rate(options.requests_per_s, "--requests-per-s"),
    }  # fmt: skip
    asked = {name: value for name, value in given.items() if value is not None}
    if options.concurrency and (options.requests_per_s or options.trace):
        raise BadInput(
            "clients at a time and requests that arrive are two loads", where="--concurrency",
            hint="give one of --concurrency, --requests-per-s and --trace",
        )  # fmt: skip
    if options.all_at_once is not None and (options.all_at_once < 1 or options.requests_per_s or options.concurrency):
        raise BadInput(
            "must be a count of requests, beside no other load", where="--all-at-once", hint="for example --all-at-once 256"
        )  # fmt: skip
    limits = _limits(options)
    if options.spec:
        spec = specs.load(options.spec)
        if asked:
            raise BadInput("the spec says the load", where="--spec", hint="leave the flags of the load out")
        workload = spec.workload
        limits += tuple(b for b in spec.budgets if _drivable(b) and not {b.metric} & {x.metric for x in limits})
        folder = spec.folder
    else:
        usual = {} if "trace" in asked else {"prompt_tokens": 128, "output_tokens": 64}
        budget = {"latency": "1 h"}  # a spec decides something; limits are told by flags here
        folder = Path.cwd()
        if options.trace and not Path(options.trace).is_file():
            raise BadInput("not a file", where=options.trace, hint="give the path of a trace: CSV or JSON lines")
        workload = specs.from_mapping(
            {"model": "served", "workload": {**usual, **asked}, "budgets": budget}, folder
        ).workload
        if options.trace:
            workload = (
                replace(workload, trace=replace(workload.trace, file=options.trace)) if workload.trace else workload
            )
    rows = read_trace(folder / workload.trace.file) if workload.trace else ()
    if options.all_at_once and workload.trace is None:
        workload = replace(workload, requests_per_s=None)
    return workload, rows, limits


def _drivable(budget: Budget) -> bool:
    """Whether a spec's budget is a limit on what clients meet."""
    from planner.load.telling import LATENCIES

    judged = budget.metric in LATENCIES and budget.statistic in PERCENTILES
    return budget.level != "off" and not budget.relative and (judged or budget.metric in RATES)


RATES = ("throughput_tokens_per_s", "requests_per_s", "goodput_requests_per_s")


def _lengths(text: str | None, flag: str) -> Any:
    """Return `512` as a number, `512,2048` as a median and a 95th percentile, as a spec writes them."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdecimal() and part.isascii() for part in parts):
        raise BadInput(f"must be N or P50,P95, got {text[:40]!r}", where=flag, hint="for example 512 or 512,2048")
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else {"p50": numbers[0], "p95": numbers[1]}


def _rate(text: str | None, flag: str) -> str | None:
    """Return a rate as a spec writes it; a plain number is for each second."""
    import re

    if text is None:
        return None
    return f"{text} requests/s" if re.fullmatch(r"[0-9.]+", text) else text


def _limits(options: argparse.Namespace) -> tuple[Budget, ...]:
    from knowledge_base import units
    from knowledge_base.metrics import LABELS
    from knowledge_base.types import Budget

    found = []
    for name in LATENCIES:
        for p in PERCENTILES:
            if text := getattr(options, f"{name}_{p}"):
                value = units.parse(text, "time", field=f"--{name}-{p}")
                found.append(Budget(metric=LABELS[name], statistic=p, bound="max", value=value, text=text))
    if options.goodput:
        if not found:
            raise BadInput("goodput needs a latency limit", where="--goodput", hint="for example --ttft-p95 200ms")
        value = units.parse(_rate(options.goodput, "--goodput") or "", "requests", field="--goodput")
        found.append(
            Budget(metric="goodput_requests_per_s", statistic="mean", bound="min", value=value, text=options.goodput)
        )
    return tuple(found)


def _protocol(options: argparse.Namespace, limits: Sequence[Budget]) -> Protocol:
    """Return how long to go on: for so many requests as the highest percentile with a limit needs."""
    from knowledge_base import units
    from planner.load.driving import Protocol
    from planner.statistics import QUANTILES, minimal_samples

    highest = max([QUANTILES[b.statistic] for b in limits if b.statistic in QUANTILES], default=0.95)
    least_s, most_s = (
        units.parse(getattr(options, n), "time", field=f"--{n.replace('_', '-')}") for n in ("duration", "time_limit")
    )
    if most_s < least_s:
        raise BadInput(
            "shorter than --duration", where="--time-limit", hint="give a longer one, or a shorter --duration"
        )
    return Protocol(
        least_s=least_s, most_s=most_s, warm_up_s=units.parse(options.warm_up, "time", field="--warm-up"),
        least_requests=minimal_samples(max(highest, 0.95), 0), all_at_once=options.all_at_once or 0, seed=options.seed or 0,
    )  # fmt: skip


# ---------------------------------------------------------------- the service


@contextlib.contextmanager
def _endpoint(options: argparse.Namespace, progress: Progress) -> Iterator[tuple[Endpoint, Path | None]]:
    """Give the service: the one at a URL, or that of a plan, started for as long as the load lasts; and its folder."""
    import asyncio
    from dataclasses import replace
    from pathlib import Path
    from urllib.parse import urlsplit

    from planner.load import client
    from planner.load.watching import listener

    client.library()
    if "://" in options.target:
        base = client.base_of(options.target)
        found = asyncio.run(client.find(base, options.model))
        yield replace(found, pid=listener(urlsplit(base).port or 80)), None
        return
    from planner.finding import runs_root
    from planner.serving import started
    from planner.serving.choosing import choose

    store = Path(options.store or ".leanplan")
    chosen = choose(options.target, runs=runs_root(options), store=store, progress=progress, offline=options.offline)
    progress.line(f"starting the service of {chosen.folder}")
    with started(chosen.folder, name=chosen.model, progress=lambda what, done: progress.tick(what)) as service:
        found = client.Endpoint(
            url=service.url, model=service.model, context_tokens=service.context_tokens, pid=service.pid
        )
        yield found, chosen.folder


def _words(options: argparse.Namespace, endpoint: Endpoint, folder: Path | None, seed: int) -> Words:
    """Return what prompts are made of: real text where there is a tokenizer, else any tokens."""
    from pathlib import Path

    from planner.data import bundled
    from planner.load.requests import Words
    from planner.texts import read_text, tokenise

    tokenizer = Path(options.tokenizer) if options.tokenizer else folder
    if tokenizer is None or not (options.tokenizer or (tokenizer / "tokenizer.json").is_file()):
        return Words(seed=seed, vocabulary=endpoint.vocabulary)
    return Words(seed=seed, text=tokenise(tokenizer, read_text(bundled("calib"))))
