"""`leanplan ls engines` on terminals of several widths."""

from __future__ import annotations

import pytest

from knowledge_base.registry import engines
from planner.cli import main
from planner.cli.ls import blocks


@pytest.mark.parametrize("columns", [80, 120])
def test_every_engine_is_told_within_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["ls", "engines"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    words = out.replace(",", " ").split()
    for name, module in engines.all().items():
        assert {name, *module.ENGINE.offers} <= set(words)


def test_a_narrow_terminal_and_no_engine_are_fine() -> None:
    row = {"engine": "one", "state": "pip install 'leanplan[one-two-three]' " * 3, "summary": "what", "offers": "a, b"}
    lines = blocks([row], columns=40).splitlines()
    assert max(map(len, lines)) <= 40 and lines[0].startswith("one  pip install") and lines[-1] == "    offers a, b"
    assert blocks([]) == "none"
