"""The search for solvers: `accelerate launch search/run.py`, or `search_solver` from Python."""

from .fit.strategy import Outcome, find_solver, search_solver


__all__ = ["Outcome", "find_solver", "search_solver"]
