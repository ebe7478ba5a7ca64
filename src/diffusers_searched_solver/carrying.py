"""Solvers on the model that they are put around: the same kind of noise process, maybe with other betas."""

import reprlib
from dataclasses import asdict, replace

import numpy as np
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
    for table in solver.solvers.values():
        check_reach(table, prediction_type)
    return solver


def check_reach(solver: SearchedSolver, prediction_type: str):
    """
    Refuse, with a `ValueError`, a solver that makes numbers of which half precision has none.

    Args:
        prediction_type: The model's.
    """
    reach, limit = solver.reach(prediction_type), torch.finfo(torch.float16).max
    if not reach <= limit:
        raise ValueError(
            f"The solver of {solver.num_steps} steps makes numbers of up to {reach:.3g} out of outputs of size one, "
            f"where half precision ends at {limit:g} (`prediction_type` {prediction_type!r}). "
            "Pass a solver that was searched for such a model, with smaller coefficients."
        )


def _carry_over(file: SolverFile, process: NoiseProcess) -> SolverFile:
    """The file for a model with other betas or another time unit: each step count that the model can have."""
    if file.process == process:
        return file
    carried, refused = {}, {}
    for n, solver in file.solvers.items():
        try:
            carried[n] = _carried(solver, file.process, process)
        except ValueError as error:
            refused[n] = error
    here, there = asdict(process), asdict(file.process)
    between = "; ".join(
        f"{name} {reprlib.repr(there[name])} there, {reprlib.repr(here[name])} here"
        for name in here
        if here[name] != there[name]
    )
    without = "".join(f" {n} steps cannot be had: {error}" for n, error in refused.items())
    if not carried:
        raise ValueError(
            f"The solver was searched for a model with other betas, and cannot be carried over.{without} Search one "
            f"for this model with `accelerate launch search/run.py`. ({between})"
        )
    brought = [str(n) for n, solver in carried.items() if not np.array_equal(solver.alphas, file.solvers[n].alphas)]
    ends = f" Nodes of {', '.join(brought)} steps beyond the model's range are brought to its end." if brought else ""
    logger.warning(
        "The solver was searched for a model with other betas: its timesteps are carried over to the same noise "
        f"levels.{ends}{without} Expect less than a solver that was searched for this model. ({between})"
    )
    return replace(file, solvers=carried, process=process)


def _carried(solver: SearchedSolver, source: NoiseProcess, target: NoiseProcess) -> SearchedSolver:
    """
    The solver with each timestep and each node at its noise level in another process; what is beyond the range of that
    is brought to its end.
    """
    timesteps = _apart(target.timesteps(*source.alpha_sigma(solver.timesteps)), target.max_timestep)
    alphas, sigmas = solver.alphas.copy(), solver.sigmas.copy()
    times = target.timesteps(alphas[:-1], sigmas[:-1])
    beyond = np.flatnonzero((times == target.max_timestep) | (times == 0))
    factors = target.scale(alphas[beyond], sigmas[beyond])
    alphas[beyond], sigmas[beyond] = factors * target.alpha_sigma(_apart(times, target.max_timestep)[beyond])
    return replace(solver, timesteps=timesteps, alphas=alphas, sigmas=sigmas)


def _apart(times: np.ndarray, end: float) -> np.ndarray:
    """Times of which several have met at an end, evenly from there to the next one."""
    noisiest, cleanest = np.count_nonzero(times == end), np.count_nonzero(times == 0)
    met = max(noisiest - 1, 0) + max(cleanest - 1, 0)
    if 2 * met >= len(times):
        raise ValueError(f"{met + 1} of its {len(times)} nodes are beyond the model's noise levels.")
    times = times.copy()
    times[:noisiest] = np.linspace(end, times[noisiest], noisiest, endpoint=False)
    times[len(times) - cleanest :] = np.linspace(times[-cleanest - 1], 0, cleanest + 1)[1:]
    return times
