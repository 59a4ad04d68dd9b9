"""What all tests may share because it is slow to make and never changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# A flag set for whoever runs the tests (.ci/run wants no progress) is not meant for the commands that tests run.
for _name in [
    n
    for n in os.environ
    if n.startswith("LEANPLAN_") and n not in ("LEANPLAN_ACCEPT", "LEANPLAN_PUBLIC_ROWS", "LEANPLAN_SCREENSHOTS")
]:
    del os.environ[_name]


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that knows this machine and nothing else. Probing takes a quarter of a minute; tests copy this."""
    from planner.machine import probe

    store = tmp_path_factory.mktemp("machine")
    probe(store)
    return store
