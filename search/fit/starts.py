"""Where a search begins: the best known tables of different kinds, and grids whose node times are searched first."""

from collections.abc import Mapping, Sequence

import numpy as np

from diffusers_searched_solver import NoiseProcess, SearchedSolver, SolverFile, time_grid
from diffusers_searched_solver.derived import MOST_STEPS, derived_from, derived_table

from ..known.baselines import CLASSICAL, GIVEN, NEIGHBOUR, KnownTable, in_one_kind
from ..known.race import Standing
from .budget import FIRST_NOISES
from .parameters import EXACT, SolverFamily
from .problem import Problem


def given_tables(given: Mapping[int, SearchedSolver], problem: Problem, num_steps: int) -> list[KnownTable]:
    """Of solvers by number of steps, that of these, or what is derived from those of others."""
    if num_steps in given:
        return [KnownTable(GIVEN, "", in_one_kind(given[num_steps]), False)]
    if not given or not min(given) - 1 <= num_steps <= MOST_STEPS:
        return []
    solvers = {count: in_one_kind(solver) for count, solver in given.items()}
    file = SolverFile(solvers, problem.process, problem.prediction_type)
    # Of none if these are so far off that nothing of them is left.
    counts = derived_from(file, num_steps)
    table = in_one_kind(derived_table(file, num_steps))
    return [KnownTable(NEIGHBOUR, f"of {' and '.join(map(str, counts))} steps", table, False)] if counts else []


def best_of_kinds(standings: Sequence[Standing], count: int) -> list[KnownTable]:
    """So many of diffusers' that got furthest, and the best of every other family."""
    best = [each for each in standings if each.table.from_diffusers][:count]
    for family in (CLASSICAL, GIVEN, NEIGHBOUR):
        best += [each for each in standings if each.table.family == family][:1]
    return [each.table for each in best]


def make_family(problem: Problem, known: SearchedSolver) -> SolverFamily:
    """The solvers around a known one among which a search looks."""
    # Hard noises and rounding are what spoils differences of predictions.
    differences = not problem.heavy and problem.rounding <= EXACT
    return SolverFamily(problem.process, known, problem.offsets, problem.rounding, differences)


def start_grids(process: NoiseProcess, num_steps: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The grids whose node times are searched, as `time_grid` has them."""
    if process.kind == "flow_matching":
        return [time_grid(process, num_steps, shift) for shift in (1.0, 1.5, 2.0)]
    return [time_grid(process, num_steps, shift, start=0.9) for shift in (0.35, 0.7)]


def shorter(start: int, stop: int) -> list[tuple[int, int]]:
    """Noises from one number to another, or to an earlier one."""
    return [(start, end) for end in range(stop, start, -FIRST_NOISES)]
