"""
What was tried and is not part of the search: held-out errors with it over those without, three seeds.

    python tests/benchmarks/candidates.py

Errors are root mean square distances to a 128-step teacher's end points, of latents and of the images that they decode
to, on noises that nothing was fitted to. Each candidate is a patch of the search; `search/` has no switches for them.
Rows go to `examples/results/candidates.json` as they come, and are kept when the script runs again. About 35 minutes
on one core.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from unittest import mock

import numpy as np
import torch
from shipped import EXAMPLES, PIPELINES, SEEDS, Benchmark, Records, markdown, search, spread

from diffusers_searched_solver import SearchedSolver
from search import gauss_newton, strategy
from search.field import NetworkCalls, PipelineField
from search.parameters import Entry, SolverFamily
from search.rollout import Batch, Run, endpoint_errors, rollout, root_mean_square, sample_errors
from search.strategy import TEACHER_STEPS, Problem
from search.trajectory import teacher_trajectory


sys.path.insert(0, str(EXAMPLES))

from digits_features import feature_network  # noqa: E402


STEP_COUNTS = 5, 8, 10
GUIDANCE = 2.0
MANY_CALLS = 50_000
FULL = "full"
View = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def images(bench: Benchmark, latents: torch.Tensor) -> torch.Tensor:
    """What latents decode to, shape (batch, 1, 16, 16), about -1 to 1."""
    return bench.pipe.vae.decode(latents / bench.pipe.vae.config.scaling_factor).sample


@contextmanager
def residuals_of(ends: Callable[[PipelineField, SearchedSolver, Run], torch.Tensor], goal: View) -> Iterator[None]:
    """Gauss-Newton on other residuals: what `ends` makes of a run less what `goal` makes of the teacher's end."""

    def seen(field, solver, prefix=None):
        run = rollout(field, solver, prefix)
        return mock.Mock(states=run.states, history=run.history, end=ends(field, solver, run))

    def residuals(found: Sequence[torch.Tensor], batches: Sequence[Batch]):
        return [end - goal(batch.target) for end, batch in zip(found, batches, strict=True)]

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(gauss_newton, "rollout", seen))
        patches.enter_context(mock.patch.object(gauss_newton, "_residuals", residuals))
        yield


def seen_as(view: Callable[[Benchmark, torch.Tensor], torch.Tensor]):
    """The search on what `view` makes of the end points."""

    def run(bench: Benchmark, problem: Problem, num_steps: int) -> Iterator[SearchedSolver]:
        with residuals_of(lambda field, solver, run: view(bench, run.end), lambda target: view(bench, target)):
            yield from search(problem, num_steps, bench.calls)

    return run


def decoded(bench: Benchmark, latents: torch.Tensor) -> torch.Tensor:
    return images(bench, latents).flatten(1)


@cache
def _features() -> torch.nn.Module:
    return feature_network().features


def with_features(bench: Benchmark, latents: torch.Tensor) -> torch.Tensor:
    """The latents, and beside them the features that the small classifier of digits sees in their images."""
    with torch.no_grad():
        return torch.cat([latents.flatten(1), _features()(images(bench, latents))], 1)


def along_the_way(weight: float):
    """Residuals at every node too, to the teacher's interpolated states; the paper's loss has such terms."""

    def run(bench: Benchmark, problem: Problem, num_steps: int) -> Iterator[SearchedSolver]:
        teachers = {id(batch.field): teacher_trajectory(batch, TEACHER_STEPS) for batch in problem.train}

        def ends(field, solver, run):
            levels = zip(run.states[1:-1], solver.alphas[1:-1], solver.sigmas[1:-1], strict=True)
            past = [x - teachers[id(field)](float(alpha), float(sigma)) for x, alpha, sigma in levels]
            return torch.cat([run.end.flatten(1), *(weight * each.flatten(1) for each in past)], 1)

        def goal(target):
            return torch.cat(
                [target.flatten(1), target.new_zeros(len(target), (num_steps - 1) * target[0].numel())], 1
            )

        with residuals_of(ends, goal):
            yield from search(problem, num_steps, bench.calls)

    return run


def from_fewer_steps(bench: Benchmark, problem: Problem, num_steps: int) -> Iterator[SearchedSolver]:
    """One start more: the nodes found for fewer steps, refined. That search costs nothing here."""
    fewer = STEP_COUNTS[max(STEP_COUNTS.index(num_steps) - 1, 0)]
    spent = bench.calls.count
    *_, found = search(problem, fewer, bench.calls)
    bench.calls.count = spent
    times = problem.process.timesteps(found.alphas, found.sigmas)
    grid = np.interp(np.arange(num_steps) / num_steps, np.arange(fewer + 1) / fewer, times)
    known = strategy.start_grids
    with mock.patch.object(strategy, "start_grids", lambda process, n: [*known(process, n), grid]):
        yield from search(problem, num_steps, bench.calls)


class Finer(SolverFamily):
    """Difference quotients over a tenth of the usual changes."""

    def searched(self, entries: np.ndarray, times_only: bool) -> list[Entry]:
        return [replace(entry, change=0.1 * entry.change) for entry in super().searched(entries, times_only)]


class Careful(gauss_newton._LinearModel):
    """Knows the damping of its last step, and learns nothing from a step that doubles the loss."""

    def damped_step(self, damping: float) -> np.ndarray:
        self.family.damping = damping
        return super().damped_step(damping)

    def _broyden_update(self, step: np.ndarray, residuals: list[torch.Tensor]):
        if self._loss(residuals) <= 2 * self.loss:
            super()._broyden_update(step, residuals)


def on_and_on(bench: Benchmark, problem: Problem, num_steps: int) -> Iterator[SearchedSolver]:
    """
    On from where the search ends: iterations with finer difference quotients, each with the damping that the last one
    ended with, until the loss falls by less than 1 % or `MANY_CALLS` are spent.
    """
    start, vectors = bench.calls.count - problem.teacher_calls, []

    def iterate(*arguments):
        vectors.append(gauss_newton.gauss_newton_iteration(*arguments))
        return vectors[-1]

    with mock.patch.object(strategy, "gauss_newton_iteration", iterate):
        *_, solver = search(problem, num_steps, bench.calls)
    family = Finer(problem.process, num_steps, strategy.ORDER, problem.prediction_type != "flow_prediction")
    family.damping, vector, cost = gauss_newton.DAMPING, vectors[-1][0], 0

    def judge(solver: SearchedSolver) -> tuple[float, SearchedSolver]:
        return root_mean_square(endpoint_errors(problem.held_out, solver)), solver

    visited, gain = [judge(solver)], 1.0
    while gain >= 0.01 and bench.calls.count - start + cost <= MANY_CALLS:
        before = bench.calls.count
        with mock.patch.multiple(gauss_newton, DAMPING=min(family.damping, 1.0), _LinearModel=Careful):
            vector, gain = gauss_newton.gauss_newton_iteration(family, vector, problem.train, False)
        visited.append(judge(family.solver(family.entries(vector))))
        cost = bench.calls.count - before
    yield min(visited, key=lambda pair: pair[0])[1]


def guided(batches: Sequence[Batch], guidance_scale: float, calls: NetworkCalls) -> list[Batch]:
    """The same noises and end points for a network under another guidance."""

    def field(batch: Batch) -> PipelineField:
        call_kwargs = {**batch.field.call_kwargs, "guidance_scale": guidance_scale}
        return PipelineField(batch.field.pipe, call_kwargs, batch.field.seeds, calls)

    return [replace(batch, field=field(batch)) for batch in batches]


def under_guidance(guidance_scale: float):
    """The solver's network runs under another guidance than the teacher's."""

    def run(bench: Benchmark, problem: Problem, num_steps: int) -> Iterator[SearchedSolver]:
        train, held_out = (guided(split, guidance_scale, bench.calls) for split in (problem.train, problem.held_out))
        other = replace(problem, train=train, held_out=held_out)
        yield from search(other, num_steps, bench.calls)
        other.close()

    return run


STUDENTS = {f"the solver under guidance {scale:g}": scale for scale in (1.9, 2.1)}
CANDIDATES = {
    FULL: lambda bench, problem, num_steps: search(problem, num_steps, bench.calls),
    "distances of decoded images": seen_as(decoded),
    "distances of features too": seen_as(with_features),
    "distances along the way too, times 0.1": along_the_way(0.1),
    "distances along the way too, times 0.3": along_the_way(0.3),
    "a start from fewer steps' nodes": from_fewer_steps,
    f"on and on, up to {MANY_CALLS:,} network calls": on_and_on,
    **{name: under_guidance(scale) for name, scale in STUDENTS.items()},
}


def errors(bench: Benchmark, held_out: Sequence[Batch], solver: SearchedSolver) -> dict:
    """Of latents and of images."""
    ends = [(rollout(batch.field, solver).end, batch.target) for batch in held_out]
    of_latents = torch.cat([sample_errors(end, target) for end, target in ends])
    of_images = torch.cat([sample_errors(images(bench, end), images(bench, target)) for end, target in ends])
    return {"error": root_mean_square(of_latents), "image_error": root_mean_square(of_images)}


def measure(records: Records, name: str, bench: Benchmark):
    """All candidates for one pipeline."""
    held_out = {candidate: bench.held_out for candidate in CANDIDATES}
    calls = NetworkCalls(bench.pipe)
    held_out |= {name: guided(bench.held_out, scale, calls) for name, scale in STUDENTS.items()}
    for seed, num_steps, candidate in itertools.product(SEEDS, STEP_COUNTS, CANDIDATES):
        problem = bench.problem(seed)

        def run(problem=problem, num_steps=num_steps, candidate=candidate):
            start = bench.calls.count - problem.teacher_calls
            *_, solver = CANDIDATES[candidate](bench, problem, num_steps)
            return {"calls": bench.calls.count - start, **errors(bench, held_out[candidate], solver)}

        records.add(run, pipeline=name, num_steps=num_steps, seed=seed, candidate=candidate)


def main():
    records = Records("candidates")
    for name in PIPELINES:
        bench = Benchmark(name, GUIDANCE)
        measure(records, name, bench)
        bench.close()
    numbers = {
        "error": "Error of latents",
        "image_error": "Error of decoded images",
        "calls": "Number of network calls",
    }
    records.write_tables(table(records, key, what) for key, what in numbers.items())


def table(records: Records, number: str, what: str) -> str:
    """What happens to a number of the rows with each."""
    cells = list(itertools.product(PIPELINES, STEP_COUNTS))
    rows = []
    for candidate in list(CANDIDATES)[1:]:
        rows.append([candidate])
        for name, num_steps in cells:
            key = {"pipeline": name, "num_steps": num_steps}
            full = {row["seed"]: row[number] for row in records.select(**key, candidate=FULL)}
            found = records.select(**key, candidate=candidate)
            rows[-1].append(spread(row[number] / full[row["seed"]] for row in found))
    title = f"{what} over that of the search without it and the same seed (mean and range of three):\n\n"
    return title + markdown(["search", *(f"{name}, {n}" for name, n in cells)], rows)


if __name__ == "__main__":
    main()
