"""Measuring solvers side by side: same noise, same network calls, every baseline at its best setting."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from diffusers_searched_solver import SearchedSolver

from .baselines import classical_solvers, diffusers_schedulers, run_scheduler
from .rollout import Batch, endpoint_errors, root_mean_square, sample_errors


BOOTSTRAP_DRAWS = 2000


def compare(
    solver: SearchedSolver, scheduler_config: Mapping, tuning: Sequence[Batch], evaluation: Sequence[Batch]
) -> list[dict]:
    """
    Errors of a searched solver and of every baseline, at equal network calls.

    Each baseline is a family of schedulers; the setting that is best on `tuning` is measured on `evaluation`.

    Args:
        solver: The searched one.
        scheduler_config: Of the pipeline's own scheduler.
        tuning, evaluation: Different noises with the teacher's end points.

    Returns:
        One row a family, best first: `solver`, `setting`, `endpoint_error` (root mean square over samples),
        `error_interval`, its 95 % bootstrap interval over samples, `median_error`, and, but for the searched one,
        `ratio` of the searched error to this, with its `ratio_interval`.
    """
    num_steps = solver.num_steps
    searched = endpoint_errors(evaluation, solver)
    rows = [_row("searched", "", searched)]
    for family, settings in _families(scheduler_config, tuning[0], num_steps).items():
        best = min(settings, key=lambda name: root_mean_square(settings[name](tuning)))
        errors = settings[best](evaluation)
        rows.append({**_row(family, best, errors), **_ratio(searched, errors)})
    return sorted(rows, key=lambda row: row["endpoint_error"])


def _families(
    scheduler_config: Mapping, batch: Batch, num_steps: int
) -> dict[str, dict[str, Callable[[Sequence[Batch]], torch.Tensor]]]:
    """For each baseline and setting, a function from batches to the errors of their samples."""

    def of_table(table: SearchedSolver):
        return lambda batches: endpoint_errors(batches, table)

    def of_scheduler(scheduler):
        return lambda batches: torch.cat(
            [sample_errors(run_scheduler(b.field, scheduler, num_steps), b.target) for b in batches]
        )

    families = {
        name: {setting: of_scheduler(scheduler) for setting, scheduler in settings.items()}
        for name, settings in diffusers_schedulers(scheduler_config).items()
    }
    tables = classical_solvers(batch.field.process, num_steps)
    return {**families, "classical table": {name: of_table(table) for name, table in tables.items()}}


def _row(solver: str, setting: str, errors: torch.Tensor) -> dict:
    return {
        "solver": solver,
        "setting": setting,
        "endpoint_error": root_mean_square(errors),
        "error_interval": _interval(np.sqrt(_resampled_mean_squares(errors))),
        "median_error": float(errors.median()),
    }


def _ratio(searched: torch.Tensor, baseline: torch.Tensor) -> dict:
    """The ratio of two solvers' errors on the same samples, and how much it depends on which samples these are."""
    return {
        "ratio": float((searched.square().mean() / baseline.square().mean()).sqrt()),
        "ratio_interval": _interval(np.sqrt(_resampled_mean_squares(searched) / _resampled_mean_squares(baseline))),
    }


def _resampled_mean_squares(errors: torch.Tensor) -> np.ndarray:
    """The mean square of each bootstrap draw; draw k takes the same samples for every solver."""
    squares = errors.square().cpu().numpy()
    draws = np.random.default_rng(0).integers(len(squares), size=(BOOTSTRAP_DRAWS, len(squares)))
    return squares[draws].mean(-1)


def _interval(draws: np.ndarray) -> list[float]:
    """The middle 95 %."""
    return np.quantile(draws, [0.025, 0.975]).tolist()


def is_diffusers_scheduler(row: Mapping) -> bool:
    """Whether a row of `compare` is one of diffusers' schedulers."""
    return row["solver"] not in ("searched", "classical table")


def format_table(rows: Sequence[Mapping]) -> str:
    """The rows of `compare` as a table for the terminal."""
    lines = [f"{'solver':18}{'best setting':34}{'error':>9}{'median':>9}  searched / this (95 %)"]
    for row in rows:
        line = f"{row['solver']:18}{row['setting']:34}{row['endpoint_error']:9.4f}{row['median_error']:9.4f}"
        if "ratio" in row:
            line += f"  {row['ratio']:.3f} ({row['ratio_interval'][0]:.3f} to {row['ratio_interval'][1]:.3f})"
        lines.append(line)
    return "\n".join(lines)
