"""Runs of a solver over a field, from any step on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffusers_searched_solver import SearchedSolver
from diffusers_searched_solver.history import History

from ..launch.processes import gather
from .field import PipelineField


@dataclass(frozen=True)
class Batch:
    """
    Samples whose end point the teacher has shown.

    Args:
        field: The pipeline's predictions for these samples; `field.noise` is where they begin.
        target (`torch.Tensor`): Where the teacher ends, of `field.noise`'s shape, at least float32.
        index (`tuple[int, ...]`): Its place among the batches of all processes.
    """

    field: PipelineField
    target: torch.Tensor
    index: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """
    A run of a solver: `states` x_0 ... x_N and `history`, the predictions p_0 ... p_(N-1) in the solver's frame.
    """

    states: list[torch.Tensor]
    history: list[torch.Tensor]

    @property
    def end(self) -> torch.Tensor:
        return self.states[-1]


def rollout(field: PipelineField, solver: SearchedSolver, prefix: Run | None = None) -> Run:
    """
    Run a solver from the field's noise, or go on from the beginning of another run.

    Args:
        prefix (*optional*): States x_0 ... x_i and predictions p_0 ... p_(i-1), or also p_i, which then is not
            evaluated again.

    Returns:
        `Run`: States are kept in at least float32; the field casts them for the network as a pipeline's run does.
            They are what the network was called on, with the parts that an inpainting pipeline has put back.
    """
    states = [field.noise] if prefix is None else list(prefix.states)
    predictions = [] if prefix is None else list(prefix.history)
    history = History(solver, field.prediction_type)
    history.extend(predictions)
    for i in range(len(states) - 1, solver.num_steps):
        if len(predictions) == i:
            output, states[i] = field.evaluate(states[i], solver.timesteps[i], node_of(solver, i))
            history.append(output, states[i])
            predictions.append(history[-1] if history.keeps_all else history[-1].clone())
        states.append(history.step(states[i]))
    return Run(states, predictions)


def node_of(solver: SearchedSolver, i: int) -> tuple[float, float]:
    """alpha and sigma of the state before step `i`; the first is noise alone, whatever the solver's first node."""
    return (float(solver.alphas[i]), float(solver.sigmas[i])) if i else (0.0, 1.0)


def sample_errors(end: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Root mean square distance of each sample to its target, shape (batch,), float64."""
    return (end - target).double().flatten(1).square().mean(1).sqrt()


def endpoint_errors(batches: Sequence[Batch], solver: SearchedSolver) -> torch.Tensor:
    """The error of every sample of all processes, one after another."""
    errors = [sample_errors(rollout(batch.field, solver).end, batch.target).cpu() for batch in batches]
    return torch.cat(gather(batches, errors))


def root_mean_square(errors: torch.Tensor) -> float:
    """The `endpoint_error` of many samples from each one's; infinite if one of them is not finite."""
    error = float(errors.square().mean().sqrt())
    return error if np.isfinite(error) else np.inf
