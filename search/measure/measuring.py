"""The measurement of a finished search, on noises that it has not seen."""

import argparse
import logging
from collections.abc import Mapping

from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolver
from diffusers_searched_solver.check import teacher_solver

from ..known.baselines import CLASSICAL, KnownTable, known_tables
from ..known.race import best_of_families, race
from ..launch.progress import IMAGES, MEASURING, Progress
from ..pipeline.field import NetworkCalls
from ..pipeline.rollout import Batch, rollout, root_mean_square, sample_errors
from ..teacher.batches import TEACHER_SHARE, make_batches
from ..teacher.cache import TeacherCache
from ..teacher.noises import portion_end
from ..teacher.splits import EVALUATION_SEEDS, TUNING_SEEDS, make_noises, split_seeds
from .evaluate import SEARCHED, compare, format_table, samplers
from .feature_network import FeatureNetwork
from .image_metrics import COLUMNS, format_metrics, measure_images
from .trajectory import compare_trajectories, teacher_trajectory


logger = logging.getLogger(__name__)

EVALUATION_BATCH_SIZE = 32
# The measuring teacher is this much finer than the one that is fitted to.
EVALUATION_TEACHER = 2
# A search makes its teacher's error a tenth of a usual solver's, as far as a few noises show; on others it may be so
# many times as large before it is said.
TEACHER_MARGIN = 2


def measure(
    pipe: DiffusionPipeline,
    conditions: list[dict],
    solvers: dict[int, SearchedSolver],
    tuned: Mapping[int, Mapping[str, KnownTable]] | None,
    teacher_steps: int,
    args: argparse.Namespace,
    network: FeatureNetwork | None,
    progress: Progress,
) -> dict:
    """
    The `evaluation` of a report: rows of `compare` and of `compare_trajectories` for each step count, also printed.

    Every process measures its part of the samples; the trajectories are the main process's alone.

    Args:
        tuned: By number of steps the best of each family of known tables, as the race of a search has found it;
            without it they race on noises of their own.
        teacher_steps (`int`): Of the teacher that solvers were fitted to; the one that measures is finer.
        network (*optional*): What `measure_images` compares images by; without it, it does not.
    """
    fitted_steps, teacher_steps = teacher_steps, EVALUATION_TEACHER * teacher_steps
    results, trajectories = {}, {}
    progress.begin(MEASURING)
    calls, cache = NetworkCalls(pipe, progress.update), TeacherCache(args.cache_dir)
    settings = EVALUATION_BATCH_SIZE, teacher_steps, calls, cache
    if tuned is None:
        tuned = _tuned(pipe, conditions, solvers, args.seed, settings)
    seeds = split_seeds(args.seed, EVALUATION_SEEDS, args.num_eval_samples)
    evaluation = make_batches(pipe, conditions, seeds, *settings)
    for num_steps, solver in solvers.items():
        results[str(num_steps)] = compare(solver, tuned[num_steps], evaluation)
        progress.write(
            f"\n{num_steps} steps, distance to the teacher's end on {args.num_eval_samples} held-out noises\n"
            + format_table(results[str(num_steps)])
        )
    found = {"num_samples": args.num_eval_samples, "teacher_steps": teacher_steps, "results": results}
    if PartialState().is_main_process:
        found["teacher_error"] = _teacher_error(evaluation[0], fitted_steps, results)
        teacher = teacher_trajectory(evaluation[0], teacher_steps)
        for num_steps, solver in solvers.items():
            classical = tuned[num_steps][CLASSICAL].solver
            trajectories[str(num_steps)] = compare_trajectories(solver, classical, evaluation[0], teacher)
    for batch in evaluation:
        batch.field.close()
    if network is not None:
        progress.begin(IMAGES)
        rivals = {n: samplers(solver, tuned[n]) for n, solver in solvers.items()}
        found["image_metrics"] = measure_images(pipe, conditions, rivals, network, teacher_steps, args, calls)
        for num_steps, rows in found["image_metrics"].get("results", {}).items():
            progress.write(f"\n{num_steps} steps, {args.image_metrics} images\n{format_metrics(rows)}")
    calls.remove()
    return {**found, "trajectories": trajectories}


def _tuned(pipe, conditions, solvers, seed: int, settings) -> dict[int, dict[str, KnownTable]]:
    """The best of each family of known tables, found on noises that nothing else is measured on."""
    batch_size, teacher_steps, calls, cache = settings
    noises = make_noises(pipe, conditions, seed, TUNING_SEEDS, teacher_steps, batch_size, calls, cache)
    standings = {
        n: race(known_tables(pipe.scheduler.config, n), noises, portion_end, lambda compute: compute())
        for n in solvers
    }
    noises.close()
    return {n: best_of_families(each) for n, each in standings.items()}


def final_numbers(evaluation: Mapping) -> dict[str, float]:
    """The numbers of a report's `evaluation`, by names for trackers."""
    tables = (evaluation["results"], evaluation.get("image_metrics", {}).get("results", {}))
    rows = [(n, row) for table in tables for n, of_steps in table.items() for row in of_steps]
    names = ("endpoint_error", *COLUMNS)
    return {f"{n} steps/{name}/{row['solver']}": row[name] for n, row in rows for name in names if name in row}


def _teacher_error(batch: Batch, teacher_steps: int, results: dict[str, list[dict]]) -> float:
    """How far the fitted teacher ends from the measuring one, on one batch."""
    end = rollout(batch.field, teacher_solver(batch.field.process, teacher_steps)).end
    error = root_mean_square(sample_errors(end, batch.target))
    least = min(row["endpoint_error"] for rows in results.values() for row in rows if row["solver"] != SEARCHED)
    if error > TEACHER_MARGIN * TEACHER_SHARE * least:
        logger.warning(
            f"The teacher's own error is {error:.3g}, the least of a rival {least:.3g}: the solver may be fitted to "
            f"the teacher's mistakes. Search again with `--teacher-steps {2 * teacher_steps}`."
        )
    return error
