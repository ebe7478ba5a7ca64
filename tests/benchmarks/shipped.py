"""What the benchmarks of the search share: the shipped pipelines, noises that no search has seen, rows on disk."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging
from huggingface_hub import cached_assets_path

from diffusers_searched_solver import SearchedSolver, process_from_config
from diffusers_searched_solver.calls import build_conditions
from search.fit.budget import default_calls
from search.fit.problem import Problem, search_problem
from search.fit.strategy import fit_solver
from search.known.baselines import classical_solvers, diffusers_schedulers, run_scheduler
from search.launch.journal import Journal
from search.pipeline.field import NetworkCalls
from search.pipeline.loading import load_pipeline
from search.pipeline.rollout import Batch, endpoint_errors, root_mean_square, sample_errors
from search.teacher.batches import BATCH_SIZE, TEACHER_STEPS, Teacher
from search.teacher.cache import TeacherCache
from search.teacher.splits import EVALUATION_SEEDS, TUNING_SEEDS, split_seeds


EXAMPLES = Path(__file__).parents[2] / "examples"
PIPELINES = "digits-dit", "digits-sit"
STEP_COUNTS = 5, 8, 10
SEEDS = 0, 1, 2
HALVES = tuple(range(5)), tuple(range(5, 10))
CLASSES = HALVES[0] + HALVES[1]
NUM_TUNING, NUM_HELD_OUT = 32, 512
MEASURING_STEPS, MEASURING_BATCH = 128, 64


class Benchmark:
    """
    A shipped pipeline at one guidance scale, or for several.

    The held-out noises and the teacher's end points are the same for every solver that is measured.

    Args:
        name (`str`): One of `PIPELINES`.
        guidance_scale: Of searches and measurements; one or several.
        classes: What searches sample, in turn, and what the best setting of a rival is found on.
        held_out: Of `HALVES`, what solvers are measured on.
        dtype: Of the networks.
        change: What is done to the pipeline first.

    Attributes:
        calls (`NetworkCalls`): What searches spend; measurements are counted elsewhere.
    """

    def __init__(
        self,
        name: str,
        guidance_scale: float | Sequence[float],
        classes: Sequence[int] = CLASSES,
        held_out: Sequence[Sequence[int]] = HALVES,
        dtype: torch.dtype = torch.float32,
        change: Callable[[DiffusionPipeline], None] = lambda pipe: None,
    ):
        torch.set_num_threads(1)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.pipe = load_pipeline(str(EXAMPLES / name), dtype, torch.device("cpu"))
        change(self.pipe)
        self.guidance_scale, self.classes, self._halves = guidance_scale, classes, held_out
        self.calls, self._measuring_calls = NetworkCalls(self.pipe), NetworkCalls(self.pipe)
        self._cache = TeacherCache(cached_assets_path("diffusers_searched_solver", "benchmarks", "teacher"))
        self._problems: dict[int, Problem] = {}

    def conditions(self, classes: Sequence[int]) -> list[dict]:
        """Keyword arguments of the calls that make one sample each."""
        return build_conditions(self.pipe, [str(label) for label in classes], None, self.guidance_scale, {})

    def problem(self, seed: int) -> Problem:
        """What a search with default settings fits."""
        if seed not in self._problems:
            teacher = Teacher(self.pipe, TEACHER_STEPS, BATCH_SIZE, self.calls, self._cache)
            self._problems[seed] = search_problem(teacher, self.conditions(self.classes), STEP_COUNTS, seed)
        return self._problems[seed].anew()

    @cached_property
    def tuning(self) -> list[Batch]:
        """On which the best setting of a rival is found."""
        return self._batches(self.classes, split_seeds(0, TUNING_SEEDS, NUM_TUNING))

    @cached_property
    def held_out(self) -> list[Batch]:
        """Each half of the classes has noises of its own."""
        seeds = torch.tensor(split_seeds(0, EVALUATION_SEEDS, NUM_HELD_OUT)).chunk(len(HALVES))
        batches = [self._batches(half, seeds[HALVES.index(half)].tolist()) for half in self._halves]
        return [batch for of_half in batches for batch in of_half]

    def _batches(self, classes: Sequence[int], seeds: Sequence[int]) -> list[Batch]:
        teacher = Teacher(self.pipe, MEASURING_STEPS, MEASURING_BATCH, self._measuring_calls, self._cache)
        return teacher.batches(self.conditions(classes), seeds)

    def measure(self, solver: SearchedSolver) -> dict:
        """A solver's error on the held-out noises: the root mean square over them, the median and the worst."""
        errors = endpoint_errors(self.held_out, solver)
        worst = float(errors.max())
        return {"error": root_mean_square(errors), "median_error": float(errors.median()), "worst_error": worst}

    def curve(self, problem: Problem, solvers: Iterator[SearchedSolver]) -> list[dict]:
        """Held-out error against network calls, as a search goes on; the teacher's are included."""
        start, points, last = self.calls.count - problem.calls, [], None  # but for noises
        for solver in solvers:
            if solver is not last:
                last, found = solver, self.measure(solver)
            spent = self.calls.count - problem.calls - start
            points.append({"calls": problem.charged + spent, **found})
        return points

    def best_scheduler(self, num_steps: int, prefix: str = "") -> dict:
        """The error of diffusers' best scheduler and setting, among the families whose names begin with `prefix`."""
        families = diffusers_schedulers(self.pipe.scheduler.config).items()
        named = [(f"{family}, {name}", s) for family, settings in families for name, s in settings.items()]
        runs = {name: scheduler for name, scheduler in named if name.startswith(prefix)}
        best = min(runs, key=lambda name: scheduler_error(self.tuning, runs[name], num_steps))
        return {"setting": best, "error": scheduler_error(self.held_out, runs[best], num_steps)}

    def best_classical(self, num_steps: int) -> dict:
        """The error of the best Adams-Bashforth table."""
        tables = classical_solvers(process_from_config(self.pipe.scheduler.config), num_steps)
        best = min(tables, key=lambda name: root_mean_square(endpoint_errors(self.tuning, tables[name])))
        return {"setting": best, **self.measure(tables[best])}

    def own_scheduler(self, num_steps: int) -> dict:
        """The error of the pipeline's own scheduler as it is."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        return {"setting": type(scheduler).__name__, "error": scheduler_error(self.held_out, scheduler, num_steps)}

    def close(self):
        """End the pipeline's calls."""
        for problem in self._problems.values():
            problem.close()
        for batch in [*vars(self).get("tuning", []), *vars(self).get("held_out", [])]:
            batch.field.close()


def search(
    problem: Problem, num_steps: int, calls: NetworkCalls, budget: float = 1.0, **settings
) -> Iterator[SearchedSolver]:
    """The search with default settings, or as many times the usual calls."""
    max_calls = int(budget * default_calls(problem, num_steps))
    for outcome in fit_solver(problem, num_steps, max_calls, Journal(calls), **settings):
        yield outcome.solver


def scheduler_error(batches: Sequence[Batch], scheduler: SchedulerMixin, num_steps: int) -> float:
    """Of one of diffusers' schedulers."""
    ends = [run_scheduler(batch.field, scheduler, num_steps) for batch in batches]
    return root_mean_square(torch.cat([sample_errors(end, b.target) for end, b in zip(ends, batches, strict=True)]))


class Records:
    """
    Rows of a benchmark in `examples/results/NAME.json`. One that is there already is not measured again.

    Args:
        name (`str`): Of the benchmark's script, too.
    """

    def __init__(self, name: str):
        self._path = EXAMPLES / "results" / f"{name}.json"
        self.command = f"python tests/benchmarks/{name}.py"
        self.rows: list[dict] = json.loads(self._path.read_text())["rows"] if self._path.exists() else []

    def add(self, measure: Callable[[], Mapping], **key):
        """Add what `measure` finds as the row of a key, and write, unless there is one."""
        if not self.select(**key):
            self.rows.append({**key, **measure()})
            lines = ",\n".join(json.dumps(row) for row in self.rows)
            self._path.write_text(f'{{"command": {json.dumps(self.command)}, "rows": [\n{lines}\n]}}\n')
            print(lines.splitlines()[-1][:160], flush=True)

    def select(self, **key) -> list[dict]:
        """The rows that have all of a key's values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def write_tables(self, sections: Iterable[str]):
        """Write `examples/results/NAME.md`, and print it."""
        text = "\n\n".join([f"Made by `{self.command}`.", *sections]) + "\n"
        self._path.with_suffix(".md").write_text(text)
        print(text)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """The mean over seeds and, if there are several, the least and the largest."""
    values = sorted(values)
    shown = [f"{value:,.{digits}f}" for value in (sum(values) / len(values), values[0], values[-1])]
    return shown[0] if len(values) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"
