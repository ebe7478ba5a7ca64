"""
What others search, found from the same samples and teacher, and where numbers are fitted, by the same Gauss-Newton
iterations.

The originals minimise otherwise (Adam, RMSprop) and mostly perceptual distances of decoded images, so this says what
their families of solvers are worth, not what their programs are.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from diffusers_searched_solver import NoiseProcess, SearchedSolver
from diffusers_searched_solver.check import teacher_solver
from search.baselines import classical_solvers
from search.field import NetworkCalls
from search.gauss_newton import MIN_GAIN, gauss_newton_iteration
from search.parameters import FRAME, Entry, SolverFamily
from search.rollout import Run, endpoint_errors, rollout, root_mean_square
from search.strategy import MAX_CALLS, ORDER, TEACHER_STEPS, Problem


class TimesFamily(SolverFamily):
    """
    Searched nodes and network times; Adams-Bashforth coefficients.

    Source: Tong et al., "Learning to Discretize Denoising Diffusion ODEs" (LD3), arXiv 2405.15506.
    """

    def searched(self, entries: np.ndarray, times_only: bool) -> list[Entry]:
        return super().searched(entries, times_only=False)[len(self.rows) :]


class CoefficientsFamily(SolverFamily):
    """
    Searched coefficients on the nodes of a classical solver.

    Source: Frankel et al., "S4S: Solving for a Diffusion Model Solver", arXiv 2502.17423.
    """

    def searched(self, entries: np.ndarray, times_only: bool) -> list[Entry]:
        return super().searched(entries, times_only=False)[: len(self.rows)]


def search_times(problem: Problem, num_steps: int, calls: NetworkCalls) -> Iterator[SearchedSolver]:
    """As LD3."""
    family = TimesFamily(problem.process, num_steps, ORDER, offsets=True)
    return descend(problem, family, classical_grids(problem.process, num_steps), calls)


def search_coefficients(problem: Problem, num_steps: int, calls: NetworkCalls) -> Iterator[SearchedSolver]:
    """As S4S."""
    family = CoefficientsFamily(problem.process, num_steps, ORDER, offsets=False)
    return descend(problem, family, classical_grids(problem.process, num_steps), calls)


def classical_grids(process: NoiseProcess, num_steps: int) -> list[np.ndarray]:
    """The timesteps of every grid among the classical tables."""
    tables = classical_solvers(process, num_steps).values()
    return [np.array(grid) for grid in sorted({tuple(table.timesteps) for table in tables})]


def descend(
    problem: Problem, family: SolverFamily, grids: Sequence[np.ndarray], calls: NetworkCalls
) -> Iterator[SearchedSolver]:
    """
    Gauss-Newton iterations over all samples, from the best of some grids; they end as those of `fit_solver` do.

    Yields:
        `SearchedSolver`: After each, the visited one of the smallest error on the samples that judge.
    """
    start = calls.count - problem.teacher_calls

    def error(batches, vector):
        return root_mean_square(endpoint_errors(batches, family.solver(family.entries(vector))))

    vector = min(map(family.vector, grids), key=lambda vector: error(problem.train, vector))
    visited, gain, cost = [(error(problem.held_out, vector), vector)], 1.0, 0
    yield family.solver(family.entries(vector))
    while gain >= MIN_GAIN and calls.count - start + cost <= MAX_CALLS:
        before = calls.count
        vector, gain = gauss_newton_iteration(family, vector, problem.train, times_only=False)
        visited.append((error(problem.held_out, vector), vector))
        cost = calls.count - before
        yield family.solver(family.entries(min(visited, key=lambda pair: pair[0])[1]))


def choose_nodes(problem: Problem, num_steps: int) -> Iterator[SearchedSolver]:
    """
    Of the teacher's nodes, those between which Euler's steps stay nearest to the teacher, by dynamic programming, with
    the Adams-Bashforth coefficients that judge best.

    The teacher's trajectories are what it left on its way to the end points, so they cost nothing more; here it runs
    again because a problem does not keep them.

    Source: Chen et al., "On the Trajectory Regularity of ODE-based Diffusion Sampling" (GITS), arXiv 2405.11326.
    """
    teacher = teacher_solver(problem.process, TEACHER_STEPS)
    costs = [euler_costs(teacher, rollout(batch.field, teacher)) for batch in problem.train]
    chosen = cheapest_path(np.mean(costs, 0), num_steps)
    nodes = teacher.timesteps[chosen[:-1]], teacher.alphas[chosen], teacher.sigmas[chosen]
    tables = [SearchedSolver.adams_bashforth(*nodes, FRAME, order) for order in (1, 2, 3, 4)]
    yield min(tables, key=lambda table: root_mean_square(endpoint_errors(problem.held_out, table)))


def euler_costs(teacher: SearchedSolver, run: Run) -> np.ndarray:
    """
    How far a step of Euler's method from each of the teacher's states ends from each later one, shape (K+1, K+1).

        cost_ij = mean over samples of |y_i + (tau_j - tau_i) p_i - y_j|,   y = x / (alpha + sigma)
    """
    scales = teacher.alphas + teacher.sigmas
    times = teacher.sigmas / scales
    states = [state.double() / scale for state, scale in zip(run.states, scales, strict=True)]
    costs = np.zeros((len(times), len(times)))
    for i, slope in enumerate(run.history):
        for j in range(i + 1, len(times)):
            miss = states[i] + (times[j] - times[i]) * slope - states[j]
            costs[i, j] = float(miss.flatten(1).norm(dim=1).mean())
    return costs


def cheapest_path(costs: np.ndarray, num_steps: int) -> list[int]:
    """The indices 0 = i_0 < i_1 < ... < i_N, the last one, whose steps cost least together."""
    last = len(costs) - 1
    steps = np.where(np.arange(last + 1)[:, None] < np.arange(last + 1), costs, np.inf)
    # What it costs at least to get from each node to the last in so many steps, and the first of these steps.
    to_go, moves = np.where(np.arange(last + 1) == last, 0.0, np.inf), []
    for _ in range(num_steps):
        totals = steps + to_go
        moves.append(totals.argmin(1))
        to_go = totals.min(1)
    path = [0]
    for move in reversed(moves):
        path.append(int(move[path[-1]]))
    return path
