"""What was measured on this machine, kept between runs: one JSON file for each measurement, written atomically.

A key names everything a figure depends on (promise P11): plan, model content, data content, workload, engine and
library versions, machine, protocol. So nothing is measured twice, and nothing stale is found.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.registry import stands
from knowledge_base.serde import digest, plain, restore, write_json
from knowledge_base.types import Measurement, Model, Workload

if TYPE_CHECKING:
    from planner.run_forecast import RunForecast

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A measurement with the model and workload it was taken on, so that cost models can learn from it later."""

    measurement: Measurement
    model: Model
    workload: Workload
    allocation: Mapping[str, str] | None = None


def measurement_key(**facts: Any) -> str:
    """Return the content key of a measurement: the digest of everything the figures depend on."""
    return digest({name: plain(value) for name, value in facts.items()})


class Store:
    """The measurement store of one folder. Several processes may use it: files are only ever replaced whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[Path] = []

    def require_writable(self) -> None:
        """Raise OSError now, not after the first measurement, where nothing can be kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder):
            return

    @property
    def references(self) -> Path:
        """Folder of the unchanged models' log-probabilities, by key."""
        return self.folder / "references"

    @property
    def unfinished(self) -> Path:
        """Folder of what builds that were cut off had done, by key."""
        return self.folder / "unfinished"

    def path(self, key: str) -> Path:
        return self.folder / "measurements" / f"{key[:32]}.json"

    def get(self, key: str) -> Record | None:
        """Return the record of a key, or None. A damaged file counts as absent and is noted in `damaged`."""
        return self._read(self.path(key))

    def put(self, record: Record) -> None:
        """Keep a record under its measurement's key, replacing an older one."""
        write_json(self.path(record.measurement.key), {"schema": SCHEMA, **plain(record)})

    def records(self, hardware_fingerprint: str | None = None) -> Iterator[Record]:
        """Yield the records of one machine (or all), oldest file name first; none of plans that are no longer possible.

        Techniques change their knobs between versions, and come and go with knowledge folders.
        """
        for path in sorted((self.folder / "measurements").glob("*.json")):
            record = self._read(path)
            if record is None or hardware_fingerprint not in (None, record.measurement.hardware_fingerprint):
                continue
            if all(map(stands, record.measurement.plan.steps)):
                yield record

    def put_forecast(self, run_id: str, hardware_fingerprint: str, forecast: RunForecast) -> None:
        """Keep what a run was expected to take beside what it took, for the next forecast."""
        facts = {"schema": SCHEMA, "hardware_fingerprint": hardware_fingerprint, "forecast": plain(forecast)}
        write_json(self.folder / "forecasts" / f"{run_id}.json", facts)

    def forecasts(self, hardware_fingerprint: str) -> Iterator[RunForecast]:
        """Yield the forecasts of finished runs of one machine with their facts, oldest first."""
        from planner.run_forecast import RunForecast

        for path in sorted((self.folder / "forecasts").glob("*.json")):
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                if (data["schema"], data["hardware_fingerprint"]) == (SCHEMA, hardware_fingerprint):
                    yield restore(RunForecast, data["forecast"])
            except (OSError, ValueError, KeyError, TypeError):
                self.damaged.append(path)

    def _read(self, path: Path) -> Record | None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("schema", None) != SCHEMA:
                return None
            return restore(Record, data)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            self.damaged.append(path)
            return None
