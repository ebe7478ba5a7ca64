"""Every benchmark at its smallest, so that none stops running unseen; what takes minutes is read alone."""

import importlib
import math
from pathlib import Path

import ablation
import every_step_count
import model_speed
import pytest
import search_cost
import search_overhead
import shipped
import step_cost
import torch

from search.fit.budget import default_calls
from search.gradient.recipe import Recipe


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


def test_what_a_search_takes_beside_its_network_is_measured(monkeypatch):
    for name, value in {"LAYERS": 1, "WIDTH": 48, "SIZE": 8}.items():
        monkeypatch.setattr(model_speed, name, value)
    whole, network, calls = search_overhead.measure()
    assert 0 < network < whole and calls > 100


@pytest.mark.parametrize("name", ["digits-dit", "digits-sit"])
def test_step_counts_that_were_not_searched_are_measured(name, monkeypatch, capsys):
    for constant, value in {"STEP_COUNTS": [4], "NOISES": 2, "TEACHER_STEPS": 8}.items():
        monkeypatch.setattr(every_step_count, constant, value)
    every_step_count.print_rows(name)
    (row,) = capsys.readouterr().out.splitlines()
    assert row.startswith(f"{name}, 4 | ")


@pytest.fixture(scope="module")
def bench():
    bench = shipped.Benchmark("digits-sit", 1.0)
    yield bench
    bench.close()


def test_every_variant_of_the_search_is_another_search(bench, monkeypatch):
    """A patch of what the search does not use any more would leave it as it is."""
    monkeypatch.setattr(shipped, "default_calls", lambda problem, num_steps: default_calls(problem, num_steps) // 2)
    problem, ends = bench.problem(0), {}
    for name in {*ablation.VARIANTS} - {ablation.OFFSETS, "from searched node times alone"}:
        *_, solver = ablation.VARIANTS[name](problem, 3, bench.calls)
        ends[name] = solver.update_table("flow_prediction").tolist()
    assert [name for name, end in ends.items() if end == ends[ablation.FULL] and name != ablation.FULL] == []


def test_the_recipe_is_run_for_all_step_counts_by_one_teacher(bench, monkeypatch):
    monkeypatch.setattr(search_cost, "RECIPE_NOISES", {0: (8,)})
    monkeypatch.setattr(search_cost, "RECIPE_BATCH", 8)
    monkeypatch.setattr(search_cost, "Recipe", lambda **settings: Recipe(**settings, teacher_steps=10))
    rows = []

    class Kept:
        def add(self, measure, **key):
            rows.append((key["num_steps"], measure()["curve"]))

    search_cost.measure_recipe(Kept(), "digits-sit", bench, bench, 0)
    assert [n for n, _ in rows] == [5, 8]
    assert all(math.isfinite(point["error"]) for _, curve in rows for point in curve)
