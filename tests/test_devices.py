"""Devices that networks are loaded under, and devices that are not here: the scheduler's numbers stay its own."""

import contextlib

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from fields import load
from simulated_device import simulated

from diffusers_searched_solver import SearchedSolverScheduler, load_solver_file, solver_from_scheduler
from diffusers_searched_solver.loading import BUNDLED_SOLVERS
from diffusers_searched_solver.serialization import SOLVER_FILE
from search import find_solver, measure
from search.measure.metrics import distribution_metrics


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


@pytest.mark.parametrize("order", ["table", "classical"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("device_type", ["cuda", "mps"])
def test_a_run_on_an_accelerator_waits_for_nothing_and_is_that_of_the_cpu(device_type, name, dtype, order):
    scheduler = SearchedSolverScheduler.from_pretrained(name)
    if order == "classical":
        scheduler = SearchedSolverScheduler.from_config(scheduler.config)
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)

    def ends(device) -> list[torch.Tensor]:
        scheduler.set_timesteps(10, device=device)
        scheduler.set_begin_index(0)
        x, found = noise.to(device), []
        for t in scheduler.timesteps:
            x, data = scheduler.step(x.sin(), t, x).to_tuple()
            assert x.device == data.device == device and x.dtype == dtype
            found += [x, data]
        return found

    expected = ends(torch.device("cpu"))
    with simulated(device_type) as device:
        found = ends(device.device)
        assert device.waits == 0
        for ours, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), wanted)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("device_type", ["cuda", "mps"])
def test_noise_is_added_on_the_device_of_the_data(device_type, name):
    scheduler = SearchedSolverScheduler.from_pretrained(name)
    scheduler.set_timesteps(6)
    data, noise = (torch.randn(2, 3, 4, dtype=torch.float16) for _ in range(2))
    expected = scheduler.add_noise(data, noise, scheduler.timesteps[:1])
    with simulated(device_type) as device:
        data, noise = data.to(device.device), noise.to(device.device)
        noised = scheduler.add_noise(data, noise, scheduler.timesteps[:1])
        assert noised.device == device.device and noised.dtype == torch.float16
        torch.testing.assert_close(noised.cpu(), expected)


def test_features_of_images_are_compared_on_an_accelerator():
    features, reference = torch.randn(2, 40, 8).unbind()
    expected = distribution_metrics(features, reference, torch.device("cpu"))
    with simulated("mps") as device:
        assert distribution_metrics(features, reference, device.device) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("by_default", [False, True])
@pytest.mark.parametrize(("device_type", "name"), [("mps", "digits-sit"), ("cuda", "digits-dit")])
def test_a_search_and_its_measurement_run_on_an_accelerator_and_wait_less_often_than_the_network_runs(
    device_type, name, by_default, tmp_path
):
    pipe, conditions = load(name), [{"class_labels": [3], "guidance_scale": 1.0}]
    runs = []
    pipe.transformer.register_forward_hook(lambda *_: runs.append(1))
    settings = {"teacher_steps": 16, "batch_size": 4}
    with simulated(device_type) as device, default_device(device.device if by_default else None):
        pipe.to(device.device)
        outcome = find_solver(pipe, 2, conditions, max_calls=1400, log=lambda line: None, **settings)
        assert device.waits <= len(runs)
        report = measure(pipe, outcome.solver, conditions, tmp_path, num_eval_samples=8, **settings)
    assert outcome.improved
    assert device.waits <= len(runs)
    assert report.verdicts[2].use
    assert (tmp_path / "images.png").exists()


@pytest.mark.parametrize("name", ["digits-sit", "digits-dit"])
def test_a_search_and_its_measurement_are_the_same_under_another_default_device(name, tmp_path):
    pipe, conditions = load(name), [{"class_labels": [3], "guidance_scale": 1.0}]

    def found(default: str) -> tuple:
        settings = {"teacher_steps": 16, "batch_size": 4}
        with default_device(default):
            outcome = find_solver(pipe, 2, conditions, max_calls=1400, log=lambda line: None, **settings)
            report = measure(pipe, outcome.solver, conditions, tmp_path / default, num_eval_samples=8, **settings)
        return outcome.solver.coefficients.tolist(), report.evaluation.results

    assert found("meta") == found("cpu")
