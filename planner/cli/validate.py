"""`leanplan validate [SPEC]`: is the spec right, and is all it names there; nothing is run."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "check a spec and the files it names, and print it with every default written out; nothing is run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec", nargs="?", default="leanplan.yaml", help="spec file, or - for stdin (default leanplan.yaml)"
    )


def output() -> Any:
    from planner import schemas

    return {"spec": schemas.spec(), "remarks": list[str]}


def run(options: argparse.Namespace) -> int:
    from planner import spec as specs
    from planner.cli._talk import emit, say

    node = specs.read(options.spec)
    spec = specs.spec_of(node, specs.folder_of(options.spec))
    remarks = specs.check_files(spec, node)
    for remark in remarks:
        say(remark, quiet=options.quiet)
    emit(options, {"spec": specs.as_mapping(spec), "remarks": remarks}, specs.as_yaml(spec))
    return 0
