"""Solvers side by side: same noise, same network calls, every rival at its best setting, on ever more noises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffusers_searched_solver import SearchedSolver

from ..known.baselines import CLASSICAL, KnownTable
from ..known.contest import Contest, Number, interval, resampled_means
from ..pipeline.rollout import root_mean_square


SEARCHED, OWN = "searched", "own scheduler"
# A ratio whose interval is as near to one as this is known well enough, whichever side it is on.
ALIKE = 0.1


@dataclass(frozen=True)
class Row:
    """
    How far a solver ends from the teacher.

    Args:
        solver (`str`): "searched", "own scheduler" (the pipeline's, as it is configured), or a family of known tables.
        setting (`str`): Which of the family: of those that other noises have left, the best on these.
        from_diffusers (`bool`): Whether it is one of diffusers' schedulers.
        num_samples (`int`): Held-out noises that it was measured on. One that the best beats beyond sampling takes no
            part in later rounds.
        endpoint_error (`float`): Root mean square over samples; infinite (null in JSON) if it diverges.
        error_interval: Its 95 % bootstrap interval over samples.
        median_error (`float`): Over samples.
        contest (`Contest`, *optional*): The searched solver against it, on its noises; None for the searched one.
    """

    solver: str
    setting: str
    from_diffusers: bool
    num_samples: int
    endpoint_error: Number
    error_interval: tuple[Number, Number]
    median_error: Number
    contest: Contest | None = None

    def __str__(self) -> str:
        return f"{self.solver}, {self.setting}" if self.setting else self.solver


@dataclass(frozen=True)
class Summary:
    """The rows of a step count that a reader asks for first: the searched one, the best of either kind of rival."""

    searched: Row
    diffusers: Row
    classical: Row | None
    own: Row | None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Summary":
        """
        Args:
            rows: Of one step count, best first.
        """
        named = {row.solver: row for row in rows}
        best = next(row for row in rows if row.from_diffusers)
        return cls(named[SEARCHED], best, named.get(CLASSICAL), named.get(OWN))


class Comparison:
    """
    A searched solver and its rivals on ever more noises.

    Args:
        solver (`SearchedSolver`): The searched one.
        rivals: Known tables, in the order that other noises have put them in. Where a family has several, the one that
            is best on these noises stands for it: that favours the rival, as it should.
    """

    def __init__(self, solver: SearchedSolver, rivals: Sequence[KnownTable]):
        self.rivals = {str(table): table for table in rivals}
        self.solvers = {SEARCHED: solver, **{name: table.solver for name, table in self.rivals.items()}}
        self._kinds = [
            [name for name, each in self.rivals.items() if each.from_diffusers == kind and each.family != OWN]
            for kind in (True, False)
        ]
        self._own = [name for name, each in self.rivals.items() if each.family == OWN]
        self._errors = {name: torch.zeros(0, dtype=torch.float64, device="cpu") for name in self.solvers}
        self._out: set[str] = set()

    @property
    def racing(self) -> list[str]:
        """The solvers that take part in the next round."""
        return [name for name in self.solvers if name not in self._out]

    def add(self, errors: Mapping[str, torch.Tensor]):
        """Errors of the solvers in the race, in a further round."""
        for name, of_round in errors.items():
            self._errors[name] = torch.cat([self._errors[name], of_round.double().nan_to_num(np.inf, posinf=np.inf)])

    @property
    def best_of_diffusers(self) -> str:
        """That of diffusers' schedulers which is best so far; before any round, the first."""
        return self._best(self._kinds[0])

    def _best(self, names: Sequence[str]) -> str:
        racing = [name for name in names if name not in self._out]
        return min(racing, key=self.error) if len(self._errors[SEARCHED]) else racing[0]

    def drop_hopeless(self):
        """Leave out of later rounds what the best of its kind beats beyond sampling."""
        for names in filter(None, self._kinds):
            best = self._best(names)
            for name in {*names} - {best, *self._out}:
                if Contest.of(self._errors[best], self._errors[name]).wins:
                    self._out.add(name)

    @property
    def is_decided(self) -> bool:
        """Whether it is clear who is better, the searched one or the best of diffusers and the pipeline's own."""
        asked = {self.best_of_diffusers, *self._own}
        contests = (Contest.of(self._errors[SEARCHED], self._errors[name]) for name in asked)
        return all(contest.is_decided or contest.is_known_within(ALIKE) for contest in contests)

    def error(self, name: str) -> float:
        """The root mean square of a solver's errors so far."""
        return root_mean_square(self._errors[name])

    def rows(self) -> list[Row]:
        """The searched one and the best of each family: those of all rounds first, the best before others."""
        rows, best = sorted(map(self._row, self.solvers), key=lambda row: (-row.num_samples, row.endpoint_error)), {}
        for row in rows:
            best.setdefault(row.solver, row)
        return list(best.values())

    def best_of(self, family: str) -> KnownTable:
        """The table of a family that stands for it."""
        setting = next(row.setting for row in self.rows() if row.solver == family)
        return next(each for each in self.rivals.values() if (each.family, each.setting) == (family, setting))

    def _row(self, name: str) -> Row:
        errors, rival = self._errors[name], self.rivals.get(name)
        squares = resampled_means(errors.square().numpy())
        return Row(
            solver=SEARCHED if rival is None else rival.family,
            setting="" if rival is None else rival.setting,
            from_diffusers=rival is not None and rival.from_diffusers,
            num_samples=len(errors),
            endpoint_error=root_mean_square(errors),
            error_interval=interval(np.sqrt(squares)),
            median_error=float(errors.median()),
            contest=None if rival is None else Contest.of(self._errors[SEARCHED][: len(errors)], errors),
        )


def format_table(rows: Sequence[Row]) -> str:
    """The rows of a step count as a table for the terminal."""
    means = "searched / this (95 %), geometric mean, nearer, worst"
    lines = [f"{'solver':18}{'best setting':34}{'noises':>7}{'error':>9}{'median':>9}  {means}"]
    for row in rows:
        line = f"{row.solver:18}{row.setting:34}{row.num_samples:7}{row.endpoint_error:9.4f}{row.median_error:9.4f}"
        if row.contest is not None:
            low, high = row.contest.ratio_interval
            line += f"  {row.contest.ratio:.3f} ({low:.3f} to {high:.3f})"
            line += f", {row.contest.geometric_mean:.3f}, {row.contest.nearer:.0%}, {row.contest.worst:.1f}"
        lines.append(line)
    return "\n".join(lines)
