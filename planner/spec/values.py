"""The values of a spec: what it says once read, every default filled in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from knowledge_base.serde import UNSAID
from knowledge_base.types import Budget, Workload
from planner._owning import Bought

DEFAULT_WORKLOAD = Workload(prompt_tokens=512, output_tokens=128)  # where a spec says nothing
DEFAULT_OBJECTIVES = ("tpot_p50", "peak_memory", "quality_loss")
MOST_OBJECTIVES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """A model as a spec names it: a folder (relative to the spec's) or a hub id; `revision` is a commit of the hub."""

    source: str
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextData:
    """A text file; `data` is joined to the spec's folder. None: the planner decides."""

    data: Path | None = None
    samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TechniqueFilter:
    """Which techniques a plan may use: only these, all but those."""

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


# Wall time and number of measured plans of each effort, where the spec does not say.
EFFORT_TIME_S = {"quick": 360.0, "normal": 1800.0, "thorough": 7200.0}
EFFORT_MEASURED = {"quick": 10, "normal": 16, "thorough": 48}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchEffort:
    """How long to search, and among how long plans. A time limit or count left as None becomes that of the effort."""

    effort: str = "normal"
    time_limit_s: float = None  # type: ignore[assignment]
    max_measured: int = None  # type: ignore[assignment]
    max_steps: int | None = None
    seed: int = 0
    solver: str = "auto"

    def __post_init__(self) -> None:
        if self.time_limit_s is None:
            object.__setattr__(self, "time_limit_s", EFFORT_TIME_S[self.effort])
        if self.max_measured is None:
            object.__setattr__(self, "max_measured", EFFORT_MEASURED[self.effort])


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one candidate may use. Memory None: all the machine allows."""

    memory_bytes: int | None = None
    time_per_candidate_s: float = 600.0
    disk_bytes: int = 20 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How `leanplan check` compares with the committed lock file."""

    regression_ratio: float = 0.03
    runs: int = 9
    against: Path = Path("leanplan.lock")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What running costs. None: the catalogue's figure for the machine, where it has one."""

    usd_per_h: float | None = None
    bought: Bought | None = None
    electricity_usd_per_kwh: float | None = None
    grid_gco2e_per_kwh: float | None = None
    pue: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A whole spec with every default filled in. Equal for the same spec from a file and from Python.

    `folder` is absolute once read; `model.source`, `draft.source` and `check.against` are told from it, text files are joined
    to it.
    """

    version: int = 1
    name: str | None = None
    goal: str = "serve"
    model: ModelRef
    draft: ModelRef | None = field(default=None, metadata=UNSAID)
    hardware: str = "local"
    workload: Workload = DEFAULT_WORKLOAD
    budgets: tuple[Budget, ...] = ()
    objectives: tuple[str, ...] = DEFAULT_OBJECTIVES
    quality: TextData = TextData()
    calibration: TextData | None = None
    engines: tuple[str, ...] | None = None
    techniques: TechniqueFilter = TechniqueFilter()
    search: SearchEffort = field(default_factory=SearchEffort)
    limits: Limits = Limits()
    check: Check = Check()
    prices: Prices = Prices()
    folder: Path = Path()

    def path(self, written: str | Path) -> Path:
        """Return a path of the spec joined to the spec's folder."""
        return self.folder / written
