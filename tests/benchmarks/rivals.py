"""
What others search, found from the same samples and teacher, and where numbers are fitted, by the same Gauss-Newton
iterations.

The originals minimise otherwise (Adam, RMSprop) and mostly perceptual distances of decoded images, so this says what
their families of solvers are worth, not what their programs are.
"""

from collections.abc import Iterator

import numpy as np

from diffusers_searched_solver import SearchedSolver
from diffusers_searched_solver.teacher import teacher_solver
from search.fit.budget import JUDGES, LATER_NOISES, default_calls
from search.fit.gauss_newton import MIN_GAIN, gauss_newton_iteration
from search.fit.parameters import FRAME, ORDER, Entry, SolverFamily
from search.fit.problem import Problem
from search.known.baselines import classical_solvers
from search.pipeline.field import NetworkCalls
from search.pipeline.rollout import (
    Batch,
    Run,
    endpoint_errors,
    recorded_run,
    rollout,
    root_mean_square,
    sample_errors,
)


# Where GITS may begin, as a share of the process.
STARTS = 1.0, 0.9, 0.8, 0.7


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
    return descend(problem, num_steps, TimesFamily, calls)


def search_coefficients(problem: Problem, num_steps: int, calls: NetworkCalls) -> Iterator[SearchedSolver]:
    """As S4S."""
    return descend(problem, num_steps, CoefficientsFamily, calls)


def fitted_and_judging(problem: Problem) -> tuple[list[Batch], list[Batch]]:
    """The noises that rivals are fitted to and judged on, as many as the search has by default."""
    return problem.train.between(0, LATER_NOISES), problem.judging.between(0, JUDGES)


def descend(
    problem: Problem, num_steps: int, family: type[SolverFamily], calls: NetworkCalls
) -> Iterator[SearchedSolver]:
    """
    Gauss-Newton iterations over all samples, from the Adams-Bashforth solver on the best of the classical grids; they
    end when they gain little, or what the search may spend is spent.

    Yields:
        `SearchedSolver`: After each, the visited one of the smallest error on the samples that judge.
    """
    train, judging = fitted_and_judging(problem)
    start = calls.count - problem.calls  # but for noises
    tables = [table for name, table in classical_solvers(problem.process, num_steps).items() if f"AB{ORDER}" in name]
    known = min(tables, key=lambda table: root_mean_square(endpoint_errors(train, table)))
    family = family(problem.process, known, offsets=True)
    errors = [sample_errors(rollout(batch.field, known), batch.target) for batch in train]
    vector, gain, cost = family.start, 1.0, 0
    visited = [(root_mean_square(endpoint_errors(judging, known)), known)]
    yield known
    budget = default_calls(problem, num_steps) - problem.charged
    while gain >= MIN_GAIN and calls.count - problem.calls - start + cost <= budget:
        before = calls.count
        fitted = gauss_newton_iteration(family, vector, train, errors)
        vector, gain = fitted.vector, 1 - fitted.loss
        solver = family.solver(family.entries(vector))
        visited.append((root_mean_square(endpoint_errors(judging, solver)), solver))
        cost = calls.count - before
        yield min(visited, key=lambda pair: pair[0])[1]


def choose_nodes(problem: Problem, num_steps: int) -> Iterator[SearchedSolver]:
    """
    Of the teacher's nodes, those between which Euler's steps stay nearest to the teacher, by dynamic programming.
    Where the nodes begin and which Adams-Bashforth coefficients they get is what judges best: a variance-preserving
    process is nearly pure noise long before its end.

    The teacher's trajectories are what it left on its way to the end points, so they cost nothing more; here it runs
    again because a problem does not keep them.

    Source: Chen et al., "On the Trajectory Regularity of ODE-based Diffusion Sampling" (GITS), arXiv 2405.11326.
    """
    train, judging = fitted_and_judging(problem)
    teacher = teacher_solver(problem.process, problem.teacher_steps)
    costs = np.mean([euler_costs(teacher, recorded_run(batch.field, teacher)) for batch in train], 0)
    tables = []
    for start in STARTS if problem.process.kind == "variance_preserving" else STARTS[:1]:
        first = int(np.searchsorted(-teacher.timesteps, -start * problem.process.max_timestep))
        chosen = [first + k for k in cheapest_path(costs[first:, first:], num_steps)]
        nodes = teacher.timesteps[chosen[:-1]], teacher.alphas[chosen], teacher.sigmas[chosen]
        tables += [SearchedSolver.adams_bashforth(*nodes, FRAME, order) for order in (1, 2, 3, 4)]
    yield min(tables, key=lambda table: root_mean_square(endpoint_errors(judging, table)))


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
