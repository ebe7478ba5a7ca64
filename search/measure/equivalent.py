"""In how many steps the best of diffusers is as near to the teacher as a searched solver."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffusers_searched_solver import solver_from_scheduler
from diffusers_searched_solver.rivals import diffusers_schedulers

from ..known.baselines import KnownTable
from ..pipeline.rollout import root_mean_square


# The rival is measured at so many times the steps, where it has tables, and between them interpolated.
TIMES = (2, 3)


@dataclass(frozen=True)
class Equivalent:
    """
    Args:
        solver, setting (`str`): The best of diffusers' schedulers.
        num_steps (`float`): In how many steps it is as near as the searched solver, on the noises of one round, by
            interpolation between logarithms of errors and steps.
        or_more (`bool`): Whether it is not as near even in so many.
    """

    solver: str
    setting: str
    num_steps: float
    or_more: bool

    def __str__(self) -> str:
        return f"{self.solver} in {'more than' if self.or_more else 'about'} {round(self.num_steps)}"


def farther_tables(config: Mapping, best: KnownTable) -> list[KnownTable]:
    """The tables of more steps of one of diffusers' schedulers: where whole timesteps meet, there is none."""
    scheduler, found = diffusers_schedulers(config)[best.family][best.setting], []
    for times in TIMES:
        with contextlib.suppress(ValueError):
            solver = solver_from_scheduler(scheduler, times * best.solver.num_steps)
            found.append(KnownTable(best.family, best.setting, solver, True))
    return found


def equivalent(
    best: KnownTable, searched: torch.Tensor, errors: torch.Tensor, farther: Sequence[tuple[KnownTable, torch.Tensor]]
) -> Equivalent | None:
    """
    Args:
        best: The best of diffusers.
        searched, errors: The errors of the searched solver and of `best`, on the same noises.
        farther: The tables of `farther_tables` with their errors.

    Returns:
        None if the searched solver is not nearer in as many steps, or nothing is known of more.
    """
    own = root_mean_square(searched)
    counts = [best.solver.num_steps, *(table.solver.num_steps for table, _ in farther)]
    found = [root_mean_square(each) for each in (errors, *(each for _, each in farther))]
    if not farther or not own < found[0]:
        return None
    # The interpolation wants errors that fall.
    falling = np.minimum.accumulate(found)
    steps = np.exp(np.interp(-np.log(max(own, 1e-300)), -np.log(falling), np.log(counts)))
    return Equivalent(best.family, best.setting, float(steps), own < falling[-1])
