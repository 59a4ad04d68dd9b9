"""Candidates in processes of their own, with limits.

    planner ──spawns──► server (one for each set of modules an engine preloads; clean environment)
       │                  └─forks─► candidate (own session, own folder; loads a model, builds or measures it)
       └──────── JSON lines over a socket ────────┘

A candidate is assumed hostile once it has loaded a model: whatever it does or says ends as a reply the caller
checks, or as `CandidateFailed` with a reason from the closed list.
"""

from planner.isolation.candidate import Candidate, Limits, Servers

__all__ = ["Candidate", "Limits", "Servers"]
