"""Runs of a solver over a field, from any step on."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffusers_searched_solver import SearchedSolver
from diffusers_searched_solver.history import History

from ..launch.processes import gather
from .field import PipelineField


# Elements of a sample that derivatives and states on the way are of: they determine a hundred numbers many times over.
MOST_ELEMENTS = 2**15


@dataclass(frozen=True)
class Batch:
    """
    Samples whose end point the teacher has shown.

    Args:
        field: The pipeline's predictions for these samples; `field.noise` is where they begin.
        target (`torch.Tensor`): Where the teacher ends, of `field.noise`'s shape, at least float32, on the CPU.
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


def rollout(field: PipelineField, solver: SearchedSolver, prefix: Run | None = None) -> torch.Tensor:
    """
    The end of a run of a solver, from the field's noise or from where another run has come to.

    Memory does not grow with the number of steps: of states the last one is held, of predictions those that some later
    row of the table still uses.

    Args:
        prefix (*optional*): States x_0 ... x_i and predictions p_0 ... p_(i-1), or also p_i, which then is not
            evaluated again.

    Returns:
        `torch.Tensor`: In at least float32; the field casts states for the network as a pipeline's run does.
    """
    end = field.noise if prefix is None else prefix.end
    for step in _steps(field, solver, prefix):
        end = step[-1]
    return end


def recorded_run(
    field: PipelineField,
    solver: SearchedSolver,
    prefix: Run | None = None,
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Run:
    """
    A run with all its states and predictions, those of `prefix` included.

    Args:
        prefix (*optional*): As in [`rollout`].
        keep (*optional*): What is to be kept of each of them, such as [`some_elements`].

    Returns:
        `Run`: States are what the network was called on, with the parts that an inpainting pipeline has put back.
    """
    states = [keep(field.noise)] if prefix is None else list(prefix.states)
    predictions = [] if prefix is None else list(prefix.history)
    for state, history, end in _steps(field, solver, prefix):
        # Where memory is used again, the next prediction may take this one's place.
        predictions[len(states) - 1 :] = [keep(history[-1] if history.keeps_all else history[-1].clone())]
        states[-1:] = [keep(state), keep(end)]
    return Run(states, predictions)


def _steps(
    field: PipelineField, solver: SearchedSolver, prefix: Run | None
) -> Iterator[tuple[torch.Tensor, History, torch.Tensor]]:
    """Of every step: the state that the network is called on, the predictions so far, and the state where it ends."""
    x, begin, known = (field.noise, 0, []) if prefix is None else (prefix.end, len(prefix.states) - 1, prefix.history)
    history = History(solver, field.prediction_type)
    history.extend(known)
    for i in range(begin, solver.num_steps):
        if i >= len(known):
            output, x = field.evaluate(x, solver.timesteps[i], node_of(solver, i))
            history.append(output, x)
            del output
        end = history.step(x)
        yield x, history, end
        x = end


def node_of(solver: SearchedSolver, i: int) -> tuple[float, float]:
    """alpha and sigma of the state before step `i`; the first is noise alone, whatever the solver's first node."""
    return (float(solver.alphas[i]), float(solver.sigmas[i])) if i else (0.0, 1.0)


def some_elements(states: torch.Tensor) -> torch.Tensor:
    """At most `MOST_ELEMENTS` of each sample, always the same ones, shape (batch, elements)."""
    rows = states.flatten(1)
    if rows.shape[1] <= MOST_ELEMENTS:
        return rows
    return rows[:, _chosen(rows.shape[1], MOST_ELEMENTS).to(rows.device)]


@functools.cache
def _chosen(elements: int, count: int) -> torch.Tensor:
    """As many places of so many, spread at random."""
    return torch.randperm(elements, generator=torch.Generator().manual_seed(0), device="cpu")[:count].sort().values


def sample_errors(end: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Root mean square distance of each sample to its target, shape (batch,), float64, on the CPU."""
    return mean_squares(end.cpu() - target.cpu()).sqrt()


def mean_squares(difference: torch.Tensor) -> torch.Tensor:
    """Of each sample, shape (batch,), float64. On the CPU: not every device has float64."""
    return difference.double().flatten(1).square().mean(1)


def endpoint_errors(batches: Sequence[Batch], solver: SearchedSolver) -> torch.Tensor:
    """The error of every sample of all processes, one after another."""
    errors = [sample_errors(rollout(batch.field, solver), batch.target) for batch in batches]
    return torch.cat(gather(batches, errors))


def root_mean_square(errors: torch.Tensor) -> float:
    """The `endpoint_error` of many samples from each one's; infinite if one of them is not finite."""
    error = float(errors.square().mean().sqrt())
    return error if np.isfinite(error) else np.inf
