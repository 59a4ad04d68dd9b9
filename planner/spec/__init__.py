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
from knowledge_base.types import Trace, Workload
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
    "missing_trace",
    "read",
    "rows",
    "schema",
    "spec_of",
    "template",
]

SHIPPED = Path("bundled")  # in place of the path of a text


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

    def placed(name: str, text: TextData) -> TextData:
        if text.data is None:
            return text
        return replace(text, data=_bundled(name) if text.data == SHIPPED else folder / text.data)

    calibration = placed("calibration", spec.calibration) if spec.calibration else None
    if spec.workload.trace:
        spec = replace(spec, workload=_traced(spec.workload, spec.workload.trace, folder, _at(node, "workload")))
    return replace(spec, folder=folder, quality=placed("quality", spec.quality), calibration=calibration)


def _traced(workload: Workload, trace: Trace, folder: Path, node: Node) -> Workload:
    """Return a workload with what its trace says: lengths, their 95th percentiles, and the rate of its requests.

    Where there is no such file, the workload as it is: `check_files` and planning tell of it.
    """
    from planner.load import trace as reading

    path = folder / trace.file
    if not path.is_file():
        return workload
    for name in ("prompt_tokens", "output_tokens", "turns", "shared_prefix"):
        if name in node.content and node.content[name].type != "null":
            raise node.content[name].error(f"workload.{name} beside a trace, which says it", hint="keep one of the two")
    rows = reading.read_trace(path)
    timed = trace.replayed and rows[0].at_s is not None
    lengths = {"prompt_tokens": [r.prompt_tokens for r in rows], "output_tokens": [r.output_tokens for r in rows]}
    found = {name: (reading.quantile(told, 0.5), reading.quantile(told, 0.95)) for name, told in lengths.items()}
    return replace(
        workload,
        trace=replace(trace, requests=len(rows), digest=reading.content_of(rows), replayed=timed),
        requests_per_s=reading.rate_of(rows) if timed else workload.requests_per_s,
        **{name: p50 for name, (p50, _) in found.items()},
        **{f"{name}_p95": p95 for name, (p50, p95) in found.items() if p95 > p50},
    )


def _bundled(name: str) -> Path:
    """Return the text that ships with leanplan for `quality` or `calibration`."""
    from planner.data import bundled

    return bundled({"quality": "heldout", "calibration": "calib"}[name])


def as_mapping(spec: Spec) -> dict[str, Any]:
    """Return a spec as a mapping that `from_mapping` turns back into the same spec, every default written out."""

    def near(name: str, text: TextData | None) -> TextData | None:
        if text is None or text.data is None:
            return text
        if text.data == _bundled(name):
            return replace(text, data=SHIPPED)
        return replace(text, data=text.data.relative_to(spec.folder)) if text.data.is_relative_to(spec.folder) else text

    values = {key.target: getattr(spec, key.target) for key in SPEC.keys}
    values |= {
        "budgets": BudgetsRead(spec.budgets),
        "quality": near("quality", spec.quality),
        "calibration": near("calibration", spec.calibration),
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
        BadInput: the folder of model or draft has no config.json, the source is neither a folder nor a hub id, a text file or
            the trace is missing, or the machine is neither in the catalogue nor a saved profile; with the place in the spec.
    """
    remarks = [
        _check_model(spec, what, ref.source, _at(node, what, "source"))
        for what, ref in (("model", spec.model), ("draft", spec.draft))
        if ref is not None
    ]
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
    if trace := spec.workload.trace:
        if not trace.digest:
            raise missing_trace(trace, _at(node, "workload", "trace"))
        remarks.append(f"trace: {trace.requests:,} requests of {spec.path(trace.file)}")
    if spec.hardware != "local":
        from planner.machine import find

        try:
            find(spec.hardware, Path())
        except BadInput as error:
            raise _at(node, "hardware").error(error.message, hint=error.hint) from error
        remarks.append(f"hardware: {spec.hardware}, not this machine: plans are predicted, not measured")
    return remarks


def missing_trace(trace: Trace, at: Node | None = None) -> BadInput:
    """Return what is to say of a trace that is not there."""
    message, hint = (
        f"workload.trace: {units.quote(trace.file, 400)} is not a file",
        "its path is told from the spec's folder",
    )
    return at.error(message, hint=hint) if at else BadInput(message, hint=hint, where="workload.trace")


def _check_model(spec: Spec, what: str, source: str, at: Node) -> str:
    for folder in (spec.path(source), Path(source)):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise at.error(
                    f"no config.json in {units.quote(source, 400)}",
                    hint="a model folder has config.json, *.safetensors, tokenizer.json",
                )
            return f"{what}: folder {folder}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?", source):
        raise at.error(
            f"{units.quote(source)} is not a folder here, nor a hub id",
            hint="give a folder with config.json, or an id like org/name",
        )
    return f"{what}: hub id {source} (no such folder beside the spec), fetched when it is needed"


def _at(node: Node, *path: str) -> Node:
    """Return the node of a path, or the nearest above it that there is."""
    for step in path:
        if node.type != "mapping" or step not in node.content:
            return node
        node = node.content[step]
    return node
