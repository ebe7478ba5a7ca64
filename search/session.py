"""One search as the command line asks for it, by either fitter."""

import argparse
import functools
import time
from collections.abc import Callable, Iterator

from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffusers_searched_solver import SearchedSolver

from .cache import TeacherCache, content_key
from .differentiable_network import DifferentiableNetwork
from .field import NetworkCalls, PipelineField
from .gradient import Recipe, fit_by_gradient, recipe_teacher
from .journal import Journal
from .output import write_solvers
from .processes import quiet
from .strategy import TRAIN_SEEDS, Problem, fit_solver, search_problem, split_seeds


# Updates of the gradient fitter from one line to the next.
UPDATES_PER_LINE = 50


def run_search(
    pipe: DiffusionPipeline,
    conditions: list[dict],
    args: argparse.Namespace,
    calls: NetworkCalls,
    journal: Journal,
    solvers: dict[int, SearchedSolver],
) -> dict:
    """
    Put a solver for each step count into `solvers`, and into `args.output_dir`, ever better ones while it searches.

    Returns:
        `dict`: The `search` of a report, i.e. what it cost.
    """
    costs, problem = {}, None
    started = time.perf_counter()
    with tqdm(desc="teacher", unit=" calls", disable=quiet(), smoothing=0) as progress:
        calls.on_call = progress.update
        log = progress.write if PartialState().is_main_process else lambda line: None
        if args.fitter == "gauss-newton":
            problem = _problem(pipe, conditions, args, calls)
            journal.check(problem.fingerprint())
            fit = functools.partial(
                fit_solver, problem, iterations=args.iterations, max_calls=args.max_calls, journal=journal, log=log
            )
        else:
            journal.check(_fingerprint(pipe, conditions[0], args, calls))
            fit = functools.partial(_fit_by_gradient, pipe, conditions, args, calls, journal, log)
        teacher_calls = problem.teacher_calls if problem else 0
        teacher_seconds = time.perf_counter() - started
        for num_steps in args.num_steps:
            progress.set_description(f"search, {num_steps} steps")
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
    return {
        "fitter": args.fitter,
        "num_samples": args.num_samples,
        "teacher_steps": args.teacher_steps,
        "teacher_network_calls": teacher_calls,
        "cost_with_teacher": costs,
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
    pipe, conditions, args, calls, journal: Journal, log: Callable[[str], None], num_steps: int
) -> Iterator[SearchedSolver]:
    first_seed = split_seeds(args.seed, TRAIN_SEEDS, 1)[0]
    network = DifferentiableNetwork(pipe, conditions, args.batch_size, calls, first_seed)
    recipe = Recipe(num_samples=args.num_samples, teacher_steps=args.teacher_steps)
    updates = fit_by_gradient([network], num_steps, recipe, journal.remember)
    for update, iteration in enumerate(updates, 1):
        if update % UPDATES_PER_LINE == 0:
            log(f"{num_steps} steps, {iteration.num_samples:,} noises: loss {iteration.loss:.4g}")
        yield iteration.solver
