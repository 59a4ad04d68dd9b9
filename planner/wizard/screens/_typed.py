"""What typed lines have in common: a word of a table and its value, a number for a row, the path of a file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knowledge_base import units
from knowledge_base.errors import BadInput
from planner import spec as specs
from planner.wizard.answers import Answers
from planner.wizard.screens._screen import View


def setting_rows(view: View, keys: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return (word, value, what it is) for keys of the spec, as the spec's own table tells them."""
    written = specs.as_mapping(view.answers.parsed)
    about = {key: (meaning, absent) for key, meaning, _, absent in specs.rows()}
    rows = []
    for word, key in keys.items():
        value: Any = written
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        meaning, absent = about[key]
        rows.append((word, absent if value is None else _shown(value), meaning))
    return rows


def _shown(value: Any) -> str:
    return f"{value['p50']} (p95 {value['p95']})" if isinstance(value, dict) else str(value)


def changed(view: View, text: str, keys: Mapping[str, str]) -> Answers:
    """Return the answers after a line such as `time 10 min`: a word of `keys` and a value, or `none`."""
    word, _, value = text.partition(" ")
    if word not in keys:
        raise unknown(word, keys)
    if not value.strip():
        raise BadInput(f"`{word}` needs a value", hint=f"type for example `{word} {_example(keys[word])}`")
    return view.answers.with_key(keys[word], _value(value.strip()))


def _value(text: str) -> Any:
    if text in ("none", "default"):
        return None
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else text


def _example(key: str) -> str:
    choice = next(may_be for name, _, may_be, _ in specs.rows() if name == key)
    return choice.partition("e.g. ")[2].partition(",")[0] or {"workload.prompt_tokens": "2048"}.get(key, "8")


def unknown(word: str, known: Sequence[str] | Mapping[str, Any]) -> BadInput:
    """Return the refusal of a word, with the nearest of those that are known."""
    near = difflib.get_close_matches(word, list(known), n=1)
    guess = f"; did you mean `{near[0]}`?" if near else ""
    return BadInput(f"{units.quote(word)} is not known here{guess}", hint=f"type one of: {', '.join(known)}")


def numbered(text: str, options: Sequence[str]) -> str:
    """Return the option of that number, or the text itself."""
    return options[int(text) - 1] if re.fullmatch(r"[0-9]{1,3}", text) and 1 <= int(text) <= len(options) else text


def path_of(text: str) -> Path:
    """Return a typed path with `~` filled in.

    Raises:
        BadInput: no such user's home.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise BadInput(f"{units.quote(text)}: no such home folder", hint="type the whole path") from error


def is_file(path: Path) -> bool:
    """Whether there is such a file; any path may be asked, also one too long for the system."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; any path may be asked, also one too long for the system."""
    try:
        return path.is_dir()
    except OSError:
        return False
