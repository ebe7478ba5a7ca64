"""
The scheduler in real diffusers pipelines, against a loop outside the scheduler that applies the table by the book.

What to know of pipelines that treat schedulers in their own way (diffusers 0.42):

============================  ============================================  ======================================
Pipeline                      What it does                                  What to do
============================  ============================================  ======================================
DDIM                          its constructor replaces the scheduler by a   assign `pipe.scheduler = ...`
                              DDIMScheduler of the same config, and so      afterwards
                              does loading it
Flux 1 and 2, Qwen-Image,     pass sigmas = 1 - i/N                         nothing: they get the searched table
Lumina 2, Z-Image, LTX,                                                     of N steps
HunyuanVideo, Chroma
LTX-Condition, CogView4,      pass a schedule of their own                  they get a classical second-order
GLM-Image                                                                   solver on it, and one warning
LTX-Condition, Sana-WM        pass per-token times and a negated velocity   nothing
Kandinsky 2.2, DeepFloyd-IF   hand on the learned variance if the config    nothing: it is dropped
                              says so
Wan 2.2 with two experts      changes the network at `boundary_ratio` of    search with the same boundary: the
                              the training steps                            table's times decide who is called
ChronoEdit                    drops frames mid-way, of the scheduler's      nothing
                              history too
SDXL `denoising_end`,         split the run by times on the training scale  pass the same value to both; the
`denoising_start`                                                           second part begins without history
CogVideoX, CogView3+,         branch on the scheduler's class               nothing: the branch for others serves
ConsisID, EasyAnimate,
HiDream
Bria 1                        passes DDPM's noise levels to all but a few   keep its own
                              classes, as if they were sigmas
Stable Cascade, LEDITS++,     demand a scheduler class                      keep theirs
LTX long multi-prompt, LTX-2
DFR
Mochi, LongCat-AudioDiT       run sigma from 0 to 1                         keep theirs; `from_config` refuses
PixArt-Alpha in one step      shows the data that the step predicts         do not search the row sum of one step
SVD, Stable Audio, Cosmos 1   EDM's or TrigFlow's noise process             keep theirs; `from_config` refuses
and 2, Sana-Sprint
pipelines that index          need whole times                              a table with whole times
`alphas_cumprod` with the
time (SAG, pix2pix-zero,
DiffEdit, CycleDiffusion)
============================  ============================================  ======================================
"""

import functools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_pipelines import BUILDERS, NUM_STEPS, OWN_SCHEDULE, build, build_anew

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, time_grid


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny networks are slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def searched(process, frame: str, consistent: bool) -> SearchedSolver:
    """What a search could return: times off the nodes, coefficients away from the classical ones."""
    timesteps, alphas, sigmas = time_grid(process, NUM_STEPS, 2.0)
    solver = SearchedSolver.adams_bashforth(timesteps, alphas, sigmas, frame, 3)
    change = np.tril(np.random.default_rng(0).normal(0, 0.2, (NUM_STEPS, NUM_STEPS)))
    if consistent:
        change[np.diag_indices(NUM_STEPS)] -= change.sum(1)
    return replace(
        solver, timesteps=0.98 * timesteps, coefficients=solver.coefficients + change, consistent=consistent
    )


TABLES = {
    "velocities": functools.partial(searched, frame="velocity", consistent=True),
    "velocities, free row sums": functools.partial(searched, frame="velocity", consistent=False),
    "data": functools.partial(searched, frame="data", consistent=True),
    "data, free row sums": functools.partial(searched, frame="data", consistent=False),
}


def attach(case, table: str = "velocities") -> SearchedSolverScheduler:
    process = SearchedSolverScheduler.from_config(case.config).process
    scheduler = SearchedSolverScheduler.from_config(case.config, solver=TABLES[table](process))
    case.attach(scheduler)
    return scheduler


@dataclass
class Recording:
    """What went into `scheduler.step` and came out of it, and how often the network was called."""

    timesteps: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    samples: list = field(default_factory=list)
    next_samples: list = field(default_factory=list)
    network_calls: int = 0


class Interrupted(Exception):
    pass


def call(case, interrupt_at: int | None = None, **kwargs) -> tuple[torch.Tensor, Recording]:
    """Call the pipeline and record it; the network raises `Interrupted` at its call `interrupt_at`."""
    recording = Recording()
    scheduler = case.pipe.scheduler
    step = scheduler.step

    @functools.wraps(step)
    def recording_step(model_output, timestep, sample, *args, **kwargs):
        recording.timesteps.append(float(timestep))
        recording.outputs.append(model_output.clone())
        recording.samples.append(sample.clone())
        result = step(model_output, timestep, sample, *args, **kwargs)
        recording.next_samples.append(result[0].clone())
        return result

    def count(module, args):
        recording.network_calls += 1
        if recording.network_calls == interrupt_at:
            raise Interrupted

    hooks = [network.register_forward_pre_hook(count) for network in case.networks]
    scheduler.step = recording_step
    try:
        return case(**kwargs), recording
    finally:
        del scheduler.step
        for hook in hooks:
            hook.remove()


def data_and_noise(prediction_type: str, m, x, alpha: float, sigma: float):
    """D and E of x = alpha * D + sigma * E, given what the network says."""
    if prediction_type == "epsilon":
        return (x - sigma * m) / alpha, m
    if prediction_type == "v_prediction":  # m = alpha * E - sigma * D and alpha^2 + sigma^2 = 1
        return alpha * x - sigma * m, sigma * x + alpha * m
    data = (x - sigma * m) / (alpha + sigma)  # m = E - D
    return data, data + m


def independent_loop(solver, prediction_type: str, case, recording: Recording) -> list[torch.Tensor]:
    """
    The states after each step, by the formula in the docstring of `SearchedSolver`, in float64.

    It begins at the first recorded sample and takes the network's outputs as recorded; the samples come from its own
    steps, unless the pipeline edits them in between.
    """
    x = recording.samples[0].double()
    predictions, states = [], []
    for i, output in enumerate(recording.outputs, case.first_step):
        output = output[:, : x.shape[1]]  # without the variance that some networks learned
        if case.blends:
            x = recording.samples[i - case.first_step].double()
        # ChronoEdit goes on with the first and the last frame only.
        predictions = [each if each.shape == x.shape else each[:, :, [0, -1]] for each in predictions]
        alpha, sigma = solver.alphas[i : i + 2], solver.sigmas[i : i + 2]
        data, noise = data_and_noise(prediction_type, case.sign * output.double(), x, alpha[0], sigma[0])
        predictions.append(data if solver.frame == "data" else noise - data)
        k, m = (sigma, alpha) if solver.frame == "data" else (alpha + sigma, sigma)
        c = solver.coefficients[i, : i + 1]
        # Where the run began mid-way, the oldest prediction stands for those that were never made.
        c = np.append(c[: case.first_step + 1].sum(), c[case.first_step + 1 :])
        combined = sum(weight * prediction for weight, prediction in zip(c, predictions, strict=True))
        x = k[1] / k[0] * x + (m[1] - k[1] * m[0] / k[0]) * combined
        states.append(x)
    return states


def assert_same_states(actual: list[torch.Tensor], expected: list[torch.Tensor]):
    """To the rounding of float32, which a few steps amplify by the size of their coefficients."""
    scale = max(state.abs().max() for state in expected).item()
    for number, (state, wanted) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            state.double(), wanted, rtol=0, atol=1e-5 * scale, msg=lambda m, n=number: f"After step {n}: {m}"
        )


@pytest.fixture(params=BUILDERS)
def case(request):
    return build(request.param)


@pytest.mark.parametrize("table", TABLES)
def test_a_pipeline_takes_the_steps_that_the_table_says(case, table):
    scheduler = attach(case, table)
    image, recording = call(case)

    steps = range(case.first_step, case.last_step + 1)
    solver = scheduler.solver_file.solvers[NUM_STEPS]
    assert recording.network_calls == case.calls_per_step * len(steps)
    np.testing.assert_array_equal(recording.timesteps, solver.timesteps[steps].astype(np.float32))
    expected = independent_loop(solver, scheduler.config.prediction_type, case, recording)
    assert_same_states(recording.next_samples, expected)
    if not case.blends:
        assert_same_states(recording.samples[1:], expected[:-1])
    assert torch.isfinite(image).all()
    assert image.float().std() > 0


def test_a_pipeline_gives_the_same_image_again_also_after_an_interrupted_call(case):
    attach(case)
    first, recording = call(case)
    second, _ = call(case)
    assert torch.equal(first, second)

    mid_way = max(2, recording.network_calls // 2 + 1)
    if recording.network_calls > 1:
        with pytest.raises(Interrupted):
            call(case, interrupt_at=mid_way, seed=1)
    third, _ = call(case)
    assert torch.equal(first, third)


@pytest.mark.parametrize("name", OWN_SCHEDULE)
def test_a_pipeline_with_a_schedule_of_its_own_gets_the_classical_solver_on_its_nodes_and_one_warning(name, caplog):
    """LTX-Condition wants linear-quadratic times, CogView4 shifts the noise levels but not the times."""
    case = build(name)
    scheduler = attach(case)
    wishes = []
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def recording_set_timesteps(*args, **kwargs):
        wishes.append((args, kwargs))
        return set_timesteps(*args, **kwargs)

    scheduler.set_timesteps = recording_set_timesteps

    image, recording = call(case)
    again, _ = call(case)
    assert torch.isfinite(image).all()
    assert torch.equal(image, again)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "An explicit schedule was passed, which the searched solver does not have"
    ]

    nodes = FlowMatchEulerDiscreteScheduler.from_config(case.config)
    args, kwargs = wishes[0]
    nodes.set_timesteps(*args, **kwargs)
    assert recording.network_calls == case.calls_per_step * NUM_STEPS
    torch.testing.assert_close(torch.tensor(recording.timesteps), nodes.timesteps, rtol=1e-6, atol=0)
    states, velocities = [], []
    x = recording.samples[0].double()
    for i, (step, previous_step) in enumerate(
        zip(nodes.sigmas.double().diff(), [None, *nodes.sigmas.double().diff()], strict=False)
    ):
        if case.blends:
            x = recording.samples[i].double()
        velocities.append(case.sign * recording.outputs[i].double())
        slope = 0 if i == 0 else (velocities[i] - velocities[i - 1]) / previous_step
        x = x + step * (velocities[i] + step / 2 * slope)
        states.append(x)
    assert_same_states(recording.next_samples, states)


def in_half_precision(value, dtype):
    if isinstance(value, list):
        return [in_half_precision(each, dtype) for each in value]
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_a_pipeline_runs_in_half_precision(name, dtype):
    """Every step by itself is as exact as the dtype of its result."""
    if name in ("ddim", "ddpm") and dtype == torch.bfloat16:
        pytest.skip("the pipeline hands bfloat16 to numpy, which has none")
    case = build_anew(name)
    for component in case.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(dtype)
    case.inputs = {key: in_half_precision(value, dtype) for key, value in case.inputs.items()}
    scheduler = attach(case)
    image, recording = call(case)
    assert torch.isfinite(image).all()
    solver = scheduler.solver_file.solvers[NUM_STEPS]
    expected = independent_loop(solver, scheduler.config.prediction_type, replace(case, blends=True), recording)
    for state, wanted in zip(recording.next_samples, expected, strict=True):
        rounding = torch.finfo(state.dtype).eps
        torch.testing.assert_close(state.double(), wanted, rtol=rounding, atol=1e-5 * wanted.abs().max().item())


def test_ddim_pipeline_replaces_the_scheduler_it_is_given_but_keeps_one_assigned_later():
    case = build("ddim")
    scheduler = attach(case)
    rebuilt = type(case.pipe)(case.pipe.unet, scheduler)
    assert type(rebuilt.scheduler) is DDIMScheduler
    rebuilt.scheduler = scheduler
    assert rebuilt.scheduler is scheduler


@pytest.mark.parametrize("consistent", [True, False], ids=["row sum one", "free row sum"])
def test_pixart_alpha_shows_the_predicted_data_of_a_single_step(consistent):
    """It takes the second entry of what the step returns, which is the first one too if the row sums to one."""
    case = build("pixart_alpha")
    process = SearchedSolverScheduler.from_config(case.config).process
    table = SearchedSolver(*time_grid(process, 1), [[1.0 if consistent else 0.9]], "velocity", consistent)
    case.attach(SearchedSolverScheduler.from_config(case.config, solver=table))
    decode, latents = case.pipe.vae.decode, []
    case.pipe.vae.decode = lambda z, *args, **kwargs: latents.append(z) or decode(z, *args, **kwargs)
    try:
        image, recording = call(case, num_inference_steps=1)
    finally:
        del case.pipe.vae.decode
    (alpha, _), (sigma, _) = table.alphas, table.sigmas
    data, _ = data_and_noise("epsilon", recording.outputs[0].double(), recording.samples[0].double(), alpha, sigma)
    scale = data.abs().max().item()
    shown = latents[0].double() * case.pipe.vae.config.scaling_factor
    torch.testing.assert_close(shown, data, rtol=0, atol=1e-5 * scale)
    assert ((recording.next_samples[0] - data).abs().max() < 1e-5 * scale) == consistent
    assert torch.isfinite(image).all()


def test_the_independent_loop_notices_a_coefficient_that_is_off_by_a_hundredth():
    case = build("flux")
    scheduler = attach(case)
    _, recording = call(case)
    solver = scheduler.solver_file.solvers[NUM_STEPS]
    coefficients = solver.coefficients + np.diag([-1e-2, 0, 0], -1) + np.diag([0, 1e-2, 0, 0])
    expected = independent_loop(replace(solver, coefficients=coefficients), "flow_prediction", case, recording)
    with pytest.raises(AssertionError, match="After step 1"):
        assert_same_states(recording.next_samples, expected)


@pytest.mark.parametrize("name", ["sdxl_inpaint", "sd15_inpaint"])
def test_an_inpainting_pipeline_noises_what_it_keeps_to_the_nodes_of_the_table(name):
    """Outside of the mask the state is the image's latents and one noise, at the level of each node."""
    case = build(name)
    scheduler = attach(case)
    solver = scheduler.solver_file.solvers[NUM_STEPS]
    kept = []
    add_noise = scheduler.add_noise
    scheduler.add_noise = lambda *args: kept.append((args, add_noise(*args))) or kept[-1][1]
    call(case)
    for step, ((data, noise, _), noised) in enumerate(kept, case.first_step):
        expected = solver.alphas[step] * data + solver.sigmas[step] * noise
        torch.testing.assert_close(noised, expected, rtol=0, atol=1e-5, check_dtype=False)
    # one before the run, and one before each step but the first
    assert len(kept) == NUM_STEPS - case.first_step
