"""The race of all known tables: on ever more noises, ever fewer of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diffusers_searched_solver import SearchedSolver
from diffusers_searched_solver.check import FINALISTS

from ..launch.processes import gather
from ..pipeline.field import PipelineField
from ..pipeline.noises import Noises
from ..pipeline.rollout import Batch, Run, node_of, rollout, sample_errors
from .baselines import KnownTable


# Noises in all, and the share of the tables that are still in the race on them; where a few noises are much harder
# than others, on these: they say which tables are best in root mean square, and eight of them say it well.
RUNGS = ((1, 1.0), (2, 0.3), (4, 0.12))
HARD_RUNGS = ((1, 1.0), (4, 0.5))
LEAST = 2


@dataclass(frozen=True)
class Standing:
    """
    How far a table got.

    Args:
        table (`KnownTable`): The table.
        errors, weights (`torch.Tensor`, shape (noises,)): On the noises that it was raced on, and what these weigh.
    """

    table: KnownTable
    errors: torch.Tensor
    weights: torch.Tensor

    @property
    def error(self) -> float:
        """The root mean square."""
        error = float((self.errors.square() * self.weights / self.weights.sum()).sum().sqrt())
        return error if math.isfinite(error) else math.inf

    @property
    def rank(self) -> tuple[int, float]:
        """Least for the best: who got further is better, whatever the errors."""
        return -len(self.errors), self.error


def race(
    tables: Sequence[KnownTable],
    noises: Noises,
    many: Callable[[int], int],
    remember: Callable,
    rungs: Sequence[tuple[int, float]] = RUNGS,
) -> list[Standing]:
    """
    Race tables by successive halving; diffusers' schedulers and others are ranked apart, so that the best of either
    kind stay.

    Args:
        noises: Their first ones are raced on.
        many: How many noises there are where usually there are so many.
        remember: `Journal.remember`.
        rungs: Noises in all, and the share of the tables that are still in the race on them.

    Returns:
        `list[Standing]`: The best of them first.

    Raises:
        ValueError: If what is remembered is of other tables.
    """
    nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
    standings = [Standing(table, nothing, nothing) for table in tables]
    before = 0
    for of_rung, share in rungs:
        count = many(of_rung)
        standings.sort(key=lambda standing: standing.rank)
        racing = []
        for kind in (True, False):
            of_kind = [standing for standing in standings if standing.table.from_diffusers == kind]
            racing += of_kind[: max(LEAST, math.ceil(share * len(of_kind)))]
        rows = remembered_errors(noises.between(before, count), [standing.table for standing in racing], remember)
        weights = gathered_weights(noises, 0, count)
        for standing, row in zip(racing, rows, strict=True):
            errors = torch.cat([standing.errors, torch.tensor(row, dtype=torch.float64, device="cpu")])
            standings[standings.index(standing)] = Standing(standing.table, errors, weights)
        before = count
    return sorted(standings, key=lambda standing: standing.rank)


def remembered_errors(batches: Sequence[Batch], tables: Sequence[KnownTable], remember: Callable) -> list[list[float]]:
    """The errors of tables on some noises, as they were remembered or are measured."""
    names, solvers = [str(table) for table in tables], [table.solver for table in tables]
    found = remember(lambda: {"tables": names, "errors": table_errors(batches, solvers).tolist()})
    if found["tables"] != names:
        other = sorted({*found["tables"]} ^ {*names}) or ["the same ones in another order"]
        raise ValueError(
            f"The search was begun with {len(found['tables'])} known solvers in this round of the race, now there are "
            f"{len(names)}; they differ in: {'; '.join(other[:4])}. Go on with the versions of this package and of "
            "diffusers that began it, or choose another --output-dir."
        )
    return found["errors"]


def race_evaluations(num_tables: int, num_steps: int) -> int:
    """Evaluations of one sample that a race makes."""
    noises, runs = 0, 0.0
    for count, share in RUNGS:
        runs, noises = runs + share * num_tables * (count - noises), count
    # Of every run, the first two predictions are mostly shared.
    return int(runs * max(1, num_steps - 1.5))


def gathered_weights(noises: Noises, start: int, stop: int) -> torch.Tensor:
    """What the noises weigh, in the order of their errors."""
    batches, weights = noises.between(start, stop), noises.weights(start, stop)
    return torch.cat(gather(batches, [weights.of(batch) for batch in batches]))


def rivals(standings: Sequence[Standing]) -> list[KnownTable]:
    """
    The tables that may be the best of their family, in the order of the race: of each the one that got furthest, and
    the finalists of either kind.
    """
    found, families, of_kind = [], set(), {True: 0, False: 0}
    for table in (standing.table for standing in standings):
        of_kind[table.from_diffusers] += 1
        if table.family not in families or of_kind[table.from_diffusers] <= FINALISTS:
            found.append(table)
        families.add(table.family)
    return found


def table_errors(batches: Sequence[Batch], solvers: Sequence[SearchedSolver]) -> torch.Tensor:
    """The error of every solver on every sample of all processes, shape (solvers, samples), float64."""
    return torch.cat(gather(batches, [race_errors(batch, solvers) for batch in batches]), 1)


def race_errors(batch: Batch, solvers: Sequence[SearchedSolver]) -> torch.Tensor:
    """The error of every solver on every row of a batch, on the CPU; predictions that solvers share are made once."""
    shared, errors = FirstPredictions(batch.field), {}
    for k in sorted(range(len(solvers)), key=lambda k: shared.key(solvers[k])):
        end = rollout(batch.field, solvers[k], shared.beginning(solvers[k]))
        errors[k] = sample_errors(end, batch.target)
    return torch.stack([errors[k] for k in range(len(solvers))])


class FirstPredictions:
    """
    The first two predictions of solvers on a field, each made once: all that begin at the same time share the first,
    and those whose first steps end at the same state and time share the second.

    Of either, the last one is kept; so solvers that share some have to come one after another, as in the order of
    their keys.
    """

    def __init__(self, field: PipelineField):
        self._field = field
        self._kept: dict[int, tuple[tuple, torch.Tensor, torch.Tensor]] = {}

    def key(self, solver: SearchedSolver) -> tuple[float, tuple[float, ...]]:
        """When the network is called first, where the first step ends, and when the network is called there."""
        _, _, a, b, *_ = row = solver.update_table(self._field.prediction_type)[0].tolist()
        # x_1 = A * noise + B * output, to the rounding of schedulers that compute in float32.
        end = a + b * row[0], b * row[1]
        second = (*solver.timesteps[1:2], *(round(number, 5) for number in (*end, *node_of(solver, 1))))
        return solver.timesteps[0], second

    def beginning(self, solver: SearchedSolver) -> Run:
        """The first steps of a run of the solver."""
        states, history, key = [self._field.noise], [], self.key(solver)
        for i in range(min(len(key), solver.num_steps)):
            if i not in self._kept or self._kept[i][0] != key[: i + 1]:
                self._kept[i] = key[: i + 1], *self._field.evaluate(states[i], solver.timesteps[i], node_of(solver, i))
            _, output, states[i] = self._kept[i]
            history.append(solver.prediction(output, states[i], i, self._field.prediction_type))
            states.append(solver.step(states[i], history, i))
        return Run(states, history)
