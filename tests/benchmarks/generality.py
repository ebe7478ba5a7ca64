"""
How far a solver carries: searched under one condition, measured under others, beside diffusers' best scheduler there.

    python tests/benchmarks/generality.py

Searched at guidance 2 on all ten classes in float32, and measured at other guidance scales and with bfloat16 weights;
searched on classes 0 to 4, and measured on 5 to 9. Error is the root mean square distance to the end point of a
128-step teacher under the condition that is measured, on noises that nothing was fitted to. Rows go to
`examples/results/generality.json` as they come, and are kept when the script runs again. About 10 minutes on one core.
"""

import itertools

import torch
from shipped import HALVES, PIPELINES, SEEDS, Benchmark, Records, markdown, search, spread

from diffusers_searched_solver import SearchedSolver


STEP_COUNTS = 5, 8
GUIDANCE = 2.0
SAME = "guidance 2, as searched"
# Where solvers are measured.
CONDITIONS = {
    "guidance 1": {"guidance_scale": 1.0},
    "guidance 1.5": {"guidance_scale": 1.5},
    SAME: {"guidance_scale": GUIDANCE},
    "guidance 3": {"guidance_scale": 3.0},
    "guidance 4": {"guidance_scale": 4.0},
    "bfloat16": {"guidance_scale": GUIDANCE, "dtype": torch.bfloat16},
    "classes 5 to 9, searched on 0 to 4": {"guidance_scale": GUIDANCE, "classes": HALVES[1], "held_out": HALVES[1:]},
}


def find(bench: Benchmark, num_steps: int, seed: int) -> SearchedSolver:
    """What a search ends with."""
    *_, solver = search(bench.problem(seed), num_steps, bench.calls)
    return solver


def measure(records: Records, name: str, condition: str, source: Benchmark, solvers: dict):
    """Solvers of `source`, one searched there, and diffusers' schedulers, under a condition."""
    bench = Benchmark(name, **CONDITIONS[condition])
    for num_steps in STEP_COUNTS:
        key = {"pipeline": name, "condition": condition, "num_steps": num_steps}
        for seed in SEEDS:

            def carried(num_steps=num_steps, seed=seed):
                if (num_steps, seed) not in solvers:
                    solvers[num_steps, seed] = find(source, num_steps, seed)
                return bench.measure(solvers[num_steps, seed])

            records.add(carried, **key, seed=seed, method="carried")
        records.add(lambda n=num_steps: bench.best_scheduler(n), **key, method="best of diffusers")
        if condition != SAME:
            records.add(lambda n=num_steps: bench.measure(find(bench, n, SEEDS[0])), **key, method="searched there")
    bench.close()


def main():
    records = Records("generality")
    for name in PIPELINES:
        everywhere, low = Benchmark(name, GUIDANCE), Benchmark(name, GUIDANCE, classes=HALVES[0])
        of_everywhere, of_low = {}, {}
        for condition in CONDITIONS:
            source, solvers = (low, of_low) if condition.startswith("classes") else (everywhere, of_everywhere)
            measure(records, name, condition, source, solvers)
        everywhere.close()
        low.close()
    records.write_tables(table(records, method) for method in ("best of diffusers", "searched there"))


def table(records: Records, rival: str) -> str:
    """The carried solvers' errors over a rival's."""
    cells = list(itertools.product(PIPELINES, STEP_COUNTS))
    rows = []
    for condition in CONDITIONS:
        if rival == "searched there" and condition == SAME:
            continue
        row = [condition]
        for name, num_steps in cells:
            key = {"pipeline": name, "condition": condition, "num_steps": num_steps}
            (other,) = records.select(**key, method=rival)
            row.append(spread(found["error"] / other["error"] for found in records.select(**key, method="carried")))
        rows.append(row)
    title = {
        "best of diffusers": "Error over that of diffusers' best scheduler (mean and range of three searches):",
        "searched there": "Error over that of a solver searched under the condition that is measured:",
    }
    return title[rival] + "\n\n" + markdown(["measured", *(f"{name}, {n}" for name, n in cells)], rows)


if __name__ == "__main__":
    main()
