"""A workload fitted to a log: lengths, concurrency, texts counted by the tokenizer, bad lines named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knowledge_base.errors import BadInput
from planner.wizard.model_card import UNSAID, licence
from planner.wizard.request_log import BAD_SHARE, fit

COUNTED = {"prompt_tokens": 10, "completion_tokens": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from planner.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("log") / "tiny"
    make_tiny_model(folder)
    return folder


def log(folder: Path, *rows: Any) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_lengths_are_the_median_and_the_95th_percentile(tmp_path: Path) -> None:
    rows = [{"prompt_tokens": n, "completion_tokens": 2 * n} for n in range(1, 101)]
    fitted = fit(log(tmp_path, *rows), tmp_path)
    assert fitted.workload == {"prompt_tokens": {"p50": 50, "p95": 95}, "output_tokens": 100, "concurrency": 1}
    assert "100 requests" in fitted.words
    assert "answers p50 100, p95 190" in fitted.words
    assert "one at a time is assumed" in fitted.words


@pytest.mark.parametrize(
    "row",
    [
        COUNTED,
        {"usage": COUNTED},
        {"response": {"body": {"usage": COUNTED, "choices": [{"message": {"content": "hello"}}]}}},
        {"input_tokens": 10, "output_tokens": 5},
        {"ContextTokens": 10, "GeneratedTokens": 5, "TIMESTAMP": "2023-11-16 18:15:46.6805900"[:26]},
        {"input_length": 10, "output_length": 5, "timestamp": 1000, "hash_ids": [1, 2]},
    ],
)
def test_token_counts_are_found_where_servers_and_traces_put_them(tmp_path: Path, row: Any) -> None:
    fitted = fit(log(tmp_path, row), tmp_path)
    assert (fitted.workload["prompt_tokens"], fitted.workload["output_tokens"]) == (10, 5)


@pytest.mark.parametrize(
    ("row", "prompt", "output"),
    [
        ({"prompt": "one two", "completion": "three"}, "one two", "three"),
        ({"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]}, "one", "two three"),
        ({"request": {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}]}]},
          "response": {"choices": [{"message": {"content": "two"}}]}}, "one", "two"),
        ({"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}, "one", "two"),
        ({"instruction": "one", "output": "two"}, "one", "two"),
    ],
)  # fmt: skip
def test_texts_are_counted_by_the_models_own_tokenizer(
    tmp_path: Path, model: Path, row: Any, prompt: str, output: str
) -> None:
    from planner.texts import tokenise

    fitted = fit(log(tmp_path, row), model)
    assert fitted.workload["prompt_tokens"] == len(tokenise(model, prompt))
    assert fitted.workload["output_tokens"] == len(tokenise(model, output))


def test_counting_texts_imports_neither_torch_nor_transformers(tmp_path: Path, model: Path) -> None:
    path = log(tmp_path, {"prompt": "one", "completion": "two"})
    code = (
        "import sys; from pathlib import Path; from planner.wizard.request_log import fit\n"
        f"fit(Path({str(path)!r}), Path({str(model)!r})); print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("spans", "at_once"),
    [
        ([(0, 10), (0, 10), (0, 10)], 3),
        ([(0, 10), (20, 10), (1000, 10)], 1),  # nights count for nothing
        ([(0, 10), (5, 10), (10, 10), (15, 10)], 2),
    ],
)
def test_concurrency_is_what_is_under_way_while_anything_is(tmp_path: Path, spans: Any, at_once: int) -> None:
    started = [{**COUNTED, "start_time": start, "latency_ms": 1000 * length} for start, length in spans]
    ended = [{**COUNTED, "start_time": start, "end_time": start + length} for start, length in spans]
    for rows in (started, ended):
        fitted = fit(log(tmp_path, *rows), tmp_path)
        assert fitted.workload["concurrency"] == at_once
        assert "assumed" not in fitted.words


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "not a JSON object"),
        ({"completion_tokens": 3}, "no prompt"),
        ({"prompt_tokens": "many"}, "whole number of tokens, got many"),
        ({"prompt_tokens": -1}, "whole number of tokens"),
        ({"prompt_tokens": True}, "whole number of tokens"),
        ({**COUNTED, "timestamp": "yesterday"}, "neither a number nor a date"),
    ],
)
def test_a_bad_line_is_named_with_its_place(tmp_path: Path, row: Any, told: str) -> None:
    path = log(tmp_path, COUNTED, row)
    with pytest.raises(BadInput) as caught:
        fit(path, tmp_path)
    assert told in caught.value.message
    assert caught.value.where == f"{path}:2"
    few = log(tmp_path, *[COUNTED] * round(2 / BAD_SHARE), row)
    words = fit(few, tmp_path).words
    assert f"1 line skipped, first requests.jsonl:{round(2 / BAD_SHARE) + 1}" in words
    assert told in words


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ((), "empty"),
        (({"prompt_tokens": 3},), "nothing of the answers"),
        (({"prompt": "a", "output": "b"},), "tokenizer"),
    ],
)
def test_a_log_that_cannot_be_fitted_is_refused(tmp_path: Path, rows: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        fit(log(tmp_path, *rows), tmp_path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, tmp_path / ("x" * 600)):
        with pytest.raises(BadInput):
            fit(path, tmp_path)


@given(text=st.text(max_size=60), value=st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["prompt_tokens", "prompt", "messages", "usage", "response", "timestamp", "end_time", "latency_s", "content", "role"]),
        inner, max_size=4),
    max_leaves=8,
))  # fmt: skip
def test_no_line_is_a_bug(tmp_path_factory: pytest.TempPathFactory, text: str, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(f"{json.dumps(value)}\n{text}".encode("utf-8", "surrogatepass"))
    try:
        workload = fit(path, path.parent).workload
    except BadInput as error:
        assert error.hint
    else:
        assert workload["concurrency"] >= 1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("README.md", "---\nlanguage: en\nlicense: apache-2.0\n---\n# x", "apache-2.0"),
        ("README.md", "---\nlicense: other\nlicense_name: my-terms\n---\n", "my-terms"),
        ("README.md", "---\nlicense: [mit]\n---", "[mit]"),
        ("README.md", "license: mit", UNSAID),
        ("README.md", "---\nlicense: mit", UNSAID),
        ("LICENSE", "\n   Apache License\n   Version 2.0\n", "Apache License (LICENSE)"),
        ("other", "", UNSAID),
    ],
)
def test_the_licence_is_what_the_models_files_say(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert licence(tmp_path) == said
