"""SearchedSolverScheduler: which table runs, where it starts, and what it refuses."""

import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_searched_solver import (
    FlowMatching,
    SearchedSolver,
    SearchedSolverScheduler,
    SolverFile,
    SolverFileError,
    VariancePreserving,
    list_bundled_solvers,
    save_solver_file,
    time_grid,
)
from diffusers_searched_solver.process import PREDICTION_TYPES, convert_prediction
from diffusers_searched_solver.serialization import SOLVER_FILE


FLOW, VP = FlowMatching(), VariancePreserving()
FLOW_CONFIG = FlowMatchEulerDiscreteScheduler(shift=3.0).config
UNSHIFTED_CONFIG = FlowMatchEulerDiscreteScheduler().config
VP_CONFIG = DDIMScheduler().config


def searched(config, steps=(4,), shift=1.3, frame="velocity", order=3, process=None):
    """A scheduler with tables that no default grid gives."""
    process = process or SearchedSolverScheduler.from_config(config).process
    solvers = {n: SearchedSolver.adams_bashforth(*time_grid(process, n, shift), frame, order) for n in steps}
    prediction_type = SearchedSolverScheduler.from_config(config).config.prediction_type
    return SearchedSolverScheduler.from_config(config, solver=SolverFile(solvers, process, prediction_type))


def network(x, t):
    return torch.sin(2 * x + float(t) / 300)


def run(scheduler, x, timesteps=None):
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    return x


@pytest.fixture()
def warnings(caplog):
    """Messages of our logger, which diffusers keeps from pytest otherwise."""
    logging.getLogger("diffusers").propagate = True
    logging.getLogger("diffusers_searched_solver").propagate = True
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


# Which table runs


@pytest.mark.parametrize(
    "spelling", [np.linspace(1, 1 / 4, 4), [1 - i / 4 for i in range(4)], torch.linspace(1, 0, 5)[:-1]]
)
def test_the_grid_that_flow_pipelines_pass_by_default_means_the_searched_table(spelling, warnings):
    scheduler = searched(FLOW_CONFIG)
    scheduler.set_timesteps(sigmas=spelling, mu=0.7, device="cpu")
    np.testing.assert_allclose(scheduler.timesteps, scheduler.solver_file.solvers[4].timesteps, rtol=1e-6)
    assert warnings() == []


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        (UNSHIFTED_CONFIG, {"sigmas": [1.0, 0.7, 0.2]}),
        (UNSHIFTED_CONFIG, {"sigmas": [1.0, 0.7, 0.2, 0.0]}),
        (FLOW_CONFIG, {"timesteps": torch.tensor([1000.0, 700.0, 200.0])}),
        (VP_CONFIG, {"timesteps": [999, 600, 100]}),
    ],
    ids=["sigmas", "sigmas to zero", "timesteps", "whole timesteps"],
)
def test_any_other_schedule_is_honoured_with_a_classical_table_and_one_warning(config, schedule, warnings):
    scheduler = searched(config)
    scheduler.set_timesteps(**schedule)
    timesteps = np.array([999, 600, 100] if config is VP_CONFIG else [1000.0, 700.0, 200.0])
    alphas, sigmas = (VP if config is VP_CONFIG else FLOW).alpha_sigma(timesteps)
    table = SearchedSolver.adams_bashforth(timesteps, np.append(alphas, 1), np.append(sigmas, 0), "velocity", 2)
    reference = SearchedSolverScheduler.from_config(config, solver=table)
    reference.set_timesteps(3)
    x = torch.randn(2, 3)
    torch.testing.assert_close(scheduler.timesteps, reference.timesteps, rtol=1e-6, atol=0)
    torch.testing.assert_close(run(scheduler, x), run(reference, x), rtol=0, atol=1e-5)
    scheduler.set_timesteps(**schedule)
    assert len(warnings()) == 1 and "An explicit schedule was passed" in warnings()[0]


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        ({"shift": 3.0}, {}),
        ({"use_dynamic_shifting": True}, {"mu": 0.8}),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 0.8}),
        ({"shift": 3.0, "shift_terminal": 0.05}, {}),
        ({"shift": 3.0}, {"timesteps": [1000, 667, 334]}),
    ],
    ids=["shift", "dynamic shift", "linear dynamic shift", "last sigma", "timesteps too"],
)
def test_explicit_sigmas_mean_the_nodes_that_they_mean_to_diffusers_own_scheduler(config, schedule):
    diffusers_scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler = searched(diffusers_scheduler.config)
    for each in (scheduler, diffusers_scheduler):
        each.set_timesteps(sigmas=[1.0, 0.667, 0.334], **schedule)
    torch.testing.assert_close(scheduler.timesteps, diffusers_scheduler.timesteps, rtol=1e-6, atol=0)
    torch.testing.assert_close(scheduler.sigmas, diffusers_scheduler.sigmas, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("num_steps", "strict"), [(7, True), (2, False), (51, False)])
def test_a_step_count_that_is_not_served_is_an_error_that_lists_those_present(num_steps, strict):
    scheduler = searched(FLOW_CONFIG, steps=(4, 6, 9))
    scheduler.register_to_config(strict=strict)
    reason = "It is `strict`" if strict else "From them, 3 to 50 steps can be derived"
    message = (
        rf"No solver for {num_steps} steps: this scheduler has 4, 6 and 9\. {reason}.*run.py --num-steps {num_steps}`"
    )
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(num_steps)


def test_without_a_solver_any_step_count_of_a_flow_runs_a_second_order_table_on_the_shifted_grid():
    scheduler = SearchedSolverScheduler.from_config(FLOW_CONFIG)
    scheduler.set_timesteps(6)
    np.testing.assert_allclose(scheduler.timesteps, time_grid(FLOW, 6, 3.0)[0], rtol=1e-6)
    assert scheduler.sigmas[-1] == 0 and len(scheduler.sigmas) == 7


@pytest.mark.parametrize("num_steps", [1, 2, 10, 50, 999])
def test_without_a_solver_any_step_count_runs_on_a_variance_preserving_model(num_steps):
    scheduler = SearchedSolverScheduler.from_config(VP_CONFIG)
    scheduler.set_timesteps(num_steps)
    assert len(scheduler.timesteps) == num_steps and scheduler.sigmas[-1] == 0
    assert run(scheduler, torch.randn(1, 1, 4, 4)).isfinite().all()


def test_dynamic_shifting_takes_mu():
    scheduler = SearchedSolverScheduler(prediction_type="flow_prediction", use_dynamic_shifting=True)
    scheduler.set_timesteps(6, mu=np.log(2.5))
    np.testing.assert_allclose(scheduler.timesteps, time_grid(FLOW, 6, 2.5)[0], rtol=1e-6)


@pytest.mark.parametrize(
    "arguments", [{}, {"sigmas": [0.2, 0.7]}, {"timesteps": [500, 500]}, {"timesteps": [float("nan")]}]
)
def test_a_schedule_that_is_none_is_refused(arguments):
    with pytest.raises(ValueError, match="expected|needs one of|must run from noise to data"):
        searched(FLOW_CONFIG).set_timesteps(**arguments)


@pytest.mark.parametrize("num_steps", [0, -4])
def test_a_step_count_below_one_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"`num_inference_steps` is {num_steps}, expected at least 1"):
        SearchedSolverScheduler.from_config(FLOW_CONFIG).set_timesteps(num_steps)


@pytest.mark.parametrize(
    ("config", "schedule", "message"),
    [
        (VP_CONFIG, {"timesteps": [float("nan"), 1.0]}, r"`timesteps` is \[nan, 1.0\], expected falling numbers"),
        (VP_CONFIG, {"timesteps": [5000.0, 1.0]}, "from at most 999 to at least 0"),
        (VP_CONFIG, {"timesteps": []}, r"`timesteps` is \[\]"),
        (VP_CONFIG, {"timesteps": [1.0, 900.0]}, "must run from noise to data"),
        (FLOW_CONFIG, {"sigmas": [1.0, float("nan")]}, r"`sigmas` is \[1.0, nan\]"),
        (FLOW_CONFIG, {"sigmas": [2.0, 1.0]}, "from at most 1 to at least 0"),
    ],
    ids=["nan time", "time beyond the process", "no time", "rising times", "nan sigma", "sigma beyond 1"],
)
def test_an_explicit_schedule_that_is_none_is_refused(config, schedule, message):
    with pytest.raises(ValueError, match=message):
        SearchedSolverScheduler.from_config(config).set_timesteps(**schedule)


def test_a_shift_that_is_not_positive_is_refused():
    scheduler = SearchedSolverScheduler(prediction_type="flow_prediction", use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="`shift` is nan, expected a positive number"):
        scheduler.set_timesteps(4, mu=float("nan"))


def test_flow_sigmas_make_no_schedule_for_a_variance_preserving_model():
    with pytest.raises(ValueError, match="`sigmas` is a schedule for flow-matching models.*Pass `timesteps`"):
        searched(VP_CONFIG).set_timesteps(sigmas=[0.9, 0.3])


@pytest.mark.parametrize(
    "schedule", [{"timesteps": [1000, 500, 0]}, {"timesteps": [1000, 500, 0], "sigmas": [1, 0.5, 0]}]
)
def test_a_flow_that_is_at_the_data_has_no_step_left(schedule):
    scheduler = SearchedSolverScheduler.from_config(UNSHIFTED_CONFIG)
    scheduler.set_timesteps(**schedule)
    assert scheduler.timesteps.tolist() == [1000, 500] and scheduler.sigmas.tolist() == [1, 0.5, 0]


def test_a_long_schedule_that_is_none_is_shown_in_short():
    with pytest.raises(ValueError, match="`timesteps` is") as raised:
        SearchedSolverScheduler.from_config(VP_CONFIG).set_timesteps(timesteps=[1.0] * 900 + [-1.0])
    assert len(str(raised.value)) < 200


# Runs


@pytest.mark.parametrize("frame", ["velocity", "data"])
@pytest.mark.parametrize("prediction_type", [kind for kind in PREDICTION_TYPES if kind != "flow_prediction"])
def test_all_prediction_types_of_one_model_give_the_same_run(prediction_type, frame):
    """One network, its output expressed as noise, data or v at the node."""
    table = SearchedSolver.adams_bashforth(*time_grid(VP, 5, 0.7), frame, 2)
    results = []
    for kind in ("epsilon", prediction_type):
        scheduler = SearchedSolverScheduler.from_config({"prediction_type": kind}, solver=table)
        scheduler.set_timesteps(5)
        x = torch.linspace(-1, 1, 8, dtype=torch.float64)
        for i, t in enumerate(scheduler.timesteps):
            u, w = convert_prediction("epsilon", kind, table.alphas[i], table.sigmas[i])
            x = scheduler.step(u * x + w * network(x, t), t, x, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


def test_a_second_run_equals_the_first_also_after_an_aborted_one():
    scheduler, x = searched(VP_CONFIG), torch.randn(2, 3)
    scheduler.set_timesteps(4)
    first = run(scheduler, x)
    scheduler.set_timesteps(4)
    run(scheduler, x, scheduler.timesteps[:2])
    scheduler.set_timesteps(4)
    assert torch.equal(run(scheduler, x), first)


@pytest.mark.parametrize("announced", [True, False], ids=["set_begin_index", "by timestep"])
def test_a_run_may_begin_at_any_step(announced):
    scheduler, x = searched(FLOW_CONFIG), torch.randn(3)
    solver = scheduler.solver_file.solvers[4]
    for begin in range(4):
        scheduler.set_timesteps(4)
        if announced:
            scheduler.set_begin_index(begin)
        expected, history = x, []
        for i in range(begin, 4):
            history.append(network(expected, scheduler.timesteps[i]))
            expected = solver.step(expected, history, i)
        assert torch.equal(run(scheduler, x, scheduler.timesteps[begin:]), expected)
        assert scheduler.step_index == 4


def test_a_constant_velocity_is_integrated_exactly_from_any_step():
    scheduler = searched(FLOW_CONFIG)
    data, noise = torch.randn(2, 5, dtype=torch.float64)
    for begin in range(4):
        scheduler.set_timesteps(4)
        x = scheduler.scale_noise(data, scheduler.timesteps[begin : begin + 1], noise)
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(noise - data, t, x).prev_sample
        torch.testing.assert_close(x, data, rtol=0, atol=1e-12)


def test_the_second_output_is_the_data_that_the_prediction_points_at():
    for config in (FLOW_CONFIG, VP_CONFIG):
        scheduler = searched(config)
        scheduler.set_timesteps(4)
        data, noise = torch.randn(2, 3, 5)
        t = scheduler.timesteps[1]
        x = scheduler.add_noise(data, noise, t)
        output = noise - data if config is FLOW_CONFIG else noise
        scheduler.set_begin_index(1)
        result = scheduler.step(output, t, x)
        torch.testing.assert_close(result.pred_original_sample, data, rtol=0, atol=1e-4)


def test_a_tuple_has_the_data_in_a_run_of_one_step_alone_where_a_distilled_pixart_takes_it():
    for num_steps, length in ((1, 2), (2, 1)):
        scheduler = SearchedSolverScheduler.from_config(VP_CONFIG)
        scheduler.set_timesteps(num_steps)
        outputs = scheduler.step(torch.randn(1, 3), scheduler.timesteps[0], torch.randn(1, 3), return_dict=False)
        assert len(outputs) == length


def test_a_timestep_of_the_schedule_stands_for_its_node_and_any_other_for_the_process():
    solver = SearchedSolver.adams_bashforth(*time_grid(FLOW, 4), "velocity", 1)
    solver = SearchedSolver(solver.timesteps * 0.9, solver.alphas, solver.sigmas, solver.coefficients, "velocity")
    scheduler = SearchedSolverScheduler.from_config(FLOW_CONFIG, solver=solver)
    scheduler.set_timesteps(4)
    zero, one = torch.zeros(2, 1), torch.ones(2, 1)
    levels = scheduler.scale_noise(zero, torch.stack([scheduler.timesteps[1], torch.tensor(500.0)]), one)
    torch.testing.assert_close(levels.flatten(), torch.tensor([0.75, 0.5]))


def test_history_is_released_after_the_last_step():
    scheduler = searched(FLOW_CONFIG)
    scheduler.set_timesteps(4)
    run(scheduler, torch.randn(3), scheduler.timesteps[:3])
    assert len(scheduler.model_outputs) == 3
    t = scheduler.timesteps[3]
    scheduler.step(torch.randn(3), t, torch.randn(3))
    assert scheduler.model_outputs == []


# Models other than the one searched for


@pytest.mark.parametrize(("config", "process"), [(FLOW_CONFIG, VP), (VP_CONFIG, FLOW)])
def test_a_solver_for_the_other_kind_of_process_is_refused(config, process):
    with pytest.raises(ValueError, match="The solver is for a .* process, this model has a .*search one with"):
        searched(config, process=process)


def test_a_solver_for_other_betas_is_carried_over_by_noise_level(warnings):
    """With exact predictions for normally distributed data, only the noise level of each call matters."""
    other = VariancePreserving(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    config = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).config

    def exact_noise(process, x, t):
        alpha, sigma = (float(level) for level in process.alpha_sigma(float(t)))
        return sigma * x / (0.25 * alpha**2 + sigma**2)

    table = SearchedSolver.adams_bashforth(*time_grid(VP, 5, 0.5, start=0.6), "velocity", 2)
    ends = []
    for model_config, process in ((VP_CONFIG, VP), (config, other)):
        file = SolverFile({5: table}, VP, "epsilon")
        scheduler = SearchedSolverScheduler.from_config(model_config, solver=file)
        scheduler.set_timesteps(5)
        x = torch.tensor([1.0, -0.3], dtype=torch.float64)
        for t in scheduler.timesteps.double():
            x = scheduler.step(exact_noise(process, x, t), t, x, return_dict=False)[0]
        ends.append(x)
    # float32 timesteps
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)
    assert len(warnings()) == 1 and "carried over to the same noise levels" in warnings()[0]


# Loading


def test_every_bundled_solver_loads_and_says_where_it_comes_from():
    assert list_bundled_solvers() == ["dit-xl-2-256", "flowdcn-b-2-256", "sit-xl-2-256"]
    for name in list_bundled_solvers():
        scheduler = SearchedSolverScheduler.from_pretrained(name)
        assert scheduler.solver_file.provenance["license"] == "mit"
        assert set(range(5, 11)) <= set(scheduler.solver_file.step_counts)


@pytest.mark.parametrize("spelling", ["name", "folder", "file", "object"])
def test_from_config_takes_a_solver_however_it_is_given(tmp_path, spelling):
    original = searched(FLOW_CONFIG)
    original.save_pretrained(tmp_path)
    solver = {
        "name": "sit-xl-2-256",
        "folder": tmp_path,
        "file": tmp_path / SOLVER_FILE,
        "object": original.solver_file.solvers[4],
    }[spelling]
    scheduler = SearchedSolverScheduler.from_config(FLOW_CONFIG, solver=solver)
    assert scheduler.solver_file.step_counts == ([5, 6, 7, 8, 9, 10] if spelling == "name" else [4])
    assert scheduler.config.shift == 3.0


@pytest.mark.parametrize(
    "place", ["nowhere", "nowhere/sit-xl-2-256"], ids=["name", "path that ends in a bundled name"]
)
def test_a_solver_that_is_nowhere_is_refused(place):
    with pytest.raises(
        FileNotFoundError, match=f"No solver file at '{place}'.*expected a path or one of dit-xl-2-256"
    ):
        SearchedSolverScheduler.from_config(FLOW_CONFIG, solver=place)


def test_a_folder_with_a_broken_solver_file_is_refused(tmp_path):
    searched(FLOW_CONFIG).save_pretrained(tmp_path)
    (tmp_path / SOLVER_FILE).write_bytes(b"not a solver")
    with pytest.raises(SolverFileError, match="not a whole safetensors file"):
        SearchedSolverScheduler.from_pretrained(tmp_path)


def test_a_saved_scheduler_comes_back(tmp_path):
    original = searched(VP_CONFIG, steps=(3, 5))
    original.save_pretrained(tmp_path)
    loaded = SearchedSolverScheduler.from_pretrained(tmp_path)
    kept = set(original.config) - {"_use_default_values"}
    assert {key: loaded.config[key] for key in kept} == {key: original.config[key] for key in kept}
    x = torch.randn(4)
    for scheduler in (original, loaded):
        scheduler.set_timesteps(5)
    assert torch.equal(run(original, x), run(loaded, x))
    assert {path.name for path in tmp_path.iterdir()} == {"scheduler_config.json", "solver"}


def test_a_file_without_its_config_can_be_put_around_any_scheduler_config(tmp_path):
    save_solver_file(searched(VP_CONFIG).solver_file, tmp_path / "mine.safetensors")
    config = DPMSolverMultistepScheduler(use_karras_sigmas=True).config
    scheduler = SearchedSolverScheduler.from_config(config, solver=tmp_path / "mine.safetensors")
    assert scheduler.solver_file.step_counts == [4]


# Calls in the wrong order


def test_step_before_set_timesteps_is_refused():
    with pytest.raises(RuntimeError, match=r"before `set_timesteps`; call `set_timesteps\(num_steps\)` first"):
        searched(FLOW_CONFIG).step(torch.zeros(1), 1000.0, torch.zeros(1))


def test_the_place_of_a_timestep_before_set_timesteps_is_refused():
    with pytest.raises(RuntimeError, match="`index_for_timestep` was called before `set_timesteps`"):
        searched(FLOW_CONFIG).index_for_timestep(1000.0)


def test_a_step_after_the_last_is_refused():
    scheduler = searched(FLOW_CONFIG)
    scheduler.set_timesteps(4)
    x = run(scheduler, torch.zeros(1))
    with pytest.raises(RuntimeError, match="`step` was called 5 times in a run of 4 steps"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_a_step_out_of_order_is_refused():
    scheduler = searched(FLOW_CONFIG)
    scheduler.set_timesteps(4)
    x = scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1)).prev_sample
    with pytest.raises(RuntimeError, match="timestep 2 of the schedule where timestep 1 is due.*`set_timesteps`"):
        scheduler.step(x, scheduler.timesteps[2], x)


@pytest.mark.parametrize("begin_index", [-1, 4])
def test_a_begin_that_the_schedule_lacks_is_refused(begin_index):
    scheduler = searched(FLOW_CONFIG)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=f"`begin_index` is {begin_index}, expected 0 to 3"):
        scheduler.set_begin_index(begin_index)


def test_a_timestep_that_is_no_number_is_refused():
    scheduler = searched(FLOW_CONFIG)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`timestep` is nan, expected an element of `timesteps`"):
        scheduler.step(torch.zeros(1), float("nan"), torch.zeros(1))


def test_outputs_of_another_shape_are_refused():
    scheduler = searched(VP_CONFIG)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"`model_output` has shape \(1, 8\), `sample` \(1, 4\).*learned variance"):
        scheduler.step(torch.zeros(1, 8), scheduler.timesteps[0], torch.zeros(1, 4))


def test_noise_is_refused():
    scheduler = searched(FLOW_CONFIG)
    scheduler.set_timesteps(4)
    with pytest.raises(NotImplementedError, match="deterministic"):
        scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1), eta=0.5)


def test_an_output_that_comes_with_times_per_token_is_a_negated_velocity_as_for_diffusers_own_scheduler():
    x, velocity = torch.randn(2, 1, 5, 3)
    states = []
    for scheduler in (SearchedSolverScheduler.from_config(UNSHIFTED_CONFIG), FlowMatchEulerDiscreteScheduler()):
        scheduler.set_timesteps(timesteps=np.array([1000.0, 600.0]))
        times = torch.full((1, 5), 1000.0)
        states.append(scheduler.step(-velocity, 1000.0, x, per_token_timesteps=times, return_dict=False)[0])
    torch.testing.assert_close(*states, rtol=0, atol=1e-6)
    torch.testing.assert_close(states[0], x - 0.4 * velocity, rtol=0, atol=1e-6)
