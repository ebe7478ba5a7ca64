"""That rivals and ablations are what they are said to be; what they are worth is measured by the scripts beside."""

import itertools

import numpy as np
import pytest
import torch
from ablation import AbsoluteCoefficients, DampedOneByOne, RowSumsOfOne
from rivals import CoefficientsFamily, TimesFamily, cheapest_path, euler_costs
from shipped import EXAMPLES

from diffusers_searched_solver import FlowMatching, SearchedSolver, VariancePreserving, time_grid
from search.fit.parameters import FRAME, ORDER, SolverFamily
from search.pipeline.field import NetworkCalls, PipelineField
from search.pipeline.loading import load_pipeline
from search.pipeline.rollout import Run, recorded_run


N = 4
PROCESSES = pytest.mark.parametrize("process", [FlowMatching(), VariancePreserving()], ids=["flow", "vp"])
FAMILIES = pytest.mark.parametrize(
    "cls", [TimesFamily, CoefficientsFamily, AbsoluteCoefficients, RowSumsOfOne, DampedOneByOne]
)


def some_vector(family: SolverFamily) -> np.ndarray:
    """Near a classical solver, with nothing at zero."""
    return family.start + 0.02 * np.random.default_rng(0).standard_normal(len(family.start))


def classical(process) -> SearchedSolver:
    return SearchedSolver.adams_bashforth(*time_grid(process, N, start=0.9), FRAME, ORDER)


def test_the_path_is_the_cheapest_of_all():
    costs = np.random.default_rng(0).random((9, 9))
    paths = [[0, *between, 8] for between in itertools.combinations(range(1, 8), N - 1)]
    cheapest = min(paths, key=lambda path: sum(costs[i, j] for i, j in itertools.pairwise(path)))
    assert cheapest_path(costs, N) == cheapest


@PROCESSES
def test_eulers_steps_along_a_constant_velocity_cost_nothing_and_otherwise_what_they_miss(process):
    teacher = SearchedSolver.adams_bashforth(*time_grid(process, N), FRAME, order=1)
    noise, slope = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double(), torch.ones(3, 4, 4)
    states, history = [noise * float(teacher.alphas[0] + teacher.sigmas[0])], [slope.expand(2, 3, 4, 4).double()] * N
    for i in range(N):
        states.append(teacher.step(states[-1], history[: i + 1], i))
    assert np.abs(euler_costs(teacher, Run(states, history))).max() < 1e-12
    states[2] = states[2] + float(teacher.alphas[2] + teacher.sigmas[2])
    assert euler_costs(teacher, Run(states, history))[1, 2] == pytest.approx(np.sqrt(slope.numel()))


@FAMILIES
@PROCESSES
def test_every_family_begins_at_the_classical_solver(cls, process):
    family = cls(process, classical(process), offsets=True)
    solver = family.solver(family.entries(family.start))
    for name in ("timesteps", "alphas", "sigmas", "coefficients"):
        np.testing.assert_allclose(getattr(solver, name), getattr(classical(process), name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["digits-dit", "digits-sit"])
@FAMILIES
def test_a_run_feels_an_entry_no_earlier_than_is_said(cls, name):
    pipe = load_pipeline(str(EXAMPLES / name), torch.float32, torch.device("cpu"))
    field = PipelineField(pipe, {"class_labels": [3], "guidance_scale": 2.0}, [0], NetworkCalls(pipe))
    family = cls(field.process, classical(field.process), offsets=True)
    entries = family.entries(some_vector(family))
    run = recorded_run(field, family.solver(entries))
    for entry in family.searched(entries, times_only=False):
        changed = entries.copy()
        changed[entry.index] += entry.change
        other = recorded_run(field, family.solver(changed))
        assert all(map(torch.equal, run.states[: entry.step + 1], other.states[: entry.step + 1]))
        assert all(map(torch.equal, run.history[: entry.known], other.history[: entry.known]))
        assert not torch.equal(run.end, other.end)
    field.close()


@PROCESSES
def test_row_sums_stay_one_whatever_is_searched(process):
    family = RowSumsOfOne(process, classical(process), offsets=True)
    coefficients = family.solver(family.entries(some_vector(family))).coefficients
    np.testing.assert_allclose(coefficients.sum(1), 1, atol=1e-12)
    assert np.abs(coefficients - family.solver(family.entries(family.start)).coefficients).max() > 0.01


@PROCESSES
def test_absolute_coefficients_stay_when_nodes_move(process):
    family = AbsoluteCoefficients(process, classical(process), offsets=True)
    before = family.entries(some_vector(family))
    after = before.copy()
    after[len(family.rows) + 1] -= 20
    first, second = family.solver(before), family.solver(after)
    assert first.sigmas[1] != second.sigmas[1]
    np.testing.assert_array_equal(first.coefficients, second.coefficients)
