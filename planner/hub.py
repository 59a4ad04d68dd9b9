"""Models of the Hugging Face hub: asked for with a short timeout, fetched into the hub's own cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput, EnvironmentProblem

TIMEOUT_S = 8
_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def is_id(text: str) -> bool:
    """Whether a text has the form of a hub id: "name" or "org/name". URLs, paths and flags have not."""
    return bool(_ID.fullmatch(text))


def fetch(
    source: str, *, revision: str | None, offline: bool, weights: bool, allow_pickle: bool, small_files: tuple[str, ...]
) -> Path:
    """Return the snapshot folder of a hub model in the hub's cache, downloading what is missing.

    Args:
        weights: fetch weight files too: safetensors, else with `allow_pickle` .bin.
        offline: look into the cache only; so does HF_HUB_OFFLINE=1.

    Raises:
        BadInput: no such model or revision; EnvironmentProblem: the hub cannot be reached or does not let us in.
    """
    if revision is not None and not _REVISION.fullmatch(revision):
        raise BadInput(
            f"`{revision[:80]}` is not a revision", hint="give a branch, a tag or 40 hex digits", where="model.revision"
        )
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    failure = "network access is switched off"
    if not offline:
        there = _ask_hub(source, revision)
        if not isinstance(there, str):
            wanted = [name for name in there if name in small_files or (name.endswith(".py") and "/" not in name)]
            if weights:
                wanted += _weights(list(there), allow_pickle)
            return Path(snapshot_download(source, revision=revision, allow_patterns=wanted, etag_timeout=TIMEOUT_S))
        failure = there
    try:
        folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
        if (folder / "config.json").exists():
            return folder
        failure += "; its copy in the cache has no config.json"
    except LocalEntryNotFoundError:
        failure += "; not in the cache"
    raise EnvironmentProblem(
        f"{source} is no folder here, and cannot be had from the hub: {failure}",
        hint="give a local folder"
        + (", or allow the network (no --offline, HF_HUB_OFFLINE unset)" if offline else ", or try again later"),
        where="model",
    )


def missing_bytes(source: str, revision: str | None, *, offline: bool, allow_pickle: bool) -> float:
    """Return the bytes of a hub model's weights that are not in the cache yet; 0 where the hub cannot be asked."""
    if offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return 0.0
    there = _ask_hub(source, revision)
    if isinstance(there, str):
        return 0.0  # fetching says why
    wanted = _weights(list(there), allow_pickle)
    return max(0.0, sum(there[name] for name in wanted) - cached_bytes(source))


def cached_bytes(source: str) -> float:
    """Return the bytes of a hub model's files in the cache."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(HF_HUB_CACHE, repo_folder_name(repo_id=source, repo_type="model"), "blobs")
    return float(sum(path.lstat().st_size for path in blobs.glob("*")))


def free_bytes() -> float:
    """Return what is free where the cache is, or will be."""
    import shutil

    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE).absolute()
    return float(shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free)


def _weights(names: list[str], allow_pickle: bool) -> list[str]:
    safe = [name for name in names if re.fullmatch(r"model[^/]*\.safetensors", name)]
    return safe or [name for name in names if allow_pickle and re.fullmatch(r"pytorch_model[^/]*\.(bin|json)", name)]


def _ask_hub(source: str, revision: str | None) -> dict[str, int] | str:
    """Return the names of a hub model's files with their bytes (0: not told), or why the hub cannot be asked. Takes at most TIMEOUT_S.

    Raises:
        EnvironmentProblem: the model is gated or private; BadInput: the hub has no such model or revision.
    """
    import threading

    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    outcome: list[Any] = []

    def ask() -> None:
        try:
            found = HfApi().model_info(source, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
            outcome.append({f.rfilename: f.size or 0 for f in found.siblings or ()})
        except Exception as error:  # every network library has its own; the kinds that matter are told apart below
            outcome.append(error)

    # In a thread, because looking up a host name can hang longer than any timeout of the request.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(TIMEOUT_S)
    answer = outcome[0] if outcome else TimeoutError()
    if isinstance(answer, dict):
        return answer
    status = getattr(getattr(answer, "response", None), "status_code", None)
    if isinstance(answer, GatedRepoError) or status in (401, 403):
        raise EnvironmentProblem(
            f"{source} needs access: it is gated or private, or does not exist",
            hint="ask for access on its page, then log in with `hf auth login`",
            where="model",
        )  # the library's own message is left out: it may hold request headers
    if isinstance(answer, RevisionNotFoundError):
        raise BadInput(
            f"{source} has no revision `{revision}`", hint="check its page on the hub", where="model.revision"
        )
    if isinstance(answer, RepositoryNotFoundError):
        raise BadInput(
            f"the hub has no model {source}", hint="check the spelling, or give a local folder", where="model"
        )
    if isinstance(answer, HfHubHTTPError):
        return f"the hub answered {status}"
    return f"could not reach huggingface.co ({type(answer).__name__})"
