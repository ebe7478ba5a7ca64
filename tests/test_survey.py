"""A small part of the survey of diffusers' pipelines, on tiny ones: right, or refused with the reason."""

import re

import pytest
from fields import inputs_of
from survey_diffusers import CRASHED, NOT_TRIED, REFUSED, RIGHT, WRONG, Verdict, find_cases, markdown, survey
from tiny_pipelines import build

from search.teacher import admission


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "status", "why"),
    [
        ("sd15", RIGHT, ""),
        ("flux", RIGHT, ""),
        ("sd3", RIGHT, ""),
        ("ddpm", RIGHT, "one sample a call"),
        ("wan_image_to_video", RIGHT, "one sample a call"),
        ("sd15_img2img", REFUSED, "runs only steps"),
        ("cogview4", REFUSED, "sets a schedule of its own"),
    ],
)
def test_a_pipeline_is_right_or_refused_with_the_reason(name, status, why):
    inputs = {key: value for key, value in inputs_of(name).items() if key != "batch_size"}
    verdict = survey(build(name).pipe, inputs)
    assert verdict.status == status
    assert re.search(why, verdict.why)
    assert verdict.pipeline == type(build(name).pipe).__name__


def test_a_call_that_fails_without_us_is_not_tried():
    assert survey(build("flux").pipe, {**inputs_of("flux"), "height": "tall"}).status == NOT_TRIED


def test_the_survey_finds_what_admission_would_let_pass(monkeypatch):
    """Guidance for half of the steps, where nobody looks."""
    monkeypatch.setattr(admission, "_check_field", lambda *_: None)
    assert survey(build("lumina2").pipe, {**inputs_of("lumina2"), "cfg_trunc_ratio": 0.5}).status == WRONG


def test_cases_are_classes_of_tests_that_name_a_pipeline(tmp_path):
    folder = tmp_path / "tests" / "pipelines" / "some"
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text("class A:\n    pipeline_class = 1\n\n\nclass B:\n    other = 2\n")
    assert find_cases(tmp_path) == [("tests.pipelines.some.test_some", "A")]


def test_the_table_counts_and_puts_what_is_wrong_first():
    verdicts = [Verdict(RIGHT, "", "A"), Verdict(CRASHED, "a|b", "B"), Verdict(WRONG, "c", "C")]
    lines = markdown(verdicts).splitlines()
    assert lines[2] == "1 right, 1 crashed, 1 wrong"
    assert lines[6:] == ["| C | wrong | c |", "| B | crashed | a\\|b |", "| A | right |  |"]
