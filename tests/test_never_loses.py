"""What the search promises: never worse than what was known, within its budget, and honest about it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact import mixture_pipeline
from fields import load

from diffusers_searched_solver import (
    FlowMatching,
    SearchedSolver,
    SearchedSolverScheduler,
    SolverFile,
    VariancePreserving,
    solver_from_scheduler,
    time_grid,
)
from search import find_solver
from search.fit import strategy
from search.fit.demands import HEAVY
from search.fit.gauss_newton import confined_step
from search.fit.parameters import SolverFamily
from search.fit.problem import search_problem
from search.fit.screening import evenness, of_their_like, stratified
from search.fit.starts import make_family
from search.fit.strategy import fit_solver
from search.known.baselines import CLASSICAL, KnownTable, diffusers_schedulers, known_tables
from search.known.contest import Contest, score
from search.known.race import LEAST, RUNGS, race
from search.launch.journal import Journal
from search.pipeline.field import NetworkCalls
from search.pipeline.noises import Weights, portion_end
from search.pipeline.rollout import endpoint_errors, root_mean_square
from search.run import main
from search.teacher.batches import Teacher


pytestmark = pytest.mark.usefixtures("one_thread")
# Of three, chance alone may have made the smallest budget the best one.
SEEDS = 6
UNGUIDED = [{"class_labels": [k], "guidance_scale": 1.0} for k in range(10)]
PROCESSES = pytest.mark.parametrize("process", [FlowMatching(), VariancePreserving()], ids=["flow", "vp"])


@pytest.fixture(scope="module")
def mixture(one_thread):
    """A pipeline with an exact flow, and noises that no search has, with their ends."""
    pipe = mixture_pipeline()
    calls = NetworkCalls(pipe)
    held_out = Teacher(pipe, 256, 64, calls).batches([{}], list(range(10**9, 10**9 + 128)))
    yield pipe, held_out
    for batch in held_out:
        batch.field.close()


@pytest.fixture(scope="module")
def of_budgets(mixture):
    """For each budget and seed the errors of the outcome and of the best that was known, on held-out noises."""
    pipe, held_out = mixture
    found = {7_000: [], 14_000: [], 40_000: []}
    for (budget, of_budget), seed in ((pair, seed) for pair in found.items() for seed in range(SEEDS)):
        said = []
        outcome = find_solver(pipe, 5, [{}], max_calls=budget, seed=seed, batch_size=16, log=said.append)
        spent = [int(n.replace(",", "")) for line in said for n in re.findall(r"network calls ([\d,]+)", line)]
        assert 0.5 * budget < spent[-1] <= 1.03 * budget  # to open a call of the pipeline is an evaluation more
        solvers = outcome.solver, outcome.best_known.solver
        of_budget.append([endpoint_errors(held_out, solver) for solver in solvers])
    return found


@pytest.mark.parametrize(
    "measure",
    [lambda errors: score(errors, torch.ones(128)), root_mean_square],
    ids=["both means", "root mean square"],
)
def test_a_larger_budget_is_no_worse_and_none_is_exceeded(of_budgets, measure):
    ratios = [[measure(ours) / measure(known) for ours, known in of_budget] for of_budget in of_budgets.values()]
    means, spreads = ([of(found) for found in ratios] for of in (np.mean, np.ptp))
    assert means[2] < means[0] and means[2] < 0.1
    # Other noises, other luck: what seeds alone make of it.
    assert means[1] < means[0] + spreads[0] and means[2] < means[1] + spreads[1]


def test_every_round_but_the_last_has_noises_that_no_round_before_had(mixture, monkeypatch):
    pipe, _ = mixture
    iterated, rounds = strategy._Fit._iterated, []

    def noted(self, contender, start, stop, times_only):
        if not times_only:
            rounds.append((start, stop))
        return iterated(self, contender, start, stop, times_only)

    monkeypatch.setattr(strategy._Fit, "_iterated", noted)
    for budget in range(7_000, 16_000, 3_000):
        rounds.clear()
        find_solver(pipe, 6, [{}], max_calls=budget, batch_size=16)
        windows = list(dict.fromkeys(rounds))
        assert rounds == sorted(rounds, key=windows.index)  # a window is never come back to
        ends = [stop for _, stop in windows]
        assert ends == sorted({*ends})


@pytest.mark.parametrize("name", ["digits-dit", "digits-sit"])
def test_if_nothing_better_is_found_the_best_known_table_is_the_outcome_and_it_says_so(name, monkeypatch):
    monkeypatch.setattr(strategy, "gauss_newton_iteration", worse)
    said = []
    outcome = find_solver(load(name), 4, UNGUIDED, max_calls=9_000, log=said.append)
    assert not outcome.improved and outcome.contest is None
    assert outcome.verdict == said[-1]
    assert f"searching has not improved on {outcome.best_known}, so the solver is its table" in outcome.verdict
    known = outcome.best_known.solver
    assert np.array_equal(outcome.solver.coefficients, known.coefficients)
    assert np.array_equal(outcome.solver.timesteps, known.timesteps)


def worse(family, vector, *settings):
    """An iteration that leads away."""
    from search.fit.gauss_newton import Fitted

    return Fitted(vector + 0.05 * np.cos(np.arange(len(vector))), 0.5)


def test_the_paper_s_recipe_too_ends_with_the_best_that_is_known(tmp_path):
    """Sixteen noises are nothing to it."""
    pipeline = ["--pipeline", "examples/digits-sit", "--output-dir", str(tmp_path / "out")]
    options = (
        "--fitter gradient --num-samples 16 --num-steps 4 --num-eval-samples 8 --teacher-steps 8 --guidance-scale 1"
    )
    main([*pipeline, *options.split()])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["search"]["improved"] == {"4": False}
    verdict = report["search"]["verdicts"]["4"]
    assert "searching has not improved on" in verdict
    for name in ("README.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "searching has not improved on" in text.replace("\\", "")
    searched = next(row for row in report["evaluation"]["results"]["4"] if row["solver"] == "searched")
    best = min(row["endpoint_error"] for row in report["evaluation"]["results"]["4"] if row["from_diffusers"])
    # Eight noises may rank them otherwise than those that judged.
    assert searched["endpoint_error"] < 1.5 * best


def test_a_given_solver_is_a_start_and_what_was_known():
    """A bad one does no harm; a searched one is not searched in vain."""
    pipe = load("digits-sit")
    searched = find_solver(pipe, 4, UNGUIDED, seed=5).solver
    file = SolverFile({4: searched}, FlowMatching(), "flow_prediction")
    again = find_solver(pipe, 4, UNGUIDED, max_calls=7_000, given=file)
    assert again.best_known.family == "given solver"
    assert again.improved or np.array_equal(again.solver.coefficients, searched.coefficients)


def test_a_given_solver_for_another_process_is_refused():
    grid = time_grid(VariancePreserving(), 4, start=0.9)
    file = SolverFile({4: SearchedSolver.adams_bashforth(*grid, "velocity", 2)}, VariancePreserving(), "epsilon")
    with pytest.raises(ValueError, match="for a variance preserving process, this model has a flow matching one"):
        find_solver(load("digits-sit"), 4, UNGUIDED, given=file)


def test_a_noise_that_gives_nan_is_named_before_anything_is_searched():
    pipe = load("digits-sit")

    def spoil(module, args, output):
        output[0][args[0].flatten(1).sum(1) > 20] = torch.nan

    with pipe.transformer.register_forward_hook(spoil):
        with pytest.raises(ValueError, match="The teacher's end point for seed .* with class_labels=.* is not finite"):
            find_solver(pipe, 4, UNGUIDED)


def test_the_least_budget_is_named_before_anything_is_searched():
    pipe, ran = load("digits-sit"), []
    pipe.transformer.register_forward_hook(lambda module, args, output: ran.append(len(output[0])))
    with pytest.raises(ValueError, match="`max_calls` is 999, expected at least [0-9,]+ for 4 steps: the teacher's"):
        find_solver(pipe, 4, UNGUIDED, max_calls=999)
    # The trial of the pipeline's call, and what opens it for the search.
    assert sum(ran) < 50


def test_the_teacher_s_steps_are_doubled_until_its_error_is_a_tenth_of_a_rival_s():
    pipe = load("digits-sit")
    calls = NetworkCalls(pipe)
    found = {}
    for step_counts in ((4,), (4, 10)):
        problem = search_problem(Teacher(pipe, 20, 4, calls), UNGUIDED, step_counts, 0)
        found[step_counts] = problem.teacher_steps
        ends = torch.cat([batch.target for batch in problem.train.between(0, 8)])
        problem.close()
        exact = Teacher(pipe, 512, 8, calls).batches(UNGUIDED, list(range(8)))
        own = float((ends - exact[0].target).square().mean().sqrt())
        rivals = [each.solver for each in known_tables(pipe.scheduler.config, max(step_counts)) if each.from_diffusers]
        best = min(root_mean_square(endpoint_errors(exact, rival)) for rival in rivals)
        assert own < 0.15 * best
    assert 20 <= found[4,] < found[4, 10]


def test_differences_of_predictions_are_trusted_where_neither_hard_noises_nor_rounding_spoil_them(mixture):
    pipe, _ = mixture
    calls = NetworkCalls(pipe)
    problem = search_problem(Teacher(pipe, 64, 4, calls), [{}], [3], 0)
    known = classical(problem.process, 3)

    of_problems = problem, replace(problem, evenness=0.1), replace(problem, rounding=1e-3)
    assert [make_family(each, known).differences for each in of_problems] == [True, False, False]
    problem.close()
    calls.remove()


def test_what_a_search_finds_and_is_charged_with_does_not_depend_on_which_step_counts_were_searched_before(mixture):
    pipe, _ = mixture
    calls, found = NetworkCalls(pipe), {}
    for before in ((), (5,)):
        problem = search_problem(Teacher(pipe, 64, 4, calls), [{}], [3, 5], 0)
        for num_steps in before:
            list(fit_solver(problem.anew(), num_steps, 20_000, Journal(calls)))
        own, journal, count = problem.anew(), Journal(calls), calls.count
        *_, outcome = fit_solver(own, 3, 6_000, journal)
        found[before] = own.charged + journal.spent, outcome.solver.coefficients.tolist(), calls.count - count
        problem.close()
    assert found[()][:2] == found[5,][:2]
    # What is there already is charged, not made again.
    assert found[5,][2] < found[()][2]
    calls.remove()


# Races and judging


def test_a_race_keeps_what_is_best_and_measures_nothing_twice(mixture):
    pipe, _ = mixture
    calls = NetworkCalls(pipe)
    problem = search_problem(Teacher(pipe, 64, 4, calls), [{}], [4], 0)
    tables, pieces = known_tables(pipe.scheduler.config, 4), []

    def remember(compute):
        pieces.append(compute())
        return pieces[-1]

    standings = race(tables, problem.train, portion_end, remember)
    raced = [len(piece["errors"]) for piece in pieces]
    assert raced == sorted(raced, reverse=True) and raced[0] == len(tables) and raced[-1] >= 2 * LEAST
    assert [len(piece["errors"][0]) for piece in pieces] == np.diff([0, *(count for count, _ in RUNGS)]).tolist()
    batches = problem.train.between(0, RUNGS[-1][0])
    best = min(root_mean_square(endpoint_errors(batches, table.solver)) for table in tables)
    assert root_mean_square(standings[0].errors) < 1.1 * best
    problem.close()
    calls.remove()


def test_a_race_that_goes_on_with_other_tables_says_which(mixture):
    pipe, _ = mixture
    calls = NetworkCalls(pipe)
    problem = search_problem(Teacher(pipe, 64, 4, calls), [{}], [4], 0)
    tables = known_tables(pipe.scheduler.config, 4)
    outcome = {"tables": [str(table) for table in tables[1:]], "errors": [[0.1]] * (len(tables) - 1)}
    with pytest.raises(ValueError, match="begun with [0-9]+ known .* they differ in: Euler, shift 0.7. Go"):
        race(tables, problem.train, portion_end, lambda compute: outcome)
    problem.close()
    calls.remove()


def test_three_numbers_say_who_is_better():
    rival = torch.ones(100)
    few_bad = torch.full((100,), 0.5)
    few_bad[0] = 20.0
    contest = Contest.of(few_bad, rival)
    assert contest.ratio == pytest.approx(np.sqrt((99 * 0.25 + 400) / 100))
    assert contest.geometric_mean == pytest.approx(0.5 * 40**0.01)
    assert (contest.nearer, contest.worst) == (0.99, pytest.approx(20))
    assert not contest.may_be_better
    better = Contest.of(torch.full((100,), 0.5), rival)
    assert better.wins and better.is_decided and better.rank == pytest.approx(0.5)


def test_one_sample_of_few_may_lift_a_root_mean_square_a_little_by_chance():
    rival = torch.ones(16)
    rival[0] = 8.0
    errors = rival / 2
    errors[0] = 9.0
    contest = Contest.of(errors, rival)
    assert 1 < contest.ratio < 1.1 and contest.geometric_mean < 0.6
    assert contest.may_be_better and not contest.is_better
    assert contest.rank < 1


def test_errors_that_are_not_finite_or_zero_have_a_place():
    assert score(torch.tensor([0.1, torch.nan]), torch.ones(2)) == np.inf
    assert Contest.of(torch.tensor([torch.inf, 0.1]), torch.ones(2)).rank > 1e6
    assert Contest.of(torch.zeros(3), torch.zeros(3)).ratio == 1


def test_strata_weigh_as_many_as_there_are_of_them():
    seeds, distances = list(range(100, 164)), np.linspace(0, 1, 64) ** 8
    order, strata = stratified(seeds, distances, spacing=2)
    assert sorted(order) == seeds
    assert order[0:16:2] == seeds[-8:]
    weights = Weights(order[:16], strata)._weights
    # Half of these sixteen are of an eighth of all.
    assert sum(weights.values()) == pytest.approx(16)
    assert weights[order[0]] / weights[order[1]] == pytest.approx((1 / 8) / (7 / 8))


def test_noises_of_a_higher_guidance_scale_are_not_hard_for_it():
    alike = np.random.default_rng(0).uniform(0.5, 1, 32)
    variants = [(scale,) for scale in (1.0, 4.0)] * 16
    distances = alike * np.tile([1.0, 20.0], 16)
    assert evenness(distances) < HEAVY < evenness(of_their_like(distances, variants))
    hard = np.array(distances)
    hard[4] *= 30
    assert of_their_like(hard, variants).argmax() == 4


def test_a_few_noises_that_have_most_of_the_squares_are_noticed():
    normal = np.random.default_rng(0).uniform(0.5, 1, 32)
    assert evenness(np.ones(8)) == evenness(np.zeros(8)) == 1
    assert evenness([*np.zeros(7), 1]) == pytest.approx(1 / 8)
    assert evenness([*normal[1:], 20.0]) < HEAVY < evenness(normal)
    assert evenness([*normal[1:], np.inf]) == evenness([*normal[1:], np.nan]) == pytest.approx(1 / 32)


def test_where_a_few_noises_are_much_harder_the_search_is_better_on_others_too(one_thread):
    pipe = mixture_pipeline(distance=10, spread=0.1)
    calls = NetworkCalls(pipe)
    held_out = Teacher(pipe, 512, 64, calls).batches([{}], list(range(10**9, 10**9 + 256)))
    said = []
    outcome = find_solver(pipe, 5, [{}], batch_size=16, log=said.append)
    assert "confirmed" in said[-2]
    contest = Contest.of(*(endpoint_errors(held_out, each) for each in (outcome.solver, outcome.best_known.solver)))
    assert contest.wins and contest.ratio < 0.3
    for batch in held_out:
        batch.field.close()


# The family


def classical(process, num_steps):
    start = 1.0 if process.kind == "flow_matching" else 0.9
    return SearchedSolver.adams_bashforth(*time_grid(process, num_steps, start=start), "velocity", order=3)


@PROCESSES
def test_every_known_table_is_where_its_family_starts(process):
    name = "digits-sit" if process.kind == "flow_matching" else "digits-dit"
    config = load(name).scheduler.config
    process = SearchedSolverScheduler.from_config(config).process
    for known in known_tables(config, 6):
        table = known.solver.in_frame("velocity")
        family = SolverFamily(process, known.solver, offsets=True)
        start = family.solver(family.entries(family.start))
        np.testing.assert_allclose(start.timesteps, table.timesteps, atol=1e-9, err_msg=str(known))
        np.testing.assert_allclose(start.coefficients, table.coefficients, atol=1e-9, err_msg=str(known))
        if np.allclose(process.scale(table.alphas, table.sigmas), 1, atol=1e-6) and table.sigmas[-1] == 0:
            np.testing.assert_allclose(start.sigmas, table.sigmas, atol=1e-6, err_msg=str(known))


@PROCESSES
def test_whatever_a_family_makes_can_be_written(process):
    """Nodes do not collapse and network times stay within what a solver file may hold, however far a step goes."""
    family = SolverFamily(process, classical(process, 5), offsets=True)
    random, made = np.random.default_rng(0), 0
    kind = "flow_prediction" if process.kind == "flow_matching" else "epsilon"
    for size in np.geomspace(0.01, 1000, 60):
        step = size * random.standard_normal(len(family.start))
        vector = family.start + step.clip(-family.limits, family.limits)
        try:
            solver = family.solver(family.entries(vector))
        except ValueError:
            continue  # two network times have changed places
        SolverFile({5: solver}, process, kind)
        made += 1
        gaps = -np.diff(np.append(process.max_timestep, family.entries(vector)[len(family.rows) :][:5]))
        assert (gaps[1:] > 0).all()
    assert made > 20


def test_a_number_that_hardly_matters_does_not_stop_the_others():
    matrix, gradient = np.diag([1.0, 1e-6]), np.array([-1.0, -1.0])
    np.testing.assert_allclose(confined_step(matrix, gradient, np.array([10.0, 3.0])), [1.0, 3.0])


def test_within_its_limits_a_step_is_the_best_one():
    random = np.random.default_rng(0)
    root = random.standard_normal((6, 6))
    matrix, gradient, limits = root @ root.T + 0.1 * np.eye(6), random.standard_normal(6), np.full(6, 0.2)
    step = confined_step(matrix, gradient, limits)
    slope = matrix @ step + gradient
    assert (np.abs(step) <= limits).all() and (np.abs(step) == limits).any()
    np.testing.assert_allclose(slope[np.abs(step) < limits], 0, atol=1e-9)


def test_a_scheduler_s_table_can_be_the_outcome():
    """All tables of one search have to fit into one file."""
    config = load("digits-dit").scheduler.config
    (family, settings), *_ = diffusers_schedulers(config).items()
    tables = [
        KnownTable(family, "", solver_from_scheduler(next(iter(settings.values())), n), True).solver for n in (4, 5)
    ]
    file = SolverFile({t.num_steps: t for t in tables}, SearchedSolverScheduler.from_config(config).process, "epsilon")
    assert file.step_counts == [4, 5]
    assert CLASSICAL in {table.family for table in known_tables(config, 4)}
