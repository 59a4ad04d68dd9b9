"""CONTRIBUTING's technique is added in one file, and everything finds it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import knowledge_base.techniques
from knowledge_base.registry import techniques

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Put the technique of CONTRIBUTING.md in a folder of its own, as its only file, and let the registry see it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    (tmp_path / "weight_rounded.py").write_text(code[1], encoding="utf-8")
    monkeypatch.setattr(knowledge_base.techniques, "__path__", [*knowledge_base.techniques.__path__, str(tmp_path)])
    yield "weight_rounded"
    monkeypatch.undo()
    techniques._loaded.pop("weight_rounded", None)
    sys.modules.pop("knowledge_base.techniques.weight_rounded", None)
    for module in [m for name, m in sys.modules.items() if name.startswith(("knowledge_base.", "cost_models."))]:
        for value in list(vars(module).values()):  # what was learned of the registry while the guest was in it
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def test_registry_and_search_space_find_it(added: str) -> None:
    from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

    from search.space import build_space

    assert added in techniques.names()
    space = build_space(TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, engine_names=("transformers",), only=(added,))
    plans = list(space.each())
    assert sorted(len(p.steps) for p in plans) == [0, 1, 1, 1]


def test_it_is_priced(added: str) -> None:
    from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

    import cost_models
    from knowledge_base.types import Plan, Step

    plan = Plan(model_digest=TOY_MODEL.digest, engine="transformers", steps=(Step(added, {"bits": 8}),))
    assert cost_models.estimate(plan, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE).values["tpot_s"].mid > 0


def test_it_is_really_executed(added: str, tmp_path: Path) -> None:
    from knowledge_base.techniques import _loading
    from planner.reading import read_model
    from planner.tiny_models import make_tiny_model

    folder = make_tiny_model(tmp_path / "model")
    facts = read_model(folder)
    facts = getattr(facts, "model", facts)
    session = _loading.load_session(folder, facts, calibration=None, seed=0, workspace=tmp_path)
    techniques.get(added).execute(session, bits=6)
    weight = next(p for p in session.model.parameters() if p.ndim == 2)
    assert bool((weight * 64 == (weight * 64).round()).all())
