"""What a search is said to cost beforehand, beside what it then costs."""

from pathlib import Path

import pytest
import torch

from diffusers_searched_solver.calls import build_conditions
from search.estimate import expected_calls
from search.fit.budget import default_calls
from search.fit.demands import usual_demands
from search.fit.problem import search_problem
from search.fit.strategy import fit_solver
from search.launch.journal import Journal
from search.launch.progress import TEACHER
from search.pipeline.field import NetworkCalls
from search.pipeline.loading import load_pipeline
from search.settings import Settings
from search.teacher.batches import Teacher


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["digits-dit", "digits-sit"])
@pytest.mark.parametrize("num_steps", [3, 5])
def test_a_search_costs_as_many_network_calls_as_was_said_within_a_fifth(name, num_steps, tmp_path):
    args = Settings(str(EXAMPLES / name), tmp_path, num_steps=(num_steps,))
    pipe = load_pipeline(args.pipeline, torch.float32, torch.device("cpu"))
    conditions = build_conditions(pipe, None, None, 2.0, {})
    calls = NetworkCalls(pipe)
    expected = expected_calls(usual_demands(pipe, conditions, args.teacher_steps, calls), conditions, args)
    teacher, said = expected[TEACHER], expected[f"{num_steps} steps"]
    problem = search_problem(Teacher(pipe, args.teacher_steps, args.batch_size, calls), conditions, args.num_steps, 0)
    # Opening a pipeline's call costs an evaluation more.
    assert problem.calls == pytest.approx(teacher, rel=0.2)
    journal = Journal(calls)
    budget = default_calls(problem, num_steps)
    list(fit_solver(problem, num_steps, budget, journal))
    # What is left would not have been enough for another iteration.
    assert 0.75 * (teacher + said) < problem.calls + journal.spent <= budget
    problem.close()
