"""What calibration measured, beside the store's measurements; and the laws fitted to both, laid on the machine's profile.

A file of laws says which measurements it was fitted to. It is fitted again as soon as there are others, by whichever
command asks for the machine first, so every run refines it; a measurement under other versions of its engine than those
installed is left aside.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_base.registry import engines
from knowledge_base.serde import plain, restore, write_json
from knowledge_base.types import Hardware, LawCheck, Measurement, Model, Reached, Workload
from planner.store import Record, Store

if TYPE_CHECKING:
    from cost_models.calibrate import Group

SCHEMA = 1
NEWEST = 200  # measurements of the machine that its laws are fitted to


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A machine's laws and what they rest on."""

    reached: tuple[Reached, ...]
    checks: tuple[LawCheck, ...]
    versions: Mapping[str, Mapping[str, str]]  # engine -> its distributions, as measured
    measurements: int
    models: int
    measured_at: str  # the newest measurement, UTC
    seen: Mapping[str, int]  # folder of measurements -> when it last changed, ns


def own_store(store: Path) -> Store:
    """Return the store of calibration's own measurements; runs keep theirs apart."""
    return Store(Path(store) / "calibration")


def laid_on(hardware: Hardware, store: Path, *, tell: Callable[[str], None] = lambda text: None) -> Hardware:
    """Return the machine with what its engines reach by all measurements kept of it; as it is where there are none."""
    kept = laws_of(hardware, store)
    if kept is None:
        return hardware
    void = [name for name in kept.versions if kept.versions[name] != installed(name)]
    for name in void:
        tell(
            f"the calibration of {name} is void: it was measured with {_words(kept.versions[name])}, "
            f"here is {_words(installed(name)) or 'none of them'}; leanplan calibrate measures again"
        )
    reached = tuple(r for r in kept.reached if r.engine not in void)
    device = hardware.device  # and all that are its like
    return replace(hardware, devices=tuple(replace(d, reached=reached) if d == device else d for d in hardware.devices))


def laws_of(hardware: Hardware, store: Path) -> Kept | None:
    """Return a machine's laws, fitted again if there are measurements they have not seen; None without any."""
    seen = _seen(store)
    if not seen:
        return None
    path = _path(store, hardware.fingerprint)
    kept = _read(path)
    if kept is not None and kept.seen == seen:
        return kept
    return refit(hardware, store)


def refit(hardware: Hardware, store: Path) -> Kept | None:
    """Fit the machine's laws to all measurements of it under the engines' present versions, and keep them."""
    from cost_models.laws import fit_laws

    seen = _seen(store)
    records = [r for folder in _stores(store) for r in folder.records(hardware.fingerprint) if _holds(r)]
    records = sorted(records, key=lambda r: r.measurement.taken_at)[-NEWEST:]
    if not records:  # those of engines replaced meanwhile are told as void, not forgotten
        return _read(_path(store, hardware.fingerprint))
    laws = fit_laws(grouped(records), hardware)
    names = {r.engine for r in laws.reached} | {r.measurement.plan.engine for r in records}
    kept = Kept(
        reached=laws.reached, checks=laws.checks, versions={name: installed(name) for name in sorted(names)},
        measurements=len(records), models=len({r.model.digest for r in records}),
        measured_at=records[-1].measurement.taken_at, seen=seen,
    )  # fmt: skip
    with suppress(OSError):  # a store that can only be read: fitted again by the next command
        write_json(_path(store, hardware.fingerprint), {"schema": SCHEMA, **plain(kept)})
    return kept


def grouped(records: Sequence[Record]) -> list[Group]:
    """Return records as (measurements, model, workload), one for each model and workload."""
    groups: dict[tuple[Model, Workload], list[Measurement]] = {}
    for record in records:
        groups.setdefault((record.model, record.workload), []).append(record.measurement)
    return [(measurements, model, workload) for (model, workload), measurements in groups.items()]


def forget(store: Path, fingerprint: str) -> list[Path]:
    """Remove what calibration measured on the machine and the laws of it; return the files that went. Runs' stay."""
    own = own_store(store)
    gone = [own.path(r.measurement.key) for r in own.records(fingerprint)]
    gone += [path for path in (_path(store, fingerprint),) if path.exists()]
    for path in gone:
        path.unlink()
    return gone


def age_words(kept: Kept) -> str:
    """Return `3 days ago`."""
    taken = time.mktime(time.strptime(kept.measured_at, "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
    days = max(0, int((time.time() - taken) // 86400))
    return "today" if days == 0 else "yesterday" if days == 1 else f"{days} days ago"


def installed(engine: str) -> dict[str, str]:
    """Return the versions an engine has here; none where it is not installed."""
    try:
        return dict(engines.get(engine).versions())
    except metadata.PackageNotFoundError:
        return {}


def _holds(record: Record) -> bool:
    measurement = record.measurement
    if measurement.failure is not None or measurement.plan.engine not in engines.names():
        return False
    here = installed(measurement.plan.engine)
    return bool(here) and all(measurement.versions.get(name) == version for name, version in here.items())


def _stores(store: Path) -> tuple[Store, Store]:
    return own_store(store), Store(Path(store))


def _seen(store: Path) -> dict[str, int]:
    folders = {name: s.folder / "measurements" for name, s in zip(("calibration", "runs"), _stores(store), strict=True)}
    return {name: folder.stat().st_mtime_ns for name, folder in folders.items() if folder.is_dir()}


def _path(store: Path, fingerprint: str) -> Path:
    return Path(store) / "machines" / f"{fingerprint}.laws.json"


def _read(path: Path) -> Kept | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            return None
        return restore(Kept, data)
    except (OSError, ValueError):
        return None  # absent, damaged or of another version: fitted again


def _words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
