"""Step counts that a solver file lacks: their tables are derived from those that it has."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .exponential import ORDER, exponential_adams_bashforth, few_step_table
from .process import NoiseProcess
from .serialization import SolverFile
from .solver import SearchedSolver


# Beyond, one may as well run what every pipeline comes with; nothing was measured there.
MOST_STEPS = 50
# How many steps outside of the searched counts nothing is left of what was searched but, on a flow, its node times.
REACH = 4


def derived_table(file: SolverFile, num_steps: int) -> SearchedSolver:
    """
    The table of a step count that a file lacks.

    Between two searched counts a < N < b everything that was searched is interpolated: first along the steps of either
    solver, then between the two; of coefficients the corrections d on top of the classical ones.

        c(N) = classical(times(N)) + k * ((1 - w) * d_a + w * d_b),   d_n = c_n - classical(times_n)

    where w = (N - a) / (b - a), k = 1, and `classical` is Adams-Bashforth of order 3 on a flow and
    [`exponential_adams_bashforth`] on a variance-preserving process. Outside of the searched counts the nearest of
    them stands for both, and what it adds fades, k = 1 - |N - a| / `REACH`: with all of it, or with nothing, 9 steps
    from 8 have 1.2 to 3.5 times the error (both digits pipelines, and a network of galaxies). From `REACH` steps on, a
    flow keeps the mean density of nodes of all searched counts (of the largest alone, 16 steps have 1.5 times the
    error on digits-sit); on a variance-preserving process [`few_step_table`] runs, which is nearer then than any
    stretched table.

    Args:
        num_steps (`int`): N, from the least of `file.step_counts` minus one to `MOST_STEPS`.

    Raises:
        ValueError: If there is no such table that could be trusted.
    """
    if not file.step_counts[0] - 1 <= num_steps <= MOST_STEPS:
        raise ValueError(f"From them, {derivable(file)} steps can be derived.")
    process, counts = file.process, derived_from(file, num_steps)
    if not counts:
        return few_step_table(process, num_steps)
    least, most = counts[0], counts[-1]
    if least < num_steps < most:
        share = (num_steps - least) / (most - least)
        shares, kept = (1 - share, share), 1.0
    else:
        shares = [1 / len(counts)] * len(counts)
        kept = max(0.0, 1 - max(least - num_steps, num_steps - most) / REACH)
    solvers = [_velocities(file.solvers[count]) for count in counts]

    def mixed(of: Callable[[SearchedSolver], np.ndarray]) -> np.ndarray:
        return sum(share * of(solver) for share, solver in zip(shares, solvers, strict=True))

    times = mixed(lambda solver: _along(_times(process, solver), num_steps))
    offsets = kept * mixed(lambda solver: _by_step(_offsets(process, solver), num_steps))
    classical = _classical(process, times, offsets)
    corrections = kept * mixed(lambda solver: _corrections(process, solver, num_steps))
    return replace(classical, coefficients=classical.coefficients + corrections, consistent=False)


def derivable(file: SolverFile) -> str:
    """The step counts for which a file has a table, or one can be derived, as words."""
    return f"{max(1, file.step_counts[0] - 1)} to {MOST_STEPS}"


def derived_from(file: SolverFile, num_steps: int) -> Sequence[int]:
    """The step counts whose tables make that of another: two or one; far outside all or, on VP models, none."""
    below = [count for count in file.step_counts if count < num_steps][-1:]
    found = below + [count for count in file.step_counts if count > num_steps][:1]
    beyond = len(found) == 1 and abs(num_steps - found[0]) >= REACH
    if not beyond:
        return found
    return file.step_counts if file.process.kind == "flow_matching" else []


def _velocities(solver: SearchedSolver) -> SearchedSolver:
    return replace(solver.in_frame("velocity"), consistent=False)


def _classical(process: NoiseProcess, times: np.ndarray, offsets: np.ndarray) -> SearchedSolver:
    """
    The classical table.

    Args:
        times, offsets (`np.ndarray`, shape (N,)): Of the nodes but the last, and by how much the network is called
            later.
    """
    # Rounding alone would go beyond pure noise.
    alphas, sigmas = process.alpha_sigma(np.minimum(times, process.max_timestep))
    nodes = np.append(alphas, 1.0), np.append(sigmas, 0.0)
    if process.kind == "flow_matching":
        return SearchedSolver.adams_bashforth(times + offsets, *nodes, "velocity", ORDER)
    return exponential_adams_bashforth(times + offsets, *nodes, ORDER)


def _times(process: NoiseProcess, solver: SearchedSolver) -> np.ndarray:
    """Of all nodes but the last."""
    return process.timesteps(solver.alphas[:-1], solver.sigmas[:-1])


def _offsets(process: NoiseProcess, solver: SearchedSolver) -> np.ndarray:
    """By how much the network is called later than at the nodes."""
    return solver.timesteps - _times(process, solver)


def _along(times: np.ndarray, num_steps: int) -> np.ndarray:
    """Times of a solver's nodes at those of another step count, by the share of steps that are done; the end is 0."""
    shares = np.arange(len(times) + 1) / len(times)
    return np.interp(np.arange(num_steps) / num_steps, shares, np.append(times, 0.0))


def _by_step(values: np.ndarray, num_steps: int) -> np.ndarray:
    """Values of some steps at those of another step count, the first at the first and the last at the last."""
    return np.interp(np.linspace(0, 1, num_steps), np.linspace(0, 1, len(values)), values)


def _corrections(process: NoiseProcess, solver: SearchedSolver, num_steps: int) -> np.ndarray:
    """What a solver adds to the classical coefficients, for each step and each number of steps back."""
    classical = _classical(process, _times(process, solver), _offsets(process, solver))
    found = solver.coefficients - classical.coefficients
    corrections = np.zeros((num_steps, num_steps))
    for back in range(min(solver.num_steps, num_steps)):
        corrections += np.diag(_by_step(np.diag(found, -back), num_steps - back), -back)
    # What rows sum to decides more than how: it is interpolated by itself.
    return corrections + np.diag(_by_step(found.sum(1), num_steps) - corrections.sum(1))
