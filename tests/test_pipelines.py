"""
The scheduler in real diffusers pipelines, against a loop outside the scheduler that applies the table by the book.

TODO table
"""

import functools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import BUILDERS, NUM_STEPS, OWN_SCHEDULE, build

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
