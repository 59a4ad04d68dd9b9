"""The spec: what to fit to which budgets, on which machine, and how hard to try.

values.py says what a spec holds, kinds.py and table.py how each key is read, showing.py how it is shown to people.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from knowledge_base import units
from knowledge_base.errors import BadInput
from planner import _yaml
from planner._yaml import Node
from planner.spec.kinds import BudgetsRead, example_limit, labels
from planner.spec.showing import rows, template
from planner.spec.table import SPEC
from planner.spec.values import (
    DEFAULT_OBJECTIVES,
    Check,
    Limits,
    ModelRef,
    Prices,
    SearchEffort,
    Spec,
    TechniqueFilter,
    TextData,
)

__all__ = [
    "DEFAULT_OBJECTIVES",
    "SPEC",
    "Check",
    "Limits",
    "ModelRef",
    "Prices",
    "SearchEffort",
    "Spec",
    "TechniqueFilter",
    "TextData",
    "as_mapping",
    "as_yaml",
    "check_files",
    "example_limit",
    "folder_of",
    "from_mapping",
    "labels",
    "load",
    "read",
    "rows",
    "schema",
    "spec_of",
    "template",
]


def load(source: str | Path, *, stdin: BinaryIO | None = None) -> Spec:
    """Return the spec of a file (.yaml, .toml, pyproject.toml with [tool.leanplan]) or of standard input (`-`).

    Raises:
        BadInput: it cannot be read, is malformed, or says something a spec cannot; with file, line and column.
    """
    return spec_of(read(source, stdin=stdin), folder_of(source))


def folder_of(source: str | Path) -> Path:
    """Return the folder a spec's relative paths are told from: its own; for standard input the current one."""
    return Path.cwd() if str(source) == "-" else Path(source).resolve().parent


def read(source: str | Path, *, stdin: BinaryIO | None = None) -> Node:
    """Return a spec file as nodes that know their places; see `load`."""
    data, name = _yaml.read_bytes(source, stdin)
    text = _yaml.decode(data, name)
    if Path(name).name == "pyproject.toml":
        return _yaml.parse_toml(text, name, table=("tool", "leanplan"))
    return _yaml.parse_toml(text, name) if name.endswith(".toml") else _yaml.parse_yaml(text, name)


def from_mapping(data: Mapping[str, Any], folder: str | Path | None = None) -> Spec:
    """Return the spec of a Python mapping with a spec file's keys: quantities as text, counts as numbers.

    Args:
        folder: what relative paths are told from; the current folder if None.

    Raises:
        BadInput: as `load`, with the key in place of the line.

    >>> from_mapping({"model": "models/tiny-lm", "budgets": {"ttft_p95": "50 ms"}}).budgets[0].value
    0.05
    """
    return spec_of(_yaml.from_python(data), Path(folder or ".").resolve())


def spec_of(node: Node, folder: Path) -> Spec:
    """Return the spec that nodes describe; `folder` is absolute."""
    version = _at(node, "version")
    if version is not node and re.fullmatch(r"[0-9]+", str(version.content)) and version.content != "1":
        raise version.error(
            f"version {version.content} of the spec format is not known here",
            hint="write version: 1, or upgrade leanplan",
        )
    spec: Spec = SPEC.read(node)

    def placed(text: TextData) -> TextData:
        return replace(text, data=folder / text.data) if text.data else text

    calibration = placed(spec.calibration) if spec.calibration else None
    return replace(spec, folder=folder, quality=placed(spec.quality), calibration=calibration)


def as_mapping(spec: Spec) -> dict[str, Any]:
    """Return a spec as a mapping that `from_mapping` turns back into the same spec, every default written out."""

    def near(text: TextData | None) -> TextData | None:
        if text is None or text.data is None or not text.data.is_relative_to(spec.folder):
            return text
        return replace(text, data=text.data.relative_to(spec.folder))

    values = {key.target: getattr(spec, key.target) for key in SPEC.keys}
    values |= {
        "budgets": BudgetsRead(spec.budgets),
        "quality": near(spec.quality),
        "calibration": near(spec.calibration),
    }
    written = {
        key.name: key.kind.write(values[key.target]) for key in SPEC.keys if values[key.target] not in (None, ())
    }
    return {name: value for name, value in written.items() if value != {}}


def as_yaml(spec: Spec) -> str:
    """Return a spec as YAML with every default written out; `load` of it, in the same folder, gives the same spec."""
    return _yaml.write_yaml(as_mapping(spec))


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a spec, for editors and for checking specs without leanplan."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "leanplan spec", **SPEC.schema()}


def check_files(spec: Spec, node: Node) -> list[str]:
    """Return remarks on what a spec refers to, without running anything or touching the network.

    Raises:
        BadInput: the model folder has no config.json, the source is neither a folder nor a hub id, a text file is
            missing, or the machine is neither in the catalogue nor a saved profile; with the place in the spec.
    """
    remarks = [_check_model(spec, _at(node, "model", "source"))]
    for name, text in (("quality", spec.quality), ("calibration", spec.calibration)):
        if text is None or text.data is None:
            continue
        at = _at(node, name, "data")
        if at is node:  # written beside a budget
            at = next((d for b in _at(node, "budgets").content.values() if (d := _at(b, "data")) is not b), node)
        if not text.data.is_file():
            what = "is a folder" if text.data.is_dir() else "not found"
            raise at.error(
                f"{name}.data: {units.quote(str(text.data), 400)} {what}",
                hint="give the path of a text file, from the spec's folder",
            )
        remarks.append(f"{name} text: {text.data}")
    if spec.hardware != "local":
        from planner.machine import find

        try:
            find(spec.hardware, Path())
        except BadInput as error:
            raise _at(node, "hardware").error(error.message, hint=error.hint) from error
        remarks.append(f"hardware: {spec.hardware}, not this machine: plans are predicted, not measured")
    return remarks


def _check_model(spec: Spec, at: Node) -> str:
    source = spec.model.source
    for folder in (spec.path(source), Path(source)):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise at.error(
                    f"no config.json in {units.quote(source, 400)}",
                    hint="a model folder has config.json, *.safetensors, tokenizer.json",
                )
            return f"model: folder {folder}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?", source):
        raise at.error(
            f"{units.quote(source)} is not a folder here, nor a hub id",
            hint="give a folder with config.json, or an id like org/name",
        )
    return f"model: hub id {source} (no such folder beside the spec), fetched when it is needed"


def _at(node: Node, *path: str) -> Node:
    """Return the node of a path, or the nearest above it that there is."""
    for step in path:
        if node.type != "mapping" or step not in node.content:
            return node
        node = node.content[step]
    return node
