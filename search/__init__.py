"""The search for solvers: `accelerate launch search/run.py`, or `search_solver` and `measure` from Python."""

from .fit.strategy import Outcome, find_solver, search_solver
from .results.record import Report
from .session import measure


__all__ = ["Outcome", "Report", "find_solver", "measure", "search_solver"]
