"""
Step counts that were not searched: errors of derived tables and of what runs without a solver, beside diffusers'.

    python tests/benchmarks/every_step_count.py digits-dit digits-sit

The solver files are those of 5, 8 and 10 steps in `examples/results`, and their 8 steps alone; 32 noises that no
search has, guidance 2, root mean square distance to the end of a teacher of 128 steps. "At defaults" are DDIM or
Euler, DPM-Solver++(2M), UniPC 2 and DEIS 2 with plain spacing, "at best" all settings of `search.known.baselines`;
each column is the best of them on these very noises. A name that is no folder of `examples` is a network of strangers,
as in `foreign.py`, for which 5, 8 and 10 steps are searched first, with seed 0. Five minutes a pipeline on one core,
and ten more to search. Nothing is written but what is printed.
"""

import argparse
import importlib
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging

from diffusers_searched_solver import SearchedSolverScheduler, SolverFile, load_solver_file
from diffusers_searched_solver.schedules import searched_table
from search import find_solver
from search.known.baselines import known_tables
from search.known.race import table_errors
from search.launch.network_calls import NetworkCalls
from search.pipeline.loading import load_pipeline
from search.teacher.batches import Teacher


EXAMPLES = Path(__file__).parents[2] / "examples"
STEP_COUNTS, SEARCHED, ALONE = (4, 6, 7, 9, 10, 11, 12, 16, 20, 30), (5, 8, 10), 8
NOISES, TEACHER_STEPS, FIRST_SEED = 32, 128, 3_005_000
PLAIN = {"shift 1", "linspace", "leading", "trailing"}


def print_rows(name: str):
    if (EXAMPLES / name).is_dir():
        pipe = load_pipeline(str(EXAMPLES / name), torch.float32, torch.device("cpu"))
        conditions = [{"class_labels": [k], "guidance_scale": 2.0} for k in range(10)]
        file = load_solver_file(EXAMPLES / "results" / name / "solver" / "searched_solver.safetensors")
    else:
        pipe, conditions = importlib.import_module("galaxies").pipeline(name), [{}]
        solvers = {n: find_solver(pipe, n, conditions, log=None).solver for n in SEARCHED}
        own = SearchedSolverScheduler.from_config(pipe.scheduler.config)
        file = SolverFile(solvers, own.process, own.config.prediction_type, {})
    calls, seeds = NetworkCalls(pipe), list(range(FIRST_SEED, FIRST_SEED + NOISES))
    batches = Teacher(pipe, TEACHER_STEPS, NOISES, calls).batches(conditions, seeds)
    alone = SolverFile({ALONE: file.solvers[ALONE]}, file.process, file.prediction_type, {})
    classical = SearchedSolverScheduler.from_config(pipe.scheduler.config)
    for num_steps in STEP_COUNTS:
        classical.set_timesteps(num_steps)
        known = [table for table in known_tables(pipe.scheduler.config, num_steps) if table.from_diffusers]
        ours = [searched_table(file, num_steps, strict=False), classical._run.solver]
        if num_steps >= ALONE - 1:
            ours.append(searched_table(alone, num_steps, strict=False))
        errors = table_errors(batches, [*(table.solver for table in known), *ours])
        errors = np.nan_to_num(errors.square().mean(1).sqrt().numpy(), nan=np.inf)
        rivals, (derived, without, *from_one) = np.split(errors, [len(known)])
        plain = [table.setting in PLAIN and "3" not in table.family for table in known]
        figures = derived, from_one[0] if from_one else np.nan, without, rivals[plain].min(), rivals.min()
        best = str(known[int(rivals.argmin())])
        print(" | ".join([f"{name}, {num_steps}", *(f"{figure:.4f}" for figure in figures), best]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    header = [
        "pipeline, steps",
        "derived",
        f"from {ALONE} alone",
        "without a solver",
        "diffusers at defaults",
        "at best",
        "which",
    ]
    print(" | ".join(header))
    for name in parser.parse_args().names:
        print_rows(name)


if __name__ == "__main__":
    main()
