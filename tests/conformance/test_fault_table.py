"""The table of bad inputs and faults: every row, promise and rule has tests that carry its mark.

`python tests/conformance/test_fault_table.py` prints which.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROWS = {
    1: "spec missing, a folder, unreadable",
    2: "malformed YAML or TOML",
    3: "spec empty, a list, two documents",
    4: "unknown key",
    5: "key given twice",
    6: "unknown unit",
    7: "unit of another dimension",
    8: "unit missing",
    9: "ambiguous unit",
    10: "not a finite positive number",
    11: "decimal comma, thousands separator",
    12: "what YAML 1.1 would misread",
    13: "min above max",
    14: "budgets nothing can meet",
    15: "budget on a figure that can only be modelled here",
    16: "nothing to decide",
    17: "spec in another encoding",
    18: "tags, alias bombs, deep nesting, huge specs",
    19: "names that leave their folder",
    20: "links out of model and run folders",
    21: "folder that is no model",
    22: "hub unreachable or switched off",
    23: "bad model id",
    24: "gated or private model",
    25: "damaged safetensors",
    26: "hostile safetensors",
    27: "weights that are not finite",
    28: "layers missing or left over",
    29: "config with impossible sizes",
    30: "unknown architecture",
    31: "model that brings code",
    32: "only pickles, harmless or not",
    38: "text empty or dull",
    39: "no calibration text",
    40: "calibration text is evaluation text",
    41: "text in another encoding, binary, huge",
    43: "engine not installed",
    44: "engine or library present but broken",
    45: "no GPU",
    46: "candidate out of host memory",
    47: "candidate out of device memory",
    48: "candidate killed by the system",
    49: "candidate hangs",
    50: "candidate crashes",
    51: "candidate floods processes, files or disk",
    52: "candidate lies",
    53: "candidate faster than possible",
    54: "quality collapses",
    55: "every candidate fails",
    56: "the unchanged model fails",
    57: "disk full",
    58: "folders that may not be written, no HOME",
    59: "planner killed in the middle",
    60: "Ctrl-C, once and twice",
    64: "two processes on one run",
    65: "lock of a dead process",
    72: "hostile strings in reports",
    74: "lock of another machine, or edited",
}
PROMISES = {
    "P1": "nothing lost",
    "P2": "nothing measured twice",
    "P3": "a candidate cannot end the search",
    "P4": "limits of time, memory and disk hold",
    "P5": "Ctrl-C answers and resumes",
    "P6": "same input, same plans",
    "P8": "every number has a birth certificate",
    "P9": "a verdict is statistical",
    "P10": "the artefact is the one measured",
    "P11": "cache keys are complete",
    "P12": "errors keep their first cause",
    "P13": "no network unless a hub id was given",
}
RULES = {
    "measured in turns": "baseline and finalists interleaved, paired ratios",
    "measured warm": "warm-up dropped, and said how much",
    "measured percentiles": "no percentile from too few samples",
    "measured verdicts": "met and not met need the whole interval",
    "measured stability": "noise, drift and a slow start are flagged",
    "measured quality": "held-out text, paired differences, output length",
    "measured energy": "counters with their wrap, else modelled and said so",
    "spec names no code": "no import paths, no remote code from a spec",
    "paths": "no link, no second name, nothing outside the folder",
    "candidate": "own session, allow-listed environment, no network, no stdin",
    "limits": "core files, open files, memory, processes, disk",
    "redaction": "credentials appear in no file and no stream",
    "terminal": "foreign text is shown, not obeyed",
    "markdown": "foreign text is escaped",
    "ci": "workflows that hold no secrets and run no foreign code",
}


def marked(name: str) -> Iterator[tuple[int | str, str]]:
    """Yield (argument, test) of every `pytest.mark.<name>(...)` in the tests; of a parameter, the test it belongs to."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for test in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                for node in (n for decorator in test.decorator_list for n in ast.walk(decorator)):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == f"pytest.mark.{name}":
                        for argument in node.args:
                            yield ast.literal_eval(argument), f"{path.relative_to(TESTS)}::{test.name}"


TABLE = {"row": ROWS, "promise": PROMISES, "rule": RULES}


@pytest.mark.parametrize("name", TABLE)
def test_every_entry_has_a_test_and_every_mark_an_entry(name: str) -> None:
    provoked = {entry for entry, _ in marked(name)}
    assert not set(TABLE[name]) - provoked, "entries without a test"
    assert not provoked - set(TABLE[name]), "marks of no entry: add it to the table above"


if __name__ == "__main__":
    for name, entries in TABLE.items():
        tests = list(marked(name))
        for entry, what in entries.items():
            print(f"{name} {entry}: {what}")
            print("".join(f"    {test}\n" for test in dict.fromkeys(t for e, t in tests if e == entry)), end="")
