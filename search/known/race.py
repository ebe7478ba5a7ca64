"""The race of all known tables: on ever more noises, ever fewer of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diffusers_searched_solver import SearchedSolver

from ..launch.processes import gather
from ..pipeline.field import PipelineField
from ..pipeline.rollout import Batch, Run, node_of, rollout, sample_errors
from ..teacher.noises import Noises
from .baselines import KnownTable
from .contest import score


# Noises in all, and the share of the tables that are still in the race on them.
RUNGS = ((1, 1.0), (2, 0.3), (4, 0.12))
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
        return -len(self.errors), score(self.errors, self.weights)


def race(
    tables: Sequence[KnownTable], noises: Noises, many: Callable[[int], int], remember: Callable
) -> list[Standing]:
    """
    Race tables by successive halving; diffusers' schedulers and others are ranked apart, so that the best of either
    kind stay.

    Args:
        noises: Their first ones are raced on.
        many: How many noises there are where usually there are so many.
        remember: `Journal.remember`.

    Returns:
        `list[Standing]`: The best of them first.
    """
    nothing = torch.zeros(0, dtype=torch.float64)
    standings = [Standing(table, nothing, nothing) for table in tables]
    before = 0
    for of_rung, share in RUNGS:
        count = many(of_rung)
        standings.sort(key=lambda standing: standing.rank)
        racing = []
        for kind in (True, False):
            of_kind = [standing for standing in standings if standing.table.from_diffusers == kind]
            racing += of_kind[: max(LEAST, math.ceil(share * len(of_kind)))]
        batches, solvers = noises.between(before, count), [standing.table.solver for standing in racing]
        rows = remember(lambda batches=batches, solvers=solvers: table_errors(batches, solvers).tolist())
        weights = gathered_weights(noises, 0, count)
        for standing, row in zip(racing, rows, strict=True):
            errors = torch.cat([standing.errors, torch.tensor(row, dtype=torch.float64)])
            standings[standings.index(standing)] = Standing(standing.table, errors, weights)
        before = count
    return sorted(standings, key=lambda standing: standing.rank)


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


def best_of_families(standings: Sequence[Standing]) -> dict[str, KnownTable]:
    """Of each family the table that got furthest, best families first."""
    best: dict[str, KnownTable] = {}
    for standing in standings:
        best.setdefault(standing.table.family, standing.table)
    return best


def table_errors(batches: Sequence[Batch], solvers: Sequence[SearchedSolver]) -> torch.Tensor:
    """The error of every solver on every sample of all processes, shape (solvers, samples), float64."""
    return torch.cat(gather(batches, [race_errors(batch, solvers) for batch in batches]), 1)


def race_errors(batch: Batch, solvers: Sequence[SearchedSolver]) -> torch.Tensor:
    """The error of every solver on every row of a batch, on the CPU; predictions that solvers share are made once."""
    shared = FirstPredictions(batch.field)
    ends = (rollout(batch.field, solver, shared.beginning(solver)).end for solver in solvers)
    return torch.stack([sample_errors(end, batch.target).cpu() for end in ends])


class FirstPredictions:
    """
    The first two predictions of solvers on a field, each made once: all that begin at the same time share the first,
    and those whose first steps end at the same state and time share the second.
    """

    def __init__(self, field: PipelineField):
        self._field = field
        self._outputs: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def beginning(self, solver: SearchedSolver) -> Run:
        """The first steps of a run of the solver."""
        states, history, key = [self._field.noise], [], ()
        kind = self._field.prediction_type
        for i in range(min(2, solver.num_steps)):
            node = node_of(solver, i)
            key += (solver.timesteps[i], *(round(level, 5) for level in node))
            if key not in self._outputs:
                self._outputs[key] = self._field.evaluate(states[i], solver.timesteps[i], node)
            output, states[i] = self._outputs[key]
            history.append(solver.prediction(output, states[i], i, kind))
            states.append(solver.step(states[i], history, i))
            # x_1 = A * noise + B * output, to the rounding of schedulers that compute in float32.
            _, _, a, b, *_ = row = solver.update_table(kind)[i].tolist()
            key += (round(a + b * row[0], 5), round(b * row[1], 5))
        return Run(states, history)
