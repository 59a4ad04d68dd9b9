"""What a run says it will fetch: the model and its draft, as far as they are of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from knowledge_base.errors import EnvironmentProblem
from planner import hub, spec
from planner.downloading import Download

COMMIT = "a" * 40
MISSING = {("org/model", COMMIT): 800.0, ("org/draft", None): 90.0}


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the hub's cache holds of each model; the hub itself cannot be reached here."""
    held = {"org/model": 20.0, "org/draft": 0.0}
    monkeypatch.setattr(hub, "missing_bytes", lambda source, revision, **how: MISSING[source, revision])
    monkeypatch.setattr(hub, "cached_bytes", lambda source: held[source])
    monkeypatch.setattr(hub, "free_bytes", lambda: 1_000)
    return held


def made(**more: object) -> spec.Spec:
    return spec.from_mapping(
        {
            "model": {"source": "org/model", "revision": COMMIT},
            "workload": {"prompt_tokens": 8},
            "objectives": ["tpot_p50"],
            **more,
        }
    )


def test_a_draft_of_the_hub_is_fetched_too(cache: dict[str, float]) -> None:
    download = Download.of(made(draft="org/draft"), offline=False)
    assert (download.missing_bytes, download.cached_bytes) == (890.0, 20.0)
    cache.update({"org/model": 820.0, "org/draft": 90.0})
    assert download.fetched_bytes == 890.0
    assert Download.of(made(), offline=False).missing_bytes == 800.0


def test_both_together_must_find_room(cache: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "free_bytes", lambda: 850)
    assert Download.of(made(), offline=False).missing_bytes == 800.0
    with pytest.raises(EnvironmentProblem, match="org/model and org/draft: a download of 890 B, 850 B of disk is free"):
        Download.of(made(draft="org/draft"), offline=False)


def test_folders_are_fetched_from_nowhere(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert Download.of(made(model=str(tmp_path / "one")), offline=False) == Download()
