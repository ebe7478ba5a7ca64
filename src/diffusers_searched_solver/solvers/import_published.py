"""
Turn the paper's published tables into the solver files that ship with the package.

    cd src/diffusers_searched_solver/solvers
    python import_published.py ../../../tests/fixtures/paper_tables.json .

The tables are rounded to four decimals, so their step sizes sum to 0.9999 to 1.0002. They are divided by that sum, so
that the nodes end exactly where the process ends. The diagonal, 1 minus the sum of the row, is filled in.

The flow tables combine velocities on t from 0 (noise) to 1 (data). The DiT table combines data predictions on the
continuous variance-preserving process

    log alpha(t) = -(19.9 t^2 / 4 + 0.1 t / 2),   alpha^2 + sigma^2 = 1,   t from 0.999 down, not below 0.001

so its nodes end at sigma = 0.0105, and it differs from diffusers' 1000 betas from 1e-4 to 0.02 by up to 0.4 % in sigma
at equal timesteps; its nodes are kept, and diffusers' betas are named as its process.

Source: Wang et al., "Differentiable Solver Search for Fast Diffusion Sampling", arXiv 2505.21114, appendix J; released
under the MIT licence as MCG-NJU/NeuralSolver.
"""

import json
import sys
from pathlib import Path

import numpy as np

from diffusers_searched_solver import (
    FlowMatching,
    SearchedSolver,
    SearchedSolverScheduler,
    SolverFile,
    VariancePreserving,
)


MODELS = {
    "dit-xl-2-256": "facebook/DiT-XL-2-256",
    "sit-xl-2-256": "SiT-XL/2 256x256",
    "flowdcn-b-2-256": "FlowDCN-B/2 256x256",
}


def import_table(table: dict, variance_preserving: bool) -> SearchedSolver:
    """One published table (`step_sizes`, `coefficients_below_diagonal`) as a solver."""
    step_sizes = np.array(table["step_sizes"])
    elapsed = np.append(0, np.cumsum(step_sizes / step_sizes.sum()))
    elapsed[-1] = 1
    coefficients = np.array(table["coefficients_below_diagonal"])
    coefficients = coefficients + np.diag(1 - coefficients.sum(1))
    if not variance_preserving:
        return SearchedSolver(1000 * (1 - elapsed[:-1]), elapsed, 1 - elapsed, coefficients, "velocity")
    times = np.maximum(0.999 - elapsed, 0.001)
    log_alphas = -(19.9 * times**2 / 4 + 0.1 * times / 2)
    alphas, sigmas = np.exp(log_alphas), np.sqrt(-np.expm1(2 * log_alphas))
    return SearchedSolver(1000 * times[:-1], alphas, sigmas, coefficients, "data")


def main(tables: Path, output: Path):
    for name, by_steps in json.loads(tables.read_text())["tables"].items():
        variance_preserving = name.startswith("dit")
        process = VariancePreserving() if variance_preserving else FlowMatching()
        prediction_type = "epsilon" if variance_preserving else "flow_prediction"
        solvers = {int(n): import_table(table, variance_preserving) for n, table in by_steps.items()}
        provenance = {
            "base_model": MODELS[name],
            "method": "Differentiable Solver Search (arXiv 2505.21114), tables published by its authors",
            "teacher": "100 steps of DDIM" if variance_preserving else "100 steps of Euler",
            "guidance_scale": "1.0",
            "resolution": "256",
            "license": "mit",
        }
        file = SolverFile(solvers, process, prediction_type, provenance)
        SearchedSolverScheduler.from_config({"prediction_type": prediction_type}, solver=file).save_pretrained(
            output / name
        )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
