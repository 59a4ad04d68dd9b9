"""What all tests may share because it is slow to make and never changed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# A flag set for whoever runs the tests (.ci/run wants no progress) is not meant for the commands that tests run.
for _name in [
    n
    for n in os.environ
    if n.startswith("LEANPLAN_") and n not in ("LEANPLAN_ACCEPT", "LEANPLAN_PUBLIC_ROWS", "LEANPLAN_SCREENSHOTS")
]:
    del os.environ[_name]
if "PYTEST_XDIST_WORKER" in os.environ:  # as many threads as workers, not as many times more
    os.environ.setdefault("OMP_NUM_THREADS", "1")


hypothesis.settings.register_profile("here", deadline=None)  # no test is timed: the machines are busy
hypothesis.settings.load_profile("here")

MEASURED = ("tests/e2e/", "tests/docs/")  # what runs the command line, which measures


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's; its groups are not kept apart by pytest 9.2
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep in one of several test processes what measures: measurements wait for each other, their time limits do not."""
    from xdist.scheduler import LoadScopeScheduling

    class OneMeasures(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "measured" if nodeid.startswith(MEASURED) else nodeid

    return OneMeasures(config, log)


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that knows this machine and nothing else. Probing takes a quarter of a minute; tests copy this.

    Kept as if measured on a quiet machine: else a command of a test would measure it anew when others have ended.
    """
    from planner.machine import probe

    store = tmp_path_factory.mktemp("machine")
    probe(store)
    (path,) = store.glob("machines/*.json")
    kept = json.loads(path.read_text())
    kept["facts"]["noise"]["busy_ratio"] = 0.0
    path.write_text(json.dumps(kept))
    return store


@pytest.fixture
def config(tmp_path: Path) -> str:
    """The config.json of an 8-billion-parameter Llama, without weights."""
    from estimate_runs import CONFIG

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "config.json")
