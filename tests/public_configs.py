"""Published config.json files (tests/data/public_configs.jsonl), and transformers asked about them in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from planner import describing

ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "public_configs.jsonl").read_text().splitlines()
]


@contextmanager
def transformers_asked_here() -> Iterator[None]:
    """Describe models in this process, where transformers is loaded already: it saves seconds for each model."""
    from knowledge_base.serde import restore

    def ask(folder: Path, where: Path) -> Any:
        return restore(describing.Description, json.loads(json.dumps(describing._answer(folder, False))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(describing, "_ask", ask)
        yield
