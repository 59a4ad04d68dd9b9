"""A folder of files as a registry: the file is the registration.

The file's name is the entry's name; names starting with `_` are helpers. No list to edit anywhere. A folder that people
may add to is joined by the folders of the same name that they laid over ours (knowledge_base/field/overlay.py).
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import pkgutil
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from knowledge_base.errors import BadInput
from knowledge_base.types import Step


class Folder:
    """The entries of one package folder, imported one at a time and only when asked for.

    Args:
        package: dotted name of the folder.
        noun: what an entry is called in messages.
        required: names every entry must define.
        joined: whether people's own folders may add entries.
    """

    def __init__(self, package: str, noun: str, required: tuple[str, ...], *, joined: bool = False) -> None:
        self.package = package
        self.noun = noun
        self.required = required
        self.joined = joined
        self.folder = package.rpartition(".")[2]
        self._loaded: dict[str, ModuleType] = {}
        self._joining: list[str] = []

    def names(self) -> tuple[str, ...]:
        """Return the entries' names, sorted, without importing them."""
        folder = importlib.import_module(self.package)
        if self.joined:
            self._join(folder)
        return tuple(sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_")))

    def _join(self, package: ModuleType) -> None:
        """Let the package's path hold people's folders as they are now, and forget entries of those that left."""
        from knowledge_base.field.overlay import folders

        wanted = [str(folder / self.folder) for folder in folders() if (folder / self.folder).is_dir()]
        if wanted == self._joining:
            return
        left = [path for path in self._joining if path not in wanted]
        package.__path__ = [*(path for path in package.__path__ if path not in self._joining), *wanted]
        self._joining = wanted
        importlib.invalidate_caches()
        prefix = f"{self.package}."
        for name, module in [(n, m) for n, m in sys.modules.items() if n.startswith(prefix)]:
            if str(Path(module.__file__ or "").parent) in left:
                del sys.modules[name]
                self._loaded.pop(name.removeprefix(prefix), None)

    def get(self, name: str) -> ModuleType:
        """Return one entry's module.

        Raises:
            BadInput: no such entry (with the nearest names), or the entry lacks a required name.
        """
        if name in self._loaded:
            return self._loaded[name]
        known = self.names()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            guess = f" Did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
            raise BadInput(f"unknown {self.noun} `{name}`.{guess}", hint=f"known {self.noun}s: {', '.join(known)}")
        module = self._import(name)
        missing = [attribute for attribute in self.required if not hasattr(module, attribute)]
        if missing:
            raise BadInput(
                f"{self.noun} `{name}` does not define {', '.join(missing)}",
                hint=f"every file in {self.package.replace('.', '/')} defines {', '.join(self.required)}",
                where=str(module.__file__),
            )
        self._loaded[name] = module
        return module

    def _import(self, name: str) -> ModuleType:
        try:
            return importlib.import_module(f"{self.package}.{name}")
        except (Exception, SystemExit) as error:
            place = next((p for folder in self._joining if (p := Path(folder) / f"{name}.py").is_file()), None)
            if place is None:  # ours: a bug
                raise
            lines = [
                frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(place)
            ]
            line = error.lineno if isinstance(error, SyntaxError) else next(reversed(lines), None)
            raise BadInput(
                f"{self.noun} `{name}` cannot be loaded: {type(error).__name__}: {error}",
                hint="correct the file", where=f"{place}:{line or 1}",
            ) from error  # fmt: skip

    def all(self) -> dict[str, ModuleType]:
        """Return every entry, by name."""
        return {name: self.get(name) for name in self.names()}


techniques = Folder(
    "knowledge_base.techniques", "technique", ("TECHNIQUE", "rejects", "rewrite", "execute"), joined=True
)
engines = Folder(
    "knowledge_base.engines", "engine", ("ENGINE", "find", "accepts", "export", "open_artefact"), joined=True
)


def stands(step: Step) -> bool:
    """Return whether a step kept from earlier is still one: its technique is there, with these knobs and settings."""
    try:
        return complete(step) == step
    except BadInput:
        return False


def require_standing(steps: Iterable[Step], *, where: str, hint: str) -> None:
    """Refuse steps of a file that no longer stand.

    Raises:
        BadInput: names the first of them.
    """
    for step in steps:
        if not stands(step):
            raise BadInput(
                f"`{step}` is of another version: its technique or settings have changed", where=where, hint=hint
            )


def complete(step: Step) -> Step:
    """Return a step with every knob set: those not given take their default.

    Raises:
        BadInput: an unknown technique, knob or setting.
    """
    knobs = techniques.get(step.technique).TECHNIQUE.knobs
    for knob, value in step.knobs.items():
        if knob not in knobs:
            raise BadInput(
                f"`{step.technique}` has no knob `{knob}`",
                hint=f"its knobs: {', '.join(knobs) or 'none'}",
                where="steps",
            )
        if value not in (settings := settings_of(step.technique, knob)):
            options = ", ".join(map(str, settings))
            raise BadInput(
                f"`{knob}` of `{step.technique}` cannot be {value!r}", hint=f"one of: {options}", where="steps"
            )
    return Step(step.technique, {**{knob: choice.default for knob, choice in knobs.items()}, **step.knobs})


def settings_of(technique: str, knob: str) -> tuple[Any, ...]:
    """Return every value a knob may have: those the search tries, and those it fits to a budget."""
    module = techniques.get(technique)
    fitted = (values for name, values in getattr(module, "RANGE", {}).values() if name == knob)
    return tuple(dict.fromkeys([*module.TECHNIQUE.knobs[knob].options, *itertools.chain.from_iterable(fitted)]))
