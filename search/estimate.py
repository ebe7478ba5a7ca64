"""What a search would cost, before it is begun."""

import argparse
import math
import time
from collections.abc import Sequence

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from .fit.problem import FEW, SCREENING_STEPS, TEACHER_NOISES
from .fit.strategy import FIRST_NOISES, JUDGES, LATER_NOISES, usual_calls
from .known.baselines import diffusers_schedulers, known_tables
from .known.race import RUNGS
from .launch.progress import IMAGES, MEASURING, TEACHER
from .measure.feature_network import FeatureNetwork
from .measure.image_metrics import seconds_per_image
from .measure.measuring import EVALUATION_BATCH_SIZE, EVALUATION_TEACHER
from .pipeline.field import NetworkCalls, PipelineField
from .teacher.batches import make_batches
from .teacher.memory import peak_memory
from .teacher.splits import split_seeds


TIMED_STEPS = 16


def estimate(
    pipe: DiffusionPipeline,
    conditions: Sequence[dict],
    args: argparse.Namespace,
    network: FeatureNetwork | None = None,
) -> str:
    """
    Network calls, minutes and memory of a search and of its measurement, from a few timed calls of the pipeline.

    Args:
        args: The command line of `search/run.py`.
        network (*optional*): What images are compared by.

    Returns:
        `str`: Lines for the terminal.
    """
    seconds, elements = _time_calls(pipe, conditions, args.batch_size)
    seconds_measuring, _ = _time_calls(pipe, conditions, EVALUATION_BATCH_SIZE)
    expected = expected_calls(pipe, conditions, args)
    costs = {stage: n * (seconds_measuring if stage == MEASURING else seconds) for stage, n in expected.items()}
    if network is not None:
        each = seconds_per_image(pipe, conditions[0], args.batch_size, network)
        costs[IMAGES] += args.image_metrics * each * (1 + len(args.num_steps) * _num_solvers(pipe))
    processes = PartialState().num_processes
    lines = [f"{stage}: {n:,} network calls, {_duration(costs[stage] / processes)}" for stage, n in expected.items()]
    in_all = _duration(sum(costs.values()) / processes)
    lines.append(f"in all: {in_all} on {processes} process{'es' * (processes > 1)}")
    if not args.evaluate_only and args.fitter == "gauss-newton" and args.max_calls is None:
        lines.append("twice as many to search if a few noises turn out to be much harder than others")
    memory = peak_memory(pipe.device) / 2**20
    if args.fitter == "gradient":
        return "\n".join([*lines, f"peak memory: {memory:,.0f} MiB, and what the network keeps for its gradient"])
    columns = max(n * (n + 1) // 2 + 2 * n for n in args.num_steps)
    scales = len({condition.get("guidance_scale") for condition in conditions})
    states = columns * math.ceil(scales * LATER_NOISES / processes) + 2 * args.teacher_steps * args.batch_size
    held = 4 * elements * states / 2**20
    lines.append(f"peak memory: {memory + held:,.0f} MiB, {memory:,.0f} for sampling and {held:,.0f} for derivatives")
    return "\n".join(lines)


def expected_calls(pipe: DiffusionPipeline, conditions: Sequence[dict], args: argparse.Namespace) -> dict[str, int]:
    """Network calls of all processes for the teacher, the search for each number of steps, and the measurement."""
    calls = NetworkCalls(pipe)
    PipelineField(pipe, conditions[0], [0], calls).close()
    calls.remove()
    per_sample, expected = calls.count, {}
    if not args.evaluate_only:
        scales = len({condition.get("guidance_scale") for condition in conditions})
        expected |= _search_calls(pipe, args, per_sample, scales)
    expected[MEASURING] = per_sample * _measuring_evaluations(pipe, args)
    if args.image_metrics:
        # To decode an image ends a call of the pipeline, and the next one has to be opened.
        each = sum(num_steps + 1 for num_steps in args.num_steps) * _num_solvers(pipe)
        expected[IMAGES] = per_sample * args.image_metrics * (EVALUATION_TEACHER * args.teacher_steps + 1 + each)
    return expected


def _time_calls(pipe: DiffusionPipeline, conditions: Sequence[dict], batch_size: int) -> tuple[float, int]:
    """Seconds of one network call, and elements of a sample's state."""
    calls = NetworkCalls(pipe)
    opening, started = 0, 0.0

    def skip_opening(samples: int):
        nonlocal opening, started
        opening, started = opening or samples, started or time.perf_counter()

    calls.on_call = skip_opening
    (batch, *others) = make_batches(pipe, conditions, split_seeds(0, 0, batch_size), batch_size, TIMED_STEPS, calls)
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    elements = sum(each.field.noise.numel() for each in (batch, *others)) // batch_size
    for each in (batch, *others):
        each.field.close()
    calls.remove()
    return seconds / (calls.count - opening), elements


def _search_calls(pipe, args: argparse.Namespace, per_sample: int, scales: int) -> dict[str, int]:
    """Network calls until the teacher is good enough, and for every step count, which spends what it may."""
    few = FEW * 2 * SCREENING_STEPS + TEACHER_NOISES * (1.5 * args.teacher_steps + 3 * max(args.num_steps))
    shared = scales * args.teacher_steps * (FIRST_NOISES + LATER_NOISES)
    expected, known = {TEACHER: int(per_sample * few)}, few
    for num_steps in args.num_steps:
        if args.fitter == "gradient":
            # One opens the pipeline's call, and a backward evaluation is worth two forward ones.
            each = args.teacher_steps + 1 + num_steps + 2 * (num_steps - 1)
            calls = per_sample * (
                args.num_samples * each + shared + known_evaluations(pipe.scheduler.config, num_steps)
            )
        else:
            budget = scales * usual_calls(num_steps) if args.max_calls is None else args.max_calls
            calls = budget - per_sample * known
        expected[f"{num_steps} steps"] = max(0, int(calls))
        # The noises of the first step count are there for the others.
        known = few + shared
    return expected


def known_evaluations(config, num_steps: int) -> int:
    """Evaluations of the race of known tables, and of judging the best."""
    tables = len(known_tables(config, num_steps))
    noises, raced = 0, 0.0
    for count, share in RUNGS:
        raced, noises = raced + share * tables * (count - noises), count
    # Of every run, the first two predictions are mostly shared.
    return int(raced * max(1, num_steps - 1.5)) + 4 * JUDGES * num_steps


def _measuring_evaluations(pipe: DiffusionPipeline, args: argparse.Namespace) -> int:
    """Evaluations of one sample that `measure` makes."""
    tuning = args.evaluate_only and args.solver is not None
    samples = args.num_eval_samples + (RUNGS[-1][0] if tuning else 0)
    evaluations = EVALUATION_TEACHER * args.teacher_steps * samples
    for num_steps in args.num_steps:
        # Solvers share their first predictions.
        evaluations += int((num_steps - 0.5) * args.num_eval_samples * _num_solvers(pipe))
        evaluations += known_evaluations(pipe.scheduler.config, num_steps) if tuning else 0
    return evaluations


def _num_solvers(pipe: DiffusionPipeline) -> int:
    """The searched one, the best classical table and each of diffusers' families."""
    return 2 + len(diffusers_schedulers(pipe.scheduler.config))


def _duration(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
