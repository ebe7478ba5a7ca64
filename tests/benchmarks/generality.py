"""
How far a solver carries: searched under one condition, measured under others, beside diffusers' best scheduler there.

    python tests/benchmarks/generality.py

Solvers of 8 steps are searched at guidance 2 on all ten classes in float32, and measured at other guidance scales,
with bfloat16 weights and on a fine-tune of the pipeline, beside solvers that are searched at guidance 1, 2, 3 and 4 at
once; and searched on classes 0 to 4, and measured on 5 to 9. Error is the root mean square distance to the end point
of a 128-step teacher under the condition that is measured, on noises that nothing was fitted to. The shipped pipelines
have one resolution. Rows go to `examples/results/generality.json` as they come, and are kept when the script runs
again. About 15 minutes on one core, with scikit-learn.
"""

import functools
import itertools
import sys
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, DiTPipeline
from shipped import EXAMPLES, HALVES, PIPELINES, SEEDS, Benchmark, Records, markdown, search, spread

from diffusers_searched_solver import SearchedSolver, process_from_config
from diffusers_searched_solver.teacher import teacher_solver


sys.path.insert(0, str(EXAMPLES))

import train_digits  # noqa: E402


NUM_STEPS = 8
GUIDANCE = 2.0
SEVERAL = 1.0, 2.0, 3.0, 4.0
SAME, HALF = "guidance 2, as searched", "bfloat16"
OTHERS = "classes 5 to 9, searched on 0 to 4"
MANY_STEPS = 64
TEACHER = f"{MANY_STEPS}-step teacher"
CARRIED, WIDE, THERE, DIFFUSERS = "carried", "of several", "searched there", "best of diffusers"


def fine_tune(pipe: DiffusionPipeline):
    """Train the pipeline's network on digits turned upside down."""
    torch.manual_seed(0)
    images, labels, _, _ = train_digits.load_images()
    with torch.no_grad():
        latents = train_digits.encode(pipe.vae, images.flip(2, 3))
    loss, null_class = (train_digits.dit_loss, 1000) if type(pipe) is DiTPipeline else (train_digits.sit_loss, 10)
    model = pipe.transformer.requires_grad_(True)
    pipe.transformer = train_digits.train_transformer(model, loss, null_class, latents, labels, FINE_TUNING_STEPS)


# Where solvers are measured.
CONDITIONS = {
    "guidance 1": {"guidance_scale": 1.0},
    "guidance 1.5": {"guidance_scale": 1.5},
    SAME: {"guidance_scale": GUIDANCE},
    "guidance 3": {"guidance_scale": 3.0},
    "guidance 4": {"guidance_scale": 4.0},
    HALF: {"guidance_scale": GUIDANCE, "dtype": torch.bfloat16},
    "fine-tune on digits upside down": {"guidance_scale": GUIDANCE, "change": fine_tune},
    OTHERS: {"guidance_scale": GUIDANCE, "classes": HALVES[1], "held_out": HALVES[1:]},
}
FINE_TUNING_STEPS = 500
Find = Callable[[int], SearchedSolver]


def find(bench: Benchmark, seed: int) -> SearchedSolver:
    """What a search ends with."""
    *_, solver = search(bench.problem(seed), NUM_STEPS, bench.calls)
    return solver


def measure(records: Records, name: str, condition: str, methods: dict[str, Find]):
    """Under a condition: the solvers of some seeds, one that was searched there, and diffusers' best scheduler."""
    bench = Benchmark(name, **CONDITIONS[condition])
    key = {"pipeline": name, "condition": condition, "num_steps": NUM_STEPS}
    for (method, carried), seed in itertools.product(methods.items(), SEEDS):
        records.add(lambda find=carried, seed=seed: bench.measure(find(seed)), **key, seed=seed, method=method)
    records.add(lambda: bench.best_scheduler(NUM_STEPS), **key, method=DIFFUSERS)
    if condition != SAME:
        records.add(lambda: bench.measure(find(bench, SEEDS[0])), **key, method=THERE)
    if condition == HALF:
        teacher = teacher_solver(process_from_config(bench.pipe.scheduler.config), MANY_STEPS)
        records.add(lambda: bench.measure(teacher), **key, method=TEACHER)
    bench.close()


def main():
    records = Records("generality")
    for name in PIPELINES:
        sources = (
            Benchmark(name, GUIDANCE),
            Benchmark(name, SEVERAL),
            Benchmark(name, GUIDANCE, classes=HALVES[0]),
        )
        of_one, of_several, of_low = (functools.cache(functools.partial(find, source)) for source in sources)
        for condition in CONDITIONS:
            methods = {CARRIED: of_low} if condition == OTHERS else {CARRIED: of_one, WIDE: of_several}
            measure(records, name, condition, methods)
        for source in sources:
            source.close()
    records.write_tables([*(table(records, rival) for rival in (DIFFUSERS, THERE)), rounding(records)])


def table(records: Records, rival: str) -> str:
    """The carried solvers' errors over those of a rival."""
    columns = list(itertools.product(PIPELINES, (CARRIED, WIDE)))
    rows = []
    for condition in CONDITIONS:
        row = [condition]
        for name, method in columns:
            key = {"pipeline": name, "condition": condition}
            others = records.select(**key, method=rival) or records.select(**key, method=CARRIED, seed=SEEDS[0])
            found = records.select(**key, method=method)
            row.append(spread(each["error"] / others[0]["error"] for each in found) if found else "")
        rows.append(row)
    against = {DIFFUSERS: "diffusers' best scheduler there", THERE: "a solver that was searched there"}
    title = f"Error of solvers of {NUM_STEPS} steps over that of {against[rival]} (mean and range of three searches):"
    header = [
        "measured",
        *(f"{name}, searched at {'2' if method == CARRIED else '1 to 4'}" for name, method in columns),
    ]
    return title + "\n\n" + markdown(header, rows)


def rounding(records: Records) -> str:
    """How far rounding moves the teacher, and so everything that is measured by it."""
    rows = []
    for name, method in itertools.product(PIPELINES, (TEACHER, CARRIED, THERE)):
        found = records.select(pipeline=name, condition=HALF, method=method)
        rows.append([f"{name}, {method}", spread((row["error"] for row in found), 4)])
    title = "Errors with bfloat16 weights; that of the teacher is rounding alone:"
    return title + "\n\n" + markdown(["solver", "error"], rows)


if __name__ == "__main__":
    main()
