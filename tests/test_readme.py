"""The README says what is so: its code runs, and its numbers are those of the committed reports."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from readme_tables import PIPELINES, ROOT, report_of, with_tables

from search.fit.strategy import usual_calls


README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def run(command):
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_python_block_runs(block):
    run([sys.executable, "-c", block])


def test_the_search_that_is_shown_runs(tmp_path):
    (block,) = (block for block in SHELL if "--pipeline examples/digits-sit" in block)
    _, command = block.split(" && accelerate ")
    out = tmp_path / "out"
    fewer = ["--num-eval-samples", 8, "--teacher-steps", 20, "--output-dir", out]
    run([Path(sys.executable).with_name("accelerate"), *shlex.split(command), *map(str, fewer)])
    assert (out / "solver" / "searched_solver.safetensors").exists()


def test_what_is_installed_for_development_is_what_ci_installs():
    (block,) = (block for block in SHELL if block.rstrip().endswith("&& pytest"))
    assert re.search(r"pip install (.*) && pytest", block)[1] in (ROOT / ".ci" / "run").read_text()


def test_no_other_shell_block_goes_untested():
    # Beside these two: the package alone is installed by CI too, and `tests/test_convert.py` runs the conversion.
    kinds = ("pip install torch -e .", "python3 -m venv", "hf download", "python3 -m venv")
    assert [next(kind for kind in kinds if block.startswith(kind)) for block in SHELL] == [*kinds]


def test_the_tables_are_those_of_the_committed_reports():
    """`python tests/readme_tables.py` writes them."""
    assert with_tables(README) == README


def test_the_memory_of_the_searches_is_that_of_the_reports():
    ratios = sorted(f"{report_of(name)['search']['peak_memory_over_inference']:.2f}" for name in PIPELINES)
    assert f"Peak memory of the searches was {' and '.join(ratios)} times" in " ".join(README.split())


def test_the_searched_solvers_of_the_reports_beat_every_rival_within_their_budget():
    for name in PIPELINES:
        report = report_of(name)
        for table in report["evaluation"]["results"].values():
            for row in table:
                assert row["solver"] == "searched" or row["ratio"] < 0.65 and row["geometric_mean"] < 0.65
        for num_steps, cost in report["search"]["cost_with_teacher"].items():
            # To open a call of the pipeline is an evaluation more.
            assert cost["network_calls"] <= 1.03 * usual_calls(int(num_steps))
        assert all(report["search"]["improved"].values())
