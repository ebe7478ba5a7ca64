"""Solvers on the model that they are put around: the same kind of noise process, maybe with other betas."""

from dataclasses import replace

import torch
from diffusers.utils import logging

from .process import NoiseProcess
from .serialization import SolverFile
from .solver import SearchedSolver


logger = logging.get_logger(__name__)


def fitted_to(process: NoiseProcess, prediction_type: str, solver: SolverFile | SearchedSolver) -> SolverFile:
    """
    A solver as it runs on a model.

    Args:
        process, prediction_type: The model's.

    Raises:
        ValueError: If the solver is for the other kind of noise process, needs noise levels that the model's lacks, or
            makes numbers of which half precision has none.
    """
    if isinstance(solver, SearchedSolver):
        solver = SolverFile({solver.num_steps: solver}, process, prediction_type)
    if solver.process.kind != process.kind:
        raise ValueError(
            f"The solver is for a {solver.process.kind.replace('_', ' ')} process, this model has a "
            f"{process.kind.replace('_', ' ')} one (`prediction_type` {prediction_type!r}). Pass "
            "a solver that was searched for such a model, or search one with `accelerate launch search/run.py`."
        )
    solver = _carry_over(solver, process)
    for num_steps, table in solver.solvers.items():
        reach, limit = table.reach(prediction_type), torch.finfo(torch.float16).max
        if not reach <= limit:
            raise ValueError(
                f"The solver of {num_steps} steps makes numbers of up to {reach:.3g} out of outputs of size one, "
                f"where half precision ends at {limit:g} (`prediction_type` {prediction_type!r}). "
                "Pass a solver that was searched for such a model, with smaller coefficients."
            )
    return solver


def _carry_over(file: SolverFile, process) -> SolverFile:
    """The file for a model with other betas or another time unit: each timestep moves to the same noise level."""
    if file.process == process:
        return file
    logger.warning(
        f"The solver was searched for {file.process}, the model has {process}: its timesteps are carried over to the "
        "same noise levels. Expect less than a solver that was searched for this model."
    )
    try:
        solvers = {
            n: replace(solver, timesteps=process.timesteps(*file.process.alpha_sigma(solver.timesteps)))
            for n, solver in file.solvers.items()
        }
    except ValueError as error:
        raise ValueError(
            f"The solver was searched for {file.process} and cannot be carried over to {process}, which lacks some "
            f"of its noise levels. {error} Search one for this model with `accelerate launch search/run.py`."
        ) from error
    return replace(file, solvers=solvers, process=process)
