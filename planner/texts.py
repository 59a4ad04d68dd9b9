"""Text files as tokens: read with care, tokenised without transformers, compared so that no test text was learnt."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from knowledge_base.errors import BadInput

LONGEST_TEXT_BYTES = 32 * 2**20
SHINGLE_WORDS = 13  # long enough that two texts rarely share one by chance
_BLOCK_BYTES = 2**20
_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_PIECE_CHARACTERS = 2**18


def read_text(path: str | Path) -> str:
    """Return a text file's content. A byte order mark is dropped, CRLF becomes LF. Read in blocks, refused early.

    Raises:
        BadInput: not found, not a regular file, empty, longer than 32 MiB, compressed, binary, not UTF-8 (with the
            line), or one line over and over.
    """
    path = Path(path)
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput("not found", hint="give the path of a text file", where=str(path)) from error
    if not stat.S_ISREG(facts.st_mode):
        raise BadInput("not a regular file", hint="give the path of a text file", where=str(path))
    if facts.st_size > LONGEST_TEXT_BYTES:
        raise BadInput(
            f"{facts.st_size / 2**20:,.0f} MiB of text; the limit is {LONGEST_TEXT_BYTES // 2**20} MiB",
            hint=f"a few megabytes are plenty; take a part: head -c 8M {path.name} > part.txt", where=str(path),
        )  # fmt: skip
    text = "".join(_decoded(path)).removeprefix("\ufeff").replace("\r\n", "\n")
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise BadInput(f"{path.name} has 0 samples: the file is empty", hint="give a file with text", where=str(path))
    if len(lines) > 1 and len(set(lines)) == 1:
        raise BadInput(
            f"one line, {len(lines)} times over: nothing can be judged on it", hint="give real text", where=str(path)
        )
    return text


def _decoded(path: Path) -> Iterator[str]:
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 1
    with path.open("rb") as file:
        block = file.read(_BLOCK_BYTES)
        if block.startswith(_COMPRESSED):
            raise BadInput("a compressed file, not text", hint="unpack it first", where=str(path))
        if block.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise BadInput("UTF-16, not UTF-8", hint="convert it: iconv -f UTF-16 -t UTF-8", where=str(path))
        while True:
            if b"\0" in block:
                line = lines + block[: block.index(b"\0")].count(b"\n")
                raise BadInput("a binary file: it holds NUL bytes", hint="give a text file", where=f"{path}:{line}")
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line = lines + error.object[: error.start].count(b"\n")
                raise BadInput(
                    f"not UTF-8: byte 0x{error.object[error.start]:02x}",
                    hint="convert it, for example from Latin-1: iconv -f LATIN1 -t UTF-8", where=f"{path}:{line}",
                ) from error  # fmt: skip
            yield text
            if not block:
                return
            lines += text.count("\n")
            block = file.read(_BLOCK_BYTES)


def tokenise(folder: str | Path, text: str) -> list[int]:
    """Return the token ids of a text by the tokenizer of a model folder, without special tokens.

    tokenizer.json is read by the `tokenizers` library alone; other tokenizers go through transformers. Long texts are
    cut at line ends into pieces of about 256 thousand characters, so memory stays near the size of the text.

    Raises:
        BadInput: the folder has no tokenizer that can be loaded.
    """
    folder = Path(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return [i for piece in _pieces(text) for i in tokenizer.encode(piece, add_special_tokens=False).ids]
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise plain Exceptions for files they cannot read
        raise BadInput(
            f"the tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}",
            hint="put the model's tokenizer.json into the folder", where=str(folder),
        ) from error  # fmt: skip
    return [i for piece in _pieces(text) for i in slow(piece, add_special_tokens=False)["input_ids"]]


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _PIECE_CHARACTERS) + 1 or len(text)
        yield text[start:stop]
        start = stop


def overlap_ratio(held_out: str, calibration: str) -> float:
    """Return the share of the held-out text that also stands in the calibration text, 0..1.

    Counted in runs of 13 words of the held-out text, end to end: a run counts as shared if it stands anywhere in the
    calibration text, white space aside. Runs of one repeated word do not count. Shorter texts are compared whole.
    """
    words = held_out.split()
    length = min(SHINGLE_WORDS, len(words))
    if not length:
        return 0.0
    runs = [tuple(words[i : i + length]) for i in range(0, len(words) - length + 1, length)]
    telling = [hash(run) for run in runs if length == 1 or len(set(run)) > 1]
    if not telling:
        return 0.0
    wanted = set(telling)
    other = calibration.split()
    shared = {h for i in range(len(other) - length + 1) if (h := hash(tuple(other[i : i + length]))) in wanted}
    return sum(h in shared for h in telling) / len(telling)
