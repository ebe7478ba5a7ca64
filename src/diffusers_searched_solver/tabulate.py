"""A diffusers scheduler is a table: run once on unit vectors, it shows its coefficients."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import SchedulerMixin

from .configs import prediction_type_from_config, process_from_config
from .process import FRAME_PREDICTIONS, NoiseProcess, convert_prediction
from .solver import SearchedSolver


FRAME = "velocity"
# Nodes that are off the noise process by less than this share are on it: schedulers compute in float32.
ON_PROCESS = 3e-6
# Of the noise that a run begins with, and where it ends: what a table may be off by. From pure noise, float32 alone
# is off by 1e-4; noise, clipping and thresholds by far more than this.
TOLERANCE = 3e-3
# Of the numbers on which table and scheduler are compared: usual ones, and such as are clipped.
SIZES = 1.0, 100.0


def solver_from_scheduler(scheduler: SchedulerMixin, num_steps: int, mu: float | None = None) -> SearchedSolver:
    """
    The table of a deterministic diffusers scheduler that makes one network call a step.

    On a fixed schedule such a scheduler is linear in the noise and in the network's outputs, whatever formulas it is
    written in:

        x_i = A_i * noise + sum_{j < i} B_ij * p_j

    So it is run once, on A_i and B_ij in place of x_i, with outputs whose velocities p_j are unit vectors. Nodes are
    where it converts outputs, which need not be the nodes of its timesteps.

    Args:
        scheduler (`SchedulerMixin`): Stays as it is.
        num_steps (`int`): N, at least 1.
        mu (`float`, *optional*): What a pipeline passes to `set_timesteps` of a scheduler with dynamic shifting.

    Returns:
        `SearchedSolver`: In the velocity frame, with the row sums that the scheduler has. Where it steps to another
        node than it goes on from (DDIM with "linspace" spacing), nodes are off the noise process by a factor.

    Raises:
        ValueError: If the scheduler is no table (it draws noise, clips, thresholds, makes two calls a step or begins
            at another scale than one), or is for a noise process that [`process_from_config`] refuses.

    Example:

        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> solver = solver_from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), num_steps=2)
        >>> solver.sigmas.round(4).tolist(), (solver.coefficients.round(6) + 0).tolist()
        ([1.0, 0.0089, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    """
    run = _Run(scheduler, num_steps, mu)
    try:
        # What draws noise draws it from here.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            numbers = torch.randn(num_steps + 1, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
            _check_repeats(run, numbers)
            solver = _tabulated(run)
            for size in SIZES:
                _check_on_numbers(run, solver, size * numbers)
    except ValueError as error:
        raise ValueError(f"{run.name} of {num_steps} steps is not a table of one call a step: {error}") from error
    return solver


@dataclass(frozen=True)
class _Run:
    """
    Runs of a scheduler from the same beginning.

    Args:
        original: Each run is one of a copy of it.
        num_steps, mu: As in `solver_from_scheduler`.
    """

    original: SchedulerMixin
    num_steps: int
    mu: float | None

    @property
    def name(self) -> str:
        return type(self.original).__name__

    @property
    def process(self) -> NoiseProcess:
        return process_from_config(self.original.config)

    def begun(self) -> SchedulerMixin:
        """A copy whose next step is the first."""
        scheduler = copy.deepcopy(self.original)
        scheduler.set_timesteps(self.num_steps, **({} if self.mu is None else {"mu": self.mu}))
        return scheduler

    def states(self, noise: torch.Tensor, output: Callable[[int, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """
        What the network is called on in every step, and the end.

        Args:
            output: The network's, given the step's number and what it is called on.
        """
        scheduler = self.begun()
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        first = scheduler.timesteps[0]
        # Schedulers that scale a network's input begin at states of another size.
        x = noise / float(scale(torch.ones(1), first))
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = None
        states = []
        for i, timestep in enumerate(scheduler.timesteps):
            states.append(scale(x, timestep))
            try:
                x = scheduler.step(output(i, states[-1]), timestep, x, return_dict=False)[0]
            except (TypeError, LookupError, AssertionError, RuntimeError) as error:
                raise ValueError(f"`step(model_output, timestep, sample)` fails with {error!r}.") from error
        return [*states, x]


def _levels(run: _Run, scheduler: SchedulerMixin) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma that a scheduler goes by at the N + 1 nodes."""
    if len(scheduler.timesteps) != run.num_steps:
        raise ValueError(f"it calls the network {len(scheduler.timesteps)} times. Choose another scheduler.")
    if hasattr(scheduler, "sigmas"):
        levels = np.array(scheduler.sigmas, np.float64)
        alphas = 1 - levels if run.process.kind == "flow_matching" else 1 / np.hypot(1, levels)
        sigmas = levels if run.process.kind == "flow_matching" else levels * alphas
    elif hasattr(scheduler, "final_alpha_cumprod"):
        signal = scheduler.alphas_cumprod[scheduler.timesteps.long()].double().numpy()
        signal = np.append(signal, float(scheduler.final_alpha_cumprod))
        alphas, sigmas = np.sqrt(signal), np.sqrt(1 - signal)
    else:
        raise ValueError("it does not say which noise levels it goes by. Choose another scheduler.")
    if len(sigmas) != run.num_steps + 1:
        raise ValueError(f"it has {len(sigmas)} noise levels, expected one more than steps. Choose another scheduler.")
    if sigmas[-1] >= sigmas[-2]:
        # A last step that does nothing (DEIS on flows), whose end passes for data all the same.
        alphas[-1], sigmas[-1] = 1.0, 0.0
    return alphas, sigmas


def _tabulated(run: _Run) -> SearchedSolver:
    n, prediction_type = run.num_steps, prediction_type_from_config(run.original.config)
    scheduler = run.begun()
    alphas, sigmas = _levels(run, scheduler)
    begins = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if hasattr(scheduler, "scale_model_input"):
        begins = float(scheduler.scale_model_input(torch.tensor([begins]), scheduler.timesteps[0]))
    if abs(begins - 1) > TOLERANCE / 10:
        raise ValueError(
            f'it begins at {begins:.4f} times the noise, a table at the noise. `timestep_spacing` "leading" begins '
            "there, as do DDIM, DPM-Solver++ and UniPC."
        )
    scales, sizes = np.ones(n + 1), alphas + sigmas

    def on_the_way(i: int, state: torch.Tensor) -> None:
        """Learn by which factor node i is off the process."""
        off = float(state.flatten()[0]) * sizes[0] / sizes[i]
        scales[i] = 1.0 if abs(off - 1) < ON_PROCESS else off

    def output(i: int, state: torch.Tensor) -> torch.Tensor:
        """What makes p_i a unit vector."""
        on_the_way(i, state)
        u, w = convert_prediction(
            prediction_type, FRAME_PREDICTIONS[FRAME], scales[i] * alphas[i], scales[i] * sigmas[i]
        )
        p = torch.zeros_like(state)
        p[..., i + 1] = 1
        return (p - u * state) / w

    noise = torch.zeros(1, 1, 1, n + 1, dtype=torch.float64)
    noise[..., 0] = 1
    states = run.states(noise, output)
    on_the_way(n, states[-1])
    states = torch.stack([state.double().flatten() for state in states])
    timesteps = np.array(scheduler.timesteps, np.float64)
    return SearchedSolver.from_states(timesteps, scales * alphas, scales * sigmas, states, FRAME)


def _check_repeats(run: _Run, numbers: torch.Tensor):
    noise, *outputs = numbers
    first, second = (run.states(noise, lambda i, state: outputs[i])[-1] for _ in range(2))
    if not torch.equal(first, second):
        raise ValueError("it draws noise, so it ends elsewhere every time. Choose a deterministic one.")


def _check_on_numbers(run: _Run, solver: SearchedSolver, numbers: torch.Tensor):
    """Run table and scheduler on the same noise and outputs."""
    noise, *outputs = numbers
    prediction_type = prediction_type_from_config(run.original.config)
    end = run.states(noise, lambda i, state: outputs[i])[-1]
    x, history = noise.double(), []
    for i, output in enumerate(outputs):
        history.append(solver.prediction(output.double(), x, i, prediction_type))
        x = solver.step(x, history, i)
    off = float((end - x).norm() / x.norm())
    if not off < TOLERANCE:
        raise ValueError(
            f"on numbers of size {float(noise.std()):.1g} it ends {off:.2g} times their size from where its table "
            "does, so it clips or thresholds. Turn that off in its config, or choose another scheduler."
        )
