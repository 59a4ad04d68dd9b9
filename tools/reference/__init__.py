"""The reference pages of docs/, made from the code while mkdocs builds the site; nothing generated is committed.

mkdocs calls `on_files` (mkdocs.yml: hooks). A page is a function of this package that returns Markdown; what it says
comes from the parser, the table of spec keys, the registries, the data files and the docstrings, so it cannot be out of
date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# mkdocs loads this file by its path, as a module outside any package: nothing here can be imported relatively.
from tools.reference import command_line, interfaces, known, measuring, predictions, technique_pages

PAGES: dict[str, Callable[[], str]] = {
    "commands": command_line.commands, "spec": command_line.spec, "exit-codes": command_line.exit_codes,
    "metrics": measuring.metrics, "techniques": technique_pages.techniques, "composition": known.composition,
    "engines": known.engines, "cost-terms": predictions.cost_terms, "protocols": measuring.protocols,
    "solvers": measuring.solvers, "catalogue": predictions.catalogue, "knowledge": known.knowledge,
    "survey": known.survey, "papers": known.papers, "environment": command_line.environment,
    "files": interfaces.files, "python": interfaces.python, "accuracy": predictions.accuracy,
}  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to mkdocs' files; those of single techniques are found through the page of all."""
    from mkdocs.structure.files import File, InclusionLevel

    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    for name, text in technique_pages.each().items():
        path = f"reference/techniques/{name}.md"
        files.append(File.generated(config, path, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files
