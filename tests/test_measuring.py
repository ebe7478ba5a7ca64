"""Rivals get their best settings, and take part for as long as they may be the best."""

import diffusers
import numpy as np
import pytest
import torch

from diffusers_searched_solver import FlowMatching, SearchedSolver, solver_from_scheduler, time_grid
from diffusers_searched_solver.check import FINALISTS
from diffusers_searched_solver.rivals import diffusers_schedulers
from search.known.baselines import KnownTable
from search.known.race import Standing, rivals
from search.measure.equivalent import equivalent, farther_tables
from search.measure.evaluate import SEARCHED, Comparison, Summary
from search.results.verdict import verdict_of


SOLVER = SearchedSolver.adams_bashforth(*time_grid(FlowMatching(), 4), "velocity", 2)


def table(family: str, setting: str, from_diffusers: bool = True) -> KnownTable:
    return KnownTable(family, setting, SOLVER, from_diffusers)


RIVALS = [table("UniPC 2", "shift 1"), table("UniPC 2", "shift 2"), table("DEIS 2", "shift 1")]
RIVALS += [table("classical table", "AB2", False), table("classical table", "AB3", False)]


def errors(scale: float, count: int = 16) -> torch.Tensor:
    """Near to `scale`, but not the same for every noise."""
    return scale * (1 + 0.1 * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def compared(**scales: float) -> Comparison:
    comparison = Comparison(SOLVER, RIVALS)
    comparison.add({name: errors(scales.get(name, 1.0)) for name in comparison.racing})
    return comparison


def test_of_a_family_the_setting_that_is_best_on_these_noises_stands_whatever_the_race_said():
    comparison = compared(**{SEARCHED: 0.5, "UniPC 2, shift 2": 0.8, "classical table, AB3": 0.9})
    summary = Summary.of(comparison.rows())
    assert (str(summary.diffusers), summary.classical.setting) == ("UniPC 2, shift 2", "AB3")
    assert comparison.best_of("classical table").setting == "AB3"
    assert [row.solver for row in comparison.rows()] == [SEARCHED, "UniPC 2", "classical table", "DEIS 2"]


def test_who_is_beaten_by_the_best_of_its_kind_measures_no_more_and_stays_in_the_table():
    comparison = compared(**{"UniPC 2, shift 2": 0.5, "classical table, AB2": 2.0})
    comparison.drop_hopeless()
    assert comparison.racing == [SEARCHED, "UniPC 2, shift 2", "classical table, AB3"]
    comparison.add({name: errors(1.0) for name in comparison.racing})
    rows = {str(row): row.num_samples for row in comparison.rows()}
    assert rows[SEARCHED] == rows["UniPC 2, shift 2"] == 32
    assert rows["DEIS 2, shift 1"] == 16


def test_the_finalists_of_either_kind_and_the_best_of_each_family_are_rivals():
    tables = [table("UniPC 2", f"shift {k}") for k in range(FINALISTS + 2)] + [
        table("DEIS 2", f"{k}") for k in range(2)
    ]
    tables += [table("classical table", f"AB2, {k}", False) for k in range(FINALISTS + 2)]
    ones = torch.ones(1, dtype=torch.float64)
    standings = [Standing(each, k * ones, ones) for k, each in enumerate(tables)]
    wanted = [*tables[:FINALISTS], tables[FINALISTS + 2], *tables[FINALISTS + 4 : 2 * FINALISTS + 4]]
    assert list(map(id, rivals(standings))) == list(map(id, wanted))


@pytest.mark.parametrize(("own", "steps", "or_more"), [(1 / 2, 8, False), (1 / 4, 16, False), (1 / 8, 16, True)])
def test_a_rival_that_halves_its_error_with_twice_the_steps_is_as_near_in_as_many(own, steps, or_more):
    farther = [
        (KnownTable("UniPC 2", "", _of(8), True), errors(0.5)),
        (KnownTable("UniPC 2", "", _of(16), True), errors(0.25)),
    ]
    found = equivalent(RIVALS[0], errors(own), errors(1.0), farther)
    np.testing.assert_allclose(found.num_steps, steps, rtol=1e-6)
    assert found.or_more == or_more


def test_nothing_is_said_of_more_steps_where_the_searched_solver_is_not_nearer():
    assert equivalent(RIVALS[0], errors(1.0), errors(1.0), [(RIVALS[0], errors(0.5))]) is None
    assert equivalent(RIVALS[0], errors(0.5), errors(1.0), []) is None


def test_where_whole_timesteps_meet_in_thrice_the_steps_the_rivals_curve_ends_at_twice():
    config = diffusers.DDIMScheduler().config
    scheduler = diffusers_schedulers(config)["DEIS 3"]["exponential"]
    best = KnownTable("DEIS 3", "exponential", solver_from_scheduler(scheduler, 10), True)
    assert [table.solver.num_steps for table in farther_tables(config, best)] == [20]


def test_the_verdict_says_how_far_sampling_may_have_misled_it():
    comparison = Comparison(SOLVER, RIVALS)
    comparison.add({name: errors(0.5).flip(0) if name == SEARCHED else errors(1.0) for name in comparison.racing})
    summary = Summary.of(comparison.rows())
    low, high = summary.diffusers.contest.ratio_interval
    sentence = str(verdict_of(4, summary, None, improved=True))
    assert low < summary.diffusers.contest.ratio < high
    assert f"95 % interval {low:.2g} to {high:.2g}" in sentence


def _of(num_steps: int) -> SearchedSolver:
    return SearchedSolver.adams_bashforth(*time_grid(FlowMatching(), num_steps), "velocity", 2)
