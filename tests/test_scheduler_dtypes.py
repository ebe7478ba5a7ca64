"""Precisions, shapes and devices: what a pipeline may hand to `step`, and that `step` reads nothing back from it."""

import weakref

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, time_grid


NUM_STEPS = 5
CONFIGS = {"flow": FlowMatchEulerDiscreteScheduler().config, "noise": DDIMScheduler().config}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def searched(kind: str, num_steps: int = NUM_STEPS) -> SearchedSolverScheduler:
    """A third-order table whose network times are off its nodes."""
    config = CONFIGS[kind]
    process = SearchedSolverScheduler.from_config(config).process
    timesteps, *nodes = time_grid(process, num_steps, 2.0)
    table = SearchedSolver.adams_bashforth(0.97 * timesteps, *nodes, "velocity", 3)
    return SearchedSolverScheduler.from_config(config, solver=table)


@pytest.fixture(params=CONFIGS)
def scheduler(request):
    return searched(request.param)


def outputs(*shape: int, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    """A network's outputs that do not depend on the state."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator).to(device, dtype) for _ in range(NUM_STEPS)]


def run(scheduler, sample: torch.Tensor, outputs) -> torch.Tensor:
    scheduler.set_timesteps(NUM_STEPS, device=sample.device)
    for output, timestep in zip(outputs, scheduler.timesteps, strict=True):
        sample = scheduler.step(output, timestep, sample).prev_sample
    return sample


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_dtype", DTYPES, ids=str)
def test_a_step_is_rounded_once_to_the_dtype_of_the_output(scheduler, output_dtype, sample_dtype, device):
    """Against float64 on the same inputs; sums run in float32 unless the samples are float64."""
    precise = searched("flow" if scheduler.config.prediction_type == "flow_prediction" else "noise")
    for each in (scheduler, precise):
        each.set_timesteps(NUM_STEPS, device=device)
    sample = torch.randn(2, 3, 4).to(device, sample_dtype)
    for output, timestep in zip(outputs(2, 3, 4, dtype=output_dtype, device=device), scheduler.timesteps, strict=True):
        result = scheduler.step(output, timestep, sample)
        expected = precise.step(output.double(), timestep, sample.double())
        for name in ("prev_sample", "pred_original_sample"):
            actual, wanted = getattr(result, name), getattr(expected, name)
            assert actual.dtype == output_dtype
            assert actual.device == sample.device
            rounding = torch.finfo(output_dtype).eps if output_dtype != torch.float64 else 1e-6
            scale = wanted.abs().max().item()
            torch.testing.assert_close(actual.double(), wanted, rtol=rounding, atol=3e-6 * scale)
        sample = result.prev_sample.to(sample_dtype)


SHAPES = {"packed": (1, 6, 4), "image": (3, 4, 5, 6), "video": (2, 3, 2, 4, 5), "one number": (1,), "many": (65, 2)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_samples_of_a_batch_do_not_interact(scheduler, shape):
    sample, predictions = torch.randn(shape), outputs(*shape)
    together = run(scheduler, sample, predictions)
    assert together.shape == shape
    for k in range(shape[0]):
        alone = run(scheduler, sample[k : k + 1], [each[k : k + 1] for each in predictions])
        assert torch.equal(alone, together[k : k + 1])


def test_views_of_larger_tensors_step_like_copies_of_them(scheduler):
    """Pipelines slice frames and tokens off the output and move axes."""
    sample = torch.randn(2, 3, 5, 4).transpose(1, 3)[:, :, 1:]
    predictions = [each.permute(0, 3, 2, 1)[:, :, :4] for each in outputs(2, 3, 6, 4)]
    assert not sample.is_contiguous() and not predictions[0].is_contiguous()
    expected = run(scheduler, sample.contiguous(), [each.contiguous() for each in predictions])
    assert torch.equal(run(scheduler, sample, predictions), expected)


def test_a_step_changes_neither_its_inputs_nor_its_earlier_results(scheduler):
    scheduler.set_timesteps(NUM_STEPS)
    sample, seen = torch.randn(2, 3), []
    for output, timestep in zip(outputs(2, 3), scheduler.timesteps, strict=True):
        result = scheduler.step(output, timestep, sample)
        seen += [(each, each.clone()) for each in (output, sample, timestep, *result.values())]
        sample = result.prev_sample
    for each, then in seen:
        assert torch.equal(each, then)


def test_no_tensor_of_a_run_is_kept_after_its_last_step(scheduler):
    scheduler.set_timesteps(NUM_STEPS)
    sample, alive = torch.randn(2, 3), []
    for timestep in scheduler.timesteps:
        output = torch.randn(2, 3)
        result = scheduler.step(output, timestep, sample)
        alive += [weakref.ref(each) for each in (output, sample, result.prev_sample, result.pred_original_sample)]
        sample = result.prev_sample
    assert scheduler.model_outputs == []
    del output, sample, result
    assert not any(reference() is not None for reference in alive)


def test_a_run_that_was_given_up_is_forgotten_by_set_timesteps(scheduler):
    scheduler.set_timesteps(NUM_STEPS)
    output = torch.randn(2, 3)
    scheduler.step(output, scheduler.timesteps[0], torch.randn(2, 3))
    reference = weakref.ref(output)
    del output
    scheduler.set_timesteps(NUM_STEPS)
    assert scheduler.model_outputs == [] and reference() is None


CASTS = {
    "bfloat16": lambda t: t.to(torch.bfloat16),
    "float16": lambda t: t.to(torch.float16),
    "float64": lambda t: t.double(),
    "copy": lambda t: t.clone(),
    "one-element vector": lambda t: t[None],
    "vector per sample": lambda t: t.expand(3)[0],
    "python float": float,
    "python int": lambda t: round(float(t)),
    "numpy": lambda t: np.float32(t),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("index", range(NUM_STEPS))
def test_a_run_begins_at_the_timestep_it_is_given_however_that_was_cast(scheduler, cast, index):
    scheduler.set_timesteps(NUM_STEPS)
    scheduler.step(torch.zeros(1), cast(scheduler.timesteps[index]), torch.zeros(1))
    assert scheduler.step_index == index + 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(NUM_STEPS))
def test_noise_is_added_at_the_node_of_a_timestep_however_that_was_cast(scheduler, dtype, index):
    """The table's network times are off its nodes, so that the noise process alone would give another level."""
    scheduler.set_timesteps(NUM_STEPS)
    data, noise = torch.randn(2, 2, 3)
    solver = scheduler.solver_file.solvers[NUM_STEPS]
    expected = solver.alphas[index] * data + solver.sigmas[index] * noise
    timestep = scheduler.timesteps[index : index + 1].to(dtype)
    torch.testing.assert_close(
        scheduler.add_noise(data, noise, timestep), expected, rtol=0, atol=1e-6, check_dtype=False
    )


@pytest.mark.parametrize("begin_index", [None, 0, 2])
def test_no_step_reads_from_the_device(scheduler, begin_index):
    """Tensors on the meta device have no values, so reading one is an error, as it is a wait on a GPU."""
    scheduler.set_timesteps(NUM_STEPS, device="meta")
    if begin_index is not None:
        scheduler.set_begin_index(begin_index)
    sample = torch.empty(2, 3, device="meta")
    for timestep in scheduler.timesteps[begin_index or 0 :]:
        sample = scheduler.step(torch.empty(2, 3, device="meta"), timestep, sample, return_dict=False)[0]
    assert scheduler.step_index == NUM_STEPS
