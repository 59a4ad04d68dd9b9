"""What a run fetches from the hub: the model and its draft, as far as they are not here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_base import units
from knowledge_base.errors import EnvironmentProblem
from planner.preparing import source_of

if TYPE_CHECKING:
    from planner.spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Models of the hub, the bytes of them that were missing, and how full their cache was before."""

    sources: tuple[str, ...] = ()
    missing_bytes: float = 0.0
    cached_bytes: float = 0.0

    @classmethod
    def of(cls, spec: Spec, *, offline: bool, allow_pickle: bool = False) -> Download:
        """Look what of a spec's models is not here.

        Raises:
            EnvironmentProblem: there is no disk for it.
        """
        from planner import hub

        refs = (spec.model, spec.draft) if spec.draft else (spec.model,)
        wanted = {source_of(spec, ref): ref.revision for ref in refs}
        sources = tuple(source for source in wanted if not Path(source).is_dir() and hub.is_id(source))
        missing = sum(
            hub.missing_bytes(source, wanted[source], offline=offline, allow_pickle=allow_pickle) for source in sources
        )
        if missing > (free := hub.free_bytes() if sources else 0):
            raise EnvironmentProblem(
                f"{' and '.join(sources)}: a download of {units.format(missing, 'bytes')}, "
                f"{units.format(free, 'bytes')} of disk is free",
                hint="free some disk, or point HF_HOME at a larger one", where="model",
            )  # fmt: skip
        return cls(sources=sources, missing_bytes=missing, cached_bytes=_cached_bytes(sources))

    @property
    def fetched_bytes(self) -> float:
        """What the cache grew by since."""
        return max(0.0, _cached_bytes(self.sources) - self.cached_bytes) if self.missing_bytes else 0.0


def _cached_bytes(sources: Iterable[str]) -> float:
    from planner import hub

    return sum(hub.cached_bytes(source) for source in sources)
