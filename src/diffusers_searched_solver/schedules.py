"""Schedules: which table runs, from what a pipeline asks for."""

import inspect
import math
import operator
import reprlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .carrying import check_reach
from .derived import derived_from, derived_table
from .exponential import few_step_table
from .grids import time_grid
from .process import NoiseProcess
from .serialization import SolverFile
from .solver import SearchedSolver


Schedule = Sequence[float] | np.ndarray | torch.Tensor


def steps_asked_for(
    num_inference_steps: int | None, timesteps: Schedule | None, sigmas: Schedule | None
) -> int | None:
    """
    The number of steps whose nodes a pipeline leaves to the scheduler, or None if it passes a schedule of its own.

    Raises:
        ValueError: If there is neither, or the number is none.
        TypeError: If it is not a whole number.
    """
    is_default = timesteps is None and sigmas is not None and _is_default_grid(sigmas)
    num_steps = len(sigmas) if is_default else num_inference_steps
    if num_steps is not None and operator.index(num_steps) < 1:
        raise ValueError(f"`num_inference_steps` is {num_steps}, expected at least 1.")
    if not is_default and (timesteps is not None or sigmas is not None):
        return None
    if num_steps is None:
        raise ValueError("`set_timesteps` needs one of `num_inference_steps`, `timesteps` and `sigmas`, found none.")
    return num_steps


def searched_table(file: SolverFile, num_steps: int, strict: bool) -> SearchedSolver:
    """
    The table of a solver file for so many steps, derived if it has none.

    Args:
        strict (`bool`): Whether what is not in the file is refused.

    Raises:
        ValueError: If there is no such table.
    """
    if num_steps in file.solvers:
        return file.solvers[num_steps]
    try:
        if strict:
            raise ValueError("It is `strict`, so no other is derived.")
        table = derived_table(file, num_steps)
        check_reach(table, file.prediction_type)
    except ValueError as error:
        raise ValueError(
            f"No solver for {num_steps} steps: this scheduler has {listed(file.step_counts)}. {error} Pass one of "
            "them as `num_inference_steps`, or search one with `accelerate launch search/run.py --num-steps "
            f"{num_steps}`."
        ) from error
    return table


def said_of_derived(file: SolverFile, num_steps: int) -> str:
    """One line on where the table of a step count comes from that a file lacks."""
    sources = derived_from(file, num_steps)
    source = f"that of {listed(sources)} steps" if sources else "no searched one, but the classical default"
    end = ": with fewer steps, these may be nearer." if num_steps > file.step_counts[-1] else "."
    return (
        f"No solver of {num_steps} steps was searched: this run's is derived from {source}. Expect less of it than of "
        f"those that were ({listed(file.step_counts)} steps){end}"
    )


def listed(counts: Sequence[int]) -> str:
    """Step counts as words."""
    return " and ".join(filter(None, [", ".join(map(str, counts[:-1])), str(counts[-1])]))


def default_table(process: NoiseProcess, config: Mapping, num_steps: int, mu: float | None) -> SearchedSolver:
    """
    The table for so many steps where none was searched: on a flow, Adams-Bashforth of order 2 on the grid that the
    config shifts; on a variance-preserving process, [`few_step_table`].

    Args:
        config: That of our scheduler.
        mu: The logarithm of the grid's shift if the config says that shifting is dynamic.
    """
    if process.kind == "variance_preserving":
        return few_step_table(process, num_steps)
    shift = math.exp(mu) if mu is not None and config.use_dynamic_shifting else config.shift
    return second_order(*time_grid(process, num_steps, shift))


def table_on(
    process: NoiseProcess,
    config: Mapping,
    timesteps: Schedule | None,
    sigmas: Schedule | None,
    mu: float | None,
) -> SearchedSolver:
    """
    A classical table on the nodes that a pipeline passes; `timesteps` with `sigmas` are what the network is called at.

    Args:
        config: That of our scheduler.

    Raises:
        ValueError: If they are no schedule.
    """
    for name, schedule, maximum in (("timesteps", timesteps, process.max_timestep), ("sigmas", sigmas, 1.0)):
        values = np.ones(1) if schedule is None else to_numpy(schedule)
        if not (values.size and values.any() and (values >= 0).all() and (values <= maximum).all()):
            raise ValueError(
                f"`{name}` is {reprlib.repr(values.tolist())}, expected falling numbers from at most {maximum:g} to "
                "at least 0."
            )
    if sigmas is None:
        timesteps = to_numpy(timesteps)
        if process.kind == "flow_matching":
            # At time 0 a flow is at the data: nothing is left to do, as after a last sigma of 0.
            timesteps = np.trim_zeros(timesteps, "b")
        alphas, sigmas = process.alpha_sigma(timesteps)
        return second_order(timesteps, np.append(alphas, 1.0), np.append(sigmas, 0.0))
    if process.kind != "flow_matching":
        raise ValueError(
            "`sigmas` is a schedule for flow-matching models, this model has `prediction_type` "
            f"{config.prediction_type!r}. Pass `timesteps` instead."
        )
    # Explicit sigmas are shifted by the config, times given with them are not: diffusers' own scheduler knows how.
    known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    sigmas = np.trim_zeros(to_numpy(sigmas), "b")
    times = None if timesteps is None else to_numpy(timesteps)[: len(sigmas)]
    with torch.device("cpu"):
        nodes = FlowMatchEulerDiscreteScheduler(**{key: config[key] for key in known if key in config})
        nodes.set_timesteps(sigmas=sigmas, timesteps=times, mu=mu)
    sigmas = to_numpy(nodes.sigmas)
    return second_order(to_numpy(nodes.timesteps), 1 - sigmas, sigmas)


def second_order(timesteps: np.ndarray, alphas: np.ndarray, sigmas: np.ndarray) -> SearchedSolver:
    """Adams-Bashforth of order 2 on velocities."""
    return SearchedSolver.adams_bashforth(timesteps, alphas, sigmas, "velocity", order=2)


def to_numpy(values: Schedule) -> np.ndarray:
    """`values` in float64, from any device."""
    return values.detach().cpu().double().numpy() if torch.is_tensor(values) else np.asarray(values, np.float64)


def steps_called_at(file: SolverFile, timesteps: Schedule) -> int | None:
    """The number of steps in which a solver is called at these timesteps, as a scheduler gives them out."""
    given = to_numpy(timesteps).astype(np.float32)
    same = (n for n, table in file.solvers.items() if np.array_equal(table.timesteps.astype(np.float32), given))
    return next(same, None)


def _is_default_grid(sigmas: Schedule) -> bool:
    """Whether `sigmas` is 1 - i/N, which flow pipelines pass for lack of a wish."""
    sigmas = to_numpy(sigmas)
    return sigmas.size > 0 and bool(abs(sigmas - (1 - np.arange(len(sigmas)) / len(sigmas))).max() < 1e-5)
