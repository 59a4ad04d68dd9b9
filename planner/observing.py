"""What a whole run uses while it lasts, observed from the planner: memory of its process tree, GPU memory, bytes on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from planner.isolation import watching

INTERVAL_S = 0.5
MAX_FILES = 1_000_000


class Observer:
    """Looks now and then, in a thread, with below 1 % of a core. A context manager: leaving it looks a last time.

    Between two looks memory may peak unseen: `saw_candidate` adds the marks the kernel kept of single candidates.
    """

    def __init__(self, folders: Sequence[Path], *, device: bool) -> None:
        self._folders = folders
        self._gpu = shutil.which("nvidia-smi") if device else None
        self._at_start = self._written()
        self._device_at_start = self._device_bytes()
        self.peak_memory_bytes = self.peak_device_bytes = self.peak_disk_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="observer", daemon=True)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look_at_disk()

    def saw_candidate(self, peak_bytes: float) -> None:
        """Take note of the highest memory of one candidate's processes; the planner's own was there beside it."""
        self.peak_memory_bytes = max(self.peak_memory_bytes, int(peak_bytes) + watching.peak_bytes(os.getpid()))

    def _watch(self) -> None:
        memory, disk, device = (watching.Paced(INTERVAL_S * times) for times in (1, 2, 4))
        while not self._over.wait(INTERVAL_S):
            for pace, look in (
                (memory, self._look_at_memory),
                (disk, self._look_at_disk),
                (device, self._look_at_device),
            ):
                if pace.due():
                    began = time.monotonic()
                    look()
                    pace.took(time.monotonic() - began)

    def _look_at_memory(self) -> None:
        used = watching.proportional_bytes(watching.group_of(os.getpid()))
        self.peak_memory_bytes = max(self.peak_memory_bytes, used)

    def _look_at_disk(self) -> None:
        self.peak_disk_bytes = max(self.peak_disk_bytes, self._written() - self._at_start)

    def _look_at_device(self) -> None:
        self.peak_device_bytes = max(self.peak_device_bytes, self._device_bytes() - self._device_at_start)

    def _written(self) -> int:
        return sum(watching.folder_usage(folder, max_files=MAX_FILES)[0] for folder in self._folders)

    def _device_bytes(self) -> int:
        """Return the memory in use on the first GPU, by whomever; 0 where there is none to ask."""
        if self._gpu is None:
            return 0
        query = [self._gpu, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        try:
            done = subprocess.run(
                query, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL, check=True
            )
            return int(done.stdout) * 2**20
        except (OSError, ValueError, subprocess.SubprocessError):
            return 0
