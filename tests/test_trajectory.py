"""Errors along a run are measured at equal noise levels, against a teacher that is known between its nodes too."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline

from diffusers_searched_solver import FlowMatching, SearchedSolver, VariancePreserving, time_grid
from diffusers_searched_solver.teacher import teacher_solver
from search.measure.trajectory import Trajectory, compare_trajectories, teacher_trajectory, with_classical_coefficients
from search.pipeline.field import NetworkCalls
from search.pipeline.rollout import Run, endpoint_errors, root_mean_square
from search.teacher.batches import Teacher


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("process", [FlowMatching(), VariancePreserving()], ids=lambda process: process.kind)
def test_a_run_along_a_cubic_is_known_exactly_between_its_nodes(process):
    """y = tau^3 - tau^2 has slopes 3 tau^2 - 2 tau."""
    solver = SearchedSolver.adams_bashforth(*time_grid(process, 6), "velocity", order=1)
    scales = torch.from_numpy(solver.alphas + solver.sigmas)
    times = torch.from_numpy(solver.sigmas.copy()) / scales
    run = Run(list(scales * (times**3 - times**2)), list((3 * times**2 - 2 * times)[:-1]))
    trajectory = Trajectory(run, solver)
    # After the last timestep no slope is known.
    for timestep in np.linspace(solver.timesteps[0], solver.timesteps[-1], 40):
        alpha, sigma = (float(v) for v in process.alpha_sigma(timestep))
        time = sigma / (alpha + sigma)
        expected = (alpha + sigma) * (time**3 - time**2)
        assert float(trajectory(alpha, sigma)) == pytest.approx(expected, abs=1e-12)
    for state, alpha, sigma in zip(run.states, solver.alphas, solver.sigmas, strict=True):
        assert float(trajectory(float(alpha), float(sigma))) == pytest.approx(float(state), abs=1e-12)


def test_the_error_at_the_end_of_a_trajectory_is_the_endpoint_error():
    pipe = DiTPipeline.from_pretrained(EXAMPLES / "digits-dit")
    conditions = [{"class_labels": [3]}]
    (batch,) = Teacher(pipe, 24, 3, NetworkCalls(pipe)).batches(conditions, [0, 1, 2])
    process = batch.field.process
    solver, classical = (SearchedSolver.adams_bashforth(*time_grid(process, 4, s), "velocity", 2) for s in (1.5, 1))
    field = batch.field
    rows = compare_trajectories(solver, classical, field, teacher_trajectory(field, 24))
    contenders = (solver, with_classical_coefficients(solver), classical)
    for row, contender in zip(rows, contenders, strict=True):
        # All runs begin with the same noise; the teacher begins with it at a little more noise.
        assert row.errors[0] < 0.1
        # The teacher's end point is a node of its trajectory, so no more than the rounding of float32 is between.
        assert row.errors[-1] == pytest.approx(root_mean_square(endpoint_errors([batch], contender)), rel=1e-5)
        assert row.timesteps == pytest.approx(process.timesteps(contender.alphas, contender.sigmas).tolist())
        assert row.num_samples == 3
    teacher = teacher_solver(process, 24)
    (self_row, *_) = compare_trajectories(teacher, classical, field, teacher_trajectory(field, 24))
    assert max(self_row.errors) < 1e-5
