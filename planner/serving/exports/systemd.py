"""systemd: a unit that runs `leanplan serve` as a user of its own, shut off from the rest of the machine."""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_base.registry import engines
from planner.serving.exports import ARTEFACT, MIB, Deployment, require_plain

SUMMARY = "a hardened service unit"
# All that a service needs is to read its artefact, to listen, and memory. Sources: systemd.exec(5), systemd.service(5).
HARDENING = (
    "DynamicUser=yes", "UMask=0077", "NoNewPrivileges=yes", "CapabilityBoundingSet=", "AmbientCapabilities=",
    "ProtectSystem=strict", "ProtectHome=read-only", "PrivateTmp=yes", "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes", "ProtectKernelLogs=yes", "ProtectControlGroups=yes", "ProtectClock=yes",
    "ProtectHostname=yes", "ProtectProc=invisible", "RestrictNamespaces=yes", "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes", "LockPersonality=yes", "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
    "SystemCallArchitectures=native", "SystemCallFilter=@system-service",
)  # fmt: skip


def refuses(deployment: Deployment) -> str | None:
    return None


def copies(deployment: Deployment) -> Mapping[str, str]:
    return {name: f"{ARTEFACT}/{name}" for name in (*deployment.manifest["files"], "leanplan.json")}


def files(deployment: Deployment) -> dict[str, str]:
    name = unit_name(deployment)
    return {name: unit(deployment, program=program())}


def unit_name(deployment: Deployment) -> str:
    return f"leanplan-{deployment.plan.id}.service"


def program() -> list[str]:
    """Return the command that runs leanplan here."""
    import shutil
    import sys
    from pathlib import Path

    beside = Path(sys.executable).with_name("leanplan")
    found = str(beside) if beside.is_file() else shutil.which("leanplan")
    return [found] if found else [sys.executable, "-m", "planner"]


def unit(deployment: Deployment, *, program: list[str]) -> str:
    """Return the unit's text."""
    folder = str(deployment.out / ARTEFACT)
    require_plain(folder, "the folder's name")
    command = [
        *program, "serve", folder, "--host", deployment.host, "--port", str(deployment.port), "--name", deployment.model,
        "--context-tokens", str(deployment.context_tokens), "--drain", f"{deployment.drain_s:g} s",
    ]  # fmt: skip
    state = f"leanplan-{deployment.plan.id}"
    limit = deployment.memory_limit_bytes
    on_cpu = engines.get(deployment.plan.engine).ENGINE.devices == {"cpu"}
    lines = [
        *(f"# {line}".rstrip() for line in deployment.about),
        "# Its user must be able to read the artefact and the program: a home folder is often closed to others.",
        "[Unit]",
        f"Description={deployment.model} served by leanplan".replace("%", "%%").replace("\\", "\\\\"),
        "After=network.target",
        "",
        "[Service]",
        "Type=exec",
        "ExecStart=" + " ".join(quoted(word) for word in command),
        f"Environment=LEANPLAN_STORE=%S/{state} HOME=%S/{state}",
        f"StateDirectory={state}",
        "Restart=on-failure",
        "RestartSec=5",
        "RestartPreventExitStatus=2",  # bad input stays bad
        "SuccessExitStatus=143",  # requests were cut off at the end of the drain
        "KillMode=mixed",
        f"TimeoutStopSec={round(deployment.drain_s) + 15}",
        *([f"MemoryMax={limit // MIB}M", "MemorySwapMax=0"] if limit else []),
        "OOMPolicy=continue",  # leanplan tells how its engine ended, and exits
        *HARDENING,
        *(["PrivateDevices=yes"] if on_cpu else []),
        *(["IPAddressDeny=any", "IPAddressAllow=localhost"] if _is_loopback(deployment.host) else []),
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def quoted(word: str) -> str:
    """Return one word of ExecStart: in quotes, with nothing filled in (systemd.service(5), command lines)."""
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{plain}"'


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
