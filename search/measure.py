"""The measurement of a finished search, on noises that it has not seen."""

import argparse
import logging
from collections.abc import Mapping

from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolver, process_from_config
from diffusers_searched_solver.check import teacher_solver

from .baselines import classical_solvers
from .cache import TeacherCache
from .evaluate import compare, format_table, samplers
from .feature_network import FeatureNetwork
from .field import NetworkCalls
from .image_metrics import COLUMNS, format_metrics, measure_images
from .progress import IMAGES, MEASURING, Progress
from .rollout import Batch, rollout, root_mean_square, sample_errors
from .strategy import EVALUATION_SEEDS, TUNING_SEEDS, split_seeds
from .teacher import make_batches
from .trajectory import compare_trajectories, teacher_trajectory


logger = logging.getLogger(__name__)

TUNING_SAMPLES = 16
EVALUATION_BATCH_SIZE = 32
# The measuring teacher is this much finer than the one that is fitted to.
EVALUATION_TEACHER = 2
# The share of a solver's error that the teacher's own may have before it matters.
TEACHER_SHARE = 0.1


def measure(
    pipe: DiffusionPipeline,
    conditions: list[dict],
    solvers: dict[int, SearchedSolver],
    args: argparse.Namespace,
    network: FeatureNetwork | None,
    progress: Progress,
) -> dict:
    """
    The `evaluation` of a report: rows of `compare` and of `compare_trajectories` for each step count, also printed.

    Every process measures its part of the samples; the trajectories are the main process's alone.

    Args:
        network (*optional*): What `measure_images` compares images by; without it, it does not.
    """
    teacher_steps = EVALUATION_TEACHER * args.teacher_steps
    results, trajectories = {}, {}
    progress.begin(MEASURING)
    calls = NetworkCalls(pipe, progress.update)
    tuning, evaluation = (
        make_batches(
            pipe,
            conditions,
            split_seeds(args.seed, split, count),
            EVALUATION_BATCH_SIZE,
            teacher_steps,
            calls,
            TeacherCache(args.cache_dir),
        )
        for split, count in ((TUNING_SEEDS, TUNING_SAMPLES), (EVALUATION_SEEDS, args.num_eval_samples))
    )
    for num_steps, solver in solvers.items():
        results[str(num_steps)] = compare(solver, pipe.scheduler.config, tuning, evaluation)
        progress.write(
            f"\n{num_steps} steps, distance to the teacher's end on {args.num_eval_samples} held-out noises\n"
            + format_table(results[str(num_steps)])
        )
    found = {"num_samples": args.num_eval_samples, "teacher_steps": teacher_steps, "results": results}
    if PartialState().is_main_process:
        found["teacher_error"] = _teacher_error(evaluation[0], args.teacher_steps, results)
        trajectories = _trajectories(pipe, solvers, results, evaluation[0], teacher_steps)
    for batch in [*tuning, *evaluation]:
        batch.field.close()
    if network is not None:
        progress.begin(IMAGES)
        rivals = {n: samplers(solver, pipe.scheduler.config, results[str(n)]) for n, solver in solvers.items()}
        found["image_metrics"] = measure_images(pipe, conditions, rivals, network, teacher_steps, args, calls)
        for num_steps, rows in found["image_metrics"].get("results", {}).items():
            progress.write(f"\n{num_steps} steps, {args.image_metrics} images\n{format_metrics(rows)}")
    calls.remove()
    return {**found, "trajectories": trajectories}


def final_numbers(evaluation: Mapping) -> dict[str, float]:
    """The numbers of a report's `evaluation`, by names for trackers."""
    tables = (evaluation["results"], evaluation.get("image_metrics", {}).get("results", {}))
    rows = [(n, row) for table in tables for n, of_steps in table.items() for row in of_steps]
    names = ("endpoint_error", *COLUMNS)
    return {f"{n} steps/{name}/{row['solver']}": row[name] for n, row in rows for name in names if name in row}


def _trajectories(pipe, solvers, results, batch: Batch, teacher_steps: int) -> dict[str, list[dict]]:
    process = process_from_config(pipe.scheduler.config)
    teacher = teacher_trajectory(batch, teacher_steps)
    trajectories = {}
    for num_steps, solver in solvers.items():
        setting = next(row["setting"] for row in results[str(num_steps)] if row["solver"] == "classical table")
        classical = classical_solvers(process, num_steps)[setting]
        trajectories[str(num_steps)] = compare_trajectories(solver, classical, batch, teacher)
    return trajectories


def _teacher_error(batch: Batch, teacher_steps: int, results: dict[str, list[dict]]) -> float:
    """How far the fitted teacher ends from the measuring one, on one batch."""
    end = rollout(batch.field, teacher_solver(batch.field.process, teacher_steps)).end
    error = root_mean_square(sample_errors(end, batch.target))
    least = min(row["endpoint_error"] for rows in results.values() for row in rows)
    if error > TEACHER_SHARE * least:
        logger.warning(
            f"The teacher's own error is {error:.3g}, the least of a solver {least:.3g}: the solver may be fitted to "
            f"the teacher's mistakes. Search again with `--teacher-steps {2 * teacher_steps}`."
        )
    return error
