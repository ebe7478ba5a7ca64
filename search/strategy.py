"""The search of a solver: from classical tables over node times to everything, with ever more samples."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver import NoiseProcess, SearchedSolver, SearchedSolverScheduler, time_grid

from .cache import TeacherCache
from .field import NetworkCalls
from .gauss_newton import gauss_newton_iteration
from .journal import Journal
from .parameters import SolverFamily
from .processes import agree, gather, total
from .progress import Finding
from .rollout import Batch, endpoint_errors, root_mean_square
from .rounding import rounding_error
from .teacher import NO_CACHE, count_batches, make_batches


# Where each split's seeds begin, so that none has a sample of another.
TRAIN_SEEDS, HELD_OUT_SEEDS, TUNING_SEEDS, EVALUATION_SEEDS = 0, 10**6, 2 * 10**6, 3 * 10**6
NUM_SAMPLES = 16
TEACHER_STEPS = 64
BATCH_SIZE = 4
MAX_CALLS = 15_000
ITERATIONS = 2
ORDER = 3


def search_solver(
    pipe: DiffusionPipeline,
    num_steps: int,
    conditions: Sequence[Mapping],
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    teacher_steps: int = TEACHER_STEPS,
    batch_size: int = BATCH_SIZE,
    iterations: int = ITERATIONS,
    max_calls: int = MAX_CALLS,
    log: Callable[[str], None] = lambda line: None,
) -> SearchedSolver:
    """
    Search a solver for a pipeline by damped Gauss-Newton steps; `gradient.fit_by_gradient` is the paper's way.

    Args:
        pipe (`DiffusionPipeline`): Any pipeline whose noise process its scheduler's config describes.
        num_steps (`int`): Steps of the solver, at least 2.
        conditions: Keyword arguments for the pipeline's call that make one sample each, used in turn, for instance
            `[{"class_labels": [k], "guidance_scale": 2.0} for k in range(10)]` or `[{"prompt": "a cat"}]`.
        num_samples (`int`): Noises to fit; a quarter as many more judge.
        seed (`int`): Of the noises.
        teacher_steps (`int`): Steps of the run whose end point is the goal.
        batch_size (`int`): Samples in one call of the pipeline.
        iterations (`int`): Over all samples. At 5 steps, more than two find little; at 8 and 10 they find more, if
            `max_calls` allows them.
        max_calls (`int`): Network calls, guidance included, that are not exceeded by iterations after the first, which
            is always made.
        log: Is given lines that say what the search has found so far.

    Returns:
        `SearchedSolver`: Never worse, on the judging noises, than the classical solver it started from.

    Raises:
        ValueError: If an argument is out of range, or there is nothing to search with.
        FieldError: If the pipeline's call fails.
    """
    check_settings([num_steps], conditions, num_samples, teacher_steps, batch_size)
    calls = NetworkCalls(pipe)
    problem = None
    try:
        problem = search_problem(pipe, conditions, num_samples, seed, teacher_steps, batch_size, calls)
        journal = Journal(calls)
        *_, solver = fit_solver(problem, num_steps, iterations, max_calls, journal, lambda found: log(str(found)))
        return solver
    finally:
        calls.remove()
        if problem is not None:
            problem.close()


def check_settings(step_counts, conditions, num_samples, teacher_steps, batch_size):
    """Refuse settings that no search can run with."""
    if not conditions:
        raise ValueError("`conditions` is empty. Give the keyword arguments of at least one call of the pipeline.")
    minima = {"num_samples": 1, "batch_size": 1, "teacher_steps": 2 * max(step_counts)}
    given = {"num_samples": num_samples, "batch_size": batch_size, "teacher_steps": teacher_steps}
    for name, minimum in minima.items():
        if given[name] < minimum:
            raise ValueError(f"`{name}` is {given[name]}, expected at least {minimum}.")
    for num_steps in step_counts:
        if num_steps < 2:
            raise ValueError(f"`num_steps` is {num_steps}, expected at least 2: one step leaves nothing to search.")


@dataclass(frozen=True)
class Problem:
    """
    What a solver is fitted to.

    Args:
        process, prediction_type: Of the pipeline.
        rounding (`float`): Of its predictions.
        train, held_out: This process's samples to fit, and samples that judge.
        num_train_batches (`int`): Of all processes.
        teacher_calls (`int`): What the teacher's end points cost all processes.
    """

    process: NoiseProcess
    prediction_type: str
    rounding: float
    train: list[Batch]
    held_out: list[Batch]
    num_train_batches: int
    teacher_calls: int

    def share_of_train(self, parts: int) -> list[Batch]:
        """This process's of the first 1 / `parts` of the batches to fit, at least one over all processes."""
        last = max(1, self.num_train_batches // parts)
        return [batch for batch in self.train if batch.index[0] < last]

    def fingerprint(self) -> str:
        """A hash of the noises and the teacher's end points of all processes."""
        batches = [*self.train, *self.held_out]
        digests = [_digest(batch.field.noise, batch.target) for batch in batches]
        return hashlib.sha256("".join(gather(batches, digests)).encode()).hexdigest()

    def close(self):
        """End the pipeline's calls."""
        for batch in [*self.train, *self.held_out]:
            batch.field.close()


def search_problem(
    pipe: DiffusionPipeline,
    conditions: Sequence[Mapping],
    num_samples: int,
    seed: int,
    teacher_steps: int,
    batch_size: int,
    calls: NetworkCalls,
    cache: TeacherCache = NO_CACHE,
) -> Problem:
    """The noises to fit and, a quarter as many, the noises that judge, with the teacher's end points."""
    own = SearchedSolverScheduler.from_config(pipe.scheduler.config)
    before = calls.count
    train, held_out = (
        make_batches(pipe, conditions, split_seeds(seed, split, count), batch_size, teacher_steps, calls, cache)
        for split, count in ((TRAIN_SEEDS, num_samples), (HELD_OUT_SEEDS, max(1, num_samples // 4)))
    )
    rounding = agree(rounding_error(train[0].field) if PartialState().is_main_process else None)
    num_batches = count_batches(conditions, num_samples, batch_size)
    spent = total(calls.count - before)
    return Problem(own.process, own.config.prediction_type, rounding, train, held_out, num_batches, spent)


def _digest(*tensors: torch.Tensor) -> str:
    content = b"".join(tensor.cpu().float().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()


def split_seeds(seed: int, split: int, count: int) -> list[int]:
    """Seeds of one split's samples."""
    return [seed * 10**7 + split + k for k in range(count)]


def fit_solver(
    problem: Problem,
    num_steps: int,
    iterations: int,
    max_calls: int,
    journal: Journal,
    tell: Callable[[Finding], None],
) -> Iterator[SearchedSolver]:
    """
    Search in three stages: the node times of an Adams-Bashforth solver, from several grids, on a quarter of the
    samples; everything, from the best of these, on half of them; everything on all.

    Few numbers need few samples, and what the first stages find is near enough for the last to converge: from a
    classical grid, the last alone stalls in a local minimum. Which grid is worth going on from shows after one
    iteration, not before.

    Args:
        problem: What to fit.
        num_steps (`int`): N.
        iterations, max_calls (`int`): As in `search_solver`.
        journal: Knows what an interrupted search has done already.
        tell: Is told what every iteration has found.

    Yields:
        `SearchedSolver`: After every iteration, the visited one of the smallest error on the samples that judge.
    """
    family = make_family(problem.process, problem.prediction_type, num_steps, problem.rounding)
    quarter, half = problem.share_of_train(4), problem.share_of_train(2)
    start = journal.spent
    visited: list[tuple[float, SearchedSolver]] = []

    def error(batches: Sequence[Batch], vector: np.ndarray) -> float:
        solver = family.solver(family.entries(vector))
        return journal.remember(lambda: root_mean_square(endpoint_errors(batches, solver)))

    def iterate(vector: np.ndarray, batches: Sequence[Batch], times_only: bool) -> np.ndarray:
        compute = functools.partial(gauss_newton_iteration, family, vector, batches, times_only)
        return np.array(journal.remember(lambda: compute()[0].tolist()))

    def visit(vector: np.ndarray, stage: str) -> SearchedSolver:
        visited.append((error(problem.held_out, vector), family.solver(family.entries(vector))))
        calls = problem.teacher_calls + journal.spent - start
        tell(Finding(num_steps, stage, {"held-out error": visited[-1][0], "network calls": calls}))
        return min(visited, key=lambda pair: pair[0])[1]

    starts = [family.vector(timesteps) for timesteps in start_grids(problem.process, num_steps)]
    yield visit(min(starts, key=lambda vector: error(quarter, vector)), "classical start")
    moved = [iterate(vector, quarter, times_only=True) for vector in starts]
    vector = iterate(min(moved, key=lambda vector: error(quarter, vector)), quarter, times_only=True)
    yield visit(vector, "node times")
    vector = iterate(vector, half, times_only=False)
    yield visit(vector, "everything, half of the noises")
    for iteration in range(1, iterations + 1):
        before = journal.spent
        vector = iterate(vector, problem.train, times_only=False)
        yield visit(vector, f"everything, iteration {iteration}")
        spent = problem.teacher_calls + journal.spent - start
        if spent + journal.spent - before > max_calls:
            return


def make_family(process: NoiseProcess, prediction_type: str, num_steps: int, rounding: float = 0.0) -> SolverFamily:
    """The solvers among which a search looks."""
    return SolverFamily(process, num_steps, ORDER, prediction_type != "flow_prediction", rounding)


def start_grids(process: NoiseProcess, num_steps: int) -> list[np.ndarray]:
    """Timesteps of the grids that a search may start from."""
    if process.kind == "flow_matching":
        return [time_grid(process, num_steps, shift)[0] for shift in (1.0, 1.5, 2.0)]
    return [time_grid(process, num_steps, shift, start=0.9)[0] for shift in (0.35, 0.7)]
