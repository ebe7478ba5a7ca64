"""What a search holds: memory that does not grow with the steps of a run, and derivatives on some elements only."""

import gc
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fields import load

from diffusers_searched_solver import FlowMatching, SearchedSolver, VariancePreserving, time_grid
from diffusers_searched_solver.teacher import teacher_solver
from search.fit.gauss_newton import gauss_newton_iteration
from search.fit.parameters import SolverFamily
from search.fit.starts import start_grids
from search.known.baselines import known_tables
from search.known.race import race_errors
from search.launch.network_calls import NetworkCalls
from search.measure.trajectory import compare_trajectories, teacher_trajectory
from search.pipeline import rollout as rollouts
from search.pipeline.rollout import Batch, endpoint_errors, recorded_run, rollout, root_mean_square
from search.teacher.batches import Teacher


pytestmark = pytest.mark.usefixtures("one_thread")
ELEMENTS = 4099  # a number that nothing else has


class CountingField:
    """A field whose flow is known, and how many numbers there have been at most in memory like that of its states."""

    process, prediction_type, seeds = FlowMatching(), "flow_prediction", [0]

    def __init__(self):
        self.noise = torch.randn(1, ELEMENTS, generator=torch.Generator().manual_seed(0))
        self._calls, self.most = 0, 0

    def evaluate(self, x, timestep, node):
        self._calls += 1
        if self._calls % 8 == 0:
            found = [each for each in gc.get_objects() if type(each) is torch.Tensor and ELEMENTS in each.shape]
            storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}
            self.most = max(self.most, sum(storages.values()) / x.nbytes)
        return torch.tanh(x) * float(timestep) / 1000, x


def most_states(make_runs) -> float:
    field = CountingField()
    make_runs(field)
    return field.most


def test_a_run_of_many_steps_holds_no_more_states_than_a_short_one():
    few, many = (most_states(lambda field, n=n: rollout(field, teacher_solver(field.process, n))) for n in (8, 128))
    assert many == few <= 8


@pytest.mark.parametrize("process", [FlowMatching(), VariancePreserving()], ids=["flow", "variance preserving"])
def test_a_teacher_needs_no_more_than_three_predictions(process):
    """Tables of predicted noise or data, as velocities, need all that there were."""
    coefficients = teacher_solver(process, 100).coefficients
    assert not np.tril(coefficients, -3).any()


def test_a_run_holds_every_prediction_that_its_table_uses():
    field = CountingField()
    table = SearchedSolver.adams_bashforth(*time_grid(field.process, 6), "velocity", order=3)
    coefficients = table.coefficients.copy()
    coefficients[5, 0] += 0.25
    late = SearchedSolver(table.timesteps, table.alphas, table.sigmas, coefficients, "velocity", consistent=False)
    assert torch.equal(rollout(field, late), recorded_run(field, late).end)
    assert not torch.equal(rollout(field, late), rollout(field, table))


def test_a_race_of_many_tables_holds_few_states():
    tables = [table.solver for table in known_tables(load("digits-sit").scheduler.config, 4)]

    def race(field, solvers):
        return race_errors(Batch(field, torch.zeros(1, ELEMENTS), (0,)), solvers)

    assert len(tables) > 40
    assert most_states(lambda field: race(field, tables)) < 16
    alone = torch.cat([race(CountingField(), [table]) for table in tables])
    torch.testing.assert_close(race(CountingField(), tables), alone, rtol=1e-3, atol=0)


def test_trajectories_are_compared_on_so_many_elements_whatever_the_steps_of_the_teacher(monkeypatch):
    monkeypatch.setattr(rollouts, "MOST_ELEMENTS", ELEMENTS // 16)
    solver = SearchedSolver.adams_bashforth(*time_grid(CountingField.process, 6), "velocity", order=2)

    def compare(steps) -> float:
        def run(field):
            compare_trajectories(solver, solver, field, teacher_trajectory(field, steps))

        return most_states(run)

    assert compare(128) <= compare(16) <= 8


@pytest.mark.parametrize("name", ["digits-dit", "digits-sit"])
def test_derivatives_on_a_quarter_of_the_elements_lead_as_far(name, monkeypatch):
    """On average: on one set of noises either has ended up to 6 % farther than the other."""
    pipe = load(name)
    calls = NetworkCalls(pipe)
    conditions = [{"class_labels": [k], "guidance_scale": 1.0} for k in range(10)]
    splits = range(16), range(16, 32), range(32, 48), range(100, 228)
    *sets, others = (Teacher(pipe, 48, 16, calls).batches(conditions, seeds) for seeds in splits)
    process = others[0].field.process
    known = SearchedSolver.adams_bashforth(*start_grids(process, 4)[0], "velocity", order=3)
    family = SolverFamily(process, known, offsets=name == "digits-dit")
    errors = np.zeros((len(sets), 2))
    for (k, train), (j, elements) in itertools.product(enumerate(sets), enumerate((2**16, 64))):
        monkeypatch.setattr(rollouts, "MOST_ELEMENTS", elements)
        fitted = gauss_newton_iteration(family, family.start, train, [torch.ones(16)])
        errors[k, j] = root_mean_square(endpoint_errors(others, family.solver(family.entries(fitted.vector))))
    for batch in itertools.chain(*sets, others):
        batch.field.close()
    calls.remove()
    assert (errors[:, 0] < 0.7 * root_mean_square(endpoint_errors(others, known))).all()
    assert np.log(errors[:, 1] / errors[:, 0]).mean() < np.log(1.05)


def test_a_search_holds_little_more_than_its_noises():
    """Of each of up to a hundred noises a suspended call of the pipeline, its beginning and the goal."""
    elements = 2**17
    command = [sys.executable, "tests/large.py", str(elements), "3", "2", "2500"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert int(ended.stdout.splitlines()[-1]) < 2**26 + 4 * elements * 6 * 100
