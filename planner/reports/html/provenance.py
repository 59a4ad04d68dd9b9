"""Part 10: what it rests on: spec, machine, versions, seeds, digests, how each figure was taken, and warnings."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from knowledge_base import units
from knowledge_base.metrics import METRICS
from knowledge_base.serde import plain
from planner.reports.html._view import View
from planner.results import ParetoSet
from planner.run_forecast import rows

TITLE = "What it rests on"
LEAD = "Enough to do it again, and to know what to doubt."


def facts(view: View) -> dict[str, Any]:
    """Return names and values by group, the spec, the digests, and the warnings with how many plans had them."""
    answer = view.answer
    model, machine, workload = answer.model, answer.hardware, answer.workload
    device = machine.device
    search, provenance = answer.search, answer.provenance
    rates = ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in sorted(device.flop_per_s.items()))
    warnings = Counter(w for r in answer.results if r.measurement for w in r.measurement.warnings)
    requests = f"{workload.prompt_tokens} tokens in, {workload.output_tokens} out"
    groups: list[tuple[str, list[tuple[str, Any]]]] = [
        ("Model", [
            ("name", model.name), ("source", model.source), ("revision", model.revision),
            ("architecture", f"{model.architecture}, {model.layers} layers, {model.params_total:,} parameters"),
            ("weights", f"{units.format(model.weight_bytes, 'bytes')} of {model.weight_dtype}"), ("sha256", model.digest),
        ]),
        ("Machine", [
            ("name", machine.name), ("device", f"{device.name}, {device.cores} cores" if device.cores else device.name),
            ("memory", f"{units.format(device.memory_bytes, 'bytes')} at {device.memory_bytes_per_s / 1e9:.3g} GB/s"),
            ("arithmetic", rates), ("figures from", device.source), ("energy counters", ", ".join(machine.energy_counters) or "none: energy is modelled"),
            ("fingerprint", machine.fingerprint),
        ]),
        ("Workload", [("requests", requests), ("at once", workload.concurrency), ("per second", workload.requests_per_s)]),
        ("Search", [
            ("solver", search.get("solver")), ("effort", search.get("effort")), ("seed", search.get("seed")),
            ("held-out and calibration data", provenance.get("data")),
        ]),
        ("What the run took", _taken(answer)),
        ("Versions", sorted(dict(provenance.get("versions", {})).items())),
    ]  # fmt: skip
    spec = provenance.get("spec")
    return {
        "groups": [(name, [(k, v) for k, v in rows if v not in (None, "")]) for name, rows in groups],
        "spec": json.dumps(plain(spec), indent=2, ensure_ascii=False) if spec else "",
        "digests": [
            {"row": row, "artefact": m.artefact_digest or "–", "key": m.key, "taken": m.taken_at}
            for row in view.rows
            if (m := row.result.measurement)
        ],
        "warnings": warnings.most_common(),
        "notes": _notes(view),
    }


def _taken(answer: ParetoSet) -> list[tuple[str, str]]:
    """Return each amount of the run: the forecast, the fact, and whether it lay inside."""
    told = rows(answer.forecast) if answer.forecast else []
    return [(r.label, f"{r.fact} ({r.held} the forecast {r.forecast})" if r.fact != "–" else r.forecast) for r in told]


def _notes(view: View) -> list[tuple[str, str]]:
    """Return what is said of single figures of the plan shown first: assumptions, what is counted."""
    row = view.recommended or view.baseline
    measurement = row.result.measurement if row else None
    if measurement is None:
        estimate = row.result.estimate if row else None
        return (
            [(METRICS[name].label, v.because) for name, v in estimate.values.items() if v.because] if estimate else []
        )
    return [(METRICS[name].label, f.note) for name, f in measurement.figures.items() if f.note]
