"""Devices that networks are loaded under, and devices that are not here: the scheduler's numbers stay its own."""

import contextlib

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_searched_solver import SearchedSolverScheduler, load_solver_file, solver_from_scheduler
from diffusers_searched_solver.loading import BUNDLED_SOLVERS
from diffusers_searched_solver.serialization import SOLVER_FILE


SOLVERS = {"sit-xl-2-256": FlowMatchEulerDiscreteScheduler, "dit-xl-2-256": DDIMScheduler}
# Made here, where numbers are on the CPU.
UNIPC = {
    "sit-xl-2-256": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "dit-xl-2-256": UniPCMultistepScheduler(timestep_spacing="trailing"),
}


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


LOADING = {"with torch.device": torch.device, "set_default_device": default_device}


def all_that_it_does(name) -> list[torch.Tensor]:
    """Load a solver and run it from noised data, on tensors of the CPU."""
    scheduler = SearchedSolverScheduler.from_pretrained(name)
    assert load_solver_file(BUNDLED_SOLVERS / name / SOLVER_FILE).process == scheduler.process
    scheduler = SearchedSolverScheduler.from_config(scheduler.config, solver=name)
    numbers = torch.arange(24.0, device="cpu").sin().view(2, 3, 4)
    scheduler.set_timesteps(6)
    found = [scheduler.timesteps, scheduler.sigmas]
    x = scheduler.add_noise(numbers, numbers.cos(), scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        x, data = scheduler.step(torch.sin(2 * x), t, x).to_tuple()
        found += [x, data]
    explicit = {"sigmas": [0.9, 0.5]} if name == "sit-xl-2-256" else {"timesteps": [900, 300]}
    scheduler.set_timesteps(**explicit)
    table = solver_from_scheduler(UNIPC[name], 4).in_frame("velocity")
    return [*found, scheduler.timesteps, scheduler.sigmas, table.update_table(scheduler.config.prediction_type)]


@pytest.mark.parametrize("loading", LOADING)
@pytest.mark.parametrize("name", SOLVERS)
def test_loading_and_running_are_the_same_under_another_default_device(name, loading):
    expected = all_that_it_does(name)
    with LOADING[loading]("meta"):
        found = all_that_it_does(name)
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours, wanted)


class OtherDevice(TorchDispatchMode):
    """
    A device that is not here, stood in for by "meta": tensors of it hold no numbers, so whatever waits for one fails.
    As on MPS there is no float64, and as everywhere no tensor of the CPU but a 0-dimensional one goes beside them.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf)]
        there = [leaf for leaf in tensors if leaf.device.type == "meta"]
        assert all(leaf.dtype != torch.float64 for leaf in there), f"{function} makes float64 on the device"
        if there and "copy" not in str(function):
            here = [leaf for leaf in tensors if leaf.device.type == "cpu" and leaf.ndim]
            assert not here, f"{function} takes a tensor of the CPU to one of the device"
        return result


@pytest.mark.parametrize("order", ["table", "classical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_on_another_device_waits_for_nothing_and_needs_no_float64(name, dtype, order):
    scheduler = SearchedSolverScheduler.from_pretrained(name)
    if order == "classical":
        scheduler = SearchedSolverScheduler.from_config(scheduler.config)
    x = torch.empty(2, 3, 4, dtype=dtype, device="meta")
    scheduler.set_timesteps(10, device="meta")
    scheduler.set_begin_index(0)
    with OtherDevice():
        for t in scheduler.timesteps:
            x, data = scheduler.step(x.sin(), t, x).to_tuple()
            assert x.device == data.device == torch.device("meta") and x.dtype == dtype


@pytest.mark.parametrize("name", SOLVERS)
def test_noise_is_added_on_the_device_of_the_data(name):
    scheduler = SearchedSolverScheduler.from_pretrained(name)
    scheduler.set_timesteps(6)
    data = torch.empty(2, 3, 4, dtype=torch.float16, device="meta")
    with OtherDevice():
        noised = scheduler.add_noise(data, torch.empty_like(data), scheduler.timesteps[:1])
    assert noised.device == data.device and noised.dtype == data.dtype
