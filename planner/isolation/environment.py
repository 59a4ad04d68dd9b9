"""What a candidate may see of the planner's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from knowledge_base.engines import _environment
from knowledge_base.field import overlay

# An allow-list: tokens, keys, passwords, cloud and CI variables, LD_* and PYTHON* are never named here.
PASSED_ON = (
    "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "USER", "LOGNAME",
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_HOME",
)  # fmt: skip

FIXED = {
    "HF_HUB_OFFLINE": "1",  # fetching is over before a candidate starts
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OPENBLAS_NUM_THREADS": "1",  # numpy must not start threads before the fork
}


def clean_environment(home: Path, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a candidate: the allow-list, offline switches, where knowledge and engines are, `home`.

    HOME and TMPDIR are not the user's: a hub token lies in the user's.
    """
    given = os.environ if given is None else given
    kept = {name: given[name] for name in PASSED_ON if name in given}
    # Candidates of one run share what torch.compile made, and nothing outlives the run.
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(home / "inductor")}
    places = {_environment.VARIABLE: str(_environment.root())}  # told from the user's HOME, which is hidden
    return {**kept, **FIXED, **compiled, **places, **overlay.environment(), "HOME": str(home), "TMPDIR": str(home)}
