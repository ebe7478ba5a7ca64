"""The README says what is so: its code runs, and its numbers are those of the committed reports."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_python_block_runs(block):
    result = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def result_rows():
    for name, kind in (("digits-dit", "VP, epsilon"), ("digits-sit", "flow matching")):
        report = json.loads((ROOT / "examples" / "results" / name / "report.json").read_text())
        for num_steps, table in report["evaluation"]["results"].items():
            searched = next(row for row in table if row["solver"] == "searched")
            classical = next(row for row in table if row["solver"] == "classical table")
            diffusers = next(row for row in table if row["solver"] not in ("searched", "classical table"))
            cost = report["search"]["cost_with_teacher"][num_steps]
            yield (
                f"| {name} ({kind}) | {num_steps} | {searched['endpoint_error']:.4f} "
                f"| {diffusers['endpoint_error']:.4f} ({diffusers['solver']}) | {classical['endpoint_error']:.4f} "
                f"| {diffusers['ratio']:.2f}, {classical['ratio']:.2f} "
                f"| {cost['network_calls']:,} | {cost['seconds']:.0f} |"
            )


@pytest.mark.parametrize("row", result_rows())
def test_every_row_of_the_results_is_in_a_committed_report(row):
    assert row in README.splitlines()


def test_the_searched_solvers_of_the_reports_beat_every_rival_by_the_promised_factor():
    for name in ("digits-dit", "digits-sit"):
        report = json.loads((ROOT / "examples" / "results" / name / "report.json").read_text())
        for table in report["evaluation"]["results"].values():
            assert all(row["ratio"] < 0.5 for row in table if row["solver"] != "searched")
        assert report["search"]["cost_with_teacher"]["8"]["network_calls"] <= 15_000
