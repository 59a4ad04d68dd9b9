"""What all tests may share because it is slow to make and never changed."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that knows this machine and nothing else. Probing takes a quarter of a minute; tests copy this."""
    from planner.machine import probe

    store = tmp_path_factory.mktemp("machine")
    probe(store)
    return store
