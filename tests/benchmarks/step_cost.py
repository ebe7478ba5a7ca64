"""
What a scheduler's `step` costs, ours beside diffusers' own, paired in one run.

    python tests/benchmarks/step_cost.py

Every contender makes the same 10-step run on the same network outputs; runs alternate, so that other load falls on all
alike, and the median run counts. The ratios are our time over theirs. "traffic limit" reads x and each prediction of
the history once and writes x once per step, by one matrix product over a stacked history. Allocations are per step, as
torch's profiler counts them; on a GPU, also kernel launches, and synchronisations as torch warns of them.
"""

import statistics
import time
import warnings

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.profiler import ProfilerActivity, profile

from diffusers_searched_solver import (
    FlowMatching,
    SearchedSolver,
    SearchedSolverScheduler,
    VariancePreserving,
    time_grid,
)


STEPS, REPEATS = 10, 41
SHAPES = [(4, 4, 128, 128), (1, 4096, 64)]


def contenders():
    """Name to scheduler; the searched ones with a full lower triangle, the dearest table there is."""

    def searched(process, prediction_type):
        means = np.tril(np.ones((STEPS, STEPS))) / np.arange(1, STEPS + 1)[:, None]
        table = SearchedSolver(*time_grid(process, STEPS), means, "velocity")
        return SearchedSolverScheduler.from_config({"prediction_type": prediction_type}, solver=table)

    return {
        "searched, flow": searched(FlowMatching(), "flow_prediction"),
        "searched, epsilon": searched(VariancePreserving(), "epsilon"),
        "DDIM": DDIMScheduler(clip_sample=False),
        "DPM-Solver++(2M)": DPMSolverMultistepScheduler(),
        "UniPC": UniPCMultistepScheduler(),
        "DEIS": DEISMultistepScheduler(),
        "FlowMatchEuler": FlowMatchEulerDiscreteScheduler(),
    }


def run(scheduler, sample, outputs):
    """One run; the time of its steps in seconds."""
    scheduler.set_timesteps(STEPS, device=sample.device)
    timesteps = list(scheduler.timesteps)
    _synchronise(sample)
    started = time.perf_counter()
    for t, output in zip(timesteps, outputs, strict=True):
        sample = scheduler.step(output, t, sample, return_dict=False)[0]
    _synchronise(sample)
    return time.perf_counter() - started


def traffic_limit(sample, outputs):
    """The same reads and writes without a scheduler."""
    history = torch.stack([output.flatten() for output in outputs])
    weights = torch.randn(STEPS, STEPS, device=sample.device)
    x = sample.flatten()
    _synchronise(sample)
    started = time.perf_counter()
    for i in range(STEPS):
        x = torch.addmv(x, history[: i + 1].t(), weights[i, : i + 1], beta=0.9, alpha=0.1)
    _synchronise(sample)
    return time.perf_counter() - started


def _synchronise(sample):
    if sample.is_cuda:
        torch.cuda.synchronize()


def count_events(scheduler, sample, outputs):
    """Allocations and, on a GPU, kernel launches and synchronisations, per step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if sample.is_cuda else [])]
    with profile(activities=activities) as recorded:
        run(scheduler, sample, outputs)
    counts = {event.key: event.count for event in recorded.key_averages()}
    events = {"allocations": sum(counts.get(f"aten::{name}", 0) for name in ("empty", "empty_strided", "empty_like"))}
    if sample.is_cuda:
        events |= {"launches": counts.get("cudaLaunchKernel", 0)}
        events |= {"synchronisations": count_synchronisations(scheduler, sample, outputs)}
    return {name: count / STEPS for name, count in events.items()}


def count_synchronisations(scheduler, sample, outputs):
    """Host-device synchronisations in the steps of a run."""
    scheduler.set_timesteps(STEPS, device=sample.device)
    timesteps = list(scheduler.timesteps)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for t, output in zip(timesteps, outputs, strict=True):
                sample = scheduler.step(output, t, sample, return_dict=False)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(shape, generator=generator).to(device)
        outputs = [torch.randn(shape, generator=generator).to(device) for _ in range(STEPS)]
        schedulers = contenders()
        times = {name: [] for name in [*schedulers, "traffic limit"]}
        for _ in range(REPEATS):
            for name, scheduler in schedulers.items():
                times[name].append(run(scheduler, sample, outputs))
            times["traffic limit"].append(traffic_limit(sample, outputs))
        medians = {name: 1e6 * statistics.median(values) / STEPS for name, values in times.items()}
        print(f"\n{shape} float32 on {device}, {STEPS} steps, median of {REPEATS} runs")
        print(f"{'scheduler':20}{'us / step':>10}{'flow / it':>11}{'epsilon / it':>14}  per step")
        for name, value in medians.items():
            ratios = [medians["searched, flow"] / value, medians["searched, epsilon"] / value]
            events = count_events(schedulers[name], sample, outputs) if name in schedulers else {}
            listed = ", ".join(f"{count:.1f} {event}" for event, count in events.items())
            print(f"{name:20}{value:10.0f}{ratios[0]:11.2f}{ratios[1]:14.2f}  {listed}")


if __name__ == "__main__":
    main()
