"""The READMEs say what is so: their code runs, their links lead somewhere, their numbers are those of the reports."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from readme_tables import PAGES, PIPELINES, ROOT, report_of, with_tables

from search.fit.budget import usual_calls


README = (ROOT / "README.md").read_text()
TEXTS = {str(page.parent.relative_to(ROOT)): page.read_text() for page in PAGES}
BLOCKS = [block for text in TEXTS.values() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
SHELL = [block for text in TEXTS.values() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]


def run(command, cwd=ROOT):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_python_block_runs(block, tmp_path):
    # Some write here.
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run([sys.executable, "-c", block], tmp_path)


def test_a_stranger_in_a_hurry_reads_at_most_120_lines():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_to_a_file_leads_to_one_and_to_a_heading_of_it(page):
    for link, heading in re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", TEXTS[page]):
        path = ROOT / page / link
        assert path.exists(), link
        titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if heading else []
        assert heading in ("", *(re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles)), link


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
    kinds = ("pip install torch -e .", "python3 -m venv", "python3 -m venv", "hf download")
    assert [next(kind for kind in kinds if block.startswith(kind)) for block in SHELL] == [*kinds]


@pytest.mark.parametrize("page", TEXTS)
def test_the_tables_are_those_of_the_committed_reports(page):
    """`python tests/readme_tables.py` writes them."""
    assert with_tables(TEXTS[page]) == TEXTS[page]


def test_the_memory_of_the_searches_is_that_of_the_reports():
    ratios = sorted(f"{report_of(name).search.peak_memory_over_inference:.2f}" for name in PIPELINES)
    assert f"Peak memory of the searches was {' and '.join(ratios)} times" in " ".join(
        TEXTS["examples/results"].split()
    )


def test_the_searched_solvers_of_the_reports_beat_every_rival_within_their_budget():
    for name in PIPELINES:
        report = report_of(name)
        contests = [
            row.contest for rows in report.evaluation.results.values() for row in rows if row.contest is not None
        ]
        assert all(contest.ratio < 0.65 and contest.geometric_mean < 0.65 for contest in contests)
        for num_steps, cost in report.search.costs.items():
            # To open a call of the pipeline is an evaluation more.
            assert cost.network_calls <= 1.03 * usual_calls(num_steps)
        assert all(verdict.use for verdict in report.verdicts.values())
