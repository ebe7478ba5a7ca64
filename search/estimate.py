"""What a search would cost, before it is begun."""

import argparse
import math
import time
from collections.abc import Sequence

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolverScheduler, process_from_config, time_grid

from .baselines import classical_solvers, diffusers_schedulers
from .feature_network import FeatureNetwork
from .field import NetworkCalls, PipelineField
from .image_metrics import seconds_per_image
from .measure import EVALUATION_BATCH_SIZE, EVALUATION_TEACHER, TUNING_SAMPLES
from .memory import peak_memory
from .parameters import Entry, SolverFamily
from .progress import IMAGES, MEASURING, TEACHER
from .strategy import make_family, split_seeds, start_grids
from .teacher import count_batches, make_batches


# Steps that searches were seen to try on one Jacobian.
USUAL_TRIALS = 4
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
    memory = peak_memory(pipe.device) / 2**20
    if args.fitter == "gradient":
        return "\n".join([*lines, f"peak memory: {memory:,.0f} MiB, and what the network keeps for its gradient"])
    columns = max(len(_searched(family, times_only=False)) for family in _families(pipe, args))
    states = columns * math.ceil(args.num_samples / processes) + 2 * args.teacher_steps * args.batch_size
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
        samples = args.num_samples + max(1, args.num_samples // 4)
        teacher = 0 if args.fitter == "gradient" else per_sample * samples * args.teacher_steps
        expected |= {TEACHER: teacher} if teacher else {}
        budget = (args.max_calls - teacher) / per_sample
        for family in _families(pipe, args):
            expected[f"{family.num_steps} steps"] = per_sample * _search_evaluations(family, conditions, args, budget)
    expected[MEASURING] = per_sample * _measuring_evaluations(pipe, args)
    if args.image_metrics:
        # To decode an image ends a call of the pipeline, and the next one has to be opened.
        each = sum(num_steps + 1 for num_steps in args.num_steps) * _num_solvers(pipe)
        expected[IMAGES] = per_sample * args.image_metrics * (EVALUATION_TEACHER * args.teacher_steps + 1 + each)
    return expected


def _families(pipe: DiffusionPipeline, args: argparse.Namespace) -> list[SolverFamily]:
    own = SearchedSolverScheduler.from_config(pipe.scheduler.config)
    return [make_family(own.process, own.config.prediction_type, num_steps) for num_steps in args.num_steps]


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


def _search_evaluations(family: SolverFamily, conditions, args: argparse.Namespace, budget: float) -> int:
    """Evaluations of one sample that the fitter makes for one step count, without the teacher's."""
    if args.fitter == "gradient":
        # One opens the pipeline's call, and a backward evaluation is worth two forward ones.
        return args.num_samples * (args.teacher_steps + 1 + family.num_steps + 2 * (family.num_steps - 1))
    n, batches = family.num_steps, count_batches(conditions, args.num_samples, args.batch_size)
    quarter, half = (args.num_samples * max(1, batches // parts) // batches for parts in (4, 2))
    held_out, starts = max(1, args.num_samples // 4), len(start_grids(family.process, n))
    times, everything = _iteration(family, times_only=True), _iteration(family, times_only=False)
    spent = quarter * (2 * starts * n + (starts + 1) * times) + half * everything + 3 * held_out * n
    iteration = everything * args.num_samples + held_out * n
    affordable = int((budget - spent) // iteration)
    return spent + iteration * min(max(1, affordable), args.iterations)


def _iteration(family: SolverFamily, times_only: bool) -> int:
    """Evaluations of one sample in `gauss_newton_iteration`."""
    n = family.num_steps
    return n + sum(n - entry.known for entry in _searched(family, times_only)) + USUAL_TRIALS * n


def _searched(family: SolverFamily, times_only: bool) -> list[Entry]:
    entries = family.entries(family.vector(time_grid(family.process, family.num_steps)[0]))
    return family.searched(entries, times_only)


def _measuring_evaluations(pipe: DiffusionPipeline, args: argparse.Namespace) -> int:
    """Evaluations of one sample that `measure` makes."""
    evaluations = EVALUATION_TEACHER * args.teacher_steps * (TUNING_SAMPLES + args.num_eval_samples)
    families = diffusers_schedulers(pipe.scheduler.config)
    process = process_from_config(pipe.scheduler.config)
    for num_steps in args.num_steps:
        tables = classical_solvers(process, num_steps)
        settings = len(tables) + sum(len(settings) for settings in families.values())
        evaluations += num_steps * (TUNING_SAMPLES * settings + args.num_eval_samples * _num_solvers(pipe))
    return evaluations


def _num_solvers(pipe: DiffusionPipeline) -> int:
    """The searched one, the best classical table and each of diffusers' families."""
    return 2 + len(diffusers_schedulers(pipe.scheduler.config))


def _duration(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
