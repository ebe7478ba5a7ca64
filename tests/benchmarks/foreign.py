"""
The search on networks that nobody here has trained: held-out errors over those of the best of diffusers.

    PYTHONPATH=FOLDER python tests/benchmarks/foreign.py hsc32 ztf32

where FOLDER has a module `galaxies` with a function `pipeline(name)`, which makes a pipeline of a network by its name,
for instance of those that the package galaxygrad carries. Each network is searched for 5 and 8 steps with three seeds
and default settings, and measured on 128 noises that no search has, by a teacher of 256 steps. The rival is the one of
all schedulers and settings of diffusers that is best on these very noises. Some 10 minutes a network of 32 x 32 pixels
on one core. Nothing is written but what is printed.
"""

import argparse
import importlib

import numpy as np
import torch
from diffusers.utils import logging
from huggingface_hub import cached_assets_path
from shipped import SEEDS, markdown

from search.fit.budget import default_calls
from search.fit.problem import search_problem
from search.fit.strategy import fit_solver
from search.known.baselines import known_tables
from search.known.contest import Contest
from search.known.race import table_errors
from search.launch.journal import Journal
from search.pipeline.field import NetworkCalls
from search.teacher.batches import BATCH_SIZE, TEACHER_STEPS, Teacher
from search.teacher.cache import TeacherCache
from search.teacher.splits import EVALUATION_SEEDS, split_seeds


STEP_COUNTS = 5, 8
HELD_OUT, MEASURING_STEPS, MEASURING_BATCH = 128, 256, 32


def measure(name: str, make_pipeline, step_counts, seeds) -> list[list[str]]:
    """A row for each step count and seed, and one of their means."""
    pipe, rows = make_pipeline(name), []
    calls = NetworkCalls(pipe)
    cache = TeacherCache(cached_assets_path("diffusers_searched_solver", "benchmarks", "teacher"))
    held_out = split_seeds(0, EVALUATION_SEEDS, HELD_OUT)
    held_out = Teacher(pipe, MEASURING_STEPS, MEASURING_BATCH, calls, cache).batches([{}], held_out)
    teacher = Teacher(pipe, TEACHER_STEPS, BATCH_SIZE, calls, cache)
    problems = [search_problem(teacher, [{}], step_counts, seed) for seed in seeds]
    for num_steps in step_counts:
        schedulers = [each for each in known_tables(pipe.scheduler.config, num_steps) if each.from_diffusers]
        errors = table_errors(held_out, [each.solver for each in schedulers])
        best = int(errors.square().mean(1).nan_to_num(np.inf).argmin())
        contests = []
        for seed, problem in zip(seeds, [each.anew() for each in problems], strict=True):
            journal = Journal(calls)
            *_, outcome = fit_solver(problem, num_steps, default_calls(problem, num_steps), journal)
            spent = problem.charged + journal.spent
            (found,) = table_errors(held_out, [outcome.solver])
            contests.append(Contest.of(found, errors[best]))
            row = [f"{name}, {num_steps}, seed {seed}", str(schedulers[best]), *_cells(contests[-1]), f"{spent:,}"]
            rows.append([*row, "improved" if outcome.improved else "as known"])
            print(" | ".join(rows[-1]), flush=True)
        means = [f"{np.mean([getattr(c, key) for c in contests]):.2f}" for key in ("ratio", "geometric_mean")]
        rows.append([f"{name}, {num_steps}, mean", str(schedulers[best]), *means, "", "", "", ""])
    for problem in problems:
        problem.close()
    calls.remove()
    return rows


def _cells(contest: Contest) -> list[str]:
    means = [
        f"{mean:.2f} ({low:.2f} to {high:.2f})"
        for mean, (low, high) in (
            (contest.ratio, contest.ratio_interval),
            (contest.geometric_mean, contest.geometric_mean_interval),
        )
    ]
    return [*means, f"{contest.nearer:.0%}", f"{contest.worst:.1f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="of networks")
    parser.add_argument("--num-steps", type=int, nargs="+", default=STEP_COUNTS, help="default: 5 8")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    make_pipeline = importlib.import_module("galaxies").pipeline
    header = [
        "network, N",
        "best of diffusers",
        "ratio (95 %)",
        "geometric mean (95 %)",
        "nearer",
        "worst",
        "calls",
        "",
    ]
    rows = [row for name in args.names for row in measure(name, make_pipeline, args.num_steps, args.seeds)]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
