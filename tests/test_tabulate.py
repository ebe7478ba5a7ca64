"""Schedulers of diffusers as tables: exact, usable as solver files, and refused where they are none."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from fields import DIGITS, load

from diffusers_searched_solver import (
    FlowMatching,
    SearchedSolver,
    SearchedSolverScheduler,
    SolverFile,
    VariancePreserving,
    load_solver_file,
    process_from_config,
    save_solver_file,
    solver_from_scheduler,
    time_grid,
)
from diffusers_searched_solver.rivals import diffusers_schedulers
from search.known.baselines import known_tables, run_scheduler
from search.known.race import race_errors
from search.pipeline.field import NetworkCalls, PipelineField
from search.pipeline.rollout import Batch, rollout, sample_errors


CONFIGS = {
    "digits-dit": DDIMScheduler(clip_sample=False).config,
    "digits-sit": FlowMatchEulerDiscreteScheduler().config,
}
SETTINGS = [
    pytest.param(name, family, setting, id=f"{name}, {family}, {setting}")
    for name, config in CONFIGS.items()
    for family, settings in diffusers_schedulers(config).items()
    for setting in settings
]
PROCESSES = pytest.mark.parametrize("process", [FlowMatching(), VariancePreserving()], ids=["flow", "vp"])


@pytest.fixture(scope="module")
def fields(one_thread):
    """Of trained networks in float64, so that what differs is the tables' and the schedulers' own."""
    opened = {}
    for name in CONFIGS:
        pipe = load(name, torch.float64)
        opened[name] = PipelineField(pipe, DIGITS, [0, 1], NetworkCalls(pipe))
    yield opened
    for field in opened.values():
        field.close()


@pytest.mark.parametrize("num_steps", [2, 5, 8, 10])
@pytest.mark.parametrize(("name", "family", "setting"), SETTINGS)
def test_a_table_ends_where_its_scheduler_ends_on_a_trained_network(fields, name, family, setting, num_steps):
    field = fields[name]
    scheduler = diffusers_schedulers(field.pipe.scheduler.config)[family][setting]
    own = run_scheduler(field, scheduler, num_steps).double()
    table = rollout(field, solver_from_scheduler(scheduler, num_steps)).double()
    # States have a size of about one; schedulers compute in float32.
    assert float((own - table).square().mean().sqrt()) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        lambda: diffusers.LMSDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        lambda: diffusers.DPMSolverSinglestepScheduler(prediction_type="v_prediction"),
        lambda: diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0),
        lambda: diffusers.UniPCMultistepScheduler(beta_schedule="scaled_linear", use_beta_sigmas=False),
    ],
    ids=["Euler", "LMS", "singlestep", "CogVideoX", "UniPC, scaled betas"],
)
def test_other_deterministic_schedulers_are_tables_too(make):
    """Whoever passes has been compared with its scheduler's run on random numbers."""
    scheduler = make()
    solver = solver_from_scheduler(scheduler, 6)
    np.testing.assert_allclose(solver.coefficients.sum(1), 1, atol=1e-5)
    process = process_from_config(scheduler.config)
    np.testing.assert_allclose(process.scale(solver.alphas, solver.sigmas), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diffusers.DDPMScheduler(clip_sample=False), "DDPMScheduler of 6 steps .* draws noise"),
        (lambda: diffusers.EulerAncestralDiscreteScheduler(), "draws noise"),
        (lambda: diffusers.LCMScheduler(), "draws noise"),
        (lambda: DDIMScheduler(), "clips or thresholds. Turn that off in its config"),
        (lambda: DPMSolverMultistepScheduler(thresholding=True), "clips or thresholds"),
        (lambda: diffusers.HeunDiscreteScheduler(), "not a table of one call a step"),
        (lambda: diffusers.FlowMatchHeunDiscreteScheduler(), "not a table of one call a step"),
        (lambda: diffusers.PNDMScheduler(), "not a table of one call a step"),
        (lambda: diffusers.EDMEulerScheduler(), "neither DDPM's noise process nor flow matching"),
        (
            lambda: diffusers.EulerDiscreteScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
            ),
            'begins at 0.99.* times the noise, a table at the noise. `timestep_spacing` "leading" begins there',
        ),
    ],
    ids=["DDPM", "ancestral", "LCM", "clipping", "thresholding", "Heun", "flow Heun", "PNDM", "EDM", "scaled noise"],
)
def test_what_is_no_table_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        solver_from_scheduler(make(), 6)


def test_the_scheduler_and_the_global_random_numbers_stay_as_they_are():
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(3)
    before, state = scheduler.timesteps.clone(), torch.random.get_rng_state()
    solver_from_scheduler(scheduler, 7)
    assert torch.equal(scheduler.timesteps, before)
    assert torch.equal(torch.random.get_rng_state(), state)


@PROCESSES
def test_a_solver_has_the_same_runs_in_its_other_frame(process):
    grid = time_grid(process, 5, 0.7, 1.0 if process.kind == "flow_matching" else 0.95)
    solver = SearchedSolver.adams_bashforth(*grid, "data", order=2)
    other = solver.in_frame("velocity")
    noise, *outputs = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = []
    for each in (solver, other):
        x, history = noise, []
        for i, output in enumerate(outputs):
            history.append(each.prediction(output, x, i, "v_prediction"))
            x = each.step(x, history, i)
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(other.in_frame("data").coefficients, solver.coefficients, atol=1e-12)


def test_a_table_with_free_row_sums_has_no_other_frame():
    solver = SearchedSolver([500.0], [0.5, 1.0], [0.5, 0.0], [[1.1]], "velocity", consistent=False)
    with pytest.raises(ValueError, match="sums to 1.1"):
        solver.in_frame("data")


@pytest.mark.parametrize("setting", ["linspace", "trailing"])
def test_a_scheduler_saved_as_a_solver_file_draws_the_scheduler_s_images(setting, tmp_path):
    """Also where nodes are off the process: DDIM with linspace spacing steps to other ones than it goes on from."""
    pipe = load("digits-dit")
    scheduler = diffusers_schedulers(pipe.scheduler.config)["DDIM"][setting]
    process = process_from_config(pipe.scheduler.config)
    file = SolverFile({n: solver_from_scheduler(scheduler, n) for n in (5, 8)}, process, "epsilon")
    save_solver_file(file, tmp_path / "ddim.safetensors")
    searched = SearchedSolverScheduler.from_config(
        pipe.scheduler.config, solver=load_solver_file(tmp_path / "ddim.safetensors")
    )
    images = [draw(pipe, each) for each in (scheduler, searched)]
    np.testing.assert_allclose(*images, atol=1e-4)


def draw(pipe: DiffusionPipeline, scheduler) -> np.ndarray:
    pipe.scheduler = scheduler
    return pipe(
        class_labels=[3, 8],
        guidance_scale=2.0,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def test_dynamic_shifting_takes_mu():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    few, many = (solver_from_scheduler(scheduler, 4, mu=mu) for mu in (0.5, 1.5))
    assert (many.sigmas[1:-1] > few.sigmas[1:-1]).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_predictions_change_no_error(fields, name):
    field = fields[name]
    batch = Batch(field, torch.zeros_like(field.noise), (0,))
    tables = [known.solver for known in known_tables(field.pipe.scheduler.config, 3)]
    before = field._calls.count
    shared = race_errors(batch, tables)
    cost, before = field._calls.count - before, field._calls.count
    apart = torch.stack([sample_errors(rollout(field, table), batch.target) for table in tables])
    # Beginnings that differ by the rounding of float32 are the same.
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-5)
    assert cost < 0.65 * (field._calls.count - before)


def test_what_diffusers_itself_fails_at_is_left_out_of_the_known_tables():
    """Where noise levels crowd, whole timesteps meet and schedulers fail in ways of their own."""
    config = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").config
    scheduler = diffusers_schedulers(config)["UniPC 2"]["Karras"]
    with pytest.raises(ValueError, match="of 8 steps is not a table of one call a step: .* fails with AssertionError"):
        solver_from_scheduler(scheduler, 8)
    families = {table.family for table in known_tables(config, 8)}
    assert {"UniPC 2", "DEIS 2", "DPM-Solver++(2M)"} <= families
