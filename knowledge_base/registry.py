"""A folder of files as a registry: the file is the registration.

The file's name is the entry's name; names starting with `_` are helpers. No list to edit anywhere.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType

from knowledge_base.errors import BadInput
from knowledge_base.types import Step


class Folder:
    """The entries of one package folder, imported one at a time and only when asked for.

    Args:
        package: dotted name of the folder.
        noun: what an entry is called in messages.
        required: names every entry must define.
    """

    def __init__(self, package: str, noun: str, required: tuple[str, ...]) -> None:
        self.package = package
        self.noun = noun
        self.required = required
        self._loaded: dict[str, ModuleType] = {}

    def names(self) -> tuple[str, ...]:
        """Return the entries' names, sorted, without importing them."""
        folder = importlib.import_module(self.package)
        return tuple(sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_")))

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
        module = importlib.import_module(f"{self.package}.{name}")
        missing = [attribute for attribute in self.required if not hasattr(module, attribute)]
        if missing:
            raise BadInput(
                f"{self.noun} `{name}` does not define {', '.join(missing)}",
                hint=f"every file in {self.package.replace('.', '/')} defines {', '.join(self.required)}",
                where=str(module.__file__),
            )
        self._loaded[name] = module
        return module

    def all(self) -> dict[str, ModuleType]:
        """Return every entry, by name."""
        return {name: self.get(name) for name in self.names()}


techniques = Folder("knowledge_base.techniques", "technique", ("TECHNIQUE", "rejects", "rewrite", "execute"))
engines = Folder("knowledge_base.engines", "engine", ("ENGINE", "find", "accepts", "export", "open_artefact"))


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
        if value not in knobs[knob].options:
            options = ", ".join(map(str, knobs[knob].options))
            raise BadInput(
                f"`{knob}` of `{step.technique}` cannot be {value!r}", hint=f"one of: {options}", where="steps"
            )
    return Step(step.technique, {**{knob: choice.default for knob, choice in knobs.items()}, **step.knobs})
