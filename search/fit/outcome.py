"""What a search comes to, and solvers on their way to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from diffusers_searched_solver import SearchedSolver

from ..known.baselines import KnownTable
from ..known.contest import Contest
from .parameters import SolverFamily


@dataclass(frozen=True)
class Outcome:
    """
    What a search for one step count has found.

    Args:
        solver (`SearchedSolver`): The best.
        best_known (`KnownTable`): What was best of all that was known before.
        contest (`Contest`, *optional*): The solver against `best_known` on `num_judges` noises that neither was fitted
            to; None if it is that table.
        tuned (`list[KnownTable]`): Those that may be the best of their family, in the order of the race.
    """

    solver: SearchedSolver
    best_known: KnownTable
    contest: Contest | None
    num_judges: int
    tuned: Sequence[KnownTable]

    @property
    def improved(self) -> bool:
        """Whether searching has improved on what was known."""
        return self.contest is not None

    @property
    def verdict(self) -> str:
        """What came out, as a sentence."""
        steps = f"{self.solver.num_steps} steps"
        if not self.improved:
            return (
                f"{steps}: searching has not improved on {self.best_known}, so the solver is its table, exactly. Use "
                "it as it is, or search again with a larger `max_calls`."
            )
        word = "better" if self.contest.is_better else "nearer on most noises"
        return (
            f"{steps}: {word} than {self.best_known}, the best that was known: {self.contest} ({self.num_judges} "
            "noises that were not fitted)."
        )


@dataclass(frozen=True)
class Contender:
    """
    A solver on its way.

    Args:
        name (`str`): What it began as.
        solver (`SearchedSolver`): What it is.
        errors, weights (`torch.Tensor`, *optional*): On the noises that judge, and what these weigh.
        family, vector (*optional*): Where it is searched on.
    """

    name: str
    solver: SearchedSolver
    errors: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    family: SolverFamily | None = None
    vector: np.ndarray | None = None

    @property
    def error(self) -> float:
        """The root mean square over noises; infinite if one is not finite."""
        error = float((self.errors.square() * self.weights / self.weights.sum()).sum().sqrt())
        return error if np.isfinite(error) else np.inf

    def on_the_way(self, shares: Sequence[float], start: np.ndarray | None = None) -> list["Contender"]:
        """
        Contenders at these shares of the way to this one, where there are solvers; itself if it is not searched.

        Args:
            start (*optional*): The vector where the way begins; by default what its family is around.
        """
        if self.family is None:
            return [self]
        found, start = [], self.family.start if start is None else start
        for share in shares:
            vector = (1 - share) * start + share * self.vector
            try:
                solver = self.family.solver(self.family.entries(vector))
            except ValueError:
                continue  # two network times have changed places
            found.append(replace(self, solver=solver, vector=vector))
        return found
