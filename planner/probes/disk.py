"""Disk: free space where runs are written, and how fast a file really gets there."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from typing import Any

PROBE = "disk: free space and write rate of the current folder"
WRITE_BYTES = 2**25


def find() -> dict[str, Any]:
    """Return {"total_bytes", "free_bytes", "write_bytes_per_s" (None where the folder cannot be written)}."""
    usage = shutil.disk_usage(".")
    return {"total_bytes": usage.total, "free_bytes": usage.free, "write_bytes_per_s": _write_rate(usage.free)}


def _write_rate(free_bytes: int) -> float | None:
    if free_bytes < 4 * WRITE_BYTES:
        return None
    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            start = time.perf_counter()
            for _ in range(WRITE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return WRITE_BYTES / (time.perf_counter() - start)
    except OSError:
        return None
