"""The teacher: a many-step run of the same pipeline, whose end points the searched solver has to reach."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from diffusers_searched_solver import NoiseProcess, SearchedSolver, time_grid
from diffusers_searched_solver.process import log_snr_grid

from .field import NetworkCalls, PipelineField, merge_conditions
from .rollout import Batch, rollout


def teacher_solver(process: NoiseProcess, num_steps: int) -> SearchedSolver:
    """Adams-Bashforth of order 3 on velocities, on the grid where it converges fastest for the process."""
    grid = time_grid if process.kind == "flow_matching" else log_snr_grid
    return SearchedSolver.adams_bashforth(*grid(process, num_steps), "velocity", order=3)


def make_batches(
    pipe: DiffusionPipeline,
    conditions: Sequence[Mapping],
    seeds: Sequence[int],
    batch_size: int,
    teacher_steps: int,
    calls: NetworkCalls,
) -> list[Batch]:
    """
    Samples with the teacher's end points.

    Args:
        pipe: The pipeline to search for.
        conditions: Keyword arguments of a call that makes one sample each; used in turn.
        seeds: One for each sample.
        batch_size (`int`): Samples of one pipeline call at most; conditions that cannot share a call get their own.
        teacher_steps (`int`): Steps of the teacher, at least 3.
        calls: Counts the network calls.

    Returns:
        `list[Batch]`: In the order of the seeds, except that samples with different call arguments are apart.
    """
    batches = []
    for call_kwargs, batch_seeds in _calls(conditions, seeds, batch_size):
        field = PipelineField(pipe, call_kwargs, batch_seeds, calls)
        end = rollout(field, teacher_solver(field.process, teacher_steps)).end
        if not torch.isfinite(end).all():
            raise ValueError(
                f"The teacher's end point for seeds {batch_seeds} is not finite. Run the pipeline's network in "
                "float32, or make sure that its own scheduler gives images with these arguments."
            )
        batches.append(Batch(field, end))
    return batches


def _calls(conditions: Sequence[Mapping], seeds: Sequence[int], batch_size: int):
    """Keyword arguments and seeds of each pipeline call."""
    pending: list[tuple[dict, list[int]]] = []
    for i, seed in enumerate(seeds):
        condition = conditions[i % len(conditions)]
        for k, (merged, merged_seeds) in enumerate(pending):
            if len(merged_seeds) < batch_size and (joined := merge_conditions(merged, condition)) is not None:
                pending[k] = (joined, [*merged_seeds, seed])
                break
        else:
            pending.append((dict(condition), [seed]))
    return pending
