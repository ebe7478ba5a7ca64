"""
What each ingredient of the search buys: the search without it, on held-out noises, three seeds.

    python tests/benchmarks/ablation.py

Each variant is a patch of the search or a family of solvers here; `search/` has no switches for it. Rows go to
`examples/results/ablation.json` as they come, and are kept when the script runs again. About 15 minutes on one core.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
from rivals import descend
from shipped import PIPELINES, SEEDS, Benchmark, Records, markdown, search, spread

from diffusers_searched_solver import SearchedSolver
from search import gauss_newton, strategy
from search.field import NetworkCalls
from search.parameters import Entry, SolverFamily
from search.rollout import endpoint_errors, root_mean_square
from search.strategy import ORDER, Problem


STEP_COUNTS = 5, 8
# The second is for what might become an ingredient.
GUIDANCES = 2.0, 4.0
Search = Callable[[Problem, int, NetworkCalls], Iterator[SearchedSolver]]


class AbsoluteCoefficients(SolverFamily):
    """d are the coefficients themselves, which stay as they are when nodes move."""

    def vector(self, timesteps: np.ndarray) -> np.ndarray:
        vector = super().vector(timesteps)
        classical = super().solver(self.entries(vector)).coefficients
        return np.concatenate([classical[self.rows, self.columns], vector[len(self.rows) :]])

    def solver(self, entries: np.ndarray) -> SearchedSolver:
        coefficients = np.zeros((self.num_steps, self.num_steps))
        coefficients[self.rows, self.columns] = entries[: len(self.rows)]
        return replace(super().solver(entries), coefficients=coefficients)


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


class FreeScales(SolverFamily):
    """
    Nodes of any scale: alpha_i and sigma_i are multiplied by exp(s_i), i = 1 ... N - 1.

        entries = (d, tau, o, s),   vector = (d, z, o, s)

    Every state is a weighted sum of the initial noise and the predictions, so coefficients on past states would free
    one number more a step, the weight of the noise: this one.
    """

    def vector(self, timesteps: np.ndarray) -> np.ndarray:
        return np.append(super().vector(timesteps), np.zeros(self.num_steps - 1))

    def entries(self, vector: np.ndarray) -> np.ndarray:
        own, scales = self._split(vector)
        return np.append(super().entries(own), scales)

    def entry_jacobian(self, vector: np.ndarray) -> np.ndarray:
        own = super().entry_jacobian(self._split(vector)[0])
        scales = np.eye(self.num_steps - 1)
        return np.block(
            [[own, np.zeros((len(own), len(scales)))], [np.zeros((len(scales), own.shape[1])), scales]],
        )

    def solver(self, entries: np.ndarray) -> SearchedSolver:
        own, scales = self._split(entries)
        solver = super().solver(own)
        factors = np.exp([0, *scales, 0])
        return replace(solver, alphas=solver.alphas * factors, sigmas=solver.sigmas * factors)

    def searched(self, entries: np.ndarray, times_only: bool) -> list[Entry]:
        own = self._split(entries)[0]
        found = super().searched(own, times_only)
        # Node i is where step i - 1 ends, and the next prediction is made there.
        scales = [Entry(len(own) + i - 1, i - 1, i, 0.01) for i in range(1, self.num_steps)]
        return found if times_only else found + scales

    def _split(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.split(numbers, [1 - self.num_steps])


def patched(target, name: str, value) -> Search:
    """The search while something of it is replaced."""

    def run(problem, num_steps, calls):
        with mock.patch.object(target, name, value):
            yield from search(problem, num_steps, calls)

    return run


def of_family(cls: type[SolverFamily], offsets: Callable[[str], bool] = lambda kind: kind != "flow_prediction"):
    """The search among other solvers."""

    def family(process, kind, num_steps, rounding):
        return cls(process, num_steps, ORDER, offsets(kind), rounding)

    return patched(strategy, "make_family", family)


def without_trials(problem, num_steps, calls) -> Iterator[SearchedSolver]:
    """Every step has a Jacobian of its own, and there are as many as the calls allow."""
    with mock.patch.object(gauss_newton, "MAX_TRIALS", 1):
        yield from search(problem, num_steps, calls, iterations=100)


def without_stages(problem, num_steps, calls) -> Iterator[SearchedSolver]:
    """Everything on all samples, from the best of the grids."""
    family = strategy.make_family(problem.process, problem.prediction_type, num_steps)
    return descend(problem, family, strategy.start_grids(problem.process, num_steps), calls)


def with_one_start(problem, num_steps, calls) -> Iterator[SearchedSolver]:
    """From the grid whose classical solver is best."""
    family = strategy.make_family(problem.process, problem.prediction_type, num_steps)
    quarter = problem.share_of_train(4)

    def error(grid):
        return root_mean_square(endpoint_errors(quarter, family.solver(family.entries(family.vector(grid)))))

    best = min(strategy.start_grids(problem.process, num_steps), key=error)
    return patched(strategy, "start_grids", lambda process, n: [best])(problem, num_steps, calls)


FULL, CANDIDATE = "full", "with free scales of the nodes"
# The search has them on noise predictions only.
OFFSETS = "no network times beside the nodes'"
VARIANTS: dict[str, Search] = {
    FULL: search,
    "coefficients that do not follow the nodes": of_family(AbsoluteCoefficients),
    OFFSETS: of_family(SolverFamily, offsets=lambda kind: False),
    "row sums of one": of_family(RowSumsOfOne),
    "no robust weights": patched(gauss_newton, "ROBUSTNESS", 1e6),
    "one step for each Jacobian, no Broyden updates": without_trials,
    "no stages: everything on all samples": without_stages,
    "one start grid": with_one_start,
    CANDIDATE: of_family(FreeScales),
}


def measure(records: Records, name: str, bench: Benchmark, seed: int, variants):
    """Variants of the search for one pipeline, guidance scale and seed."""
    problem = bench.problem(seed)
    for num_steps, variant in itertools.product(STEP_COUNTS, variants):
        if variant == OFFSETS and problem.prediction_type == "flow_prediction":
            continue

        def run(num_steps=num_steps, variant=variant):
            start = bench.calls.count - problem.teacher_calls
            *_, solver = VARIANTS[variant](problem, num_steps, bench.calls)
            return {"calls": bench.calls.count - start, **bench.measure(solver)}

        key = {"pipeline": name, "guidance": bench.guidance_scale, "num_steps": num_steps, "seed": seed}
        records.add(run, **key, variant=variant)


def main():
    records = Records("ablation")
    for guidance, name in itertools.product(GUIDANCES, PIPELINES):
        bench = Benchmark(name, guidance)
        for seed in SEEDS:
            measure(records, name, bench, seed, VARIANTS if guidance == GUIDANCES[0] else (FULL, CANDIDATE))
        bench.close()
    records.write_tables([ingredients(records), candidate(records)])


def ingredients(records: Records) -> str:
    """What happens to the error without each."""
    cells = list(itertools.product(PIPELINES, STEP_COUNTS))
    rows = []
    for variant in VARIANTS:
        settings = [{"pipeline": name, "num_steps": n, "guidance": GUIDANCES[0]} for name, n in cells]
        rows.append([variant, *(_ratios(records, variant, **setting) for setting in settings)])
        rows[-1].append(spread((row["calls"] for row in records.select(variant=variant, guidance=GUIDANCES[0])), 0))
    title = "Held-out error over that of the full search with the same seed (mean and range of three), and calls:\n\n"
    return title + markdown(["search", *(f"{name}, {n}" for name, n in cells), "network calls"], rows)


def candidate(records: Records) -> str:
    """What free scales would buy."""
    rows = [
        [f"{name}, guidance {guidance:g}"]
        + [_ratios(records, CANDIDATE, pipeline=name, num_steps=n, guidance=guidance) for n in STEP_COUNTS]
        for name, guidance in itertools.product(PIPELINES, GUIDANCES)
    ]
    title = "Free scales of the intermediate nodes, error over that of the full search with the same seed:\n\n"
    return title + markdown(["pipeline", *(f"N = {n}" for n in STEP_COUNTS)], rows)


def _ratios(records: Records, variant: str, **key) -> str:
    full = {row["seed"]: row["error"] for row in records.select(variant=FULL, **key)}
    found = records.select(variant=variant, **key)
    return spread(row["error"] / full[row["seed"]] for row in found) if found else "as full"


if __name__ == "__main__":
    main()
