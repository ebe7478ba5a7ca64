"""
Errors along the way: how far a solver's states are from the teacher's at the same noise level, on at most
`MOST_ELEMENTS` of a sample, so that a teacher of many steps can be kept whole.
"""

from dataclasses import dataclass

import numpy as np
import torch

from diffusers_searched_solver import SearchedSolver
from diffusers_searched_solver.teacher import teacher_solver

from ..known.baselines import CLASSICAL
from ..pipeline.field import PipelineField
from ..pipeline.rollout import Run, recorded_run, root_mean_square, sample_errors, some_elements
from .evaluate import SEARCHED


# Of the classical coefficients that a searched solver's are shown beside.
CLASSICAL_ORDER = 3


@dataclass(frozen=True)
class TrajectoryRow:
    """
    How a run departs from the teacher's.

    Args:
        solver (`str`): Its name.
        timesteps (N+1): Where the model's noise process has the noise levels of its nodes.
        errors (N+1): There, root mean square distances to the teacher's states of the same samples.
        num_samples (`int`): How many these are.
    """

    solver: str
    timesteps: list[float]
    errors: list[float]
    num_samples: int


class Trajectory:
    """
    A run of a solver in the velocity frame, between its nodes too.

        y = x / (alpha + sigma),   tau = sigma / (alpha + sigma),   dy / dtau = p

    Between two nodes, where a run has y and its slope p, y is the cubic polynomial that agrees with both; before the
    last node, where no prediction was made, the quadratic one.

    Args:
        run (`Run`): States and predictions.
        solver (`SearchedSolver`): Which made them.
    """

    def __init__(self, run: Run, solver: SearchedSolver):
        self._run = run
        self._scales = solver.alphas + solver.sigmas
        self._times = solver.sigmas / self._scales

    def __call__(self, alpha: float, sigma: float) -> torch.Tensor:
        """The state at a noise level between those of the first and the last node."""
        time = sigma / (alpha + sigma)
        i = int(np.searchsorted(-self._times, -time, side="right").clip(1, len(self._times) - 1)) - 1
        step = float(self._times[i + 1] - self._times[i])
        start, end = (self._run.states[k] / float(self._scales[k]) for k in (i, i + 1))
        chord = (end - start) / step
        slope = self._run.history[i]
        end_slope = self._run.history[i + 1] if i + 1 < len(self._run.history) else 2 * chord - slope
        u = (time - float(self._times[i])) / step
        y = start + u * step * (chord + (1 - u) * ((1 - u) * (slope - chord) + u * (chord - end_slope)))
        return (alpha + sigma) * y


def teacher_trajectory(field: PipelineField, teacher_steps: int) -> Trajectory:
    """The teacher's run of these samples."""
    teacher = teacher_solver(field.process, teacher_steps)
    return Trajectory(recorded_run(field, teacher, keep=some_elements), teacher)


def with_classical_coefficients(solver: SearchedSolver) -> SearchedSolver:
    """The Adams-Bashforth table on a solver's own nodes and network times."""
    return SearchedSolver.adams_bashforth(
        solver.timesteps, solver.alphas, solver.sigmas, solver.frame, CLASSICAL_ORDER
    )


def compare_trajectories(
    solver: SearchedSolver, classical: SearchedSolver, field: PipelineField, teacher: Trajectory
) -> list[TrajectoryRow]:
    """
    How the runs of a searched solver, of classical coefficients on its nodes and of a classical solver depart from the
    teacher's.
    """
    contenders = {
        SEARCHED: solver,
        f"AB{CLASSICAL_ORDER} on its nodes": with_classical_coefficients(solver),
        CLASSICAL: classical,
    }
    return [_row(name, contender, field, teacher) for name, contender in contenders.items()]


def _row(name: str, solver: SearchedSolver, field: PipelineField, teacher: Trajectory) -> TrajectoryRow:
    levels = zip(solver.alphas.tolist(), solver.sigmas.tolist(), strict=True)
    states = recorded_run(field, solver, keep=some_elements).states
    errors = [sample_errors(state, teacher(*level)) for state, level in zip(states, levels, strict=True)]
    timesteps = field.process.timesteps(solver.alphas, solver.sigmas)
    return TrajectoryRow(name, timesteps.tolist(), [root_mean_square(each) for each in errors], len(field.seeds))
