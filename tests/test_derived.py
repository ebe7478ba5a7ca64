"""Step counts that a solver file lacks, and what runs without one: exact where it can be, never worse than others."""

import contextlib
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from fields import load

from diffusers_searched_solver import (
    FlowMatching,
    SearchedSolver,
    SearchedSolverScheduler,
    SolverFile,
    VariancePreserving,
    list_bundled_solvers,
    load_solver_file,
    solver_from_scheduler,
    time_grid,
)
from diffusers_searched_solver.derived import derived_table
from diffusers_searched_solver.exponential import (
    exponential_adams_bashforth,
    exponential_predictor_corrector,
    few_step_table,
)
from diffusers_searched_solver.grids import geometric_grid
from diffusers_searched_solver.schedules import searched_table
from diffusers_searched_solver.teacher import teacher_solver
from search.known.baselines import diffusers_schedulers
from search.known.race import table_errors
from search.launch.network_calls import NetworkCalls
from search.teacher.batches import Teacher


FLOW, VP = FlowMatching(), VariancePreserving()
PROCESSES = pytest.mark.parametrize("process", [FLOW, VP], ids=["flow", "vp"])
# Plain spacings and the flow's own shift: what a user gets who names the class alone.
DEFAULTS = {"shift 1", "linspace", "leading", "trailing"}
CONDITIONS = [{"class_labels": [k], "guidance_scale": 2.0} for k in range(10)]


def classical(process, num_steps):
    grid = time_grid(process, num_steps, start=1.0 if process is FLOW else 0.9)
    if process is FLOW:
        return SearchedSolver.adams_bashforth(*grid, "velocity", 3)
    return exponential_adams_bashforth(*grid, 3)


def file_of(process, *solvers):
    kind = "flow_prediction" if process is FLOW else "epsilon"
    return SolverFile({solver.num_steps: solver for solver in solvers}, process, kind)


@PROCESSES
@pytest.mark.parametrize("num_steps", [5, 6])
def test_between_classical_solvers_on_one_grid_is_the_classical_solver_on_it(process, num_steps):
    table = derived_table(file_of(process, classical(process, 4), classical(process, 8)), num_steps)
    expected = classical(process, num_steps)
    np.testing.assert_allclose(table.timesteps, expected.timesteps, atol=1e-9)
    np.testing.assert_allclose(table.coefficients, expected.coefficients, atol=1e-9)


@PROCESSES
@pytest.mark.parametrize("num_steps", [3, 5, 7, 12, 50])
def test_what_is_derived_from_consistent_solvers_is_consistent(process, num_steps):
    solvers = [
        SearchedSolver.adams_bashforth(*time_grid(process, n, shift, 0.9), "velocity", 4)
        for n, shift in ((4, 0.5), (8, 1.4))
    ]
    table = derived_table(file_of(process, *solvers), num_steps)
    assert table.num_steps == num_steps
    np.testing.assert_allclose(table.coefficients.sum(1), 1, atol=1e-9)


def test_beyond_the_searched_counts_a_flow_keeps_the_mean_density_of_nodes():
    dense, sparse = (SearchedSolver.adams_bashforth(*time_grid(FLOW, 5, shift), "velocity", 3) for shift in (3.0, 1.0))
    table = derived_table(file_of(FLOW, dense), 20)
    np.testing.assert_allclose(table.sigmas[::4], dense.sigmas, atol=1e-12)
    np.testing.assert_allclose(table.timesteps, 1000 * table.sigmas[:-1], atol=1e-9)
    ten = SearchedSolver.adams_bashforth(*time_grid(FLOW, 10, 1.0), "velocity", 3)
    table = derived_table(file_of(FLOW, dense, ten), 20)
    np.testing.assert_allclose(table.sigmas[::4], (dense.sigmas + sparse.sigmas) / 2, atol=1e-12)


@PROCESSES
def test_outside_of_the_searched_counts_what_a_solver_adds_fades(process):
    solver = classical(process, 8)
    file = file_of(process, replace(solver, coefficients=solver.coefficients + 0.1 * np.eye(8), consistent=False))
    for num_steps, kept in ((7, 0.75), (8, 1), (9, 0.75), (10, 0.5), (11, 0.25), (12, 0), (30, 0)):
        sums = searched_table(file, num_steps, strict=False).in_frame("velocity").coefficients.sum(1)
        np.testing.assert_allclose(sums, 1 + 0.1 * kept, atol=1e-9)


def test_the_exponential_table_of_order_one_is_ddim_but_for_the_last_step():
    grid = geometric_grid(VP, 6)
    ddim = SearchedSolver.adams_bashforth(*grid, "data", 1).in_frame("velocity")
    np.testing.assert_allclose(
        exponential_adams_bashforth(*grid, 1).coefficients[:-1], ddim.coefficients[:-1], atol=1e-12
    )


def test_the_exponential_table_integrates_what_it_promises_exactly():
    """Noise that is quadratic in lambda, in all steps that have three predictions."""
    timesteps, alphas, sigmas = geometric_grid(VP, 8)
    table = exponential_adams_bashforth(timesteps, alphas, sigmas, 3)

    def noise(level):
        return 1 + 0.3 * np.log(level) - 0.2 * np.log(level) ** 2

    def integral(level):
        """Of the noise over the level."""
        log = np.log(level)
        return level * (1 + 0.3 * (log - 1) - 0.2 * (log**2 - 2 * log + 2))

    levels, x, history = sigmas / alphas, torch.randn((), dtype=torch.float64), []
    for i in range(7):
        # The velocity with which x = alpha * data + sigma * noise has that noise.
        history.append(((alphas[i] + sigmas[i]) * noise(levels[i]) - x) / alphas[i])
        after = table.step(x, history, i)
        if i >= 2:
            moved = float(after / alphas[i + 1] - x / alphas[i])
            assert moved == pytest.approx(integral(levels[i + 1]) - integral(levels[i]), rel=1e-9)
        x = after


@pytest.mark.parametrize("bend", [0.0, 0.2], ids=["linear", "quadratic"])
def test_the_table_with_a_corrector_integrates_what_it_promises_exactly(bend):
    """
    Data that is quadratic in log(alpha / sigma), in all steps that have three predictions; linear data from the start,
    although the first step has only one: the second prediction mends it.
    """
    timesteps, alphas, sigmas = geometric_grid(VP, 16)
    table = exponential_predictor_corrector(timesteps, alphas, sigmas, 3)

    def data(ratio):
        return 1 + 0.3 * np.log(ratio) - bend * np.log(ratio) ** 2

    def integral(ratio):
        """Of the data over the ratio."""
        log = np.log(ratio)
        return ratio * (1 + 0.3 * (log - 1) - bend * (log**2 - 2 * log + 2))

    ratios, states, history = alphas[:-1] / sigmas[:-1], [torch.randn((), dtype=torch.float64)], []
    for i in range(15):
        # The velocity with which x = alpha * data + sigma * noise has that data.
        history.append((states[i] - (alphas[i] + sigmas[i]) * data(ratios[i])) / sigmas[i])
        states.append(table.step(states[i], history, i))
        since = i if bend else 0
        if i >= (3 if bend else 1):
            moved = float(states[i + 1] / sigmas[i + 1] - states[since] / sigmas[since])
            assert moved == pytest.approx(integral(ratios[i + 1]) - integral(ratios[since]), rel=1e-9)


@PROCESSES
@pytest.mark.parametrize("bend", [0.0, 0.2], ids=["linear", "quadratic"])
def test_the_teacher_integrates_what_it_promises_exactly(process, bend):
    """
    Velocities that are quadratic in tau, but for what is predicted after the last of them; linear ones from the start,
    although the first step has only one: the second prediction mends it.
    """
    table = teacher_solver(process, 12)
    scales = table.alphas + table.sigmas
    times = table.sigmas / scales
    velocities = 1 + 0.3 * times[:-1] - bend * times[:-1] ** 2
    x, states = torch.zeros((), dtype=torch.float64), []
    for i in range(12):
        x = table.step(x, [torch.tensor(v, dtype=torch.float64) for v in velocities[: i + 1]], i)
        states.append(float(x) / scales[i + 1])

    def integral(start, end):
        return end - start + 0.15 * (end**2 - start**2) - bend / 3 * (end**3 - start**3)

    def mended(i):
        """The state that step i begins with, by what was predicted there: without the step itself."""
        slope = (velocities[i] - velocities[i - 1]) / (times[i] - times[i - 1])
        length = times[i + 1] - times[i]
        return states[i] - length * (velocities[i] + slope * length / 2)

    first = 2 if bend else 1
    found = [mended(i) - mended(first) for i in range(first, 12)]
    expected = [integral(times[first], times[i]) for i in range(first, 12)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    if not bend:
        assert states[-1] == pytest.approx(integral(times[0], 0.0), abs=1e-12)


@pytest.mark.parametrize("name", list_bundled_solvers())
def test_every_bundled_solver_serves_every_step_count(name):
    scheduler = SearchedSolverScheduler.from_pretrained(name)
    for num_steps in range(scheduler.solver_file.step_counts[0] - 1, 51):
        scheduler.set_timesteps(num_steps)
        assert len(scheduler.timesteps) == num_steps


def test_a_derived_run_says_so_once_and_from_what(caplog):
    logging.getLogger("diffusers_searched_solver").propagate = True
    file = file_of(FLOW, classical(FLOW, 4), classical(FLOW, 8))
    scheduler = SearchedSolverScheduler(prediction_type="flow_prediction")
    scheduler.solver_file = file
    for _ in range(2):
        scheduler.set_timesteps(6)
    (record,) = caplog.records
    assert "No solver of 6 steps was searched" in record.message and "from that of 4 and 8 steps" in record.message
    assert "may be nearer" not in record.message
    scheduler.set_timesteps(8)
    assert len(caplog.records) == 1
    scheduler.set_timesteps(9)
    assert "with fewer steps, these may be nearer" in caplog.records[-1].message


def test_strict_is_kept_by_saving(tmp_path):
    file = file_of(FLOW, classical(FLOW, 4))
    config = SearchedSolverScheduler(prediction_type="flow_prediction").config
    SearchedSolverScheduler.from_config(config, solver=file, strict=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 4. It is `strict`"):
        SearchedSolverScheduler.from_pretrained(tmp_path).set_timesteps(5)
    SearchedSolverScheduler.from_pretrained(tmp_path, strict=False).set_timesteps(5)


@pytest.fixture(scope="module", params=["digits-dit", "digits-sit"])
def digits(request, one_thread):
    """A pipeline's name and config, and noises with their ends."""
    pipe = load(request.param)
    calls = NetworkCalls(pipe)
    batches = Teacher(pipe, 96, 16, calls).batches(CONDITIONS, list(range(10**9, 10**9 + 16)))
    yield request.param, pipe.scheduler.config, batches
    calls.remove()
    for batch in batches:
        batch.field.close()


def tables(num_steps, schedulers):
    """Those of schedulers that have one; whole timesteps may meet where there are many."""
    for scheduler in schedulers:
        with contextlib.suppress(ValueError):
            yield solver_from_scheduler(scheduler, num_steps)


def root_mean_squares(batches, solvers):
    return table_errors(batches, solvers).square().mean(1).sqrt()


@pytest.mark.parametrize("num_steps", [4, 6, 7, 9, 12, 16, 20, 30])
def test_a_derived_solver_is_no_worse_than_the_best_of_diffusers_at_their_defaults(digits, num_steps):
    name, config, batches = digits
    found, *others = root_mean_squares(
        batches, [derived_table(searched(name), num_steps), *at_defaults(config, num_steps)]
    )
    assert found <= min(others)


@pytest.mark.parametrize("num_steps", [7, 9, 10])
def test_from_one_searched_count_the_next_are_nearer_than_any_of_diffusers_at_their_defaults(digits, num_steps):
    name, config, batches = digits
    file = searched(name)
    file = SolverFile({8: file.solvers[8]}, file.process, file.prediction_type)
    found, *others = root_mean_squares(batches, [derived_table(file, num_steps), *at_defaults(config, num_steps)])
    assert found <= 0.6 * min(others)


def searched(name):
    return load_solver_file(f"examples/results/{name}/solver/searched_solver.safetensors")


def at_defaults(config, num_steps):
    """Tables of diffusers' schedulers as they come."""
    families = diffusers_schedulers(config)
    settings = [pair for family in families if "3" not in family for pair in families[family].items()]
    return tables(num_steps, (scheduler for setting, scheduler in settings if setting in DEFAULTS))


@pytest.mark.parametrize("num_steps", [4, 6, 10, 20, 50])
def test_without_a_solver_it_is_no_worse_than_dpm_solver_at_its_best_setting(digits, num_steps):
    _, config, batches = digits
    scheduler = SearchedSolverScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    rivals = tables(num_steps, diffusers_schedulers(config)["DPM-Solver++(2M)"].values())
    found, *others = root_mean_squares(batches, [scheduler._run.solver, *rivals])
    assert found <= min(others)


def test_few_step_tables_run_on_the_process_of_stable_diffusion():
    process = VariancePreserving(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for num_steps in range(1, 51):
        table = few_step_table(process, num_steps)
        assert table.reach("epsilon") < 1e3
