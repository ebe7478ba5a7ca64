"""What a whole run will take, before it is begun: every stage says its own, here it is added up."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver.rivals import diffusers_schedulers

from .fit.budget import allowed_calls, judging_evaluations, search_bytes, shared_evaluations
from .fit.demands import HEAVY_CALLS, Demands
from .fit.problem import setup_evaluations
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


def expected_calls(demands: Demands, conditions: Sequence[Mapping], settings: Settings) -> dict[str, int]:
    """Network calls of all processes for the teacher, the search for each number of steps, and what follows."""
    config, per_sample = demands.config, demands.calls_per_evaluation
    expected = {} if settings.evaluate_only else _search_calls(demands, settings)
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
    demands: Demands,
    expected: Mapping[str, int],
    network: FeatureNetwork | None = None,
) -> str:
    """
    Network calls, minutes and memory of a whole run, from a few timed calls of the pipeline.

    Args:
        settings, demands: Of the run.
        expected: As `expected_calls` has them.
        network (*optional*): What images are compared by.

    Returns:
        `str`: Lines for the terminal.
    """
    full = _seconds_per_call(pipe, conditions, settings.batch_size)
    # The first noises of a search, which serve most often, are in calls of one and two; later calls are full.
    searching = (full + _seconds_per_call(pipe, conditions, min(settings.batch_size, FEW))) / 2
    per_call = {stage: full for stage in (MEASURING, IMAGES, DRAWING)}
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
    return "\n".join([*lines, _memory(device_of(pipe), settings, demands)])


def _memory(device: torch.device, settings: Settings, demands: Demands) -> str:
    sampling = peak_memory(device) / 2**20
    if settings.evaluate_only:
        return f"peak memory: {sampling:,.0f} MiB"
    if settings.fitter == "gradient":
        return f"peak memory: {sampling:,.0f} MiB, and what the network keeps for its gradient"
    of_run = settings.num_steps, settings.batch_size, PartialState().num_processes
    kept = KEPT_ON_CPU if device.type == "cpu" else 1.0
    uneven = replace(demands, evenness=0.0)
    held, most = (kept * search_bytes(each, *of_run) / 2**20 for each in (demands, uneven))
    return (
        f"peak memory: {sampling + held:,.0f} MiB, {sampling:,.0f} for sampling and {held:,.0f} to search, or "
        f"{most:,.0f} if a few noises are much harder than others"
    )


def _seconds_per_call(pipe: DiffusionPipeline, conditions: Sequence[Mapping], batch_size: int) -> float:
    """Seconds of one network call in batches, once they are opened."""
    calls = NetworkCalls(pipe)
    opening, started = 0, 0.0

    def skip_opening(samples: int):
        nonlocal opening, started
        opening, started = opening or samples, started or time.perf_counter()

    calls.on_call = skip_opening
    variants = one_of_each(conditions)
    batches = Teacher(pipe, TIMED_STEPS, batch_size, calls).batches(variants, range(batch_size * len(variants)))
    if device_of(pipe).type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    for each in batches:
        each.field.close()
    calls.remove()
    return seconds / (calls.count - opening)


def _search_calls(demands: Demands, settings: Settings) -> dict[str, int]:
    """Network calls until the teacher is good enough, and for every step count, which spends what it may."""
    teacher_steps, per_sample = settings.teacher_steps, demands.calls_per_evaluation
    setup = setup_evaluations(teacher_steps, max(settings.num_steps))
    shared = demands.num_variants * shared_evaluations(teacher_steps)
    expected, known = {TEACHER: int(per_sample * setup)}, setup
    for num_steps in settings.num_steps:
        if settings.fitter == "gradient":
            recipe = Recipe(num_samples=settings.num_samples, teacher_steps=teacher_steps)
            evaluations = recipe_evaluations(recipe, num_steps) + judging_evaluations(demands.config, num_steps)
            calls = per_sample * (evaluations + (shared if known == setup else 0))
        else:
            calls = allowed_calls(demands, num_steps, settings.max_calls) - per_sample * known
        expected[f"{num_steps} steps"] = max(0, int(calls))
        # The noises of the first step count are there for the others.
        known = setup + shared
    return expected


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.{0 if seconds >= 600 else 1}f} min"
