"""The paper's published tables, bundled: what the scheduler does with them is what the released sampler does."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_searched_solver import SearchedSolverScheduler


FIXTURES = Path(__file__).parent / "fixtures"
RUNS = load_file(FIXTURES / "published_solver_runs.safetensors")
# The released tables are rounded to four decimals; the released sampler leaves their step sizes as they are.
TOLERANCE = 5e-4


def _velocity(x, timestep):
    t = 1 - timestep.double() / 1000
    return -(torch.sin(2 * x + 3 * t) * (0.5 + t))


def _noise(x, timestep):
    t = timestep.double() / 1000
    log_alpha = -(19.9 * t**2 / 4 + 0.1 * t / 2)
    a, s = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    return x * s / (0.25 * a**2 + s**2) + 0.1 * a * torch.sin(2 * x + 3 * t)


def _run(name, num_steps, truncate=False):
    scheduler = SearchedSolverScheduler.from_pretrained(name)
    network = _noise if name.startswith("dit") else _velocity
    scheduler.set_timesteps(num_steps)
    x = RUNS["noise"]
    for t in scheduler.timesteps:
        output = network(x.double(), t.trunc() if truncate else t).to(x.dtype)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("key", [key for key in RUNS if key != "noise"])
def test_a_bundled_solver_reproduces_the_released_sampler(key):
    name, num_steps, *times = key.split(".")
    x = _run(name, int(num_steps), truncate=times == ["int_timesteps"])
    assert (x - RUNS[key]).abs().max() < TOLERANCE


def test_the_fixture_covers_every_published_step_count():
    with safe_open(FIXTURES / "published_solver_runs.safetensors", "pt") as file:
        runs = {tuple(key.split(".")[:2]) for key in file.keys() if key != "noise"}
    bundled = {
        (name, str(n))
        for name in ("dit-xl-2-256", "sit-xl-2-256", "flowdcn-b-2-256")
        for n in SearchedSolverScheduler.from_pretrained(name).solver_file.step_counts
    }
    assert bundled == runs
