"""Links between devices, and what the collectives send over them."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_base.errors import BadInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One tier of the network: what a device sends for each second, and the time before the first byte arrives."""

    name: str
    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or not self.latency_s >= 0:
            raise BadInput(
                f"link `{self.name}` needs a bandwidth above 0 and a latency of at least 0, "
                f"got {self.bytes_per_s:g} byte/s and {self.latency_s:g} s", hint="mend the link", where="cluster",
            )  # fmt: skip


ETHERNET = Link(name="10 Gbit/s Ethernet", bytes_per_s=1.25e9, latency_s=30e-6)  # between machines, where none is named


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal machines: the link between the devices of one, and the link between machines."""

    devices_per_machine: int
    inside: Link
    between: Link

    def link(self, span: int) -> Link:
        """Return the slowest link a group crosses that reaches over `span` consecutive ranks."""
        return self.inside if span <= self.devices_per_machine else self.between


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank sends in a step, and the seconds it takes when nothing hides it."""

    bytes: float
    s: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.s + other.s)

    def times(self, count: float) -> Traffic:
        """Return that many of them."""
        return Traffic(self.bytes * count, self.s * count)


NOTHING = Traffic(0.0, 0.0)


def all_gather(size_bytes: float, ranks: int, link: Link) -> Traffic:
    """Return a ring all-gather of `size_bytes` in all: n - 1 steps of a share each, (n-1)/n of the size.

    Source: Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH".

    >>> all_gather(8e9, 4, Link(name="toy", bytes_per_s=1e9, latency_s=0.0))
    Traffic(bytes=6000000000.0, s=6.0)
    """
    sent = size_bytes * (ranks - 1) / ranks
    return Traffic(sent, (ranks - 1) * link.latency_s + sent / link.bytes_per_s)


def reduce_scatter(size_bytes: float, ranks: int, link: Link) -> Traffic:
    """Return a ring reduce-scatter: the all-gather run backwards, the same bytes and steps."""
    return all_gather(size_bytes, ranks, link)


def all_reduce(size_bytes: float, ranks: int, link: Link) -> Traffic:
    """Return a ring all-reduce: a reduce-scatter, then an all-gather, 2(n-1)/n of the size."""
    return reduce_scatter(size_bytes, ranks, link) + all_gather(size_bytes, ranks, link)


def all_to_all(size_bytes: float, ranks: int, link: Link) -> Traffic:
    """Return an exchange in which each rank keeps 1/n of its `size_bytes` and sends the rest, a share to each other."""
    return all_gather(size_bytes, ranks, link)


def send(size_bytes: float, link: Link) -> Traffic:
    """Return one message to a neighbour."""
    return Traffic(size_bytes, link.latency_s + size_bytes / link.bytes_per_s)
