"""
The paper's recipe: a solver by gradients through the network.

    loss = sum_{i=1..N} MSE(x_i, teacher at tau_i) + 1000 * Huber_0.001(x_N, end of the teacher)

where the teacher is 100 steps of Euler's method, uniform in time (flow matching), or of DDIM at 100 timesteps from the
first to 0 and then to the data (variance preserving); between its states one interpolates linearly. Lion updates the
vector of a [`ConsistentFamily`] with a learning rate of 0.01 and no weight decay, on 50,000 noises in batches of 32.
The recipe has no guidance: give conditions with `"guidance_scale": 1.0`, at which most pipelines run the network once.

A noise costs 101 + N forward evaluations (one of them opens its field) and N - 1 backward ones. The code that was
released with the paper (MCG-NJU/NeuralSolver) does otherwise in places, and this does not:

- It integrates with r itself for step sizes and takes the softmax only to choose targets, so that nothing keeps the
  sum of the steps at one.
- It compares x_i with the nearest state of the teacher, by a rounded index: no gradient of tau_i from the target.
- On variance-preserving processes it makes every update twice, the second time with the newest prediction alone (the
  published tables are of the single update), and ends at sigma = 0.0105 instead of at the data.
- It evaluates the unconditional half of the batch too, only to multiply it by zero.

Source: Wang et al., "Differentiable Solver Search for Fast Diffusion Sampling", arXiv 2505.21114; Chen et al.,
"Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, for Lion.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from diffusers_searched_solver import NoiseProcess, SearchedSolver
from diffusers_searched_solver.solver import tensor_step

from ..launch.processes import gather, share
from ..pipeline.field import PipelineField
from ..pipeline.rollout import recorded_run
from .consistent_family import ConsistentFamily
from .differentiable_network import DifferentiableNetwork


BETAS = 0.9, 0.99
END_WEIGHT, HUBER_DELTA = 1000.0, 0.001


@dataclass(frozen=True)
class Recipe:
    """
    How long to search, and how fast; by default as the paper.

    Args:
        num_samples (`int`): Noises, each used once.
        batch_size (`int`): Noises of one update, over all processes.
        learning_rate (`float`): What an update changes every number of the vector by.
        teacher_steps (`int`): Steps of the teacher, at least 2.

    Raises:
        ValueError: If one is out of range.
    """

    num_samples: int = 50_000
    batch_size: int = 32
    learning_rate: float = 0.01
    teacher_steps: int = 100

    def __post_init__(self):
        for name, minimum in (("num_samples", 1), ("batch_size", 1), ("teacher_steps", 2)):
            if getattr(self, name) < minimum:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least {minimum}.")
        if not 0 < self.learning_rate < np.inf:
            raise ValueError(f"`learning_rate` is {self.learning_rate}, expected a positive number.")


PAPER_RECIPE = Recipe()


@dataclass(frozen=True)
class Iteration:
    """
    What an update has led to.

    Args:
        num_samples (`int`): Noises used so far.
        loss (`float`): Of the last batch of them, before its update.
        solver (`SearchedSolver`): After it.
    """

    num_samples: int
    loss: float
    solver: SearchedSolver


@dataclass(frozen=True)
class _Part:
    """
    The share of one pipeline call in the loss and the gradient of a batch.

    Args:
        index (`int`): The call's place among those of all processes.
        value (`torch.Tensor`): The loss and its gradient.
    """

    index: int
    value: torch.Tensor


def fit_by_gradient(
    network: DifferentiableNetwork,
    num_steps: int,
    recipe: Recipe = PAPER_RECIPE,
    remember: Callable[[Callable[[], list[float]]], list[float]] = lambda compute: compute(),
) -> Iterator[Iteration]:
    """
    Search a solver by the paper's recipe.

    Pipeline calls are dealt out to the processes and their gradients are summed in one order, so the outcome has the
    same bits on any number of processes.

    Args:
        network: What the solver is for.
        num_steps (`int`): N, at least 2.
        recipe: The paper's unless given.
        remember (*optional*): Is given what computes the loss and the gradient of the next batch, and may hand back
            the outcome of an earlier run instead, as `Journal.remember` does.

    Returns:
        An `Iteration` for each update; the last one's solver is the paper's outcome.

    Raises:
        ValueError: If there is nothing to search; while it runs, if the loss does not stay finite.
        FieldError: While it runs, if the pipeline's call fails or hands on no gradients.
    """
    if num_steps < 2:
        raise ValueError(f"`num_steps` is {num_steps}, expected at least 2: one step leaves nothing to search.")
    return _descend(network, ConsistentFamily(network.process, num_steps), recipe, remember)


def _descend(
    network: DifferentiableNetwork, family: ConsistentFamily, recipe: Recipe, remember
) -> Iterator[Iteration]:
    vector = family.start()
    momentum = torch.zeros_like(vector)
    for first in range(0, recipe.num_samples, recipe.batch_size):
        numbers = range(first, min(first + recipe.batch_size, recipe.num_samples))
        compute = functools.partial(loss_and_gradient, network, family, vector, numbers, recipe.teacher_steps)
        loss, *gradient = remember(compute)
        if not np.isfinite([loss, *gradient]).all():
            raise ValueError(
                f"After {first} noises the loss is {loss:g} and the sum of its gradient {sum(gradient):g}, expected "
                f"finite numbers. Run the network in float32, or lower `learning_rate` from {recipe.learning_rate:g}."
            )
        vector, momentum = lion_update(vector, momentum, vector.new_tensor(gradient), recipe.learning_rate)
        yield Iteration(numbers.stop, loss, family.solver(vector))


def lion_update(
    vector: torch.Tensor, momentum: torch.Tensor, gradient: torch.Tensor, learning_rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """v' = v - rate * sign(b1 * m + (1 - b1) * g),   m' = b2 * m + (1 - b2) * g,   b1, b2 = 0.9, 0.99."""
    now, later = BETAS
    direction = (now * momentum + (1 - now) * gradient).sign()
    return vector - learning_rate * direction, later * momentum + (1 - later) * gradient


def loss_and_gradient(
    network: DifferentiableNetwork,
    family: ConsistentFamily,
    vector: torch.Tensor,
    numbers: Sequence[int],
    teacher_steps: int,
) -> list[float]:
    """The loss, a mean over the samples of these numbers, and its gradient."""
    teacher = recipe_teacher(family.process, teacher_steps)

    def of_field(field: PipelineField) -> torch.Tensor:
        leaf = vector.clone().requires_grad_()
        loss = trajectory_loss(field, family, leaf, teacher)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return len(field.seeds) / len(numbers) * torch.cat([loss.detach().to(gradient)[None], gradient])

    calls = list(enumerate(network.split(numbers)))
    parts = [_Part(i, sum(network.map(of_field, samples))) for i, samples in share(calls)]
    return sum(gather(parts, [part.value for part in parts])).tolist()


def recipe_teacher(process: NoiseProcess, num_steps: int) -> SearchedSolver:
    """Euler's method on the flow, DDIM on a variance-preserving process, at timesteps of equal distance."""
    flow = process.kind == "flow_matching"
    timesteps = np.linspace(process.max_timestep, process.max_timestep / num_steps if flow else 0, num_steps)
    alphas, sigmas = process.alpha_sigma(timesteps)
    nodes = timesteps, np.append(alphas, 1), np.append(sigmas, 0)
    return SearchedSolver.adams_bashforth(*nodes, "velocity" if flow else "data", order=1)


def trajectory_loss(
    field: PipelineField, family: ConsistentFamily, vector: torch.Tensor, teacher: SearchedSolver
) -> torch.Tensor:
    """
    The loss of the vector's solver on the samples of a field.

    Args:
        vector (`torch.Tensor`): On the CPU, float64.
        teacher (`SearchedSolver`): With timesteps of equal distance.

    Returns:
        `torch.Tensor`, 0-dimensional: With a graph if the vector has one.
    """
    with torch.no_grad():
        states = recorded_run(field, teacher).states
    x = field.noise.to(torch.promote_types(field.noise.dtype, torch.float32))
    timesteps = family.timesteps(vector)
    table = family.table(vector, field.prediction_type).to(x.dtype).to(x.device)
    places = (teacher.timesteps[0] - timesteps) / (teacher.timesteps[0] - teacher.timesteps[1])
    history = x.new_zeros(family.num_steps, *x.shape)
    loss = x.new_zeros(())
    for i in range(family.num_steps):
        # Nothing moves the first timestep, so its evaluation needs no graph.
        output, x = field.evaluate(x, timesteps[i] if i else timesteps[0].item())
        x, history = tensor_step(x, output, history, torch.tensor([i], device=x.device), table)
        last = i + 1 == family.num_steps
        loss = loss + F.mse_loss(x, states[-1] if last else _interpolated(states, places[i + 1]))
    return loss + END_WEIGHT * F.huber_loss(x, states[-1], delta=HUBER_DELTA)


def _interpolated(states: Sequence[torch.Tensor], place: torch.Tensor) -> torch.Tensor:
    """The state at a place between two whole numbers."""
    before = int(place)
    return torch.lerp(states[before], states[before + 1], (place - before).to(states[before]))


def recipe_evaluations(recipe: Recipe, num_steps: int) -> int:
    """Evaluations of one sample: a call is opened, and a backward evaluation is worth two forward ones."""
    return recipe.num_samples * (recipe.teacher_steps + 1 + num_steps + 2 * (num_steps - 1))
