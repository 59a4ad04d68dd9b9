"""Text to tokens and back, as the artefact's own tokenizer files have it. Loads neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 64 << 20
LONGEST_CHARACTER_TOKENS = 4  # UTF-8 bytes; what is no character by then never becomes one


class Texts:
    """The tokenizer of an artefact folder. Without a tokenizer.json only token ids are understood."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _tokenizer(folder / "tokenizer.json")
        self._settings = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
        self.end = self._end_tokens(folder)
        self._template = self._chat_template(folder)

    def tokens(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Return a text's tokens; `special` puts those around it that the model wants around a text.

        Raises:
            ValueError: there is no tokenizer, or the text cannot be encoded.
        """
        if self._tokenizer is None:
            raise ValueError("this artefact has no tokenizer.json, so the prompt must be token ids")
        return tuple(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Return the tokens of a conversation, ready for the model's answer.

        Raises:
            ValueError: there is no chat template, or it does not take these messages.
        """
        import jinja2

        if self._template is None:
            raise ValueError("this model's tokenizer has no chat template; use /v1/completions")
        special = {
            name: _content(self._settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, **{k: v for k, v in special.items() if v is not None}
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template does not take these messages: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError("the model's chat template does not take these messages") from error
        return self.tokens(text, special=False)

    def reading(self) -> Callable[[int], str]:
        """Return a function that takes an answer's tokens one by one and gives the text each completes."""
        return (lambda token: "") if self._tokenizer is None else _Reading(self._tokenizer).read

    def _end_tokens(self, folder: Path) -> frozenset[int]:
        for name in ("generation_config.json", "config.json"):
            found = _read(folder / name).get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            if ids and all(type(token) is int for token in ids):
                return frozenset(ids)
        word = _content(self._settings.get("eos_token"))
        token = self._tokenizer.token_to_id(word) if self._tokenizer and word else None
        return frozenset() if token is None else frozenset([token])

    def _chat_template(self, folder: Path) -> Any:
        given: Any = self._settings.get("chat_template")
        file = folder / "chat_template.jinja"
        if file.is_file() and file.stat().st_size <= MAX_FILE_BYTES:
            given = file.read_text(encoding="utf-8")
        if isinstance(given, list):  # several by name
            named = {str(entry.get("name")): entry.get("template") for entry in given if isinstance(entry, dict)}
            given = named.get("default")
        return _compiled(given) if isinstance(given, str) and given else None


class _Reading:
    """Decodes an answer token by token. A text depends on the tokens before it, and a character may take several.

    Kept are the tokens of the last text given and those that wait for the rest of their character.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._told: list[int] = []
        self._waiting: list[int] = []

    def read(self, token: int) -> str:
        self._waiting.append(token)
        before = self._tokenizer.decode(self._told)
        whole = self._tokenizer.decode(self._told + self._waiting)
        if whole.endswith("\ufffd") and len(self._waiting) < LONGEST_CHARACTER_TOKENS:
            return ""
        self._told, self._waiting = self._waiting, []
        return whole[len(before) :]


def _compiled(template: str) -> Any:
    """Return a chat template ready to render; it comes with the model, so it runs in a sandbox."""
    import datetime

    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(str(message)[:500])

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=False)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json  # jinja2's own escapes for HTML
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    try:
        return environment.from_string(template)
    except jinja2.TemplateError:
        return None


def _tokenizer(path: Path) -> Any:
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object of an artefact; empty where there is none."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return {}
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _content(token: Any) -> str | None:
    """Return a special token's text, which is given bare or in an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
