"""SearchedSolver against diffusers' schedulers and textbooks, and what it refuses; see also test_numerics.py."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch._dynamo.testing import CompileCounter

from diffusers_searched_solver import FlowMatching, SearchedSolver, VariancePreserving, tensor_step, time_grid
from diffusers_searched_solver.process import convert_prediction


PROCESSES = {"flow": FlowMatching(), "vp": VariancePreserving()}
FRAMES = ("velocity", "data")


def random_solver(process, frame, num_steps=7, consistent=True, seed=0):
    """A valid solver far from any classical one: times off the nodes, coefficients of either sign."""
    rng = np.random.default_rng(seed)
    timesteps, alphas, sigmas = time_grid(process, num_steps, shift=1.7)
    coefficients = np.tril(rng.normal(size=(num_steps, num_steps)))
    if consistent:
        coefficients[np.diag_indices(num_steps)] += 1 - coefficients.sum(1)
    return SearchedSolver(timesteps * 0.97, alphas, sigmas, coefficients, frame, consistent)


def run(solver, network, x, prediction_type):
    """The state after the last step; `network` is called with the state and the step's timestep."""
    history = []
    for i, t in enumerate(solver.timesteps):
        history.append(solver.prediction(network(x, t), x, i, prediction_type))
        x = solver.step(x, history, i)
    return x


def test_conversions_are_inverse_to_each_other_and_agree_with_their_definitions():
    alpha, sigma, data, noise = 0.3, 0.8, 1.7, -0.4
    x = alpha * data + sigma * noise
    outputs = {"sample": data, "epsilon": noise, "v_prediction": alpha * noise - sigma * data}
    outputs["flow_prediction"] = noise - data
    for source, output in outputs.items():
        for target, expected in outputs.items():
            u, w = convert_prediction(source, target, alpha, sigma)
            assert u * x + w * output == pytest.approx(expected, abs=1e-12)


def test_order_one_velocity_is_flow_match_euler_step_by_step():
    reference = FlowMatchEulerDiscreteScheduler(shift=3.0)
    reference.set_timesteps(6)
    sigmas = reference.sigmas.double().numpy()
    solver = SearchedSolver.adams_bashforth(sigmas[:-1] * 1000, 1 - sigmas, sigmas, "velocity", order=1)
    x, history = torch.randn(2, 3, 4), []
    for i, t in enumerate(reference.timesteps):
        output = torch.sin(x * 2 + t / 1000)
        history.append(output)
        expected = reference.step(output, t, x, return_dict=False)[0]
        x = solver.step(x, history, i)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


def test_order_one_data_is_ddim_step_by_step():
    reference = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    reference.set_timesteps(8)
    timesteps = reference.timesteps.numpy()
    alphas = np.append(reference.alphas_cumprod[timesteps].double().sqrt().numpy(), 1.0)
    solver = SearchedSolver.adams_bashforth(timesteps, alphas, np.sqrt(1 - alphas**2), "data", order=1)
    x, history = torch.randn(2, 3, 4, dtype=torch.float64), []
    for i, t in enumerate(reference.timesteps):
        output = torch.sin(x * 2 + t / 1000)
        history.append(solver.prediction(output, x, i, "epsilon"))
        expected = reference.step(output, t, x, return_dict=False)[0]
        x = solver.step(x, history, i)
        # diffusers' alphas_cumprod is float32, and 1 - it loses digits near the data.
        torch.testing.assert_close(x, expected, rtol=0, atol=2e-5)


def test_the_textbook_coefficients_come_out_on_equal_steps():
    timesteps, alphas, sigmas = time_grid(FlowMatching(), 6)
    rows = {
        2: [-1 / 2, 3 / 2],
        3: [5 / 12, -16 / 12, 23 / 12],
        4: [-9 / 24, 37 / 24, -59 / 24, 55 / 24],
    }
    for order, row in rows.items():
        solver = SearchedSolver.adams_bashforth(timesteps, alphas, sigmas, "velocity", order)
        np.testing.assert_allclose(solver.coefficients[5, 6 - order :], row, atol=1e-12)


def test_order_two_in_the_data_frame_nears_dpm_solver_pp_2m_as_steps_shrink():
    """Their coefficients (1 + h/2g, -h/2g) measure the steps h, g in exp(lambda) and in lambda."""
    gaps = []
    for num_steps in (20, 40, 80):
        _, alphas, sigmas = time_grid(VariancePreserving(), num_steps)
        solver = SearchedSolver.adams_bashforth(np.arange(num_steps, 0, -1.0), alphas, sigmas, "data", 2)
        lambdas = np.log(alphas[:-1] / sigmas[:-1])
        i = num_steps // 2
        ours = -solver.coefficients[i, i - 1]
        dpm = 0.5 * (lambdas[i + 1] - lambdas[i]) / (lambdas[i] - lambdas[i - 1])
        gaps.append(abs(ours - dpm))
    assert gaps[0] > 1.6 * gaps[1] > 2.5 * gaps[2]


def test_a_run_that_begins_mid_way_puts_missing_weights_on_the_oldest_prediction():
    solver = random_solver(FlowMatching(), "velocity")
    x, first, second = torch.randn(3, 4, dtype=torch.float64)
    step = solver.sigmas[5] - solver.sigmas[4]
    row = solver.coefficients[4]
    expected = x + step * (row[:4].sum() * first + row[4] * second)
    torch.testing.assert_close(solver.step(x, [first, second], 4), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype):
    solver = random_solver(FlowMatching(), "velocity")
    x, prediction = torch.randn(2, 64).to(dtype)
    result = solver.step(x, [prediction], 0)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, solver.step(x.float(), [prediction.float()], 0), rtol=0, atol=0)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_the_pure_function_makes_the_same_run(frame, prediction_type):
    solver = random_solver(PROCESSES["vp"], frame, consistent=False)
    table, x = solver.update_table(prediction_type), torch.randn(2, 5, dtype=torch.float64)

    def network(x, t):
        return torch.sin(x + t / 300)

    state, history = x, torch.zeros(solver.num_steps, *x.shape, dtype=torch.float64)
    for i, t in enumerate(solver.timesteps):
        state, history = tensor_step(state, network(state, t), history, torch.tensor([i]), table)
    torch.testing.assert_close(state, run(solver, network, x, prediction_type), rtol=1e-12, atol=1e-12)


def test_one_compiled_graph_of_the_pure_function_serves_all_rows_of_all_solvers():
    graphs = CompileCounter()
    compiled = torch.compile(tensor_step, backend=graphs, fullgraph=True)
    for frame in FRAMES:
        solver = random_solver(PROCESSES["flow"], frame)
        table = solver.update_table("flow_prediction").float()
        x, history = torch.randn(2, 5), torch.zeros(solver.num_steps, 2, 5)
        for i in range(solver.num_steps):
            x, history = compiled(x, x, history, torch.tensor([i]), table)
    assert graphs.frame_count == 1


def test_tables_cannot_be_changed():
    solver = random_solver(FlowMatching(), "velocity")
    with pytest.raises(ValueError, match="read-only"):
        solver.coefficients[0, 0] = 2


def _broken(**changes):
    timesteps, alphas, sigmas = time_grid(FlowMatching(), 3)
    tables = {"timesteps": timesteps, "alphas": alphas, "sigmas": sigmas, "coefficients": np.eye(3)}
    return lambda: SearchedSolver(**{**tables, "frame": "velocity", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame": "noise"}, "`frame` is 'noise', expected one of"),
        ({"timesteps": [[900.0]]}, r"`timesteps` has shape \(1, 1\)"),
        ({"timesteps": []}, "at least one"),
        ({"sigmas": [1.0, 0.5, 0.0]}, r"`sigmas` has shape \(3,\), expected \(4,\)"),
        ({"coefficients": np.diag([1, np.nan, 1])}, r"`coefficients` holds nan at \[1, 1\]"),
        ({"sigmas": [1.0, 0.6, -0.1, 0.0]}, "`sigmas` goes down to -0.1"),
        ({"sigmas": [1.0, 0.6, 0.8, 0.0], "alphas": [0.0, 0.4, 0.2, 1.0]}, "does not fall from node 1 to node 2"),
        ({"timesteps": [900.0, 900.0, 100.0]}, "strictly decreasing"),
        ({"timesteps": [900.0, 500.0, -1.0]}, "at least 0"),
        ({"coefficients": np.eye(3) + np.diag([0.5, 0], 1)}, r"`coefficients` is 0.5 at \[0, 1\], above the diagonal"),
        ({"coefficients": np.diag([1, 1.1, 1])}, "Row 1 of `coefficients` sums to 1.1, expected 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_invalid_table_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _broken(**changes)()


def test_free_row_sums_are_accepted_when_declared():
    assert _broken(coefficients=np.diag([1, 1.1, 1]), consistent=False)().coefficients[1, 1] == 1.1
