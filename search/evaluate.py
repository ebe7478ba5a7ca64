"""Measuring solvers side by side: same noise, same network calls, every baseline at its best setting."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from diffusers_searched_solver import NoiseProcess, SearchedSolver, process_from_config

from .baselines import classical_solvers, diffusers_schedulers, run_scheduler
from .field import PipelineField
from .processes import gather
from .rollout import Batch, rollout, root_mean_square, sample_errors


BOOTSTRAP_DRAWS = 2000
# From a field to where a solver ends.
Sampler = Callable[[PipelineField], torch.Tensor]


def compare(
    solver: SearchedSolver, scheduler_config: Mapping, tuning: Sequence[Batch], evaluation: Sequence[Batch]
) -> list[dict]:
    """
    Errors of a searched solver and of every baseline, at equal network calls.

    Each baseline is a family of schedulers; the setting that is best on `tuning` is measured on `evaluation`.

    Args:
        solver: The searched one.
        scheduler_config: Of the pipeline's own scheduler.
        tuning, evaluation: This process's batches of different noises, with the teacher's end points.

    Returns:
        One row a family, best first: `solver`, `setting`, `endpoint_error` (root mean square over samples),
        `error_interval`, its 95 % bootstrap interval over samples, `median_error`, and, but for the searched one,
        `ratio` of the searched error to this, with its `ratio_interval`.
    """
    num_steps, process = solver.num_steps, process_from_config(scheduler_config)
    searched = _errors(evaluation, _sampler(solver))
    rows = [_row("searched", "", searched)]
    for family, settings in _families(scheduler_config, process, num_steps).items():
        best = min(settings, key=lambda name: root_mean_square(_errors(tuning, settings[name])))
        errors = _errors(evaluation, settings[best])
        rows.append({**_row(family, best, errors), **_ratio(searched, errors)})
    return sorted(rows, key=lambda row: row["endpoint_error"])


def samplers(solver: SearchedSolver, scheduler_config: Mapping, rows: Sequence[Mapping]) -> dict[str, Sampler]:
    """The searched solver and each baseline at its best setting, by the names in rows of `compare`."""
    families = _families(scheduler_config, process_from_config(scheduler_config), solver.num_steps)
    families["searched"] = {"": _sampler(solver)}
    return {row["solver"]: families[row["solver"]][row["setting"]] for row in rows}


def _errors(batches: Sequence[Batch], run: Sampler) -> torch.Tensor:
    """The error of every sample of all processes at the end of a run, one after another."""
    errors = []
    for batch in batches:
        noise, count = batch.field.noise, len(batch.field.seeds)
        errors.append(sample_errors(run(batch.field), batch.target).cpu())
        # DiTPipeline's states hold every sample twice under guidance: one of them is evidence enough.
        if len(noise) == 2 * count and torch.equal(noise[:count], noise[count:]):
            errors[-1] = errors[-1][:count]
    return torch.cat(gather(batches, errors))


def _families(scheduler_config: Mapping, process: NoiseProcess, num_steps: int) -> dict[str, dict[str, Sampler]]:
    """Each baseline at every setting."""

    def of_scheduler(scheduler):
        return lambda field: run_scheduler(field, scheduler, num_steps)

    families = {
        name: {setting: of_scheduler(scheduler) for setting, scheduler in settings.items()}
        for name, settings in diffusers_schedulers(scheduler_config).items()
    }
    tables = classical_solvers(process, num_steps)
    return {**families, "classical table": {name: _sampler(table) for name, table in tables.items()}}


def _sampler(solver: SearchedSolver) -> Sampler:
    return lambda field: rollout(field, solver).end


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
