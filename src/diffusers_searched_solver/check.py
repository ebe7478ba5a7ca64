"""Whether a solver is good for a pipeline: its errors beside those of the pipeline's own scheduler."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging

from .grids import log_snr_grid, time_grid
from .process import NoiseProcess
from .scheduler import SearchedSolverScheduler
from .serialization import SolverFile
from .solver import SearchedSolver
from .trial import check_arguments, recorded_steps, schedule_for, try_call, undecoded


logger = logging.get_logger(__name__)

REFERENCE_STEPS = 64
# With fewer samples no outcome is beyond `DOUBT`: four coins show four heads once in 16 throws.
MIN_SAMPLES = 5
DOUBT = 0.05


@dataclass(frozen=True)
class Comparison:
    """
    How far a searched solver and a pipeline's own scheduler end from the reference, in the same number of steps.

    Args:
        num_steps (`int`): The steps of both.
        searched, own (`np.ndarray`, shape (samples,)): Root mean square distance of each sample's end to the
            reference's end from the same noise.
    """

    num_steps: int
    searched: np.ndarray
    own: np.ndarray

    @property
    def ratio(self) -> float:
        """The searched solver's error (root mean square over samples) as a share of the own scheduler's."""
        with np.errstate(all="ignore"):
            return float(np.sqrt(np.mean(self.searched**2) / np.mean(self.own**2)))

    @property
    def wins(self) -> int:
        """On how many samples the searched solver ends nearer."""
        return int((self.searched < self.own).sum())

    @property
    def is_better(self) -> bool:
        """Whether the searched solver's error is smaller, and on more samples than by chance (a sign test)."""
        samples = len(self.own)
        chance = sum(math.comb(samples, wins) for wins in range(self.wins, samples + 1)) / 2**samples
        return self.ratio < 1 and chance <= DOUBT


def check_solver(
    pipe: DiffusionPipeline,
    solver: SolverFile,
    calls: Sequence[Mapping],
    num_steps: Sequence[int] | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> list[Comparison]:
    """
    Measure a solver on a pipeline as it is: fine-tuned, quantised, with a LoRA, at any guidance and resolution.

    Each sample is drawn by the pipeline's ordinary call, from the same noise, with a reference of 64 steps, with the
    pipeline's own scheduler and with the solver.

    Args:
        pipe (`DiffusionPipeline`): Has its own scheduler again afterwards.
        solver (`SolverFile`): Such as `SearchedSolverScheduler.from_pretrained(...).solver_file`.
        calls: Keyword arguments of the pipeline's call for one sample each, at least five: conditions, guidance scale
            and so on.
        num_steps (*optional*): Some of `solver.step_counts`; all of them by default.
        on_step (*optional*): Is called after every step of the pipeline.

    Returns:
        `list[Comparison]`: One for each step count.

    Raises:
        ValueError: If there are too few samples, the solver has no such step count or is for another kind of noise
            process, or the reference is not finite.
        UnsuitableCallError: If the pipeline's call would not run the solver, or not all of it; found out in one call
            before all others.
    """
    if len(calls) < MIN_SAMPLES:
        raise ValueError(f"There are {len(calls)} samples, expected at least {MIN_SAMPLES} to tell skill from chance.")
    own = pipe.scheduler
    searched = SearchedSolverScheduler.from_config(own.config, solver=solver)
    teacher = teacher_solver(searched.process, REFERENCE_STEPS)
    reference = SearchedSolverScheduler.from_config(own.config, solver=teacher)
    for count in (errors := {count: ([], []) for count in num_steps or solver.step_counts}):
        searched.set_timesteps(count)  # Raises early if there is none.
    for call in calls:
        check_arguments(pipe, call)
    argument = try_call(pipe, calls[0], min(errors)).schedule_argument

    def table_end(scheduler: SearchedSolverScheduler, count: int, call: Mapping, seed: int) -> torch.Tensor:
        scheduler.set_timesteps(count)
        more = {} if argument is None else {argument: schedule_for(argument, scheduler.timesteps.tolist())}
        return _end(pipe, scheduler, {**call, **more}, count, seed, on_step)

    for seed, call in enumerate(calls):
        target = table_end(reference, REFERENCE_STEPS, call, seed)
        if not torch.isfinite(target).all():
            raise ValueError(
                f"The reference of sample {seed} is not finite. Run the pipeline in float32, or make sure that it "
                "draws a sample with these arguments and its own scheduler."
            )
        for count, of_both in errors.items():
            ends = table_end(searched, count, call, seed), _end(pipe, own, call, count, seed, on_step)
            for found, end in zip(of_both, ends, strict=True):
                found.append(_distance(end, target))
        if seed == 0:
            limit = _distance(_end(pipe, own, call, REFERENCE_STEPS, seed, on_step), target)
            _warn_unless_below(limit, min(found[-1] for _, found in errors.values()), own)
    return [Comparison(count, *map(np.array, of_both)) for count, of_both in errors.items()]


def count_steps(num_steps: Sequence[int], num_samples: int) -> int:
    """How many steps of the pipeline [`check_solver`] takes."""
    return REFERENCE_STEPS + num_samples * (REFERENCE_STEPS + 2 * sum(num_steps))


def teacher_solver(process: NoiseProcess, num_steps: int) -> SearchedSolver:
    """Adams-Bashforth of order 3 on velocities, on the grid where it converges fastest for the process."""
    grid = time_grid if process.kind == "flow_matching" else log_snr_grid
    return SearchedSolver.adams_bashforth(*grid(process, num_steps), "velocity", order=3)


def _end(pipe, scheduler: SchedulerMixin, call: Mapping, num_steps: int, seed: int, on_step) -> torch.Tensor:
    """The state that the pipeline's call ends at with a scheduler."""
    last = []

    def see(output, sample, next_sample):
        last[:] = [next_sample]
        on_step()

    generator = torch.Generator("cpu").manual_seed(seed)
    with recorded_steps(pipe, scheduler, see):
        pipe(**undecoded(pipe, call), num_inference_steps=num_steps, generator=generator)
    return last[0].float().cpu()


def _distance(end: torch.Tensor, target: torch.Tensor) -> float:
    return (end - target).square().mean().sqrt().item()


def _warn_unless_below(limit: float, error: float, own: SchedulerMixin):
    if not limit < error:
        logger.warning(
            f"The pipeline's {type(own).__name__} ends {limit:.3g} from the reference in {REFERENCE_STEPS} steps, no "
            f"nearer than in fewer ({error:.3g}): it draws noise, or solves another equation. Its errors tell little; "
            "look at images as well."
        )
