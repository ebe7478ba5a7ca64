"""One search as the command line asks for it, by either fitter."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolver

from .fit.parameters import FRAME
from .fit.problem import Problem, search_problem
from .fit.strategy import Outcome, default_calls, fit_solver, judge_solver
from .gradient.differentiable_network import DifferentiableNetwork
from .gradient.recipe import Recipe, fit_by_gradient, recipe_teacher
from .launch.journal import Journal
from .launch.progress import TEACHER, Finding, Progress
from .pipeline.field import NetworkCalls, PipelineField
from .results.output import write_solvers
from .teacher.cache import TeacherCache, content_key
from .teacher.memory import inference_memory, peak_memory
from .teacher.splits import TRAIN_SEEDS, split_seeds


# Updates of the gradient fitter from one line to the next.
UPDATES_PER_LINE = 50


def run_search(
    pipe: DiffusionPipeline,
    conditions: list[dict],
    args: argparse.Namespace,
    given: Mapping[int, SearchedSolver],
    calls: NetworkCalls,
    journal: Journal,
    progress: Progress,
) -> tuple[dict[int, Outcome], dict]:
    """
    Search a solver for each step count; in `args.output_dir` are ever better ones meanwhile.

    Args:
        given: Solvers to begin from, by number of steps.

    Returns:
        The outcomes by number of steps, and the `search` of a report, i.e. what they cost and are worth.
    """
    outcomes, costs = {}, {}
    memory = inference_memory(pipe, conditions[0], args.batch_size)
    calls.on_call = progress.update
    progress.begin(TEACHER)
    if args.fitter == "gradient":
        journal.check(_fingerprint(pipe, conditions[0], args, calls))
    started = time.perf_counter()
    settings = args.seed, args.teacher_steps, args.batch_size, calls, TeacherCache(args.cache_dir)
    problem = search_problem(pipe, conditions, args.num_steps, *settings)
    if args.fitter == "gauss-newton":
        journal.check(problem.fingerprint())
    seconds = time.perf_counter() - started
    for num_steps in args.num_steps:
        progress.begin(f"{num_steps} steps")
        before, started = journal.spent, time.perf_counter()
        if args.fitter == "gauss-newton":
            found = {n: outcome.solver for n, outcome in outcomes.items()}
            budget = default_calls(problem, num_steps) if args.max_calls is None else args.max_calls
            steps = fit_solver(problem, num_steps, budget, journal, progress.found, {**found, **given})
        else:
            steps = _fit_by_gradient(pipe, conditions, args, calls, problem, journal, progress.found, num_steps)
        for outcome in steps:
            if num_steps not in outcomes or outcome.solver is not outcomes[num_steps].solver:
                outcomes[num_steps] = outcome
                if PartialState().is_main_process:
                    solvers = {n: outcome.solver for n, outcome in outcomes.items()}
                    write_solvers(pipe, solvers, args.output_dir, {"base_model": args.pipeline})
            outcomes[num_steps] = outcome
        progress.write(outcomes[num_steps].verdict)
        costs[str(num_steps)] = {
            "network_calls": problem.calls + journal.spent - before,
            "seconds": round(time.perf_counter() - started + seconds, 2),
        }
    calls.remove()
    problem.close()
    return outcomes, {
        "fitter": args.fitter,
        "num_samples": problem.train.made if args.fitter == "gauss-newton" else args.num_samples,
        "teacher_steps": problem.teacher_steps,
        "least_teacher_steps": args.teacher_steps,
        "teacher_network_calls": problem.calls,
        "hard_noises": problem.heavy,
        "verdicts": {str(n): outcome.verdict for n, outcome in outcomes.items()},
        "improved": {str(n): outcome.improved for n, outcome in outcomes.items()},
        "tuned": {str(n): {f: table.setting for f, table in o.tuned.items()} for n, o in outcomes.items()},
        "cost_with_teacher": costs,
        "peak_memory_over_inference": peak_memory(pipe.device) / memory,
    }


def _fingerprint(pipe, condition: dict, args, calls) -> str:
    """What the network makes of the first noise."""
    field = PipelineField(pipe, condition, split_seeds(args.seed, TRAIN_SEEDS, 1), calls)
    fingerprint = content_key(field, recipe_teacher(field.process, args.teacher_steps))
    field.close()
    return fingerprint


def _fit_by_gradient(
    pipe, conditions, args, calls, problem: Problem, journal: Journal, tell: Callable[[Finding], None], num_steps: int
) -> Iterator[Outcome]:
    first_seed = split_seeds(args.seed, TRAIN_SEEDS, 1)[0]
    network = DifferentiableNetwork(pipe, conditions, args.batch_size, calls, first_seed)
    recipe = Recipe(num_samples=args.num_samples, teacher_steps=args.teacher_steps)
    updates = fit_by_gradient([network], num_steps, recipe, journal.remember)
    before = journal.spent
    for update, iteration in enumerate(updates, 1):
        if update % UPDATES_PER_LINE == 0:
            numbers = {"loss": iteration.loss, "network calls": journal.spent - before}
            tell(Finding(num_steps, f"{iteration.num_samples:,} noises", numbers))
    solver = replace(iteration.solver.in_frame(FRAME), consistent=False)
    yield judge_solver(problem, solver, journal, tell)
