"""Text files: good ones come through whole, bad ones are refused with the line and what to do."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from pathlib import Path

import pytest

from knowledge_base.errors import BadInput
from planner import texts
from planner.tiny_models import make_tiny_model


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(BadInput) as caught:
        texts.read_text(path)
    assert caught.value.hint
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    return path


def test_marks_and_line_ends_are_evened_out(tmp_path: Path) -> None:
    assert texts.read_text(write(tmp_path, "\ufeffa\r\nß\r\n".encode())) == "a\nß\n"


def test_characters_across_blocks_survive(tmp_path: Path) -> None:
    text = "x" + "漢" * (2**20 // 3 + 50) + "\nend\n"  # the block of 2^20 bytes ends inside a character
    assert texts.read_text(write(tmp_path, text.encode())) == text


@pytest.mark.row(38, 41)
def test_what_is_no_text(tmp_path: Path) -> None:
    refused(tmp_path / "none.txt", "not found")
    refused(tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")
    refused(write(tmp_path, b""), "0 samples")
    refused(write(tmp_path, b" \n\t\n"), "0 samples")
    refused(write(tmp_path, b"same line\n" * 500), "one line, 500 times over")
    refused(write(tmp_path, gzip.compress(b"hello")), "compressed", "unpack")
    refused(write(tmp_path, "hello".encode("utf-16")), "UTF-16", "iconv")
    refused(write(tmp_path, b"one\ntwo\nthr\0ee\n"), "text.txt:3: a binary file")


@pytest.mark.row(41)
def test_the_line_of_a_wrong_byte_is_told(tmp_path: Path) -> None:
    refused(write(tmp_path, b"one\ntwo\ncaf\xe9\n"), "text.txt:3: not UTF-8: byte 0xe9", "iconv -f LATIN1")
    lines = b"0123456789\n" * 200_000  # over two megabytes: the fault lies in the third block
    refused(write(tmp_path, lines + b"\xff\n"), "text.txt:200001: not UTF-8")
    refused(write(tmp_path, b"fine\n\xe6\xbc"), "text.txt:2: not UTF-8")


@pytest.mark.row(41)
def test_huge_files_are_refused_with_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    tracemalloc.start()
    refused(path, "10,240 MiB of text", "head -c")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.row(41)
def test_a_wrong_byte_stops_reading(tmp_path: Path) -> None:
    path = write(tmp_path, b"\0" + b"a" * (16 * 2**20))
    tracemalloc.start()
    refused(path, "binary")
    assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    tracemalloc.stop()


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make_tiny_model(tmp_path)
    text = "Every budget is met; 漢字\n\n  indented\tlines\r" * 7
    assert (
        texts.tokenise(folder, text)
        == AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    )
    with pytest.raises(BadInput, match="the tokenizer cannot be loaded"):
        (folder / "tokenizer.json").write_text("{}")
        texts.tokenise(folder, text)


def test_long_texts_are_tokenised_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path)
    text = "".join(f"line {i} of the plan\n" for i in range(3000))
    whole = texts.tokenise(folder, text)
    monkeypatch.setattr(texts, "_PIECE_CHARACTERS", 100)
    pieces = list(texts._pieces(text))
    assert "".join(pieces) == text
    assert len(pieces) > 300
    assert texts.tokenise(folder, text) == whole


def words(start: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


@pytest.mark.row(40)
def test_overlap_is_the_share_of_copied_text() -> None:
    held_out = words(0, 1300)
    assert texts.overlap_ratio(held_out, words(5000, 1300)) == 0
    assert texts.overlap_ratio(held_out, held_out) == 1
    assert texts.overlap_ratio(held_out, held_out.replace(" ", "\n   ")) == 1
    third = words(9000, 77) + "\n" + words(400, 390) + "\n" + words(7000, 100)
    assert texts.overlap_ratio(held_out, third) == pytest.approx(0.3, abs=0.03)
    assert texts.overlap_ratio(held_out, " ".join(reversed(held_out.split()))) == 0


def test_overlap_of_short_and_dull_texts() -> None:
    assert texts.overlap_ratio("", "a b c") == 0
    assert texts.overlap_ratio("a b c", "x a b c y") == 1
    assert texts.overlap_ratio("a b c", "a b x c") == 0
    assert texts.overlap_ratio("- " * 500, "- " * 500) == 0  # rulers prove nothing
