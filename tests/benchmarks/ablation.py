"""
What each ingredient of the search buys: the search without it, on held-out noises, three seeds.

    python tests/benchmarks/ablation.py

Each variant is a patch of the search or a family of solvers here; `search/` has no switches for it. Rows go to
`examples/results/ablation.json` as they come, and are kept when the script runs again. About 35 minutes on one core.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from shipped import PIPELINES, SEEDS, Benchmark, Records, markdown, search, spread

from diffusers_searched_solver import SearchedSolver
from search.fit import strategy
from search.fit.parameters import FRAME, Entry, SolverFamily
from search.fit.problem import Problem
from search.pipeline.field import NetworkCalls


STEP_COUNTS = 5, 8
GUIDANCE = 2.0
Search = Callable[[Problem, int, NetworkCalls], Iterator[SearchedSolver]]


class AbsoluteCoefficients(SolverFamily):
    """d are the coefficients themselves, which stay as they are when nodes move."""

    def __init__(self, process, known, offsets, rounding=0.0):
        super().__init__(process, known, offsets, rounding)
        self.start[: len(self.rows)] = known.in_frame(FRAME).coefficients[self.rows, self.columns]

    def solver(self, entries: np.ndarray) -> SearchedSolver:
        coefficients = np.zeros((self.num_steps, self.num_steps))
        coefficients[self.rows, self.columns] = entries[: len(self.rows)]
        return replace(super().solver(entries), coefficients=coefficients)


class DampedOneByOne(SolverFamily):
    """Coefficients are damped by their own effects, not by those of differences of predictions."""

    def __init__(self, process, known, offsets, rounding=0.0):
        super().__init__(process, known, offsets, rounding, differences=False)


class RowSumsOfOne(SolverFamily):
    """Rows of d sum to zero: what is added to the others is taken from the newest prediction."""

    def solver(self, entries: np.ndarray) -> SearchedSolver:
        corrections, rest = np.split(entries, [len(self.rows)])
        d = np.zeros((self.num_steps, self.num_steps))
        d[self.rows, self.columns] = corrections
        d -= np.diag(d.sum(1))
        return super().solver(np.concatenate([d[self.rows, self.columns], rest]))

    def searched(self, entries: np.ndarray, times_only: bool) -> list[Entry]:
        diagonal = np.flatnonzero(self.rows == self.columns)
        return [entry for entry in super().searched(entries, times_only) if entry.index not in diagonal]


def patched(target, name: str, value) -> Search:
    """The search while something of it is replaced."""

    def run(problem, num_steps, calls):
        with mock.patch.object(target, name, value):
            yield from search(problem, num_steps, calls)

    return run


def of_family(cls: type[SolverFamily], offsets: Callable[[str], bool] = lambda kind: kind != "flow_prediction"):
    """The search among other solvers."""

    def family(problem, known):
        return cls(problem.process, known, offsets(problem.prediction_type), problem.rounding)

    return patched(strategy, "make_family", family)


def weighted(change: Callable[[torch.Tensor], torch.Tensor]) -> Search:
    """The search with other weights than one over the best known solver's error."""
    known = strategy._Fit._known_errors

    def changed(fit, batches, weights):
        return [change(errors) for errors in known(fit, batches, weights)]

    return patched(strategy._Fit, "_known_errors", changed)


def from_starts(keep: Callable[[strategy.Contender], bool]) -> Search:
    """The search from some of its starts."""
    improved = strategy._Fit._improved

    def changed(fit, contenders):
        return (yield from improved(fit, [each for each in contenders if keep(each)]))

    return patched(strategy._Fit, "_improved", changed)


FULL = "full"
# The search has them on noise predictions only.
OFFSETS = "no network times beside the nodes'"
STAGED = "searched node times"
VARIANTS: dict[str, Search] = {
    FULL: search,
    "coefficients that do not follow the nodes": of_family(AbsoluteCoefficients),
    OFFSETS: of_family(SolverFamily, offsets=lambda kind: False),
    "coefficients damped one by one": of_family(DampedOneByOne),
    "row sums of one": of_family(RowSumsOfOne),
    "all samples weigh alike": weighted(torch.ones_like),
    "weights of one over the squared known error": weighted(torch.square),
    "one step for each Jacobian, no Broyden updates": patched(strategy, "MAX_TRIALS", 1),
    "from searched node times alone": from_starts(lambda start: start.name == STAGED),
    "from known tables alone": from_starts(lambda start: start.name != STAGED),
}


def measure(records: Records, name: str, bench: Benchmark, seed: int):
    """Variants of the search for one pipeline and seed."""
    for num_steps, variant in itertools.product(STEP_COUNTS, VARIANTS):
        problem = bench.problem(seed)
        if variant == OFFSETS and problem.prediction_type == "flow_prediction":
            continue

        def run(problem=problem, num_steps=num_steps, variant=variant):
            start = bench.calls.count - problem.calls
            *_, solver = VARIANTS[variant](problem, num_steps, bench.calls)
            spent = bench.calls.count - problem.calls - start
            return {"calls": problem.charged + spent, **bench.measure(solver)}

        key = {"pipeline": name, "num_steps": num_steps, "seed": seed}
        records.add(run, **key, variant=variant)


def main():
    records = Records("ablation")
    for name in PIPELINES:
        bench = Benchmark(name, GUIDANCE)
        for seed in SEEDS:
            measure(records, name, bench, seed)
        bench.close()
    records.write_tables([ingredients(records)])


def ingredients(records: Records) -> str:
    """What happens to the error without each."""
    cells = list(itertools.product(PIPELINES, STEP_COUNTS))
    rows = []
    for variant in VARIANTS:
        settings = [{"pipeline": name, "num_steps": n} for name, n in cells]
        rows.append([variant, *(_ratios(records, variant, **setting) for setting in settings)])
        rows[-1].append(spread((row["calls"] for row in records.select(variant=variant)), 0))
    title = "Held-out error over that of the full search with the same seed (mean and range of three), and calls:\n\n"
    return title + markdown(["search", *(f"{name}, {n}" for name, n in cells), "network calls"], rows)


def _ratios(records: Records, variant: str, **key) -> str:
    full = {row["seed"]: row["error"] for row in records.select(variant=FULL, **key)}
    found = records.select(variant=variant, **key)
    return spread(row["error"] / full[row["seed"]] for row in found) if found else "as full"


if __name__ == "__main__":
    main()
