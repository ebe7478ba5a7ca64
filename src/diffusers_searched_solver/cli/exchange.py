"""The commands that merge solvers, and that write them for programs that are not diffusers."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..merging import merge_solver_files
from ..scheduler import SearchedSolverScheduler
from ..serialization import SolverFile, save_solver_file, write_whole
from ..solver import SearchedSolver
from .solvers import load, load_scheduler, table_of


def merge(options: argparse.Namespace):
    first, second = load(options.first), load(options.second)
    prefer = {None: None, "A": "first", "B": "second"}[options.prefer]
    file = merge_solver_files(first, second, prefer)
    if os.path.isfile(options.first):
        save_solver_file(file, options.output)
    else:
        scheduler = load_scheduler(options.first)
        SearchedSolverScheduler.from_config(scheduler.config, solver=file).save_pretrained(options.output)
    print(f"Wrote {options.output}: {', '.join(map(str, file.step_counts))} steps.")


def export(options: argparse.Namespace):
    file = load(options.name)
    counts = options.num_steps or file.step_counts
    text = FORMATS[options.to](file, {n: table_of(options.name, file, n) for n in counts})
    if options.output is None:
        sys.stdout.write(text)
    else:
        write_whole(Path(options.output), text.encode())
        print(f"Wrote {options.output}: {', '.join(map(str, counts))} steps.")


def _as_json(file: SolverFile, solvers: dict[int, SearchedSolver]) -> str:
    """Each step as the numbers that a plain loop needs; the loop is in `search/README.md`."""
    exported = {"prediction_type": file.prediction_type, "process": str(file.process), "solvers": {}}
    for n, solver in solvers.items():
        rows = solver.update_table(file.prediction_type).tolist()
        exported["solvers"][str(n)] = {
            "sigmas": solver.sigmas.tolist(),
            "alphas": solver.alphas.tolist(),
            "steps": [
                {"timestep": float(t), "from_state": u, "from_output": w, "state": a, "predictions": b[: i + 1]}
                for i, (t, (u, w, a, *b)) in enumerate(zip(solver.timesteps, rows, strict=True))
            ],
        }
    return json.dumps(exported, indent=1) + "\n"


def _as_sigmas(file: SolverFile, solvers: dict[int, SearchedSolver], line: Callable[[np.ndarray], str]) -> str:
    """Noise levels as k-diffusion counts them: sigma / alpha, and sigma itself on a flow."""
    lines = [
        "# Noise levels alone: another program's sampler runs its own coefficients on them, which is less than the",
        "# searched solver. Its coefficients are in the velocity frame or the data frame (noise - data, or data) of:",
        f"# {file.process}, {file.prediction_type}",
    ]
    for n, solver in solvers.items():
        levels = solver.sigmas / (1.0 if file.process.kind == "flow_matching" else solver.alphas)
        lines += [f"# {n} steps", line(levels), f"# coefficients, {solver.frame} frame, one step a line"]
        lines += ["#   " + " ".join(f"{c:.6g}" for c in row[: i + 1]) for i, row in enumerate(solver.coefficients)]
    return "\n".join(lines) + "\n"


FORMATS = {
    "json": _as_json,
    # A list for `sample_*(model, x, sigmas)`.
    "k-diffusion": lambda file, solvers: _as_sigmas(
        file, solvers, lambda levels: f"sigmas = torch.tensor({[round(float(level), 6) for level in levels]})"
    ),
    # What its nodes that take sigmas as text read.
    "comfyui": lambda file, solvers: _as_sigmas(
        file, solvers, lambda levels: ", ".join(f"{level:.6g}" for level in levels)
    ),
}
