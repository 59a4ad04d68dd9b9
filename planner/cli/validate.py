"""`leanplan validate [FILE]`: is a spec right, and is all it names there; or is a machine one; nothing is run."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "check a spec and the files it names, or the description of a machine, and print what was understood; nothing is run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec",
        nargs="?",
        default="leanplan.yaml",
        help="spec or machine file, or - for a spec on stdin (default leanplan.yaml)",
    )


def output() -> Any:
    from knowledge_base.types import Hardware
    from planner import schemas

    return [{"spec": schemas.spec(), "remarks": list[str]}, {"machine": Hardware, "remarks": list[str]}]


def run(options: argparse.Namespace) -> int:
    from planner import machine_file
    from planner import spec as specs
    from planner.cli._talk import emit, say

    node = specs.read(options.spec)
    if machine_file.is_machine(node) or machine_file.is_profile(node):
        return _machine(options)
    spec = specs.spec_of(node, specs.folder_of(options.spec))
    remarks = specs.check_files(spec, node)
    for remark in remarks:
        say(remark, quiet=options.quiet)
    emit(options, {"spec": specs.as_mapping(spec), "remarks": remarks}, specs.as_yaml(spec))
    return 0


def _machine(options: argparse.Namespace) -> int:
    from pathlib import Path

    from planner import machine_file
    from planner.cli._talk import emit, say
    from planner.cli.show import outline
    from planner.machine import from_file

    found = from_file(Path(options.spec))
    remarks = machine_file.remarks(found)
    for remark in remarks:
        say(remark, quiet=options.quiet)
    emit(options, {"machine": found, "remarks": remarks}, outline(found))
    return 0
