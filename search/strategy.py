"""The search of a solver: from classical tables over node times to everything, with ever more samples."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from diffusers import DiffusionPipeline

from diffusers_searched_solver import NoiseProcess, SearchedSolver, time_grid

from .field import NetworkCalls
from .gauss_newton import MIN_GAIN, gauss_newton_iteration
from .parameters import SolverFamily
from .rollout import Batch, endpoint_errors, root_mean_square
from .teacher import make_batches


FITTERS = ("gauss-newton",)
# Where each split's seeds begin, so that none has a sample of another.
TRAIN_SEEDS, HELD_OUT_SEEDS, TUNING_SEEDS, EVALUATION_SEEDS = 0, 10**6, 2 * 10**6, 3 * 10**6
TEACHER_STEPS = 64
BATCH_SIZE = 4
MAX_CALLS = 15_000
ORDER = 3


def search_solver(
    pipe: DiffusionPipeline,
    num_steps: int,
    conditions: Sequence[Mapping],
    num_samples: int = 16,
    seed: int = 0,
    teacher_steps: int = TEACHER_STEPS,
    batch_size: int = BATCH_SIZE,
    fitter: str = "gauss-newton",
    max_calls: int = MAX_CALLS,
    log: Callable[[str], None] = lambda line: None,
) -> SearchedSolver:
    """
    Search a solver for a pipeline.

    Args:
        pipe (`DiffusionPipeline`): Any pipeline whose noise process its scheduler's config describes.
        num_steps (`int`): Steps of the solver, at least 2.
        conditions: Keyword arguments for the pipeline's call that make one sample each, used in turn, for instance
            `[{"class_labels": [k], "guidance_scale": 2.0} for k in range(10)]` or `[{"prompt": "a cat"}]`.
        num_samples (`int`): Noises to fit; a quarter as many more judge.
        seed (`int`): Of the noises.
        teacher_steps (`int`): Steps of the run whose end point is the goal.
        batch_size (`int`): Samples in one call of the pipeline.
        fitter (`str`): "gauss-newton".
        max_calls (`int`): Network calls, guidance included, after which no further iteration is begun. The first
            iteration over all samples is always made.
        log: Is given lines that say what the search has found so far.

    Returns:
        `SearchedSolver`: Never worse, on the judging noises, than the classical solver it started from.

    Raises:
        ValueError: If an argument is out of range, or there is nothing to search with.
        FieldError: If the pipeline's call fails.
    """
    check_settings([num_steps], conditions, num_samples, teacher_steps, batch_size, fitter)
    calls, train, held_out = NetworkCalls(pipe), [], []
    try:
        train, held_out = search_batches(pipe, conditions, num_samples, seed, teacher_steps, batch_size, calls)
        return fit_solver(train, held_out, num_steps, calls, max_calls, log)
    finally:
        calls.remove()
        for batch in [*train, *held_out]:
            batch.field.close()


def check_settings(step_counts, conditions, num_samples, teacher_steps, batch_size, fitter):
    """Refuse settings that no search can run with."""
    if fitter not in FITTERS:
        raise ValueError(f"`fitter` is {fitter!r}, expected one of {', '.join(FITTERS)}.")
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


def search_batches(
    pipe: DiffusionPipeline,
    conditions: Sequence[Mapping],
    num_samples: int,
    seed: int,
    teacher_steps: int,
    batch_size: int,
    calls: NetworkCalls,
) -> tuple[list[Batch], list[Batch]]:
    """The noises to fit and, a quarter as many, the noises that judge, with the teacher's end points."""
    return tuple(
        make_batches(pipe, conditions, split_seeds(seed, split, count), batch_size, teacher_steps, calls)
        for split, count in ((TRAIN_SEEDS, num_samples), (HELD_OUT_SEEDS, max(1, num_samples // 4)))
    )


def split_seeds(seed: int, split: int, count: int) -> list[int]:
    """Seeds of one split's samples."""
    return [seed * 10**7 + split + k for k in range(count)]


def fit_solver(
    train: Sequence[Batch],
    held_out: Sequence[Batch],
    num_steps: int,
    calls: NetworkCalls,
    max_calls: int,
    log: Callable[[str], None],
) -> SearchedSolver:
    """
    Search in three stages: the node times of an Adams-Bashforth solver, from several grids, on a quarter of the
    samples; everything, from the best of these, on half of them; everything on all.

    Few numbers need few samples, and what the first stages find is near enough for the last to converge: from a
    classical grid, the last alone stalls in a local minimum. Which grid is worth going on from shows after one
    iteration, not before.

    Args:
        train, held_out: Samples to fit and samples that judge.
        num_steps (`int`): N.
        calls: Counts what is spent; what it has counted before belongs to the budget.
        max_calls (`int`): As in `search_solver`.
        log: Is given a line per iteration.

    Returns:
        `SearchedSolver`: The visited one of the smallest error on `held_out`.
    """
    process, prediction_type = train[0].field.process, train[0].field.prediction_type
    quarter, half = (train[: max(1, len(train) // share)] for share in (4, 2))
    family = SolverFamily(process, num_steps, ORDER, offsets=prediction_type != "flow_prediction")
    visited: list[tuple[float, SearchedSolver]] = []

    def loss_on_quarter(vector: np.ndarray) -> float:
        return _error(quarter, family.solver(family.entries(vector)))

    def visit(vector: np.ndarray, line: str):
        solver = family.solver(family.entries(vector))
        visited.append((_error(held_out, solver), solver))
        log(f"{num_steps} steps, {line}: error {visited[-1][0]:.4g} on held-out noises")

    starts = [family.vector(timesteps) for timesteps in _start_grids(process, num_steps)]
    visit(min(starts, key=loss_on_quarter), "classical start")
    moved = [gauss_newton_iteration(family, start, quarter, times_only=True)[0] for start in starts]
    vector, gain = gauss_newton_iteration(family, min(moved, key=loss_on_quarter), quarter, times_only=True)
    visit(vector, "node times")
    vector, gain = gauss_newton_iteration(family, vector, half, times_only=False)
    visit(vector, "everything, half of the noises")
    for iteration in itertools.count(1):
        before = calls.count
        vector, gain = gauss_newton_iteration(family, vector, train, times_only=False)
        visit(vector, f"everything, iteration {iteration}")
        if not gain >= MIN_GAIN or 2 * calls.count - before > max_calls:
            return min(visited, key=lambda pair: pair[0])[1]


def _error(batches: Sequence[Batch], solver: SearchedSolver) -> float:
    return root_mean_square(endpoint_errors(batches, solver))


def _start_grids(process: NoiseProcess, num_steps: int) -> list[np.ndarray]:
    """Timesteps of the grids that a search may start from."""
    if process.kind == "flow_matching":
        return [time_grid(process, num_steps, shift)[0] for shift in (1.0, 1.5, 2.0)]
    return [time_grid(process, num_steps, shift, start=0.9)[0] for shift in (0.35, 0.7)]
