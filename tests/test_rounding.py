"""How exact predictions are, and how far that makes a search move a number to see what it does."""

import numpy as np
import pytest
import torch
from fields import DIGITS, load

from diffusers_searched_solver import FlowMatching, SearchedSolver, VariancePreserving, time_grid
from search.fit.gauss_newton import _neighbour
from search.fit.parameters import Entry, SolverFamily
from search.pipeline.rounding import rounding_error


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seeds", [[0, 1], [0]])
@pytest.mark.parametrize("name", ["digits-dit", "digits-sit"])
def test_the_rounding_error_is_that_of_the_dtype(name, seeds, open_field):
    found, inputs = {}, {**DIGITS, "class_labels": DIGITS["class_labels"][: len(seeds)]}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found[dtype] = rounding_error(open_field(load(name).to(dtype), inputs, seeds))
    # Layers add up errors and averages take some away; the dtypes themselves are apart by 8 and by 8,000.
    for dtype, error in found.items():
        assert 0.3 < error / torch.finfo(dtype).eps < 10


def test_activations_that_are_rounded_on_the_way_are_noticed(open_field):
    pipe = load("digits-dit")
    pipe.transformer.transformer_blocks[1].register_forward_hook(lambda module, args, out: out.bfloat16().float())
    assert rounding_error(open_field(pipe, DIGITS, [0, 1])) > 5e-4


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_predictions_without_a_size_have_no_rounding_error(value, open_field):
    pipe = load("digits-dit")
    pipe.transformer.register_forward_hook(lambda module, args, out: type(out)(value * out.sample))
    assert rounding_error(open_field(pipe, DIGITS, [0, 1])) == 0


def classical(process, num_steps):
    return SearchedSolver.adams_bashforth(*time_grid(process, num_steps), "velocity", order=3)


def test_changes_grow_with_the_square_root_of_the_rounding_error_between_bounds():
    def changes(rounding):
        family = SolverFamily(FlowMatching(), classical(FlowMatching(), 4), offsets=True, rounding=rounding)
        entries = family.entries(family.start)
        return np.array([entry.change for entry in family.searched(entries, times_only=False)])

    np.testing.assert_array_equal(changes(1e-6), changes(0.0))
    np.testing.assert_allclose(changes(4e-3) / changes(1e-3), 2)
    np.testing.assert_array_equal(changes(0.5), changes(1e-2))


def test_a_change_that_leads_to_no_solver_is_made_smaller_and_to_the_other_side():
    family = SolverFamily(VariancePreserving(), classical(VariancePreserving(), 3), offsets=True)
    entries = family.entries(family.start)
    first = len(family.rows)
    gap = entries[first] - entries[first + 1]
    solver, change = _neighbour(family, entries, Entry(first, 0, 0, -3 * gap))
    assert gap / 4 < abs(change) < 2 * gap
    expected = entries.copy()
    expected[first] += change
    np.testing.assert_array_equal(solver.timesteps, family.solver(expected).timesteps)
    assert _neighbour(family, entries, Entry(first, 0, 0, -gap / 2))[1] == -gap / 2
