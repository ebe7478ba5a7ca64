"""What a run says while it goes on: on a terminal, in a log file, and to accelerate's trackers."""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import accelerate.tracking
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from search.launch import progress as launch_progress
from search.launch.progress import Finding, Progress
from search.run import main


ROOT = Path(__file__).parent.parent
SEARCH = ["--pipeline", str(ROOT / "examples" / "digits-sit"), "--guidance-scale", "2", "--teacher-steps", "64"]
SIZES = ["--num-steps", "2", "3", "--num-eval-samples", "24"]
IMAGES = ["--image-metrics", "8", "--feature-network", str(ROOT / "examples" / "digits_features.py")]


@pytest.fixture(scope="module")
def terminal(tmp_path_factory):
    """What a terminal was sent by a small search."""
    folder = tmp_path_factory.mktemp("terminal")
    command = [sys.executable, str(ROOT / "search" / "run.py"), *SEARCH, *SIZES, *IMAGES]
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 160))
    arguments = ["--output-dir", str(folder / "out"), "--cache-dir", str(folder / "cache")]
    process = subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=terminal, stderr=terminal)
    os.close(terminal)
    sent = b""
    try:
        while part := os.read(controller, 4096):
            sent += part
    except OSError:
        pass  # how a terminal ends whose last process is gone
    assert process.wait() == 0, sent.decode()
    return sent.decode()


def bars(terminal, stage):
    """Calls made and calls expected, at every sight of the bar."""
    return [tuple(map(int, pair)) for pair in re.findall(rf"{stage}: *\d+%[^\r\n]*?(\d+)/(\d+) \[", terminal)]


def test_a_terminal_sees_network_calls_of_every_stage_and_the_time_that_is_left(terminal):
    for stage in ("teacher", "2 steps", "3 steps", "measuring", "images", "drawing"):
        assert bars(terminal, stage), stage
        assert re.search(rf"{stage}: [^\r\n]*\[\d\d:\d\d<\d\d:\d\d, [^\r\n]* calls/s\]", terminal)


def test_at_the_end_as_many_calls_were_made_as_were_expected_within_a_tenth(terminal):
    made, expected = bars(terminal, "drawing")[-1]
    assert made == pytest.approx(expected, rel=0.1)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Where a small search wrote, and what, for a tracker and for a log file."""
    out, log = tmp_path_factory.mktemp("tracked") / "out", io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        main([*SEARCH, *SIZES, *IMAGES, "--output-dir", str(out), "--report-to", "tensorboard"])
    return out, log.getvalue()


def lines_of(log, num_steps):
    """Stage, error and network calls of every line of a search."""
    pattern = rf"^{num_steps} steps, (.*): judged error ([\d.]+), ratio.*, network calls ([\d,]+)$"
    return [(stage, float(e), int(n.replace(",", ""))) for stage, e, n in re.findall(pattern, log, re.MULTILINE)]


def test_a_log_file_gets_lines_of_what_was_found_and_no_bar(tracked):
    _, log = tracked
    assert not re.search(r"calls/s|steps/s|solvers/s", log)
    begun = re.findall(r"^(.*): about [\d,]+ network calls to come$", log, re.MULTILINE)
    assert begun == ["teacher", "2 steps", "3 steps", "measuring", "images", "drawing"]
    for num_steps in (2, 3):
        stages = [stage for stage, _, _ in lines_of(log, num_steps)]
        assert stages[0].startswith("best that is known") and stages[-1].startswith("decided")
        assert re.search(rf"^{num_steps} steps: better than .*, the best that was known: ", log, re.MULTILINE)


def test_tensorboard_shows_every_iteration_and_the_numbers_of_the_report(tracked):
    out, log = tracked
    events = EventAccumulator(str(out / "searched_solver")).Reload()
    shown = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    _, errors, calls = zip(*lines_of(log, 2), strict=True)
    assert shown["2 steps/judged error"] == pytest.approx(errors, rel=1e-3)  # lines have four digits
    assert shown["2 steps/network calls"] == list(calls) == sorted(calls)
    evaluation = json.loads((out / "report.json").read_text())["evaluation"]
    for row in evaluation["results"]["3"]:
        assert shown[f"3 steps/endpoint_error/{row['solver']}"] == [pytest.approx(row["endpoint_error"])]
    for row in evaluation["image_metrics"]["results"]["3"]:
        assert shown[f"3 steps/inception_score/{row['solver']}"] == [pytest.approx(row["metrics"]["inception_score"])]
    (settings,) = (out / "searched_solver").glob("*/hparams.yml")
    assert "teacher_steps: '64'" in settings.read_text()


def test_a_tracker_that_is_not_installed_is_refused_before_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="`--report-to tensorboard` needs a package that is not installed"):
        main([*SEARCH, "--output-dir", str(tmp_path / "out"), "--report-to", "tensorboard"])
    assert not (tmp_path / "out").exists()


def test_stages_that_cost_other_than_expected_move_what_is_left():
    progress = Progress({"teacher": 100, "5 steps": 50, "measuring": 30}, lambda numbers, step: None)
    totals = []
    for stage, calls in (("teacher", 100), ("5 steps", 10), ("measuring", 30)):
        progress.begin(stage)
        totals.append(progress._bar.total)
        progress.update(calls)
    assert totals == [180, 180, 140]


def test_a_log_file_gets_a_line_a_minute_and_none_sooner(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(launch_progress.time, "monotonic", lambda: now[0])
    progress = Progress({"teacher": 100, "5 steps": 1900}, lambda numbers, step: None)
    progress.begin("teacher")
    for seconds in (30.0, 59.0, 61.0, 100.0, 200.0):
        now[0] = seconds
        progress.update(100)
    begun, *lines = capsys.readouterr().out.splitlines()
    assert begun == "teacher: about 100 network calls to come"
    assert lines == [
        "teacher: 300 of about 2000 network calls of this process, 05:45 to go",
        "teacher: 500 of about 2000 network calls of this process, 10:00 to go",
    ]


def test_trackers_are_told_findings_one_after_another():
    told = []
    with Progress({}, lambda numbers, step: told.append((step, numbers))) as progress:
        progress.found(Finding(5, "node times", {"held-out error": 0.25, "network calls": 1000}))
        progress.track({"end": 1.0})
    assert told == [(0, {"5 steps/held-out error": 0.25, "5 steps/network calls": 1000}), (1, {"end": 1.0})]
    assert str(Finding(5, "node times", {"held-out error": 0.25, "network calls": 1000})) == (
        "5 steps, node times: held-out error 0.25, network calls 1,000"
    )
