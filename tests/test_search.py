"""The search, on the shipped pipelines: real diffusers pipelines with trained networks."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, time_grid
from diffusers_searched_solver.calls import build_conditions
from diffusers_searched_solver.pipelines import ClassToImagePipeline
from diffusers_searched_solver.teacher import teacher_solver
from search import find_solver, search_solver
from search.fit.budget import default_calls, usual_calls
from search.fit.find import check_settings
from search.fit.parameters import ALONE, SolverFamily
from search.fit.problem import search_problem
from search.known.contest import Contest
from search.pipeline.field import NetworkCalls, PipelineField
from search.pipeline.loading import load_pipeline
from search.pipeline.rollout import Run, endpoint_errors, recorded_run, rollout, root_mean_square
from search.teacher.batches import TEACHER_STEPS, Teacher
from search.teacher.splits import EVALUATION_SEEDS, split_seeds


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module", params=["digits-dit", "digits-sit"])
def pipe(request):
    cls = {"digits-dit": DiTPipeline, "digits-sit": ClassToImagePipeline}[request.param]
    return cls.from_pretrained(EXAMPLES / request.param)


@pytest.fixture()
def calls(pipe):
    counter = NetworkCalls(pipe)
    yield counter
    counter.remove()


def conditions(guidance_scale=2.0):
    return [{"class_labels": [k], "guidance_scale": guidance_scale} for k in range(10)]


def classical(process, num_steps):
    return SearchedSolver.adams_bashforth(*time_grid(process, num_steps, start=0.9), "velocity", order=3)


def test_samples_do_not_depend_on_how_they_are_batched(pipe, calls):
    together = Teacher(pipe, 12, 3, calls).batches(conditions(), [0, 1, 2])
    apart = Teacher(pipe, 12, 1, calls).batches(conditions(), [0, 1, 2])
    assert [len(together), len(apart)] == [1, 3]
    noise = torch.cat([batch.field.noise[:1] for batch in apart])
    assert torch.equal(together[0].field.noise[:3], noise)


def test_a_run_that_goes_on_from_a_prefix_is_the_whole_run(pipe, calls):
    field = PipelineField(pipe, {"class_labels": [1, 7]}, [0, 1], calls)
    solver = teacher_solver(field.process, 6)
    run = recorded_run(field, solver)
    before = calls.count
    branch = rollout(field, solver, Run(run.states[:4], run.history[:4]))
    assert torch.equal(branch, run.end)
    # Two steps are left, of two samples, with guidance.
    assert calls.count - before == 2 * 2 * 2


def test_the_entry_jacobian_is_the_derivative_of_the_entries(pipe):
    process = SearchedSolverScheduler.from_config(pipe.scheduler.config).process
    family = SolverFamily(process, classical(process, 4), offsets=True)
    vector = family.start + 0.1 * np.sin(np.arange(19))
    analytic = family.entry_jacobian(vector)
    h = 1e-6
    for k, unit in enumerate(np.eye(len(vector))):
        quotient = (family.entries(vector + h * unit) - family.entries(vector - h * unit)) / (2 * h)
        np.testing.assert_allclose(analytic[:, k], quotient, atol=1e-5)


@pytest.mark.parametrize("differences", [True, False])
def test_moving_weight_between_predictions_that_are_alike_is_damped_little_only_where_differences_are_trusted(
    pipe, differences
):
    process = SearchedSolverScheduler.from_config(pipe.scheduler.config).process
    family = SolverFamily(process, classical(process, 4), offsets=True, differences=differences)
    predictions = 1 + 0.01 * np.random.default_rng(0).standard_normal((50, 4))
    columns = np.zeros((50, len(family.start)))
    columns[:, : len(family.rows)] = predictions[:, family.columns]
    columns[:, len(family.rows) :] = 1.0
    everything = np.arange(len(family.start))
    damping = family.damping(columns.T @ columns, everything)
    np.testing.assert_allclose(damping, damping.T)
    last_row = np.flatnonzero(family.rows == 3)
    for first, second in zip(last_row, last_row[1:], strict=False):
        moved = np.zeros(len(family.start))
        moved[[first, second]] = 1.0, -1.0
        # Alone, each of the two does 50.
        assert moved @ damping @ moved == pytest.approx(ALONE * 100 if differences else 100, rel=0.03)
    # What is no coefficient is damped by itself.
    time = len(family.rows)
    assert np.flatnonzero(damping[time]).tolist() == [time]
    # Of some numbers: their part.
    some = everything[:-2]
    np.testing.assert_allclose(family.damping((columns.T @ columns)[:-2, :-2], some), damping[:-2, :-2])


def test_a_branch_feels_an_entry_no_earlier_than_its_family_says(pipe):
    """Every table before the step that an entry names stays as it is, so restarting there loses nothing."""
    process = SearchedSolverScheduler.from_config(pipe.scheduler.config).process
    family = SolverFamily(process, classical(process, 5), offsets=True)
    entries = family.entries(family.start)
    base = family.solver(entries)
    for entry in family.searched(entries, times_only=False):
        changed = entries.copy()
        changed[entry.index] += entry.change
        solver = family.solver(changed)
        assert solver._weights[: entry.step] == base._weights[: entry.step]
        assert np.array_equal(solver.timesteps[: entry.known], base.timesteps[: entry.known])
        # A known prediction is converted at its node.
        assert np.array_equal(solver.sigmas[: entry.known], base.sigmas[: entry.known])
        assert solver._weights != base._weights or not np.array_equal(solver.timesteps, base.timesteps)


def test_the_searched_solver_halves_the_error_of_every_baseline_on_other_noises(pipe, calls):
    outcome = find_solver(pipe, num_steps=5, conditions=conditions(), seed=0)
    evaluation = Teacher(pipe, 128, 32, calls).batches(conditions(), split_seeds(0, EVALUATION_SEEDS, 128))
    errors = endpoint_errors(evaluation, outcome.solver)
    assert len(outcome.tuned) >= 8
    # The bound is the project's own for classical tables; for diffusers' schedulers, at that setting of each family
    # which leads the race, it is 0.5. Other finalists may be better here: three seeds have 0.50 to 0.59 of them.
    winners = {table.family: table for table in reversed(outcome.tuned) if table.from_diffusers}.values()
    for table in outcome.tuned:
        contest = Contest.of(errors, endpoint_errors(evaluation, table.solver))
        assert contest.ratio < (0.5 if any(table is each for each in winners) else 0.6), table
        assert contest.ratio_interval[0] <= contest.ratio <= contest.ratio_interval[1]


def test_the_teacher_is_far_more_accurate_than_any_few_step_solver(pipe, calls):
    batches = Teacher(pipe, 512, 8, calls).batches(conditions(), list(range(8)))
    teacher = root_mean_square(endpoint_errors(batches, teacher_solver(batches[0].field.process, 64)))
    few = root_mean_square(endpoint_errors(batches, teacher_solver(batches[0].field.process, 10)))
    assert teacher < 0.1 * few


def test_the_same_seed_gives_the_same_solver(pipe):
    first, second = (search_solver(pipe, 3, conditions(1.0), seed=3, teacher_steps=8) for _ in range(2))
    assert not pipe.transformer._forward_pre_hooks
    assert np.array_equal(first.coefficients, second.coefficients)
    assert np.array_equal(first.timesteps, second.timesteps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0, expected at least 1"),
        ({"max_calls": 100}, "`max_calls` is 100, expected at least .* for 5 steps"),
        ({"num_steps": 1}, "`num_steps` is 1, expected at least 2"),
        ({"conditions": []}, "`conditions` is empty"),
        ({"teacher_steps": 9}, "`teacher_steps` is 9, expected at least 10"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_out_of_range_are_refused(pipe, changes, message):
    with pytest.raises(ValueError, match=message):
        search_solver(**{"pipe": pipe, "num_steps": 5, "conditions": conditions(), **changes})


def test_a_network_that_gives_nan_is_reported(pipe, calls):
    def spoil(module, args, output):
        return (
            (output[0] * float("nan"),) if isinstance(output, tuple) else type(output)(sample=output[0] * float("nan"))
        )

    handle = pipe.transformer.register_forward_hook(spoil)
    try:
        with pytest.raises(ValueError, match="The teacher's end point for seed 0 with class_labels=.* is not finite"):
            Teacher(pipe, 8, 1, calls).batches(conditions(), [0])
    finally:
        handle.remove()


def test_all_class_labels_are_searched_by_default(pipe):
    assert build_conditions(pipe, None, None, 1.5, {}) == [
        {"guidance_scale": 1.5, "class_labels": [k]} for k in range(10)
    ]


def test_several_guidance_scales_go_with_every_label_and_alike_with_the_first(pipe):
    scales = [1.0, 2.0, 3.0, 4.0]
    found = [(c["class_labels"][0], c["guidance_scale"]) for c in build_conditions(pipe, None, None, scales, {})]
    assert sorted(found) == sorted(itertools.product(range(10), scales))
    assert {label for label, _ in found[:10]} == set(range(10))
    assert Counter(scale for _, scale in found[:16]) == dict.fromkeys(scales, 4)
    assert build_conditions(pipe, ["3"], None, scales[:2], {}) == [
        {"class_labels": [3], "guidance_scale": 1.0},
        {"class_labels": [3], "guidance_scale": 2.0},
    ]


def test_each_of_several_guidance_scales_has_as_many_noises_and_calls_as_one(pipe, calls):
    factors = []
    for scales in ([2.0], [1.0, 3.0]):
        several = build_conditions(pipe, None, None, scales, {})
        problem = search_problem(Teacher(pipe, 8, 4, calls), several, [3], 0)
        factors.append(default_calls(problem, 3) / usual_calls(3))
        problem.close()
    assert factors == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["cat"], None, None, {}), "There is no class 'cat'"),
        ((None, ["a cat"], None, {}), "takes no `prompt`"),
        ((None, None, None, {"strength": 1}), "takes no `strength`"),
    ],
    ids=["label", "prompt", "argument"],
)
def test_conditions_that_the_pipeline_does_not_know_are_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_conditions(pipe, *arguments)


def test_an_unknown_pipeline_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="There is no pipeline 'no/such'"):
        load_pipeline("no/such", torch.float32, torch.device("cpu"))


def run_py(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "search/run.py")]
    return subprocess.run([*command, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("name", "scales", "said"), [("digits-dit", [2], "scale 2.0"), ("digits-sit", [1, 3], "scales 1.0, 3.0")]
)
def test_accelerate_launch_writes_what_from_pretrained_loads(tmp_path, name, scales, said):
    out = tmp_path / "out"
    options = ["--num-steps", 3, 4, "--num-eval-samples", 8, "--teacher-steps", 12, "--seed", 1]
    result = run_py("--pipeline", EXAMPLES / name, "--output-dir", out, "--guidance-scale", *scales, *options)
    assert result.returncode == 0, result.stderr
    assert "searched / this" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        "README.md",
        "images.png",
        "report.html",
        "report.json",
        "scheduler_config.json",
        "solver/searched_solver.safetensors",
    }
    report = json.loads((out / "report.json").read_text())
    assert set(report["evaluation"]["results"]) == {"3", "4"}
    assert report["search"]["costs"]["3"]["network_calls"] > report["search"]["teacher_network_calls"] > 0
    assert Image.open(out / "images.png").width > 300
    assert f"guidance {said}" in (out / "README.md").read_text()
    pipe = load_pipeline(str(EXAMPLES / name), torch.float32, torch.device("cpu"))
    pipe.scheduler = SearchedSolverScheduler.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(class_labels=[3], num_inference_steps=4).images[0]
    assert np.asarray(image).std() > 20
    with pytest.raises(ValueError, match="No solver for 51 steps: this scheduler has 3 and 4"):
        pipe(class_labels=[3], num_inference_steps=51)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-samples", "5"], "--num-samples is for --fitter gradient; here --max-calls decides"),
        (["--call-kwargs", '{"guidance_scale": "high"}'], "The call of ClassToImagePipeline with guidance_scale=high"),
        (["--call-kwargs", "[1]"], "expected a JSON object"),
        (["--num-steps", "3", "10", "--max-calls", "9000"], "`max_calls` is 9,000, expected at least "),
        (["--max-calls", "9000", "--dry-run"], "`max_calls` is 9,000, expected at least "),
    ],
    ids=["no samples", "failing call", "odd json", "too few calls for one of them", "estimating too few calls"],
)
def test_a_search_that_cannot_run_says_why_and_writes_nothing(tmp_path, options, message):
    result = run_py("--pipeline", EXAMPLES / "digits-sit", "--output-dir", tmp_path / "out", *options)
    assert result.returncode != 0
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def without_velocity() -> ClassToImagePipeline:
    pipe = ClassToImagePipeline.from_pretrained(EXAMPLES / "digits-sit")
    pipe.transformer.register_forward_hook(lambda module, args, output: (output[0].zero_(),))
    return pipe


def test_the_teacher_has_twice_the_steps_of_the_solver_even_if_fewer_are_exact():
    pipe = without_velocity()
    calls = NetworkCalls(pipe)
    for num_steps, expected in ((4, 8), (5, 16)):
        problem = search_problem(Teacher(pipe, 8, 4, calls), conditions(1.0), [num_steps], 0)
        assert problem.teacher_steps == expected
        problem.close()
    calls.remove()


def test_the_usual_teacher_serves_every_step_count_and_one_that_is_given_must_be_fine_enough():
    check_settings([30], conditions(), TEACHER_STEPS, 1)
    with pytest.raises(ValueError, match="`teacher_steps` is 9, expected at least 10"):
        check_settings([5], conditions(), 9, 1)


def test_a_network_that_any_solver_integrates_exactly_leaves_a_valid_solver():
    """With a velocity of zero all errors are zero: nothing may be divided by them."""
    pipe = without_velocity()
    solver = search_solver(pipe, 4, conditions(1.0), teacher_steps=8)
    assert np.isfinite(solver.coefficients).all()
