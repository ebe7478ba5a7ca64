"""Properties of the solver over random valid tables: what holds for every one, and where half precision ends."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffusers_searched_solver import FlowMatching, SearchedSolver, SearchedSolverScheduler, VariancePreserving
from diffusers_searched_solver.process import PREDICTION_TYPES, convert_prediction
from search.pipeline.rollout import recorded_run


# Seeded by the test's name, so that a run of the suite can be repeated.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")

PROCESSES = {
    "flow": FlowMatching(),
    "flow in other units": FlowMatching(7),
    "linear": VariancePreserving(),
    "scaled": VariancePreserving(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "zero SNR": VariancePreserving(rescale_betas_zero_snr=True),
}
FRAMES = ["velocity", "data"]
HALF_MAX = torch.finfo(torch.float16).max
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def prediction_types(process) -> list[str]:
    """What models of a process predict."""
    flow = process.kind == "flow_matching"
    return [kind for kind in PREDICTION_TYPES if (kind == "flow_prediction") == flow]


def model_config(process, prediction_type: str) -> dict:
    if process.kind == "flow_matching":
        return {"prediction_type": prediction_type, "num_train_timesteps": process.num_train_timesteps}
    return {"prediction_type": prediction_type} | {
        key: getattr(process, key) for key in ("beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
    }


@st.composite
def grids(draw, processes=tuple(PROCESSES), max_steps=8, least_gap=0.05):
    """A process and falling times on it, one for each node but the last, which is the data."""
    process = PROCESSES[draw(st.sampled_from(processes))]
    num_steps = draw(st.integers(1, max_steps))
    gaps = np.array(draw(st.lists(st.floats(least_gap, 1), min_size=num_steps + 1, max_size=num_steps + 1)))
    gaps[0] *= draw(st.booleans())
    return process, process.max_timestep * (1 - np.cumsum(gaps)[:-1] / gaps.sum())


@st.composite
def solvers(draw, consistent=None, size=3.0, grid=None):
    """A process and a valid solver of it: any nodes, network times off them, coefficients up to `size`."""
    process, times = draw(grids() if grid is None else grid)
    num_steps = len(times)
    alphas, sigmas = process.alpha_sigma(times)
    # At zero SNR the last timesteps are all of one noise level.
    assume((np.diff(np.append(alphas / sigmas, np.inf)) > 0).all())
    consistent = draw(st.booleans()) if consistent is None else consistent
    entries = st.floats(-size, size, width=32)
    coefficients = np.zeros((num_steps, num_steps))
    coefficients[np.tril_indices(num_steps)] = draw(
        st.lists(entries, min_size=num_steps * (num_steps + 1) // 2, max_size=num_steps * (num_steps + 1) // 2)
    )
    if consistent:
        coefficients[np.diag_indices(num_steps)] += 1 - coefficients.sum(1)
    called = times * draw(st.floats(0.9, 1))
    return process, SearchedSolver(
        called, np.append(alphas, 1), np.append(sigmas, 0), coefficients, draw(st.sampled_from(FRAMES)), consistent
    )


def run(solver, network, x, prediction_type, begin=0):
    """The state after the last step; `network` is called with the state and the index of the step."""
    history = []
    for i in range(begin, solver.num_steps):
        history.append(solver.prediction(network(x, i), x, i, prediction_type))
        x = solver.step(x, history, i)
    return x


def normal(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SEEDS = st.integers(0, 2**31)


@given(solvers(consistent=True), SEEDS, st.data())
def test_a_constant_prediction_is_integrated_exactly_by_any_consistent_solver_from_any_step(made, seed, data):
    """If the network always names the same data D and noise E, every state is alpha * D + sigma * E."""
    process, solver = made
    kind = data.draw(st.sampled_from(prediction_types(process)))
    begin = data.draw(st.integers(0, solver.num_steps - 1))
    clean, noise = normal(seed, 2, 5)

    def network(x, i):
        u, w = convert_prediction("sample", kind, solver.alphas[i], solver.sigmas[i])
        return u * x + w * clean

    def noise_network(x, i):
        return noise

    start = solver.alphas[begin] * clean + solver.sigmas[begin] * noise
    end = run(solver, noise_network if kind == "epsilon" else network, start, kind, begin)
    # A row's sum is 1 to 1e-15, and rounding grows by as much as outputs can.
    torch.testing.assert_close(end, clean, rtol=0, atol=1e-13 * (1 + solver.reach(kind)))


@given(solvers(), SEEDS, st.floats(-3, 3), st.floats(-3, 3), st.data())
def test_a_run_is_linear_in_noise_and_outputs(made, seed, a, b, data):
    process, solver = made
    kind = data.draw(st.sampled_from(prediction_types(process)))
    one, two = normal(seed, 2, solver.num_steps + 1, 5)
    ends = [run(solver, lambda x, i, z=z: z[i + 1], z[0], kind) for z in (one, two, a * one + b * two)]
    tolerance = 1e-12 * (1 + abs(a) + abs(b)) * solver.reach(kind)
    torch.testing.assert_close(a * ends[0] + b * ends[1], ends[2], rtol=0, atol=tolerance)


@given(solvers(), SEEDS, st.data())
def test_the_reach_is_a_bound_on_states_and_predictions_that_some_outputs_attain(made, seed, data):
    process, solver = made
    kind = data.draw(st.sampled_from(prediction_types(process)))
    n, reach = solver.num_steps, solver.reach(kind)
    # Every combination of signs is tried, so one of them is the worst case of the last state.
    signs = torch.tensor(np.array(np.meshgrid(*[[-1.0, 1.0]] * (n + 1))).reshape(n + 1, -1))
    largest, history, x = torch.ones(()), [], signs[0]
    for i in range(n):
        history.append(solver.prediction(signs[i + 1], x, i, kind))
        x = solver.step(x, history, i)
        largest = torch.stack([largest, history[i].abs().max(), x.abs().max()]).max()
    assert float(largest) == pytest.approx(reach, rel=1e-9)


@given(solvers(), SEEDS, st.sampled_from(DTYPES), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_samples_of_a_batch_do_not_interact_bit_for_bit(made, seed, dtype, shape, data):
    process, solver = made
    kind = data.draw(st.sampled_from(prediction_types(process)))
    x = normal(seed, 3, *shape, dtype=dtype)

    def network(x, i):
        return torch.sin(3 * x + solver.timesteps[i] / process.max_timestep).to(dtype)

    def clone(x):
        return run(solver, network, x, kind)

    together = clone(x)
    assert together.shape == x.shape
    for k in range(3):
        assert torch.equal(clone(x[k : k + 1]), together[k : k + 1])


@given(solvers(), SEEDS, st.sampled_from([torch.float32, torch.float64]), st.data())
def test_the_search_s_rollout_and_the_scheduler_make_the_same_run_bit_for_bit(made, seed, dtype, data):
    process, solver = made
    kind = data.draw(st.sampled_from(prediction_types(process)))
    assume(solver.reach(kind) < HALF_MAX)
    scheduler = SearchedSolverScheduler.from_config(model_config(process, kind), solver=solver)
    x = normal(seed, 2, 9, dtype=dtype)

    def network(x, t):
        return torch.cos(2 * x + float(t) / process.max_timestep)

    # A pipeline's calls are those of its scheduler's float32 timesteps; test_field.py runs real ones.
    evaluate = lambda x, t, node: (network(x, np.float32(t)), x)  # noqa: E731
    field = SimpleNamespace(noise=x, evaluate=evaluate, prediction_type=kind)
    scheduler.set_timesteps(solver.num_steps)
    states = [x]
    for t in scheduler.timesteps:
        states.append(scheduler.step(network(states[-1], t), t, states[-1], return_dict=False)[0])
    for ours, theirs in zip(states, recorded_run(field, solver).states, strict=True):
        assert torch.equal(ours, theirs)


# Order of convergence, on data of one normal distribution, whose flow is known


def gaussian_end_error(process, frame, order, times, spread, centre) -> float:
    """The error at the end of an Adams-Bashforth run over all `times`, the largest of several starts."""
    alphas, sigmas = process.alpha_sigma(times)
    solver = SearchedSolver.adams_bashforth(times[:-1], alphas, sigmas, frame, order)
    variances = alphas**2 * spread**2 + sigmas**2
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)

    def network(x, i):
        return sigmas[i] * (x - alphas[i] * centre) / variances[i]

    exact = alphas[-1] * centre + np.sqrt(variances[-1] / variances[0]) * (x - alphas[0] * centre)
    return float((run(solver, network, x, "epsilon") - exact).abs().max())


def warped(bend: float, num_steps: int) -> np.ndarray:
    """A smooth grid from 0.9 to 0.2 whose steps grow or shrink along it."""
    u = np.linspace(0, 1, num_steps + 1)
    return 0.9 - 0.7 * (u + bend * u * (1 - u))


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("order", [1, 2])
@settings(max_examples=15)
@given(st.sampled_from(["flow", "linear", "scaled"]), st.floats(0.4, 1.5), st.floats(-1, 1), st.floats(-0.6, 0.6))
def test_adams_bashforth_converges_with_its_order_on_any_smooth_grid(frame, order, process, spread, centre, bend):
    """The range stays away from the ends, where the processes are singular."""
    process = PROCESSES[process]
    errors = [
        gaussian_end_error(process, frame, order, process.max_timestep * warped(bend, n), spread, centre)
        for n in (128, 256)
    ]
    assume(errors[1] > 1e-11)
    # The leading term may cancel, then the order is higher.
    assert np.log2(errors[0] / errors[1]) > order - 0.2


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("order", [3, 4])
def test_higher_orders_that_ramp_up_from_euler_keep_order_two_at_a_smaller_error(frame, order):
    """The first steps are of lower order, so the global order is min(k, 2); the constant is what improves."""
    for process in (PROCESSES["flow"], PROCESSES["linear"]):

        def error(order, num_steps, process=process):
            times = process.max_timestep * warped(0, num_steps)
            return gaussian_end_error(process, frame, order, times, 0.6, 0.4)

        assert np.log2(error(order, 256) / error(order, 512)) > 1.85
        assert error(order, 512) < 0.5 * error(2, 512)


# What a run does not depend on


@given(solvers(grid=grids(["flow"])), SEEDS, st.integers(1, 5000))
def test_the_unit_of_time_does_not_matter(made, seed, unit):
    _, solver = made
    x = normal(seed, 5)
    other = SearchedSolver(
        solver.timesteps * unit / 1000,
        solver.alphas,
        solver.sigmas,
        solver.coefficients,
        solver.frame,
        solver.consistent,
    )

    def network(x, time):
        return torch.sin(2 * x + time)

    ends = [
        run(each, lambda x, i, each=each, scale=scale: network(x, each.timesteps[i] / scale), x, "flow_prediction")
        for each, scale in ((solver, 1000), (other, unit))
    ]
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10 * solver.reach("flow_prediction"))


@given(solvers(), SEEDS, st.data())
def test_the_scale_of_the_state_does_not_matter(made, seed, data):
    """
    With nodes r * alpha and r * sigma every state is r * x, for any positive r at each node: variance-preserving,
    variance-exploding and flow-matching forms of one path make one run.
    """
    process, solver = made
    n = solver.num_steps
    r = np.array(data.draw(st.lists(st.floats(0.1, 10), min_size=n + 1, max_size=n + 1)))
    scaled = SearchedSolver(
        solver.timesteps, r * solver.alphas, r * solver.sigmas, solver.coefficients, solver.frame, solver.consistent
    )

    def data_network(x, i):
        return torch.sin(2 * x + i)

    x = normal(seed, 5)
    end = run(solver, data_network, x, "sample")
    scaled_end = run(scaled, lambda x, i: data_network(x / r[i], i), r[0] * x, "sample")
    tolerance = 1e-12 * solver.reach("sample")
    torch.testing.assert_close(scaled_end / r[-1], end, rtol=0, atol=tolerance)


@given(grids(), st.sampled_from(FRAMES), st.integers(1, 4), st.data())
def test_classical_coefficients_depend_on_noise_levels_alone(made, frame, order, data):
    """On the nodes of another process at the same ratios sigma / alpha they are the same."""
    process, times = made
    alphas, sigmas = (np.append(each, end) for each, end in zip(process.alpha_sigma(times), (1, 0), strict=True))
    total = alphas + sigmas
    one = SearchedSolver.adams_bashforth(times, alphas, sigmas, frame, order)
    other = SearchedSolver.adams_bashforth(times, alphas / total, sigmas / total, frame, order)
    np.testing.assert_allclose(one.coefficients, other.coefficients, rtol=1e-6, atol=1e-9)


# Extremes


def half_precision_run(solver, config, dtype, seed, size):
    scheduler = SearchedSolverScheduler.from_config(config, solver=solver)
    scheduler.set_timesteps(solver.num_steps)
    generator = torch.Generator().manual_seed(seed)
    x, *outputs = (torch.rand(solver.num_steps + 1, 64, generator=generator) * 2 - 1).to(dtype)
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(size * output, t, x, return_dict=False)[0]
        assert torch.isfinite(x).all()


EXTREMES = grids(max_steps=15, least_gap=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@given(solvers(size=10.0, consistent=False, grid=EXTREMES), SEEDS, st.data())
def test_an_extreme_table_stays_finite_in_half_precision_or_is_refused_with_how_far_it_goes(dtype, made, seed, data):
    process, solver = made
    kind = data.draw(st.sampled_from(prediction_types(process)))
    if solver.reach(kind) > HALF_MAX:
        with pytest.raises(ValueError, match="makes numbers of up to .* half precision ends at 65504"):
            SearchedSolverScheduler.from_config(model_config(process, kind), solver=solver)
    else:
        half_precision_run(solver, model_config(process, kind), dtype, seed, size=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@given(solvers(size=10.0, consistent=False, grid=grids(["flow"], max_steps=15, least_gap=1e-7)), SEEDS)
def test_coefficients_up_to_ten_never_overflow_a_flow_in_its_own_frame(dtype, made, seed):
    """15 steps that add up to one and 15 coefficients of 10 a row amount to 150, so outputs may be as large as 400."""
    process, solver = made
    assume(solver.frame == "velocity")
    assert solver.reach("flow_prediction") <= 151
    half_precision_run(solver, model_config(process, "flow_prediction"), dtype, seed, size=400)
