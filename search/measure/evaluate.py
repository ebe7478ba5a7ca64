"""Measuring solvers side by side: same noise, same network calls, every baseline at its best setting."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from diffusers_searched_solver import SearchedSolver

from ..known.baselines import CLASSICAL, KnownTable
from ..known.contest import Contest, interval, resampled_means
from ..known.race import race_errors
from ..launch.processes import gather
from ..pipeline.rollout import Batch, root_mean_square


SEARCHED = "searched"


def compare(solver: SearchedSolver, tuned: Mapping[str, KnownTable], evaluation: Sequence[Batch]) -> list[dict]:
    """
    Errors of a searched solver and of every baseline, at equal network calls.

    Args:
        solver: The searched one.
        tuned: Of each family of known tables, the one at its best setting, found on other noises.
        evaluation: This process's batches, with the teacher's end points.

    Returns:
        One row a family, best first: `solver`, `setting`, `endpoint_error` (root mean square over samples),
        `error_interval`, its 95 % bootstrap interval over samples, `median_error`, and, but for the searched one, the
        searched solver against it: `ratio` of errors with its `ratio_interval`, `geometric_mean` of the samples'
        ratios with its `geometric_mean_interval`, the share of samples that end `nearer`, and that of the `worst`.
    """
    tables = list(tuned.values())
    searched, *others = _errors(evaluation, [solver, *(table.solver for table in tables)])
    rows = [_row(SEARCHED, "", searched)]
    for table, errors in zip(tables, others, strict=True):
        rows.append({**_row(table.family, table.setting, errors), **vars(Contest.of(searched, errors))})
    return sorted(rows, key=lambda row: row["endpoint_error"])


def samplers(solver: SearchedSolver, tuned: Mapping[str, KnownTable]) -> dict[str, SearchedSolver]:
    """The searched solver and each baseline at its best setting, by the names in rows of `compare`."""
    return {SEARCHED: solver, **{family: table.solver for family, table in tuned.items()}}


def _errors(batches: Sequence[Batch], solvers: Sequence[SearchedSolver]) -> torch.Tensor:
    """The error of every solver on every sample of all processes, shape (solvers, samples)."""
    found = []
    for batch in batches:
        noise, count = batch.field.noise, len(batch.field.seeds)
        errors = race_errors(batch, solvers)
        # DiTPipeline's states hold every sample twice under guidance: one of them is evidence enough.
        twice = len(noise) == 2 * count and torch.equal(noise[:count], noise[count:])
        found.append(errors[:, :count] if twice else errors)
    return torch.cat(gather(batches, found), 1)


def _row(solver: str, setting: str, errors: torch.Tensor) -> dict:
    return {
        "solver": solver,
        "setting": setting,
        "endpoint_error": root_mean_square(errors),
        "error_interval": list(interval(np.sqrt(resampled_means(errors.square().numpy())))),
        "median_error": float(errors.median()),
    }


def is_diffusers_scheduler(row: Mapping) -> bool:
    """Whether a row of `compare` is one of diffusers' schedulers."""
    return row["solver"] not in (SEARCHED, CLASSICAL)


def format_table(rows: Sequence[Mapping]) -> str:
    """The rows of `compare` as a table for the terminal."""
    means = "searched / this (95 %), geometric mean, nearer, worst"
    lines = [f"{'solver':18}{'best setting':34}{'error':>9}{'median':>9}  {means}"]
    for row in rows:
        line = f"{row['solver']:18}{row['setting']:34}{row['endpoint_error']:9.4f}{row['median_error']:9.4f}"
        if "ratio" in row:
            line += f"  {row['ratio']:.3f} ({row['ratio_interval'][0]:.3f} to {row['ratio_interval'][1]:.3f})"
            line += f", {row['geometric_mean']:.3f}, {row['nearer']:.0%}, {row['worst']:.1f}"
        lines.append(line)
    return "\n".join(lines)
