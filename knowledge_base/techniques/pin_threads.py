"""Run on fewer CPU threads than the machine has cores, and keep them on physical cores of one memory node.

The scheduler moves threads about: away from their caches, onto the second thread of a core that already computes, or to
another socket than the weights. A process that is kept on cores chosen by the machine's topology is spared that, and
leaves the others to other programs. What it brings is found by measuring.
"""

from __future__ import annotations

from knowledge_base.build_memory import SHAPES
from knowledge_base.techniques import thread_count
from knowledge_base.techniques.thread_count import legal, rejects
from knowledge_base.types import Choice, Demand, Evidence, Session, Technique

__all__ = ["EVIDENCE", "TECHNIQUE", "execute", "legal", "rejects", "rewrite"]

TECHNIQUE = Technique(
    summary="fewer CPU threads than cores, kept on physical cores of their own",
    stage="serve",
    family="threads",
    implements=("thread_pinning",),
    knobs={"count": Choice(options=(1, 2, 4, 8, 16, 32, 64), default=1)},
    spends=thread_count.TECHNIQUE.spends,
    needs=frozenset({"pinned_threads"}),
    lossless=True,
    memory=SHAPES,
    sources=("https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md",),
)

EVIDENCE: tuple[Evidence, ...] = ()


def rewrite(demand: Demand, *, count: int) -> Demand:
    """Return the demand bound to `count` threads; that they stay where they are is not predicted to change it."""
    demand = thread_count.rewrite(demand, count=count)
    return demand.but(because=(*demand.because, "kept on cores of their own"))


def execute(session: Session, *, count: int) -> None:
    """Ask the engine for `count` threads, kept on cores."""
    thread_count.execute(session, count=count)
    session.runtime["pinned"] = True
