"""Where a model is: its folder, the files that make it, the tensors their headers tell, and the digest of it all."""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from knowledge_base.errors import BadInput
from knowledge_base.serde import digest
from planner import hub
from planner._safetensors_header import Stored, non_finite, read_header
from planner.config_facts import LONGEST_CONFIG_BYTES, read_json

WHOLE_DIGEST_BYTES = 256 * 2**20  # larger weight files are sampled

# What a model is made of, besides its weights; everything here counts in the digest.
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "vocab.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "model.safetensors.index.json",
)  # fmt: skip


def check_finite(folder: Path) -> None:
    """Refuse weights with NaN or infinite values. Files are streamed; memory stays flat.

    Raises:
        BadInput: names the first such tensors and counts their values.
    """
    bad = [entry for path in _weight_files(Path(folder)) for entry in non_finite(path)]
    if bad:
        shown = ", ".join(
            f"tensor `{name}` has {count} non-finite value{'s' if count > 1 else ''}" for name, count in bad[:3]
        )
        more = f", and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
        raise BadInput(
            shown + more, hint="the checkpoint is damaged or training diverged; use another one", where=str(folder)
        )


def _local(source: str) -> Path | None:
    """Return the file or folder of that name, or None; any text may be asked."""
    try:
        path = Path(source).expanduser()
        return path if source and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, no such user's home
        return None


def locate(
    source: str, revision: str | None, offline: bool, weights: str, allow_pickle: bool, notes: list[str]
) -> tuple[Path, Path, str, str | None]:
    """Return (folder, config file, name, commit)."""
    path = _local(source)
    if path is not None and path.is_file() and path.suffix == ".json" and weights == "optional":
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return path.parent, path, name, None
    if path is not None and path.is_dir():
        config_file = path / "config.json"
        if not config_file.exists():
            adapter = (path / "adapter_config.json").exists()
            raise BadInput(
                "an adapter, not a whole model" if adapter else f"no config.json in {path}",
                hint="merge the adapter into its base model first" if adapter
                else "a model folder has config.json, *.safetensors and tokenizer.json",
                where=str(path),
            )  # fmt: skip
        if hub.is_id(source) and "/" in source:
            notes.append(f"`{source}` is a local folder; a hub model of that name is not looked for")
        return path, config_file, path.resolve().name, None
    if not hub.is_id(source):
        raise BadInput(
            f"`{source[:200]}` is not a model folder or a model id",
            hint="give a folder that exists, or a hub id such as org/name",
            where="model",
        )
    folder = hub.fetch(
        source,
        revision=revision,
        offline=offline,
        weights=weights == "required",
        allow_pickle=allow_pickle,
        small_files=_SMALL_FILES,
    )
    return folder, folder / "config.json", source.split("/")[-1], folder.name


def files_of(folder: Path, config_file: Path) -> list[Path]:
    """Return the files that make the model, each regular and inside the folder."""
    names = [folder / name for name in _SMALL_FILES if name != "config.json"]
    found = [config_file, *names, *folder.glob("*.py"), *_weight_files(folder), *folder.glob("pytorch_model*.bin")]
    # The hub's cache keeps contents in blobs/ beside snapshots/; links inside one model's cache are its own.
    inside = folder.resolve()
    if inside.parent.name == "snapshots" and (inside.parent.parent / "blobs").is_dir():
        inside = inside.parent.parent
    files = []
    for path in dict.fromkeys(found):
        if not path.exists() and not path.is_symlink():
            continue
        target = path.resolve()
        if not target.is_relative_to(inside):
            raise BadInput(
                f"refusing to follow a link out of {folder}", hint="copy the file into the folder", where=str(path)
            )
        if not target.exists() or not stat.S_ISREG(target.stat().st_mode):
            raise BadInput("not a regular file", hint="download or copy the file again", where=str(path))
        files.append(path)
    return files


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files transformers would load: model.safetensors, else the shards of the index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or single.is_symlink() or not index.exists():
        return [single] if single.exists() or single.is_symlink() else []
    return [folder / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    facts = read_json(index, LONGEST_CONFIG_BYTES * 32)
    mapping = facts.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise BadInput("no weight_map in it", hint="download the file again", where=str(index))
    for file in set(mapping.values()):
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors", file):
            raise BadInput(
                f"`{str(file)[:80]}` is not the name of a weight file", hint="download the file again", where=str(index)
            )
    return mapping


def tensors_of(folder: Path) -> dict[str, Stored] | None:
    """Return every tensor of the folder's safetensors by name, or None where there are none."""
    files = _weight_files(folder)
    if not files:
        return None
    tensors: dict[str, Stored] = {}
    for path in files:
        if not path.exists():
            raise BadInput(
                "named by model.safetensors.index.json, but missing", hint="download the model again", where=str(path)
            )
        found = read_header(path)
        if twice := found.keys() & tensors.keys():
            raise BadInput(f"tensor `{min(twice)}` is in two files", hint="download the model again", where=str(path))
        tensors |= found
    if len(files) > 1 or files[0].name != "model.safetensors":
        listed = _weight_map(folder / "model.safetensors.index.json")
        if missing := sorted(listed.keys() - tensors.keys()):
            raise BadInput(
                listing(missing, "missing from the shards"), hint="download the model again", where=str(folder)
            )
    if not tensors:
        raise BadInput("no tensors in it", hint="download the model again", where=str(files[0]))
    return tensors


def content_digest(files: Iterable[Path], config_file: Path) -> str:
    """Return a SHA-256 over the names and contents of a model's files; folder and dates do not count.

    Files up to 256 MiB are read whole. Of a larger one, its size, its first MiB (where a safetensors header begins) and
    64 blocks of 64 KiB spread over it are read: a copy cut short, converted or of another model is noticed, a change of
    single weights between the blocks is not.
    """
    contents = {}
    for path in files:
        size = path.stat().st_size
        name = "config.json" if path == config_file else path.name
        with path.open("rb") as file:
            if size <= WHOLE_DIGEST_BYTES:
                contents[name] = hashlib.file_digest(file, "sha256").hexdigest()
                continue
            sample = hashlib.sha256(str(size).encode())
            sample.update(file.read(2**20))
            for block in range(64):
                file.seek(block * (size - 65536) // 63)
                sample.update(file.read(65536))
            contents[name] = f"sampled:{sample.hexdigest()}"
    return digest(contents)


def listing(names: Sequence[str], what: str) -> str:
    shown = ", ".join(name[:120] for name in names[:2]) + (", …" if names[2:] else "")
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} {what} ({shown})"
