"""Taking an address to listen on."""

from __future__ import annotations

import errno
import socket

from knowledge_base.errors import EnvironmentProblem


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address; port 0 is any free one.

    Raises:
        OSError: it cannot be had.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left may be taken again
        listener.bind(address)
        listener.listen(1)  # with SO_REUSEADDR a port is ours alone only then
    except OSError:
        listener.close()
        raise
    return listener


def why_not(error: OSError) -> str:
    """Return why an address cannot be had, in a few words."""
    return "the port is taken" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))


def refused(host: str, port: int, why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"cannot listen on {host}:{port}: {why}", hint="stop what uses it, or choose another: --port 0 takes a free one"
    )


def require_free(host: str, port: int) -> None:
    """Find out early whether an address can be had.

    Raises:
        EnvironmentProblem: it cannot.
    """
    try:
        bound(host, port).close()
    except OSError as error:
        raise refused(host, port, why_not(error)) from error
