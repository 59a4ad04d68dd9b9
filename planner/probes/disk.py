"""Disk: free space where runs are written, how fast a file really gets there, and how fast it is read again."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from typing import Any, BinaryIO

from knowledge_base.engines._disk_reading import read_into, settled

PROBE = "disk: free space, write and read rate of the current folder"
WRITE_BYTES = 2**25
READ_BYTES = 2**27
READINGS = 3


def find() -> dict[str, Any]:
    """Return {"total_bytes", "free_bytes", "write_bytes_per_s", "read_bytes_per_s"}, rates None in a folder that is not ours."""
    usage = shutil.disk_usage(".")
    write, read = _rates(usage.free)
    return {
        "total_bytes": usage.total, "free_bytes": usage.free, "write_bytes_per_s": write, "read_bytes_per_s": read,
    }  # fmt: skip


def _rates(free_bytes: int) -> tuple[float | None, float | None]:
    if free_bytes < 4 * READ_BYTES:
        return None, None
    try:
        with tempfile.TemporaryFile(dir=".") as file:
            start = time.perf_counter()
            _write(file, WRITE_BYTES)
            write = WRITE_BYTES / (time.perf_counter() - start)
            _write(file, READ_BYTES - WRITE_BYTES)
            return write, READ_BYTES / statistics.median(_reading_s(file) for _ in range(READINGS))
    except OSError:
        return None, None


def _write(file: BinaryIO, size: int) -> None:
    block = os.urandom(2**20)
    for number in range(size // len(block)):
        file.write(number.to_bytes(8, "little") + block[8:])  # no two alike
    file.flush()
    os.fsync(file.fileno())


def _reading_s(file: BinaryIO) -> float:
    """Return the seconds to read the whole file in the way an engine reads weights, nothing of it in memory before."""
    settled(file.fileno())
    place = memoryview(bytearray(2**24))
    start = time.perf_counter()
    for offset in range(0, READ_BYTES, len(place)):
        read_into(file.fileno(), place, offset)
    return time.perf_counter() - start
