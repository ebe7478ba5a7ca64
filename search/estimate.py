"""What a whole run will take, before it is begun: every stage says its own, here it is added up."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver.rivals import diffusers_schedulers

from .fit.budget import judging_evaluations, search_bytes, shared_evaluations, usual_calls
from .fit.problem import HEAVY_CALLS, calls_per_evaluation, setup_evaluations
from .gradient.recipe import Recipe, recipe_evaluations
from .launch.network_calls import NetworkCalls
from .launch.progress import DRAWING, IMAGES, MEASURING, TEACHER
from .measure.feature_network import FeatureNetwork
from .measure.image_metrics import image_evaluations, seconds_per_image
from .measure.measuring import FINER, measuring_evaluations
from .pipeline.conditions import one_of_each
from .pipeline.readying import device_of
from .results.images import drawing_evaluations
from .results.output import GRID_SAMPLES
from .settings import Settings
from .teacher.batches import Teacher
from .teacher.memory import peak_memory


# Steps of a timed run, and samples of a small one.
TIMED_STEPS, FEW = 16, 2
# Of what tensors hold, what a process on the CPU does, because its allocator keeps what is freed between others:
# `tests/large.py` shows 1.5 to 2.2 times as much.
KEPT_ON_CPU = 2.2


def expected_calls(pipe: DiffusionPipeline, conditions: Sequence[Mapping], settings: Settings) -> dict[str, int]:
    """Network calls of all processes for the teacher, the search for each number of steps, and what follows."""
    calls = NetworkCalls(pipe)
    per_sample = calls_per_evaluation(pipe, conditions, calls)
    calls.remove()
    config = pipe.scheduler.config
    expected = {} if settings.evaluate_only else _search_calls(config, conditions, settings, per_sample)
    full = settings.measure == "full"
    measuring_steps = (FINER if full else 1) * settings.teacher_steps
    steps = settings.num_steps
    solvers = 2 + len(diffusers_schedulers(config))
    later = {MEASURING: 0, IMAGES: 0, DRAWING: 0}
    if settings.measure != "none":
        how = settings.teacher_steps, full, settings.num_eval_samples, settings.batch_size
        later[MEASURING] = measuring_evaluations(config, steps, *how)
        later[DRAWING] = drawing_evaluations(min(GRID_SAMPLES, len(conditions)), steps, measuring_steps)
        later[IMAGES] = image_evaluations(settings.image_metrics, measuring_steps, steps, solvers)
    return expected | {stage: int(per_sample * n) for stage, n in later.items()}


def estimate(
    pipe: DiffusionPipeline,
    conditions: Sequence[Mapping],
    settings: Settings,
    expected: Mapping[str, int],
    network: FeatureNetwork | None = None,
) -> str:
    """
    Network calls, minutes and memory of a whole run, from a few timed calls of the pipeline.

    Args:
        settings: Of the run.
        expected: As `expected_calls` has them.
        network (*optional*): What images are compared by.

    Returns:
        `str`: Lines for the terminal.
    """
    timed = _time_calls(pipe, conditions, settings.batch_size)
    # The first noises of a search, which serve most often, are in calls of one and two; later calls are full.
    searching = (timed.seconds + _time_calls(pipe, conditions, min(settings.batch_size, FEW)).seconds) / 2
    per_call = {stage: timed.seconds for stage in (MEASURING, IMAGES, DRAWING)}
    seconds = {stage: n * per_call.get(stage, searching) for stage, n in expected.items()}
    if network is not None:
        each = seconds_per_image(pipe, conditions[0], settings.batch_size, network)
        solvers = 2 + len(diffusers_schedulers(pipe.scheduler.config))
        seconds[IMAGES] += settings.image_metrics * each * (1 + len(settings.num_steps) * solvers)
    processes = PartialState().num_processes
    # One process draws while the others wait.
    shares = {stage: n if stage == DRAWING else n / processes for stage, n in seconds.items()}
    lines = [f"{stage}: {n:,} network calls, {_duration(shares[stage])}" for stage, n in expected.items() if n]
    lines.append(
        f"in all: {sum(expected.values()):,} network calls, {_duration(sum(shares.values()))} on {processes} "
        f"process{'es' * (processes > 1)}"
    )
    if not settings.evaluate_only and settings.fitter == "gauss-newton" and settings.max_calls is None:
        lines.append(f"{HEAVY_CALLS:g} times as many to search if a few noises turn out to be much harder than others")
    return "\n".join([*lines, _memory(pipe, conditions, settings, timed.elements)])


@dataclass(frozen=True)
class _Timed:
    """Seconds of one network call, and elements of a sample's state."""

    seconds: float
    elements: int


def _memory(pipe: DiffusionPipeline, conditions: Sequence[Mapping], settings: Settings, elements: int) -> str:
    sampling = peak_memory(device_of(pipe)) / 2**20
    if settings.evaluate_only:
        return f"peak memory: {sampling:,.0f} MiB"
    if settings.fitter == "gradient":
        return f"peak memory: {sampling:,.0f} MiB, and what the network keeps for its gradient"
    scales = len(one_of_each(conditions)), PartialState().num_processes
    sizes = settings.num_steps, elements, settings.batch_size, *scales
    kept = KEPT_ON_CPU if device_of(pipe).type == "cpu" else 1.0
    held, most = (kept * search_bytes(*sizes, heavy) / 2**20 for heavy in (False, True))
    return (
        f"peak memory: {sampling + held:,.0f} MiB, {sampling:,.0f} for sampling and {held:,.0f} to search, or "
        f"{most:,.0f} if a few noises are much harder than others"
    )


def _time_calls(pipe: DiffusionPipeline, conditions: Sequence[Mapping], batch_size: int) -> _Timed:
    calls = NetworkCalls(pipe)
    opening, started = 0, 0.0

    def skip_opening(samples: int):
        nonlocal opening, started
        opening, started = opening or samples, started or time.perf_counter()

    calls.on_call = skip_opening
    variants = one_of_each(conditions)
    seeds = range(batch_size * len(variants))
    batches = Teacher(pipe, TIMED_STEPS, batch_size, calls).batches(variants, seeds)
    if device_of(pipe).type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    elements = sum(each.field.shape.numel() for each in batches) // len(seeds)
    for each in batches:
        each.field.close()
    calls.remove()
    return _Timed(seconds / (calls.count - opening), elements)


def _search_calls(
    config: Mapping, conditions: Sequence[Mapping], settings: Settings, per_sample: float
) -> dict[str, int]:
    """Network calls until the teacher is good enough, and for every step count, which spends what it may."""
    setup, scales = setup_evaluations(settings.teacher_steps, max(settings.num_steps)), len(one_of_each(conditions))
    shared = scales * shared_evaluations(settings.teacher_steps)
    expected, known = {TEACHER: int(per_sample * setup)}, setup
    for num_steps in settings.num_steps:
        if settings.fitter == "gradient":
            recipe = Recipe(num_samples=settings.num_samples, teacher_steps=settings.teacher_steps)
            evaluations = recipe_evaluations(recipe, num_steps) + judging_evaluations(config, num_steps)
            calls = per_sample * (evaluations + (shared if known == setup else 0))
        else:
            budget = scales * usual_calls(num_steps) if settings.max_calls is None else settings.max_calls
            calls = budget - per_sample * known
        expected[f"{num_steps} steps"] = max(0, int(calls))
        # The noises of the first step count are there for the others.
        known = setup + shared
    return expected


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.{0 if seconds >= 600 else 1}f} min"
