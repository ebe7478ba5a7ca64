"""
What a scheduler's `step` costs, ours beside diffusers' own, paired in one run.

    python tests/benchmarks/step_cost.py

Every contender makes the same 10-step run on the same network outputs; runs alternate, so that other load falls on all
alike, and the median run counts. `traffic limit` is a plain fused sum that reads x and each prediction of the history
once and writes x once per step, by matrix product over a stacked history. The ratio is our time over theirs. Allocations are those of
torch per step, counted by its profiler; on a GPU also the kernel launches, and synchronisations by torch's own warning.
"""

import statistics
import time
import warnings

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.profiler import ProfilerActivity, profile

from diffusers_searched_solver import FlowMatching, SearchedSolver, SearchedSolverScheduler, VariancePreserving, time_grid


STEPS, REPEATS = 10, 41
SHAPES = [(4, 4, 128, 128), (1, 4096, 64)]


def contenders():
    """Name to scheduler; the searched ones with a full lower triangle, the dearest table there is."""

    def searched(process, prediction_type):
        table = SearchedSolver.adams_bashforth(*time_grid(process, STEPS), "velocity", order=STEPS)
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
    """Allocations, and on a GPU launches and synchronisations, per step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if sample.is_cuda else [])]
    with profile(activities=activities, profile_memory=True) as recorded:
        run(scheduler, sample, outputs)
    big = sum(1 for event in recorded.events() if event.name == "[memory]") if False else None
    del big
    events = recorded.key_averages()
    allocations = sum(event.count for event in events if event.key in ("aten::empty", "aten::empty_strided", "aten::empty_like"))
    launches = sum(event.count for event in events if event.key == "cudaLaunchKernel")
    return allocations / STEPS, launches / STEPS


def count_synchronisations(scheduler, sample, outputs):
    """Host-device synchronisations per step."""
    scheduler.set_timesteps(STEPS, device=sample.device)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t, output in zip(list(scheduler.timesteps), outputs, strict=True):
            sample = scheduler.step(output, t, sample, return_dict=False)[0]
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught) / STEPS


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
        print(f"{'scheduler':20}{'us / step':>10}{'flow / it':>11}{'epsilon / it':>14}{'allocations':>13}")
        for name, value in medians.items():
            ratios = [medians["searched, flow"] / value, medians["searched, epsilon"] / value]
            events = "" if name == "traffic limit" else f"{count_events(schedulers[name], sample, outputs)[0]:13.1f}"
            print(f"{name:20}{value:10.0f}{ratios[0]:11.2f}{ratios[1]:14.2f}{events}")


if __name__ == "__main__":
    main()
