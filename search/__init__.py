"""The search for solvers: `accelerate launch search/run.py`, or `search_solver` and `measure` from Python."""

# The function takes the name of the room, whose modules are imported as `search.measure.evaluate` and so on.
from .api import measure
from .fit.find import find_solver, search_solver
from .fit.outcome import Outcome
from .results.record import Report


__all__ = ["Outcome", "Report", "find_solver", "measure", "search_solver"]
