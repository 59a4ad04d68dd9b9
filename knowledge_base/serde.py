"""Values to JSON and back without loss, and the content digest that keys caches and names plans."""

from __future__ import annotations

import dataclasses
import enum
import errno
import hashlib
import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Metadata of a dataclass field that is left out of the JSON while it has its default, so that the digests of values
# from before there was such a field hold.
UNSAID: Mapping[str, Any] = types.MappingProxyType({"unsaid": True})


def plain(value: Any) -> Any:
    """Return `value` as JSON types: dataclasses and mappings to dicts, sets to sorted lists, tuples to lists.

    Raises:
        ValueError: a number is not finite; TypeError: a type JSON cannot hold.
    """
    if value is None or isinstance(value, bool | int | str):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"not a finite number: {value}")
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        there = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: plain(v) for f, v in there if not (f.metadata.get("unsaid") and v == f.default)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no JSON form for {type(value).__name__}")


def canonical(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def restore(cls: Any, data: Any) -> Any:
    """Return `data` (JSON types) as `cls`: a dataclass, tuple, mapping, optional or plain type.

    Raises:
        ValueError: an unknown or missing field, or a value of another type; names the field.
    """
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin in (types.UnionType, typing.Union):
        if data is None:
            return None
        return restore(next(a for a in args if a is not type(None)), data)
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        if not isinstance(data, Mapping):
            raise ValueError(f"{cls.__name__}: expected an object, got {type(data).__name__}")
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        if extra := set(data) - known:
            raise ValueError(f"{cls.__name__}: unknown field {', '.join(sorted(extra))}")
        try:
            return cls(**{name: restore(hints[name], value) for name, value in data.items()})
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error
    if origin is tuple:
        item = args[0] if args else Any
        return tuple(restore(item, v) for v in data)
    if origin in (frozenset, set):
        return origin(data)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {k: restore(args[1], v) for k, v in data.items()}
    if cls is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if cls in (int, float, str, bool) and (not isinstance(data, cls) or (cls is int and isinstance(data, bool))):
        raise ValueError(f"expected {cls.__name__}, got {data!r}")
    return data


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a whole file or nothing: temporary file in the same folder, flush, fsync, rename, fsync the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            error.filename = str(path)  # a full disk does not say which file it had no room for
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomic(path, json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
