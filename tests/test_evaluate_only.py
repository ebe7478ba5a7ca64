"""`--evaluate-only`: what was searched before, or elsewhere, is measured without a search."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.serialization import SOLVER_FILE
from search.run import main


ROOT = Path(__file__).parent.parent
PIPELINE = ["--pipeline", str(ROOT / "examples" / "digits-sit")]
SETTINGS = "--num-eval-samples 8 --teacher-steps 8 --guidance-scale 2 --image-metrics 12 --batch-size 5".split()
NETWORK = ["--feature-network", str(ROOT / "examples" / "digits_features.py")]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """What a small search in one process wrote."""
    out = tmp_path_factory.mktemp("searched") / "out"
    main([*PIPELINE, *SETTINGS, *NETWORK, "--num-steps", "2", "3", "--output-dir", str(out)])
    return out


@pytest.fixture()
def again(searched, tmp_path):
    """A copy of it, to be measured again."""
    return Path(shutil.copytree(searched, tmp_path / "again"))


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_two_processes_measure_again_what_one_has_measured_bit_for_bit(searched, again):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    arguments = [*PIPELINE, *SETTINGS, *NETWORK, "--output-dir", str(again), "--evaluate-only"]
    (again / "report.html").unlink()
    result = subprocess.run(
        [*launch, str(ROOT / "search" / "run.py"), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    before, after = report_of(searched), report_of(again)
    commands = [report["evaluation"].pop("command") for report in (before, after)]
    processes = [report.pop("processes") for report in (before, after)]
    assert processes == [1, 2]
    assert all(report.pop("seconds_per_image") for report in (before, after))
    assert after == before
    assert len(after["evaluation"]["image_metrics"]["results"]["2"]) == 10
    assert commands[0] == after["search"]["command"] != commands[1]
    html = (again / "report.html").read_text()
    assert "--evaluate-only" in html and "What the search cost" in html
    assert (again / SOLVER_FILE).read_bytes() == (searched / SOLVER_FILE).read_bytes()


def test_a_solver_from_elsewhere_is_measured_and_kept_as_what_it_is(tmp_path):
    pipeline = ["--pipeline", str(ROOT / "examples" / "digits-dit")]
    options = "--evaluate-only --solver dit-xl-2-256 --num-steps 5 --num-eval-samples 4 --teacher-steps 10".split()
    main([*pipeline, *options, "--output-dir", str(tmp_path / "out")])
    report = report_of(tmp_path / "out")
    assert report["search"] is None
    assert list(report["evaluation"]["results"]) == ["5"]
    file = SearchedSolverScheduler.from_pretrained(tmp_path / "out").solver_file
    assert file.provenance == SearchedSolverScheduler.from_pretrained("dit-xl-2-256").solver_file.provenance
    # It was not searched for this pipeline, so there is no card that says so.
    assert not (tmp_path / "out" / "README.md").exists()
    assert "What the search cost" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance-scale", "3"], "had other settings: guidance_scale was 2.0, is 3.0. .* `--solver .*again`"),
        (["--teacher-steps", "12"], "teacher_steps was 8, is 12"),
        (["--num-steps", "2"], r"num_steps was \[2, 3\], is \[2\]"),
        (["--num-steps", "7"], "The solver has no table of 7 steps; pass some of --num-steps 2, 3"),
        (["--solver", "sit-xl-2-256"], "again' has a search's results. Choose another --output-dir"),
    ],
    ids=["guidance", "teacher", "fewer step counts", "unknown step count", "another solver"],
)
def test_what_would_not_fit_the_searchs_report_is_refused_and_changes_nothing(again, options, message):
    before = (again / "report.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        main([*PIPELINE, *SETTINGS, "--output-dir", str(again), "--evaluate-only", *options])
    assert (again / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "There is no finished search in '.*out'. Search, or name a --solver"),
        (["--solver", "no/such/thing"], "Cannot load a scheduler from 'no/such/thing'"),
        (["--solver", "dit-xl-2-256"], "variance preserving process, this model has a flow matching one"),
    ],
    ids=["nothing there", "no such solver", "another kind of process"],
)
def test_where_there_is_nothing_to_measure_it_says_so_and_writes_nothing(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        main([*PIPELINE, "--output-dir", str(tmp_path / "out"), "--evaluate-only", *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [["--solver", "x"], ["--evaluate-only", "--resume"], ["--evaluate-only", "--solver", "x", "--push-to-hub", "a/b"]],
    ids=["a solver to search", "going on with nothing", "a card of nothing"],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, capsys):
    with pytest.raises(SystemExit):
        main([*PIPELINE, "--output-dir", str(tmp_path), *options])
    assert "error: --" in capsys.readouterr().err
