"""Measuring a candidate under the load of a spec: served as `leanplan serve` would, driven as its users would.

A workload is driven where one batch after the other does not tell what clients meet: where requests arrive, where a
conversation grows, and where a budget is on what only a load shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import BadInput, CandidateFailed, EnvironmentProblem
from knowledge_base.serde import plain
from knowledge_base.types import Budget, Figure, Hardware, Workload
from planner.load.driving import DRAIN_S, Protocol, drive
from planner.load.requests import Words
from planner.load.telling import LATENCIES, Seen, seen
from planner.load.trace import Row, read_trace
from planner.measuring import Observed

if TYPE_CHECKING:
    from planner.isolation import Limits, Servers
    from planner.spec import Spec

ONLY_LOADED = ("itl_s", "goodput_requests_per_s")  # metrics that nothing but a load shows
PROTOCOLS = {
    "quick": Protocol(least_s=10.0, most_s=25.0, warm_up_s=2.0),
    "normal": Protocol(least_s=30.0, most_s=120.0, warm_up_s=5.0),
    "thorough": Protocol(least_s=60.0, most_s=600.0, warm_up_s=10.0),
}


def driven(workload: Workload, budgets: Sequence[Budget]) -> bool:
    """Whether candidates are measured under load."""
    live = [b for b in budgets if b.level != "off"]
    asked = any(b.metric in ONLY_LOADED or b.statistic == "p99" for b in live)
    return asked or workload.loaded


def require(spec: Spec) -> None:
    """Make sure that the candidates of a spec can be measured under load.

    Raises:
        EnvironmentProblem: a package is missing; BadInput: a budget on goodput, and no latency to keep.
    """
    from planner.load.client import library
    from planner.serving import missing_modules

    library()
    if missing := missing_modules():
        raise EnvironmentProblem(
            f"the workload is measured by serving it, and {', '.join(missing)} is not installed", where="workload",
            hint="pip install 'leanplan[serve]', or add --predict",
        )  # fmt: skip
    live = [b for b in spec.budgets if b.level != "off"]
    if any(b.metric == "goodput_requests_per_s" for b in live) and not any(b.metric in LATENCIES for b in live):
        raise BadInput(
            "goodput counts requests within the latency budgets, and there are none", where="budgets",
            hint="add one, for example ttft_p95: 500 ms",
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateLoad:
    """The load every candidate of a spec is put under."""

    workload: Workload
    budgets: tuple[Budget, ...]
    rows: tuple[Row, ...]
    protocol: Protocol

    @property
    def facts(self) -> Mapping[str, Any]:
        """What figures depend on, beside the workload: part of a measurement's key."""
        limits = sorted(
            (b.metric, b.statistic, b.value) for b in self.budgets if b.metric in LATENCIES and not b.relative
        )
        return {**asdict(self.protocol), "limits": limits}

    def lasts_s(self, latency_s: Any, served_per_s: Any) -> Any:
        """Return the seconds that it goes on, see `driving.drive`.

        Args:
            latency_s: of an answer, a number or an array; `served_per_s`: requests that the service answers at most.
        """
        import numpy as np

        workload, protocol = self.workload, self.protocol
        rest_s = np.minimum(latency_s, max(DRAIN_S, protocol.least_s))
        if workload.trace is not None and workload.trace.replayed:
            return np.minimum(protocol.most_s, self.rows[-1].at_s or 0.0) + rest_s
        asked_per_s = served_per_s if workload.requests_per_s is None else workload.requests_per_s
        counted_s = np.maximum(protocol.least_s, protocol.least_requests / asked_per_s)
        return np.minimum(protocol.most_s, protocol.warm_up_s + counted_s) + rest_s

    def observe(
        self, folder: Path, prompts: Path, hardware: Hardware, *, servers: Servers, limits: Limits, log: Path, most_s: float,
        progress: Callable[[str, float], None], waiting: Callable[[str], None],
    ) -> Observed:  # fmt: skip
        """Serve an artefact, put the service under the load, and return what clients met.

        Raises:
            CandidateFailed: it cannot be served, or answers nothing.
        """
        import numpy

        from planner.load.client import Endpoint
        from planner.locks import measurement_lock
        from planner.serving import Settings, started

        text = numpy.load(prompts, mmap_mode="r", allow_pickle=False).ravel().tolist()
        longest = max([r.prompt_tokens + r.output_tokens for r in self.rows] or [2 * self.workload.longest_tokens])
        settings = Settings(context_tokens=max(longest, Settings().context_tokens))
        protocol = replace(self.protocol, most_s=min(self.protocol.most_s, max(5.0, most_s)))
        began = time.monotonic()
        try:
            with measurement_lock(waiting=waiting) as waited_s:
                with started(
                    folder, servers=servers, limits=limits, log=log, settings=settings, progress=progress
                ) as service:
                    endpoint = Endpoint(
                        url=service.url, model=service.model, context_tokens=service.context_tokens, pid=service.pid
                    )
                    words = Words(seed=protocol.seed, text=text)
                    run = drive(
                        endpoint, self.workload, protocol, words, rows=self.rows, tick=lambda what: progress(what, 0.0)
                    )
        except EnvironmentProblem as error:
            raise CandidateFailed("invalid_result", f"served: {error.message}", hint=error.hint) from error
        told = seen(run, protocol, self.budgets)
        if not told.requests.answered:
            raise CandidateFailed(
                "timeout", f"served: {told.remarks[0] if told.remarks else 'no request was answered'}"
            )
        record = {
            **told.protocol, "requests": plain(told.requests), "steady": told.steady, "percentiles": plain(told.percentiles),
            "lock_wait_s": waited_s, "wall_s": time.monotonic() - began,
        }  # fmt: skip
        return Observed(figures=_with_costs(told, hardware), protocol=record, warnings=told.remarks)


def load_of(spec: Spec) -> CandidateLoad | None:
    """Return the load of a spec's candidates; None where they are not driven."""
    from planner.statistics import minimal_samples

    if not driven(spec.workload, spec.budgets):
        return None
    tail = 0.99 if any(b.statistic == "p99" and b.level != "off" for b in spec.budgets) else 0.95
    protocol = replace(PROTOCOLS[spec.search.effort], seed=spec.search.seed, least_requests=minimal_samples(tail, 0))
    trace = spec.workload.trace
    rows = read_trace(spec.path(trace.file)) if trace else ()
    return CandidateLoad(workload=spec.workload, budgets=spec.budgets, rows=rows, protocol=protocol)


def _with_costs(told: Seen, hardware: Hardware) -> dict[str, Figure]:
    """Return the figures, with what follows from throughput and energy: carbon and cost of a token under this load."""
    from planner import energy
    from planner.statistics import exact_figure

    figures = dict(told.figures)
    throughput, joules = figures.get("throughput_tokens_per_s"), figures.get("energy_j_per_token")
    if throughput and throughput.value > 0:
        seconds = exact_figure(1 / throughput.value, "under load")
        if joules is None:
            joules = energy.modelled_energy(seconds, hardware, told.protocol.get("service_cores") or 0.0)
        found = {"cost_usd_per_token": energy.cost(seconds, joules, hardware)}
        if joules:
            found |= {"energy_j_per_token": joules, "carbon_gco2e_per_token": energy.carbon(joules, hardware)}
        figures |= {name: figure for name, figure in found.items() if figure is not None}
    return figures
