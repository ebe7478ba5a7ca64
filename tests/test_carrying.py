"""Solvers on models with other betas than they were searched for."""

import logging

import diffusers
import numpy as np
import pytest
import torch

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, SolverFile, VariancePreserving


BETAS = {
    "Stable Diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "AnimateDiff": {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012},
}
VP = VariancePreserving()


@pytest.fixture()
def warnings(caplog):
    logging.getLogger("diffusers").propagate = True
    logging.getLogger("diffusers_searched_solver").propagate = True
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def on_nodes(timesteps) -> SearchedSolver:
    alphas, sigmas = VP.alpha_sigma(timesteps)
    return SearchedSolver.adams_bashforth(timesteps, np.append(alphas, 1), np.append(sigmas, 0), "velocity", 2)


def carried(solvers, model):
    config = diffusers.DDIMScheduler(**BETAS[model]).config
    file = SolverFile({solver.num_steps: solver for solver in solvers}, VP, "epsilon")
    return SearchedSolverScheduler.from_config(config, solver=file)


@pytest.mark.parametrize("model", BETAS)
def test_every_bundled_table_of_dit_is_carried_over_with_one_warning(model, warnings):
    original = SearchedSolverScheduler.from_pretrained("dit-xl-2-256").solver_file
    config = diffusers.DDIMScheduler(**BETAS[model]).config
    scheduler = SearchedSolverScheduler.from_config(config, solver="dit-xl-2-256")
    (warning,) = warnings()
    assert "carried over to the same noise levels" in warning and "brought to its end" in warning
    assert "beta_end 0.02 there, 0.012 here" in warning
    assert scheduler.solver_file.step_counts == original.step_counts
    lowest = scheduler.process.alpha_sigma(999.0)[0]
    for n, solver in scheduler.solver_file.solvers.items():
        assert solver.timesteps[0] == 999 and solver.alphas[0] == pytest.approx(lowest)
        within = original.solvers[n].alphas >= lowest
        np.testing.assert_array_equal(solver.alphas[within], original.solvers[n].alphas[within])
        np.testing.assert_array_equal(solver.coefficients, original.solvers[n].coefficients)


def test_nodes_that_would_meet_at_the_end_lie_evenly_between_it_and_the_first_within():
    times = [999.0, 950.0, 900.0, 600.0, 400.0, 200.0, 50.0]
    solver = carried([on_nodes(times)], "Stable Diffusion").solver_file.solvers[7]
    gaps = np.diff(solver.timesteps)
    assert solver.timesteps[0] == 999 and gaps[0] == pytest.approx(gaps[1]) and gaps[1] == pytest.approx(gaps[2])


@pytest.mark.parametrize("model", BETAS)
def test_a_carried_run_ends_at_its_last_node_where_predictions_are_exact(model):
    scheduler = SearchedSolverScheduler.from_config(
        diffusers.DDIMScheduler(**BETAS[model]).config, solver="dit-xl-2-256"
    )
    data, noise = torch.randn(2, 3, 4, dtype=torch.float64)
    scheduler.set_timesteps(7)
    x = scheduler.add_noise(data, noise, scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        x = scheduler.step(noise, t, x).prev_sample
    solver = scheduler.solver_file.solvers[7]
    torch.testing.assert_close(x, solver.alphas[-1] * data + solver.sigmas[-1] * noise, rtol=0, atol=1e-9)


def test_a_step_count_that_cannot_be_had_is_named_and_the_others_are_had(warnings):
    scheduler = carried([on_nodes([995.0, 970.0]), on_nodes([995.0, 700.0, 300.0])], "Stable Diffusion")
    assert scheduler.solver_file.step_counts == [3]
    (warning,) = warnings()
    assert "2 steps cannot be had: 2 of its 2 nodes are beyond the model's noise levels" in warning


def test_a_solver_of_which_no_step_count_can_be_had_is_refused():
    with pytest.raises(ValueError, match="cannot be carried over. 2 steps cannot be had: .*3 steps cannot be had: "):
        carried([on_nodes([995.0, 970.0]), on_nodes([999.0, 995.0, 970.0])], "Stable Diffusion")
