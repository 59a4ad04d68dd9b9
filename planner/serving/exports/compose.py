"""Docker Compose: a container that runs `leanplan serve`, confined, with a health check."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from planner.serving.exports import ARTEFACT, MIB, Deployment

SUMMARY = "compose.yaml and the Dockerfile of its image"
USER = "65532:65532"  # nobody in particular; needs nothing but to read the artefact
INSIDE = 8000
PYTHON = ".".join(map(str, sys.version_info[:2]))
COMPILER = "RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*"
REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9._!-]+")
HEALTH = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/health', timeout=5)"


def refuses(deployment: Deployment) -> str | None:
    return None


def copies(deployment: Deployment) -> Mapping[str, str]:
    return {name: f"{ARTEFACT}/{name}" for name in (*deployment.manifest["files"], "leanplan.json")}


def files(deployment: Deployment) -> dict[str, str]:
    return {"compose.yaml": _compose(deployment), "Dockerfile": _dockerfile(deployment)}


def _compose(deployment: Deployment) -> str:
    import yaml

    health = ["CMD", "python", "-c", HEALTH.format(port=INSIDE)]
    command = [
        "serve", "/artefact", "--host", "0.0.0.0", "--port", str(INSIDE), "--name", deployment.model,
        "--context-tokens", str(deployment.context_tokens), "--drain", f"{deployment.drain_s:g} s",
    ]  # fmt: skip
    service: dict[str, Any] = {
        "build": ".",
        "command": [_literal(word) for word in command],
        "ports": [f"{_bracketed(deployment.host)}:{deployment.port}:{INSIDE}"],
        "volumes": [{"type": "bind", "source": f"./{ARTEFACT}", "target": "/artefact", "read_only": True}],
        "healthcheck": {
            "test": health, "interval": "10s", "timeout": "6s", "retries": 3, "start_period": "10m", "start_interval": "2s",
        },
        "restart": "unless-stopped",
        "stop_grace_period": f"{round(deployment.drain_s) + 15}s",
        "user": USER,
        "init": True,
        "read_only": True,
        "tmpfs": ["/tmp:exec" if "compile" in deployment.runtime else "/tmp"],  # compiled code is loaded from there
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "pids_limit": 512,
    }  # fmt: skip
    if limit := deployment.memory_limit_bytes:
        service |= {"mem_limit": f"{limit // MIB}m", "memswap_limit": f"{limit // MIB}m"}
    head = [
        *deployment.about,
        "",
        "leanplan publishes no image: `docker compose up --build` makes one from the Dockerfile.",
    ]
    text = yaml.safe_dump({"services": {"model": service}}, sort_keys=False, allow_unicode=True, width=10**6)
    return "".join(f"# {line}".rstrip() + "\n" for line in head) + text


def _dockerfile(deployment: Deployment) -> str:
    versions = sorted(deployment.manifest.get("versions", {}).items())
    pinned = [
        f"{name}=={version.partition('+')[0]}" for name, version in versions
    ]  # 2.13.0+cpu is a local build's name
    words = " ".join(['"$LEANPLAN"', *(each for each in pinned if REQUIREMENT.fullmatch(each))])
    lines = [
        "# Made by leanplan export.",  # first, or a model's name could pass for a parser directive
        *(f"# {line}" for line in deployment.about[:2]),
        "# Build it where the plan was measured or on the same kind of processor; a GPU needs a base image with its libraries.",
        "# LEANPLAN is what to install leanplan from: a released version, a wheel's address or git+https://...;",
        "# the engine's libraries are installed in the versions the artefact was made with.",
        f"FROM python:{PYTHON}-slim",
        "ARG LEANPLAN='leanplan[serve]'",
        *([COMPILER] if "compile" in deployment.runtime else []),
        f"RUN pip install --no-cache-dir {words}",
        "ENV LEANPLAN_STORE=/tmp/leanplan",
        'ENTRYPOINT ["leanplan"]',
    ]
    return "\n".join(lines) + "\n"


def _literal(word: str) -> str:
    """Return a word that Compose does not fill in."""
    return word.replace("$", "$$")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
