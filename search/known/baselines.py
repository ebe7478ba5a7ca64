"""What a search has to beat, and may begin from: diffusers' schedulers as tables, classical tables on many grids."""

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from diffusers import SchedulerMixin

from diffusers_searched_solver import (
    NoiseProcess,
    SearchedSolver,
    process_from_config,
    solver_from_scheduler,
    time_grid,
)
from diffusers_searched_solver.rivals import FLOW_SHIFTS, diffusers_schedulers

from ..pipeline.field import PipelineField


logger = logging.getLogger(__name__)

# Of a variance-preserving process: shift of the time grid, and where it begins.
VARIANCE_PRESERVING_GRIDS = tuple(itertools.product((0.35, 0.5, 0.7, 1.0, 1.5), (0.8, 0.9, 1.0)))
CLASSICAL, GIVEN, NEIGHBOUR = "classical table", "given solver", "other step counts"


@dataclass(frozen=True)
class KnownTable:
    """
    A solver that was known before a search began.

    Args:
        family (`str`): A scheduler of diffusers with its order, or one of the above.
        setting (`str`): Which of the family.
        from_diffusers (`bool`): Whether it is the table of one of diffusers' schedulers.
    """

    family: str
    setting: str
    solver: SearchedSolver
    from_diffusers: bool

    def __str__(self) -> str:
        return f"{self.family}, {self.setting}" if self.setting else self.family


def known_tables(config: Mapping, num_steps: int) -> list[KnownTable]:
    """
    diffusers' few-step schedulers at all settings, and classical tables on many grids.

    Args:
        config: The config of the pipeline's scheduler.
    """
    tables = []
    for family, settings in diffusers_schedulers(config).items():
        for setting, scheduler in settings.items():
            try:
                tables.append(KnownTable(family, setting, solver_from_scheduler(scheduler, num_steps), True))
            except ValueError as error:
                # Whole timesteps may meet where there are many; diffusers itself fails or repeats a step there.
                logger.info(f"{family}, {setting}: {error}")
    classical = classical_solvers(process_from_config(config), num_steps)
    return tables + [KnownTable(CLASSICAL, name, in_one_kind(solver), False) for name, solver in classical.items()]


def in_one_kind(solver: SearchedSolver) -> SearchedSolver:
    """The same solver as searched ones are written, in the velocity frame and with free row sums."""
    return replace(solver.in_frame("velocity"), consistent=False)


def classical_solvers(process: NoiseProcess, num_steps: int) -> dict[str, SearchedSolver]:
    """Adams-Bashforth tables of order 2 to 4 on many grids, by name; those of order 1 are Euler's method and DDIM."""
    flow = process.kind == "flow_matching"
    solvers = {}
    for shift, start in [(shift, 1.0) for shift in FLOW_SHIFTS] if flow else VARIANCE_PRESERVING_GRIDS:
        grid = time_grid(process, num_steps, shift, start)
        # Beyond 2, data frames lose.
        for frame, order in (("velocity", 2), ("velocity", 3), ("velocity", 4), ("data", 2)):
            name = f"AB{order}, {frame}, shift {shift:g}" + ("" if start == 1 else f" from {start:g}")
            solvers[name] = SearchedSolver.adams_bashforth(*grid, frame, order)
    return solvers


def run_scheduler(field: PipelineField, scheduler: SchedulerMixin, num_steps: int) -> torch.Tensor:
    """
    The end point of one of diffusers' schedulers, from the field's noise.

    Args:
        scheduler: Works on states of unit variance at the start, as all of `diffusers_schedulers` do.

    Returns:
        `torch.Tensor`: Of `field.noise`'s shape.
    """
    scheduler.set_timesteps(num_steps)
    x = field.noise
    for timestep in scheduler.timesteps:
        output, x = field.evaluate(x, timestep)
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return x
