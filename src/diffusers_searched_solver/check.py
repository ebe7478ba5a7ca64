"""Whether a solver is good for a pipeline: its errors beside those of the pipeline's own scheduler."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging

from .rivals import diffusers_schedulers
from .scheduler import SearchedSolverScheduler
from .serialization import SolverFile
from .tabulate import solver_from_scheduler
from .teacher import teacher_solver
from .trial import check_arguments, recorded_steps, schedule_for, try_call, undecoded


logger = logging.get_logger(__name__)

REFERENCE_STEPS = 64
# With fewer samples no outcome is beyond `DOUBT`: four coins show four heads once in 16 throws.
MIN_SAMPLES = 5
DOUBT = 0.05
# Noises that no search has fitted a solver to: of every ten million seeds a search uses those below five million.
FIRST_SEED = 9 * 10**6
# So many of those that lead on few noises may be the best on all: in races on the two digits pipelines the best of
# four was on average 0.5 % above the best of diffusers, the winner alone up to 6 %.
FINALISTS = 4


@dataclass(frozen=True)
class Comparison:
    """
    How far a searched solver, a pipeline's own scheduler and the best of diffusers' schedulers end from the reference,
    in the same number of steps.

    Args:
        num_steps (`int`): The steps of all.
        searched, own, best (`np.ndarray`, shape (samples,)): Root mean square distance of each sample's end to the
            reference's end from the same noise.
        best_name (`str`): Which of diffusers' schedulers is the best, at which setting.
    """

    num_steps: int
    searched: np.ndarray
    own: np.ndarray
    best: np.ndarray
    best_name: str

    @property
    def ratio(self) -> float:
        """The searched solver's error (root mean square over samples) as a share of the own scheduler's."""
        return _ratio(self.searched, self.own)

    @property
    def ratio_to_best(self) -> float:
        """The same as a share of the error of the best of diffusers."""
        return _ratio(self.searched, self.best)

    @property
    def wins(self) -> int:
        """On how many samples the searched solver ends nearer than the own scheduler."""
        return int((self.searched < self.own).sum())

    @property
    def is_better(self) -> bool:
        """Whether the searched solver's error is smaller than both, on more samples than by chance (sign tests)."""
        return _is_better(self.searched, self.own) and _is_better(self.searched, self.best)


def _ratio(errors: np.ndarray, others: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.mean(errors**2) / np.mean(others**2)))


def _is_better(errors: np.ndarray, others: np.ndarray) -> bool:
    samples = len(others)
    least = int((errors < others).sum())
    chance = sum(math.comb(samples, wins) for wins in range(least, samples + 1)) / 2**samples
    return _ratio(errors, others) < 1 and chance <= DOUBT


def check_solver(
    pipe: DiffusionPipeline,
    solver: SolverFile,
    calls: Sequence[Mapping],
    num_steps: Sequence[int] | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> list[Comparison]:
    """
    Measure a solver on a pipeline as it is: fine-tuned, quantised, with a LoRA, at any guidance and resolution.

    Each sample is drawn by the pipeline's ordinary call, from the same noise, which no search has seen, with a
    reference of 64 steps, with the pipeline's own scheduler, with the solver, and with the best of diffusers' few-step
    schedulers at all settings: of the four that end nearest from the first noise, the one that is nearest in all.

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

    for sample, call in enumerate(calls):
        seed = FIRST_SEED + sample
        target = table_end(reference, REFERENCE_STEPS, call, seed)
        if not torch.isfinite(target).all():
            raise ValueError(
                f"The reference of sample {sample} is not finite. Run the pipeline in float32, or make sure that it "
                "draws a sample with these arguments and its own scheduler."
            )
        if sample == 0:
            rivals = {count: rival_schedulers(own.config, count) for count in errors}
            of_rivals = {count: {name: [] for name in of_count} for count, of_count in rivals.items()}
        for count, (of_searched, of_own) in errors.items():
            of_searched.append(_distance(table_end(searched, count, call, seed), target))
            of_own.append(_distance(_end(pipe, own, call, count, seed, on_step), target))
            for name, found in of_rivals[count].items():
                found.append(_distance(table_end(rivals[count][name], count, call, seed), target))
        if sample == 0:
            limit = _distance(_end(pipe, own, call, REFERENCE_STEPS, seed, on_step), target)
            _warn_unless_below(limit, min(found[0] for _, found in errors.values()), own)
            of_rivals = {count: dict(_nearest(found)[:FINALISTS]) for count, found in of_rivals.items()}
    best = {count: _nearest(found)[0] for count, found in of_rivals.items()}
    return [
        Comparison(count, *map(np.array, (*of_each, best[count][1])), best[count][0])
        for count, of_each in errors.items()
    ]


def _nearest(errors: Mapping[str, list[float]]) -> list[tuple[str, list[float]]]:
    """Names with errors, the least root mean square first; what is not finite last."""
    return sorted(errors.items(), key=lambda named: np.nan_to_num(np.mean(np.square(named[1])), nan=np.inf))


def rival_schedulers(config: Mapping, num_steps: int) -> dict[str, SearchedSolverScheduler]:
    """diffusers' few-step schedulers for a model at all settings, as tables, by family and setting."""
    found = {}
    for family, settings in diffusers_schedulers(config).items():
        for setting, scheduler in settings.items():
            try:
                table = solver_from_scheduler(scheduler, num_steps)
            except ValueError:
                continue  # whole timesteps may meet
            found[f"{family}, {setting}"] = SearchedSolverScheduler.from_config(config, solver=table)
    return found


def count_steps(config: Mapping, num_steps: Sequence[int], num_samples: int) -> int:
    """How many steps of the pipeline with a scheduler of that config [`check_solver`] takes."""
    rivals = {count: len(rival_schedulers(config, count)) for count in num_steps}
    racing = sum(count * (n + (num_samples - 1) * min(n, FINALISTS)) for count, n in rivals.items())
    return REFERENCE_STEPS + racing + num_samples * (REFERENCE_STEPS + 2 * sum(num_steps))


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
