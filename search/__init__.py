"""The search for solvers: `accelerate launch search/run.py`, or `search_solver` from Python."""

from .strategy import search_solver


__all__ = ["search_solver"]
