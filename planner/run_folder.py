"""The folder of one run: what is in it, how it is named, and how an interrupted one is found again.

runs/2026-11-21T0934Z-serve-tiny-lm-7f3a/
  run.json        fingerprint of the spec, machine and catalogue; written first
  spec.yaml       as read, normalised
  events.jsonl    one line for each thing that happened, in order
  plans/<id>/     plan.json, recipe.yaml, measurement.json, log.txt
  artefacts/<id>/ what was measured
  study.db        the measured plans as an Optuna study
  result.json     the answer; its presence says the run is finished
  report.html     the answer for people, with charts; summary.md: in short
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput
from knowledge_base.serde import plain, write_atomic, write_json


def slug(text: str) -> str:
    """Return text as a safe part of a file name: letters, digits, dot, dash; at most 40."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:40] or "model"


class RunFolder:
    """One run's folder. Files are written whole; events are appended and flushed line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: Any = None
        self._sequence = 0

    @classmethod
    def open(cls, root: Path, *, fingerprint: str, title: str, fresh: bool = False) -> tuple[RunFolder, bool]:
        """Return the unfinished run of this fingerprint, or a new folder; and whether it is resumed."""
        if not fresh:
            for path in sorted(root.glob("*/run.json"), reverse=True):
                folder = cls(path.parent)
                if folder.finished or path.parent.is_symlink():
                    continue
                try:
                    facts = json.loads(path.read_text(encoding="utf-8"))
                except ValueError:
                    continue
                if facts.get("fingerprint") == fingerprint:
                    return folder, True
        stamp = time.strftime("%Y-%m-%dT%H%MZ", time.gmtime())
        base = f"{stamp}-{slug(title)}-{fingerprint[:4]}"
        root.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            path = root / (base if attempt == 1 else f"{base}-{attempt}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            folder = cls(path)
            write_json(path / "run.json", {"schema": 1, "fingerprint": fingerprint, "title": title, "started": stamp})
            return folder, False
        raise BadInput(f"{base} and 999 more already exist", where=str(root), hint="remove old runs: leanplan clean")

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def progress(self) -> str:
        """What an earlier process left: `7 measured, 1 interrupted (will be tried again)`."""
        tried = {path.parent for path in self.path.glob("plans/*/attempts.json")}
        measured = {path.parent for path in self.path.glob("plans/*/measurement.json")}
        cut_off = len(tried - measured)
        return f"{len(measured)} measured" + (f", {cut_off} interrupted (will be tried again)" if cut_off else "")

    def refuse_links(self) -> None:
        """Check that a folder found on disk writes to itself only.

        Raises:
            BadInput: it is a link, or one of the folders a run writes to is.
        """
        parts = [self.path / name for name in ("plans", "artefacts", "work")]
        for path in (self.path, *parts, *(entry for part in parts if part.is_dir() for entry in part.iterdir())):
            if path.is_symlink():
                raise BadInput(
                    f"refusing to follow a link out of the run folder, to {path.readlink()}", where=str(path),
                    hint="remove the link, or start a new run with --fresh",
                )  # fmt: skip

    @property
    def artefacts(self) -> Path:
        return self.path / "artefacts"

    def plan_folder(self, plan_id: str) -> Path:
        return self.path / "plans" / plan_id

    def event(self, kind: str, **facts: Any) -> None:
        """Append one event; a torn last line of an earlier crash is cut off first."""
        if self._events is None:
            self._events = self._open_events()
        self._sequence += 1
        line = json.dumps({"n": self._sequence, "at": time.time(), "event": kind, **plain(facts)}, allow_nan=False)
        self._events.write(line + "\n")
        self._events.flush()

    def _open_events(self) -> Any:
        path = self.path / "events.jsonl"
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                os.truncate(path, len(whole))
            self._sequence = whole.count(b"\n")
        return path.open("a", encoding="utf-8")

    def write(self, name: str, value: Mapping[str, Any] | str) -> None:
        """Write a file of the run atomically: text as it is, anything else as JSON."""
        if isinstance(value, str):
            write_atomic(self.path / name, value)
        else:
            write_json(self.path / name, value)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None
