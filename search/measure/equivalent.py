"""In how many steps the best of diffusers is as near to the teacher as a searched solver."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffusers_searched_solver import solver_from_scheduler
from diffusers_searched_solver.rivals import diffusers_schedulers

from ..known.baselines import KnownTable
from ..pipeline.rollout import root_mean_square
from .evaluate import SEARCHED, Comparison


# The rival is measured at so many times the steps, and between them interpolated.
TIMES = (2, 3)


@dataclass(frozen=True)
class Equivalent:
    """
    Args:
        solver, setting (`str`): The best of diffusers' schedulers, as the race of known tables has found it.
        num_steps (`float`): In how many steps it is as near as the searched solver, on the noises of the first round,
            by interpolation between logarithms of errors and steps.
        or_more (`bool`): Whether it is not as near even in so many.
    """

    solver: str
    setting: str
    num_steps: float
    or_more: bool

    def __str__(self) -> str:
        return f"{self.solver} in {'more than' if self.or_more else 'about'} {round(self.num_steps)}"


def farther_tables(config: Mapping, tuned: Mapping[str, KnownTable], num_steps: int) -> list[KnownTable]:
    """The tables of more steps of the scheduler of diffusers that is best in `num_steps`, or none."""
    best = next(table for table in tuned.values() if table.from_diffusers)
    scheduler = diffusers_schedulers(config)[best.family][best.setting]
    try:
        return [
            KnownTable(best.family, best.setting, solver_from_scheduler(scheduler, times * num_steps), True)
            for times in TIMES
        ]
    except ValueError:
        # Whole timesteps may meet where there are many.
        return []


def equivalent(
    comparison: Comparison, farther: Sequence[KnownTable], errors: Iterator[torch.Tensor]
) -> Equivalent | None:
    """
    Args:
        comparison: After the first round.
        farther: As in `farther_tables`.
        errors: Theirs in that round, which are taken from it.

    Returns:
        None if the searched solver is not nearer in as many steps, or nothing is known of more.
    """
    if not farther:
        return None
    best, own = farther[0], comparison.error(SEARCHED)
    counts = [comparison.solvers[SEARCHED].num_steps, *(table.solver.num_steps for table in farther)]
    found = [comparison.error(best.family), *(root_mean_square(next(errors)) for _ in farther)]
    if not own < found[0]:
        return None
    # The interpolation wants errors that fall.
    falling = np.minimum.accumulate(found)
    steps = np.exp(np.interp(-np.log(max(own, 1e-300)), -np.log(falling), np.log(counts)))
    return Equivalent(best.family, best.setting, float(steps), own < falling[-1])
