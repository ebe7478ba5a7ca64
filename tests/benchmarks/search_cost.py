"""
Held-out error against network calls: the search, the paper's recipe, what others search, and the best that needs none.

    python tests/benchmarks/search_cost.py

Error is the root mean square distance to the end point of a 128-step teacher, on 512 noises that nothing was fitted
to, of the two shipped pipelines. Everything is fitted to the same 16 noises, but for the paper's recipe, which takes
ever new ones and is stopped early here. The recipe searches without guidance, so the two are compared there. Rows go
to `examples/results/search_cost.json` as they come, and are kept when the script runs again.
About 25 minutes on one core.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from rivals import choose_nodes, search_coefficients, search_times
from shipped import PIPELINES, SEEDS, STEP_COUNTS, Benchmark, Records, markdown, search, spread

from diffusers_searched_solver import process_from_config
from search.gradient import recipe as gradient
from search.gradient.differentiable_network import DifferentiableNetwork
from search.gradient.recipe import PAPER_RECIPE, Recipe, fit_by_gradient, recipe_teacher
from search.teacher.splits import TRAIN_SEEDS, split_seeds


RIVAL_STEP_COUNTS = 5, 8
GUIDANCE = 2.0
# The recipe's searches have no guidance.
UNGUIDED = 1.0
RECIPE_NOISES = {0: (320, 1024, 3072), 1: (320, 1024), 2: (320, 1024)}
RECIPE_BATCH = 32


def measure_schedulers(records: Records, name: str, bench: Benchmark):
    """What needs no search."""
    for n in STEP_COUNTS:
        key = {"pipeline": name, "guidance": bench.guidance_scale, "num_steps": n}
        records.add(lambda n=n: bench.best_scheduler(n), **key, method="best of diffusers")
        records.add(lambda n=n: bench.best_classical(n), **key, method="best classical table")
        records.add(lambda n=n: bench.own_scheduler(n), **key, method="the pipeline's own")
        records.add(lambda n=n: bench.best_scheduler(2 * n, "UniPC"), **key, method="UniPC, 2N steps")


def measure_searches(records: Records, name: str, bench: Benchmark, seed: int, methods):
    """Every search that is fitted to 16 noises; `methods` are names of `SEARCHES`."""
    for n, method in itertools.product(STEP_COUNTS, methods):
        if n in RIVAL_STEP_COUNTS or method == "searched":

            def measure(n=n, method=method):
                problem = bench.problem(seed)
                return {"curve": bench.curve(problem, SEARCHES[method](problem, n, bench.calls))}

            key = {"pipeline": name, "guidance": bench.guidance_scale, "num_steps": n, "seed": seed}
            records.add(measure, **key, method=method)


SEARCHES = {
    "searched": search,
    "times only (LD3)": search_times,
    "coefficients only (S4S)": search_coefficients,
    "times by dynamic programming (GITS)": lambda problem, n, calls: choose_nodes(problem, n),
}


def measure_recipe(records: Records, name: str, unguided: Benchmark, guided: Benchmark, seed: int):
    """The paper's recipe after some budgets of noises."""
    first_seed = split_seeds(seed, TRAIN_SEEDS, 1)[0]
    settings = unguided.pipe, unguided.conditions(unguided.classes), RECIPE_BATCH, unguided.calls, first_seed
    network, budgets = DifferentiableNetwork(*settings), RECIPE_NOISES[seed]

    def measure(n):
        curve, before = [], unguided.calls.count
        for iteration in fit_by_gradient(network, n, Recipe(num_samples=budgets[-1], batch_size=RECIPE_BATCH)):
            if iteration.num_samples in budgets:
                point = {"noises": iteration.num_samples, "calls": unguided.calls.count - before}
                guided_error = guided.measure(iteration.solver)["error"]
                curve.append({**point, **unguided.measure(iteration.solver), "guided_error": guided_error})
        return {"curve": curve}

    with kept_trajectories(unguided.calls):
        for n in RIVAL_STEP_COUNTS:
            key = {"pipeline": name, "guidance": UNGUIDED, "num_steps": n, "seed": seed}
            records.add(lambda n=n: measure(n), **key, method="paper's recipe")


def measure_recipe_teacher(records: Records, name: str, bench: Benchmark):
    """Where the recipe leads at best, whatever it spends."""
    teacher = recipe_teacher(process_from_config(bench.pipe.scheduler.config), PAPER_RECIPE.teacher_steps)
    key = {"pipeline": name, "guidance": UNGUIDED, "method": "the recipe's teacher"}
    records.add(lambda: bench.measure(teacher), **key)


@contextmanager
def kept_trajectories(calls) -> Iterator[None]:
    """The recipe's teacher runs once for all step counts; its calls count each time."""
    kept, run = {}, gradient.recorded_run

    def run_once(field, teacher):
        key, before = tuple(field.seeds), calls.count
        if key in kept:
            calls.count += kept[key][1]
        else:
            kept[key] = run(field, teacher), calls.count - before
        return kept[key][0]

    with mock.patch.object(gradient, "recorded_run", run_once):
        yield


def ratios(records: Records) -> str:
    """What the search promises, as ratios of its error to others'."""
    rows = []
    for name, n in itertools.product(PIPELINES, STEP_COUNTS):
        key = {"pipeline": name, "guidance": GUIDANCE, "num_steps": n}
        ends = [row["curve"][-1] for row in records.select(**key, method="searched")]
        row = [f"{name}, {n}", spread((end["error"] for end in ends), 4), f"{max(end['calls'] for end in ends):,}"]
        for method in ("best of diffusers", "best classical table", "UniPC, 2N steps", "the pipeline's own"):
            (rival,) = records.select(**key, method=method)
            row.append(spread(end["error"] / rival["error"] for end in ends))
        rows.append(row)
    header = ["pipeline, N", "searched", "calls", "/ best of diffusers", "/ best classical", "/ UniPC at 2N", "/ own"]
    return "Searched, and its error over others' (mean and range of three searches):\n\n" + markdown(header, rows)


def rivals(records: Records) -> str:
    """The searches that are fitted to the same noises."""
    rows = []
    for name, n in itertools.product(PIPELINES, RIVAL_STEP_COUNTS):
        row = [f"{name}, {n}"]
        for method in SEARCHES:
            found = records.select(pipeline=name, guidance=GUIDANCE, num_steps=n, method=method)
            ends = [row["curve"][-1] for row in found]
            calls = sum(end["calls"] for end in ends) / len(ends)
            row.append(f"{spread((end['error'] for end in ends), 4)} / {calls:,.0f}")
        rows.append(row)
    title = "Error (mean and range of three searches) / network calls, of what is fitted to the same 16 noises:\n\n"
    return title + markdown(["pipeline, N", *SEARCHES], rows)


def recipe(records: Records) -> str:
    """The paper's recipe, and what the search needs for its error."""
    rows = []
    for name, n in itertools.product(PIPELINES, RIVAL_STEP_COUNTS):
        key = {"pipeline": name, "guidance": UNGUIDED, "num_steps": n}
        searched = {row["seed"]: row["curve"] for row in records.select(**key, method="searched")}
        curves = {row["seed"]: row["curve"] for row in records.select(**key, method="paper's recipe")}
        for budget in RECIPE_NOISES[0]:
            points = {seed: point for seed, curve in curves.items() for point in curve if point["noises"] == budget}
            rows.append([f"{name}, {n}", f"{budget:,}", *_beside(points, searched)])
        rows.append(
            [
                f"{name}, {n}",
                f"{PAPER_RECIPE.num_samples:,}, extrapolated",
                *_beside({0: _extrapolated(curves[0])}, searched),
            ]
        )
    header = ["pipeline, N", "noises", "its calls", "its error", "the search needs", "times fewer", "guided error"]
    (dit, sit) = (records.select(pipeline=name, method="the recipe's teacher")[0]["error"] for name in PIPELINES)
    return (
        "The paper's recipe without guidance, and the calls after which the search, without guidance too, has no "
        "larger error. Of the recipe, only forward calls are counted. Its error after 50,000 noises is not measured: "
        "it is where the power law through the two largest budgets of seed 0 leads. What it is fitted to, 100 steps "
        f"of DDIM or Euler, has itself an error of {dit:.4f} (digits-dit) and {sit:.4f} (digits-sit). Guided error: "
        "of the recipe's solver under guidance 2.\n\n" + markdown(header, rows)
    )


def _beside(points: dict[int, dict], searched: dict[int, list[dict]]) -> list[str]:
    """Cells: the recipe's calls and error, the search's calls for it, their ratio, the recipe's guided error."""
    needed = {
        seed: min((p["calls"] for p in searched[seed] if p["error"] <= point["error"]), default=np.inf)
        for seed, point in points.items()
    }
    columns = {name: [point[name] for point in points.values()] for name in ("calls", "error", "guided_error")}
    return [
        f"{columns['calls'][0]:,.0f}",
        spread(columns["error"], 4),
        spread(needed.values(), 0),
        spread((point["calls"] / needed[seed] for seed, point in points.items()), 0),
        spread(columns["guided_error"], 4),
    ]


def _extrapolated(curve: list[dict]) -> dict:
    """The point at the paper's number of noises, on power laws through the last two of a curve."""
    before, last = curve[-2:]
    reach = np.log(PAPER_RECIPE.num_samples / last["noises"]) / np.log(last["noises"] / before["noises"])
    return {name: last[name] * (last[name] / before[name]) ** reach for name in last}


def main():
    records = Records("search_cost")
    for name in PIPELINES:
        guided, unguided = Benchmark(name, GUIDANCE), Benchmark(name, UNGUIDED)
        for seed in SEEDS:
            measure_searches(records, name, guided, seed, SEARCHES)
            measure_searches(records, name, unguided, seed, ["searched"])
            measure_recipe(records, name, unguided, guided, seed)
        measure_schedulers(records, name, guided)
        measure_recipe_teacher(records, name, unguided)
        guided.close()
        unguided.close()
    records.write_tables([ratios(records), rivals(records), recipe(records)])


if __name__ == "__main__":
    main()
