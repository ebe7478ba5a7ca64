"""Networks that give no numbers, memory that runs out and caches that are damaged, in the middle of a search."""

import logging

import numpy as np
import pytest
import torch
from fields import load
from safetensors.torch import save

from diffusers_searched_solver import FlowMatching, SearchedSolver, time_grid
from search import measure, search_solver
from search.fit.gauss_newton import gauss_newton_iteration
from search.fit.parameters import SolverFamily
from search.fit.starts import start_grids
from search.pipeline.field import FieldError, NetworkCalls
from search.pipeline.rollout import root_mean_square
from search.teacher.batches import Teacher
from search.teacher.cache import TeacherCache


CONDITIONS = [{"class_labels": [k], "guidance_scale": 1.0} for k in range(10)]
SETTINGS = {"num_steps": 3, "teacher_steps": 8, "batch_size": 2}


@pytest.fixture(scope="module")
def pipe(one_thread):
    return load("digits-sit")


class Spoil:
    """
    Makes some calls of a network give NaN for their first sample.

    Args:
        calls: Which ones, by number.
    """

    def __init__(self, calls=()):
        self.calls, self.count = set(calls), 0

    def __call__(self, module, args, output):
        self.count += 1
        if self.count - 1 in self.calls:
            output[0][0] = torch.nan


def search(pipe, **changes):
    return search_solver(pipe, conditions=CONDITIONS, **{**SETTINGS, **changes})


def tables(solver):
    return np.concatenate([solver.timesteps, solver.alphas, solver.sigmas, solver.coefficients.ravel()])


@pytest.fixture(scope="module")
def num_calls(pipe):
    """Of a search."""
    counter = Spoil()
    with pipe.transformer.register_forward_hook(counter):
        search(pipe)
    return counter.count


@pytest.mark.parametrize("share", np.linspace(0, 1, 9))
def test_one_nan_in_a_search_is_an_error_or_costs_a_trial_and_is_never_in_the_tables(pipe, num_calls, share):
    with pipe.transformer.register_forward_hook(Spoil([round(share * (num_calls - 1))])):
        try:
            solver = search(pipe)
        except (ValueError, FieldError) as error:
            # The first calls try whether a prediction is always the same.
            assert "finite" in str(error) or "differs by 100%" in str(error)
        else:
            assert np.isfinite(tables(solver)).all()


def test_an_error_that_is_not_finite_never_wins():
    assert root_mean_square(torch.tensor([0.1, torch.nan])) == np.inf


@pytest.fixture()
def iteration(pipe):
    """The arguments of an iteration, the first network call of its Jacobian, and the first of its trials."""
    calls = NetworkCalls(pipe)
    batches = Teacher(pipe, 8, 2, calls).batches(CONDITIONS, [0, 1])
    process = batches[0].field.process
    known = SearchedSolver.adams_bashforth(*start_grids(process, 3)[0], "velocity", order=3)
    family = SolverFamily(process, known, offsets=False)
    searched = family.searched(family.entries(family.start), times_only=False)
    trials = 3 + sum(3 - entry.known for entry in searched)
    yield (family, family.start, batches, [torch.ones(2)]), 3, trials
    batches[0].field.close()
    calls.remove()


def test_a_trial_that_is_not_finite_is_rejected(pipe, iteration):
    arguments, _, trials = iteration
    clean = gauss_newton_iteration(*arguments)
    spoil = Spoil(range(trials, trials + 3))
    with pipe.transformer.register_forward_hook(spoil):
        fitted = gauss_newton_iteration(*arguments)
    assert spoil.count > trials + 3
    assert np.isfinite(fitted.vector).all()
    assert fitted.loss < 1
    assert not np.array_equal(fitted.vector, clean.vector)


def test_a_derivative_that_is_not_finite_is_an_error(pipe, iteration):
    arguments, jacobian, trials = iteration
    for call in range(jacobian, trials):
        with pipe.transformer.register_forward_hook(Spoil([call])):
            with pytest.raises(ValueError, match="A solver of 3 steps, or one that differs .* does not end at finite"):
                gauss_newton_iteration(*arguments)


def limit(samples):
    def out_of_memory(module, args):
        if len(args[0]) > samples:
            raise torch.OutOfMemoryError("no more")

    return out_of_memory


def test_a_search_that_runs_out_of_memory_goes_on_with_halves(pipe, caplog):
    small = search(pipe, num_steps=2, batch_size=2)
    other = load("digits-sit")  # which will remember
    with other.transformer.register_forward_pre_hook(limit(2)):
        halved = search(other, num_steps=2, batch_size=4)
    # The same samples together in calls, and the same order of sums.
    assert np.array_equal(tables(halved), tables(small))
    # What did not do once is not tried again.
    assert caplog.text.count("4 samples in one call run out of memory: going on with 2.") == 1


def test_a_measurement_that_runs_out_of_memory_goes_on_with_halves(tmp_path, caplog):
    pipe, solver = load("digits-sit"), SearchedSolver.adams_bashforth(*time_grid(FlowMatching(), 2), "velocity", 2)
    with pipe.transformer.register_forward_pre_hook(limit(2)):
        report = measure(pipe, solver, CONDITIONS[:4], tmp_path, num_eval_samples=8, batch_size=4, teacher_steps=8)
    assert all(row.num_samples == 2 for row in report.evaluation.trajectories[2])
    assert report.pictures
    assert caplog.text.count("run out of memory") == 1


def test_memory_that_is_not_enough_for_one_sample_is_an_error(pipe):
    with pipe.transformer.register_forward_pre_hook(limit(0)):
        with pytest.raises(RuntimeError, match="no more"):
            search(pipe)


@pytest.fixture()
def ends(pipe):
    """Makes the end points of two samples with a cache, and counts network calls."""
    calls = NetworkCalls(pipe)

    def ends(folder):
        counter = Spoil()
        with pipe.transformer.register_forward_hook(counter):
            (batch,) = Teacher(pipe, 8, 2, calls, TeacherCache(folder)).batches(CONDITIONS, [0, 1])
        batch.field.close()
        return batch.target, counter.count

    yield ends
    calls.remove()


def test_end_points_are_found_again(ends, tmp_path):
    first, cost = ends(tmp_path)
    again, cost_again = ends(tmp_path)
    assert torch.equal(first, again)
    assert cost_again == cost - 8
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "nan", "no calls", "other shape", "a folder"])
def test_damaged_end_points_are_made_again(ends, tmp_path, caplog, damage):
    first, cost = ends(tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(
            {
                "garbage": b"\xff" * 500,
                "truncated": content[:-7],
                "empty": b"",
                "nan": save({"end": first * torch.nan}, {"calls": "16"}),
                "no calls": save({"end": first}),
                "other shape": save({"end": first[:1]}, {"calls": "16"}),
            }[damage]
        )
    with caplog.at_level(logging.WARNING):
        again, cost_again = ends(tmp_path)
    assert torch.equal(first, again)
    assert cost_again == cost
    assert "is damaged" in caplog.text and "the teacher runs again" in caplog.text
    if damage != "a folder":
        assert path.read_bytes() == content


def test_end_points_that_cannot_be_kept_are_done_without(ends, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    first, _ = ends(tmp_path / "file" / "cache")
    assert torch.isfinite(first).all()
    assert "The teacher's end points cannot be kept for another time" in caplog.text
