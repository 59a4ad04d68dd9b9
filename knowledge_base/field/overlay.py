"""Folders of a person's own knowledge, laid over ours: found, checked, and refused or left out as a whole.

A folder is named in LEANPLAN_KNOWLEDGE (or with --knowledge), several with `:` between them, or belongs to an installed
package that names itself as an entry point of the group `leanplan.knowledge`. It holds files that are called like ours:

    taxonomy.csv methods/*.yaml evidence.csv evidence_metrics.csv papers.csv …   knowledge_base/data/field
    composition_rules.csv devices.csv electricity_prices.csv grid_carbon.csv     knowledge_base/data
    efficiencies.csv engine_overheads.csv engine_memory.csv host_links.csv
    techniques/*.py engines/*.py                                                 code that Leanplan runs

Python files are code, run with the rights of whoever starts Leanplan. That is why no folder is ever looked for: only
those that a person named, or installed, are read.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from knowledge_base.errors import BadInput
from knowledge_base.field.records import REPLACES, Record, is_number, lay, rows
from knowledge_base.units import quote

VARIABLE = "LEANPLAN_KNOWLEDGE"
IGNORE = "LEANPLAN_IGNORE_DAMAGED_KNOWLEDGE"
GROUP = "leanplan.knowledge"
DATA = Path(__file__).resolve().parent.parent / "data"
TABLES = {  # how many columns, from the first, name a row
    "devices.csv": 1, "electricity_prices.csv": 1, "grid_carbon.csv": 1, "efficiencies.csv": 4, "engine_overheads.csv": 2,
    "engine_memory.csv": 3, "host_links.csv": 1,
}  # fmt: skip
_UNSIGNED = re.compile(r"_(bytes|per_s|per_h|per_kwh|w|s|ratio|sd|value|tokens)$|^cores$")
_ZERO_TOO = re.compile(r"price|_per_kwh$|idle_w$|^(kernel|step)_s$|^runtime_bytes$|^(tied|copies)_ratio$|sd$")
RULES = "composition_rules.csv"
CODE = ("techniques", "engines")

_trying: tuple[Path, ...] | None = None  # what counts as laid over while a folder is being checked


def folders() -> tuple[Path, ...]:
    """Return the folders laid over ours, the last on top, each checked when first asked for.

    Raises:
        BadInput: a folder is damaged and was not asked to be left out; with file and line.
    """
    if _trying is not None:
        return _trying
    return _folders(os.environ.get(VARIABLE, ""), _ignoring())


def files(name: str) -> tuple[tuple[Path, str], ...]:
    """Return one file of every folder that has it, each with the name that complaints call it by."""
    return tuple((folder / name, str(folder / name)) for folder in folders() if (folder / name).exists())


def table(name: str) -> tuple[dict[str, str], ...]:
    """Return the rows of one CSV file of knowledge_base/data, with those of a person's folders."""
    return _table(name, files(name) if name in TABLES else ())


def take(checked: tuple[Path, ...]) -> None:
    """Lay folders over ours as they are: whoever started this process checked them, with packages that it need not have."""
    global _trying
    _trying = checked


def environment() -> dict[str, str]:
    """Return the variables with which another process knows what this one does."""
    found = {VARIABLE: os.pathsep.join(map(str, folders()))} if folders() else {}
    return {**found, IGNORE: "1"} if _ignoring() else found


def _ignoring() -> bool:
    return os.environ.get(IGNORE, "") not in ("", "0", "false")


@lru_cache(maxsize=8)
def _folders(named: str, ignoring: bool) -> tuple[Path, ...]:
    kept: tuple[Path, ...] = ()
    for find in _sources(named):
        try:
            folder = find()
            if folder not in kept:
                _check(folder, kept)
                kept = (*kept, folder)
        except BadInput as error:
            if not ignoring:
                raise BadInput(
                    error.message, hint=f"{error.hint}; or leave its folder out: --ignore-damaged-knowledge",
                    where=error.where,
                ) from error  # fmt: skip
            place = f"{error.where}: " if error.where else ""
            logging.getLogger("leanplan").warning(
                "".join(c if c.isprintable() else "?" for c in f"{place}{error.message}; its folder is left out")
            )
    return kept


def _sources(named: str) -> Iterator[Callable[[], Path]]:
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        yield partial(_installed, point)
    for path in filter(None, named.split(os.pathsep)):
        yield partial(_named, path)


def _named(path: str) -> Path:
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise BadInput(f"no folder {quote(path)}", hint="correct --knowledge", where=VARIABLE)
    return folder


def _installed(point: EntryPoint) -> Path:
    try:
        spec = find_spec(point.value)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"{quote(point.value)} is no package", hint=f"correct the entry point {quote(point.name)}", where=GROUP
        )
    return Path(spec.submodule_search_locations[0]).resolve()


# ---------------------------------------------------------------- checking


def _check(folder: Path, below: tuple[Path, ...]) -> None:
    """Refuse a folder that could not be used as a whole: read everything in it, as it would lie over what is below."""
    from knowledge_base import rules
    from knowledge_base.field import OURS, load
    from knowledge_base.field.checking import techniques_of
    from knowledge_base.registry import engines, techniques

    _layout(folder)
    with _laid(below):
        taken = {kind.package: kind.names() for kind in (techniques, engines)}
    with _laid((*below, folder)):
        known = load((OURS, *below, folder))
        for name in TABLES:
            table(name)
        for kind in (techniques, engines):
            for path in sorted(folder.glob(f"{kind.folder}/[!_]*.py")):
                if path.stem in taken[kind.package]:
                    raise BadInput(
                        f"there is a {kind.noun} `{path.stem}` already", hint="give the file another name",
                        where=str(path),
                    )  # fmt: skip
                kind.get(path.stem)
        for problem in techniques_of(known):
            raise problem
        rules.composition()


def _layout(folder: Path) -> None:
    """Refuse a file that would not be read: most likely its name is misspelt."""
    from knowledge_base.field.reading import KINDS

    known = sorted({kind.files for kind in KINDS.values()} | {*TABLES, RULES} | {f"{code}/*.py" for code in CODE})
    read = {path for pattern in known for path in folder.glob(pattern)}
    there = (*folder.glob("*"), *folder.glob("*/*"))  # as deep as patterns go, also where the folder is somebody's home
    for path in sorted(p for p in there if not p.is_dir()):
        inside = path.relative_to(folder)
        if any(part.startswith((".", "_")) for part in inside.parts):
            continue
        if not path.is_file():
            raise BadInput(
                f"{quote(str(inside))} is not a plain file", hint="put a text file in its place", where=str(path)
            )
        if path not in read and path.suffix != ".md":
            raise BadInput(
                f"{quote(str(inside))} is no file of knowledge", hint=f"known are {', '.join(known)}, *.md",
                where=str(path),
            )  # fmt: skip


@contextmanager
def _laid(folders: tuple[Path, ...]) -> Iterator[None]:
    """Let these folders be the ones laid over ours."""
    global _trying
    before, _trying = _trying, folders
    try:
        yield
    finally:
        _trying = before


@lru_cache(maxsize=16)
def _table(name: str, more: tuple[tuple[Path, str], ...]) -> tuple[dict[str, str], ...]:
    ours = tuple(rows(DATA / name, name))
    if not more:
        return tuple(record.cells for record in ours)
    columns = tuple(ours[0].cells)
    theirs = [tuple(rows(path, called, columns, (REPLACES,))) for path, called in more]
    for record in (record for layer in theirs for record in layer):
        for column in columns:
            if all(is_number(row.cells[column]) for row in ours if row.cells[column]):
                _in_range(record, column)
    found = lay((ours, *theirs), key=columns[0], beside=columns[1 : TABLES[name]])
    return tuple({column: record.cells[column] for column in columns} for record in found.values())


def _in_range(record: Record, column: str) -> None:
    """Refuse what is no number, and a size, rate, time or price below what it can be."""
    number = record.number(column)
    if number is None or not _UNSIGNED.search(column):
        return
    if number < 0 or (number == 0 and not _ZERO_TOO.search(column)):
        raise record.error(
            f"`{column}` is {number:g}", hint="a positive number, or nothing where it is not known", key=column
        )
