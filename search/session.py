"""One search as the command line asks for it, by either fitter."""

import argparse
import functools
import time
from collections.abc import Callable, Iterator

from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolver

from .cache import TeacherCache, content_key
from .differentiable_network import DifferentiableNetwork
from .field import NetworkCalls, PipelineField
from .gradient import Recipe, fit_by_gradient, recipe_teacher
from .journal import Journal
from .memory import inference_memory, peak_memory
from .output import write_solvers
from .progress import TEACHER, Finding, Progress
from .strategy import TRAIN_SEEDS, Problem, fit_solver, search_problem, split_seeds


# Updates of the gradient fitter from one line to the next.
UPDATES_PER_LINE = 50


def run_search(
    pipe: DiffusionPipeline,
    conditions: list[dict],
    args: argparse.Namespace,
    calls: NetworkCalls,
    journal: Journal,
    progress: Progress,
) -> tuple[dict[int, SearchedSolver], dict]:
    """
    Search a solver for each step count; in `args.output_dir` are ever better ones meanwhile.

    Returns:
        The solvers by number of steps, and the `search` of a report, i.e. what it cost.
    """
    solvers, costs, problem = {}, {}, None
    memory = inference_memory(pipe, conditions[0], args.batch_size)
    calls.on_call = progress.update
    started = time.perf_counter()
    if args.fitter == "gauss-newton":
        progress.begin(TEACHER)
        problem = _problem(pipe, conditions, args, calls)
        journal.check(problem.fingerprint())
        sizes = {"iterations": args.iterations, "max_calls": args.max_calls}
        fit = functools.partial(fit_solver, problem, journal=journal, tell=progress.found, **sizes)
    else:
        journal.check(_fingerprint(pipe, conditions[0], args, calls))
        fit = functools.partial(_fit_by_gradient, pipe, conditions, args, calls, journal, progress.found)
    teacher_calls = problem.teacher_calls if problem else 0
    teacher_seconds = time.perf_counter() - started
    for num_steps in args.num_steps:
        progress.begin(f"{num_steps} steps")
        before, started = journal.spent, time.perf_counter()
        for solver in fit(num_steps=num_steps):
            if solver is not solvers.get(num_steps):
                solvers[num_steps] = solver
                if PartialState().is_main_process:
                    write_solvers(pipe, solvers, args.output_dir, {"base_model": args.pipeline})
        costs[str(num_steps)] = {
            "network_calls": teacher_calls + journal.spent - before,
            "seconds": round(time.perf_counter() - started + teacher_seconds, 2),
        }
    calls.remove()
    if problem:
        problem.close()
    return solvers, {
        "fitter": args.fitter,
        "num_samples": args.num_samples,
        "teacher_steps": args.teacher_steps,
        "teacher_network_calls": teacher_calls,
        "cost_with_teacher": costs,
        "peak_memory_over_inference": peak_memory(pipe.device) / memory,
    }


def _problem(pipe, conditions, args, calls) -> Problem:
    cache = TeacherCache(args.cache_dir)
    sizes = args.num_samples, args.seed, args.teacher_steps, args.batch_size
    return search_problem(pipe, conditions, *sizes, calls, cache)


def _fingerprint(pipe, condition: dict, args, calls) -> str:
    """What the network makes of the first noise."""
    field = PipelineField(pipe, condition, split_seeds(args.seed, TRAIN_SEEDS, 1), calls)
    fingerprint = content_key(field, recipe_teacher(field.process, args.teacher_steps))
    field.close()
    return fingerprint


def _fit_by_gradient(
    pipe, conditions, args, calls, journal: Journal, tell: Callable[[Finding], None], num_steps: int
) -> Iterator[SearchedSolver]:
    first_seed = split_seeds(args.seed, TRAIN_SEEDS, 1)[0]
    network = DifferentiableNetwork(pipe, conditions, args.batch_size, calls, first_seed)
    recipe = Recipe(num_samples=args.num_samples, teacher_steps=args.teacher_steps)
    updates = fit_by_gradient([network], num_steps, recipe, journal.remember)
    before = journal.spent
    for update, iteration in enumerate(updates, 1):
        if update % UPDATES_PER_LINE == 0:
            numbers = {"loss": iteration.loss, "network calls": journal.spent - before}
            tell(Finding(num_steps, f"{iteration.num_samples:,} noises", numbers))
        yield iteration.solver
