"""Every benchmark at its smallest, so that none stops running unseen; what takes minutes is read alone."""

import importlib
import math
from pathlib import Path

import every_step_count
import model_speed
import pytest
import step_cost
import torch


SCRIPTS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("test_"))


@pytest.fixture(autouse=True)
def threads():
    """The scripts take one thread; the other tests go on with theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_can_be_read(name):
    assert importlib.import_module(name).__doc__


def test_the_cost_of_a_step_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(step_cost, "SHAPES", [(1, 4, 8, 8)])
    monkeypatch.setattr(step_cost, "REPEATS", 1)
    step_cost.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if " allocations" in line]
    assert [row[:20].rstrip() for row in rows] == [*step_cost.contenders()]
    assert all(math.isfinite(float(number)) for row in rows for number in row[20:56].split())


def test_the_speed_of_the_models_is_measured(monkeypatch, capsys):
    for name, value in {"LAYERS": 1, "WIDTH": 48, "SIZE": 8, "ROUNDS": 1, "BATCHES": [1]}.items():
        monkeypatch.setattr(model_speed, name, value)
    model_speed.main()
    assert "FlowDCN-B/2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["digits-dit", "digits-sit"])
def test_step_counts_that_were_not_searched_are_measured(name, monkeypatch, capsys):
    for constant, value in {"STEP_COUNTS": [4], "NOISES": 2, "TEACHER_STEPS": 8}.items():
        monkeypatch.setattr(every_step_count, constant, value)
    every_step_count.print_rows(name)
    (row,) = capsys.readouterr().out.splitlines()
    assert row.startswith(f"{name}, 4 | ")
