"""One file for each solver: SOLVER (a sentence) and solve(problem, effort, seed) -> Priced."""

from knowledge_base.registry import Folder

registry = Folder("search.solvers", "solver", ("SOLVER", "solve"))
