"""SearchedSolverScheduler: the diffusers scheduler contract around a SearchedSolver. No numerics of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging

from .configs import BETAS, process_from_config
from .limiting import has_limits, limited
from .runs import Run
from .saving import SavedWithSolver
from .schedules import (
    default_table,
    said_of_derived,
    searched_table,
    steps_asked_for,
    steps_called_at,
    table_on,
    to_numpy,
)
from .serialization import SolverFile
from .solver import SearchedSolver


logger = logging.get_logger(__name__)


@dataclass
class SearchedSolverSchedulerOutput(BaseOutput):
    """
    Output of [`SearchedSolverScheduler.step`].

    Args:
        prev_sample (`torch.Tensor`): The sample at the next node, the input of the next network call.
        pred_original_sample (`torch.Tensor`): The data that this step's prediction points at.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class SearchedSolverScheduler(SavedWithSolver):
    """
    Runs a [`SearchedSolver`]: time steps and multistep coefficients that were searched for a model.

    This model inherits from [`SchedulerMixin`] and [`ConfigMixin`]. Load one with
    `SearchedSolverScheduler.from_pretrained(...)` or put tables around a pipeline's own config with
    `SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=...)`. Constructed without a solver it is a
    classical multistep scheduler for any step count: Adams-Bashforth of order 2 on a flow's shifted grid, order 3 on
    the predicted noise (as DEIS) of a variance-preserving model.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: The noise
            process of a variance-preserving model, as in [`DDPMScheduler`]; not used by flow-matching models.
        snr_shift_scale (`float`): Its shift, as in [`CogVideoXDDIMScheduler`].
        prediction_type (`str`): What the network predicts: "epsilon", "v_prediction", "sample" (all three on a
            variance-preserving process) or "flow_prediction" (noise minus data, on the flow-matching process).
        shift (`float`): Shift of the classical grid of a flow-matching model towards the noise. A searched table's
            nodes are used as they are.
        use_dynamic_shifting (`bool`): Whether that grid is shifted by exp(`mu`) of `set_timesteps` instead.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: Read by pipelines that compute `mu`.
        variance_type (`str`, *optional*): Read by some pipelines; this scheduler adds no noise.
        strict (`bool`): Whether step counts that the solver file lacks are refused instead of derived from those it
            has.

    Source: Wang et al., "Differentiable Solver Search for Fast Diffusion Sampling", arXiv 2505.21114.
    """

    # Not EDMEulerScheduler: its config describes another noise process.
    _compatibles = [
        *(scheduler.name for scheduler in KarrasDiffusionSchedulers if scheduler.name != "EDMEulerScheduler"),
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    ]
    order = 1
    init_noise_sigma = 1.0
    last_sample = None  # ChronoEdit, which drops frames mid-way, drops them from `model_outputs` and from this

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
        prediction_type: str = "epsilon",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        variance_type: str | None = None,
        strict: bool = False,
    ):
        self.process = process_from_config(self.config)
        self.solver_file: SolverFile | None = None
        self.num_inference_steps: int | None = None
        self.timesteps = torch.from_numpy(np.arange(num_train_timesteps)[::-1].copy()).float()
        self.sigmas = torch.from_numpy(self.process.alpha_sigma(self.timesteps.numpy())[1]).float()
        if self.process.kind == "variance_preserving":
            # diffusers' schedulers have different defaults for these, and do not hand on what was left at its default.
            if "_use_default_values" in self.config:
                defaults = {*self.config["_use_default_values"]} - {*BETAS}
                self.register_to_config(_use_default_values=sorted(defaults))
            self.betas = torch.from_numpy(self.process.betas)
            self.alphas_cumprod = torch.from_numpy(self.process.alphas_cumprod).float()
        self._run: Run | None = None
        self._begin_index: int | None = None
        self._warned: set[str] = set()

    @property
    def compatibles(self) -> list[type[SchedulerMixin]]:
        """diffusers' schedulers for the same kind of noise process."""
        flow_matching = self.process.kind == "flow_matching"
        return [each for each in super().compatibles if each.__name__.startswith("FlowMatch") == flow_matching]

    # Schedules

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | np.ndarray | torch.Tensor | None = None,
        sigmas: list[float] | np.ndarray | torch.Tensor | None = None,
        mu: float | None = None,
    ):
        """
        Choose the table for a run and forget the run before.

        Args:
            num_inference_steps (`int`, *optional*): N; a step count that the solver file holds, or from its smallest
                minus one to 50, for which a table is derived from those in the file, with a warning.
            device (*optional*): Where `timesteps` goes.
            timesteps, sigmas (*optional*): An explicit schedule. `sigmas` equal to 1 - i/N, which many flow pipelines
                pass by default, means N steps of the searched solver, and so do the `timesteps` that it has for N
                steps, for pipelines that pass others unless they are told. Any other schedule is honoured with a
                classical second-order multistep table on those nodes. `sigmas` are shifted as the config says, and the
                network is called at `timesteps` if both are given, as in [`FlowMatchEulerDiscreteScheduler`].
            mu (`float`, *optional*): Shift of the classical grid if the config uses dynamic shifting.

        Raises:
            ValueError: If there is no solver for so many steps, or no valid schedule is given.
            TypeError: If `num_inference_steps` is not a whole number.
        """
        num_steps = steps_asked_for(num_inference_steps, timesteps, sigmas)
        if num_steps is None and self.solver_file is not None and sigmas is None:
            num_steps = steps_called_at(self.solver_file, timesteps)
        if num_steps is None:
            if self.solver_file is not None:
                self._warn_once(
                    "An explicit schedule was passed, which the searched solver does not have: a classical "
                    "second-order multistep solver runs on it. Pass only `num_inference_steps` to use the searched "
                    "one."
                )
            solver = table_on(self.process, self.config, timesteps, sigmas, mu)
        elif self.solver_file is None:
            solver = default_table(self.process, self.config, num_steps, mu)
        else:
            solver = searched_table(self.solver_file, num_steps, self.config.strict)
            if num_steps not in self.solver_file.solvers:
                self._warn_once(said_of_derived(self.solver_file, num_steps))
        self.num_inference_steps = solver.num_steps
        self.timesteps = torch.tensor(solver.timesteps, dtype=torch.float32, device=device or "cpu")
        self.sigmas = torch.tensor(solver.sigmas, dtype=torch.float32, device="cpu")
        self._begin_index = None
        self._run = Run(solver, self.timesteps, before=self._run)

    def _warn_once(self, message: str):
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def set_begin_index(self, begin_index: int = 0):
        """
        Start the next run at this step, as image-to-image pipelines do.

        Raises:
            ValueError: If the schedule has no such step.
            RuntimeError: If another thread has begun a run.
        """
        if self._run is not None and not 0 <= begin_index < self.num_inference_steps:
            raise ValueError(
                f"`begin_index` is {begin_index}, expected 0 to {self.num_inference_steps - 1} in a run of "
                f"{self.num_inference_steps} steps. Call `set_timesteps` first for another number of steps."
            )
        if self._run is not None and self.step_index != self.num_inference_steps:
            self._run.check_thread()
        self._begin_index = begin_index

    @property
    def step_index(self) -> int | None:
        """The step that comes next; None before the first."""
        return None if self._run is None else self._run.step_index

    @property
    def begin_index(self) -> int | None:
        """The step at which a run starts, if a pipeline has said so."""
        return self._begin_index

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """
        The step whose timestep is nearest to `timestep`.

        The elements of `self.timesteps` are recognised by their place in memory, which costs no device
        synchronisation.

        Raises:
            RuntimeError: Before `set_timesteps`.
            ValueError: If `timestep` is not a number.
        """
        return self._begun("index_for_timestep").index_of(timestep)

    def _begun(self, method: str) -> Run:
        if self._run is None:
            raise RuntimeError(f"`{method}` was called before `set_timesteps`; call `set_timesteps(num_steps)` first.")
        return self._run

    # A run

    @property
    def model_outputs(self) -> Sequence[torch.Tensor]:
        """The predictions that the steps to come need, oldest first; ChronoEdit drops frames of them."""
        return [] if self._run is None or self._run.history is None else self._run.history

    def scale_model_input(self, sample: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The sample itself: this scheduler's states are what the network takes."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SearchedSolverSchedulerOutput | tuple:
        """
        Advance the sample by one step.

        Args:
            model_output (`torch.Tensor`): The network's output (after guidance), of the config's `prediction_type`. A
                learned variance behind it is dropped if the config's `variance_type` says that there is one.
            timestep: The element of `timesteps` that the network was called with; it tells where a run begins.
            sample (`torch.Tensor`): The state the network was called on, of the output's shape.
            eta, use_clipped_model_output, generator: Accepted because pipelines pass them; `eta` must be 0.
            per_token_timesteps (*optional*): Says, as in [`FlowMatchEulerDiscreteScheduler`], that `model_output` is
                data minus noise. All tokens advance together; pipelines put clean tokens back after the step.
            return_dict (`bool`): Whether to return a [`SearchedSolverSchedulerOutput`] rather than a tuple.

        Returns:
            The sample at the next node, in `model_output`'s dtype, and the data this prediction points at; a tuple has
            the data only in a run of one step.

        Raises:
            RuntimeError: Before `set_timesteps`, out of order, after the last step, or in another thread's run.
            ValueError: If shapes differ, of the two or from the steps before.
            NotImplementedError: If noise is asked for.
        """
        run = self._begun("step")
        index = run.due(timestep, self._begin_index)
        model_output = self._output(model_output, sample, per_token_timesteps)
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` has shape {tuple(model_output.shape)}, `sample` {tuple(sample.shape)}; expected the "
                "same. Drop the learned variance from the output if the network predicts one."
            )
        if eta:
            raise NotImplementedError("A searched solver is deterministic. Call the pipeline without `eta`.")
        output, kind = self._limited(model_output, sample, run.solver, index)
        prev_sample = run.advance(output, sample, index, kind).to(model_output.dtype)
        # Two passes over memory that the loops of pipelines have no use for, but for PixArt's in one step.
        if not return_dict and run.solver.num_steps > 1:
            return (prev_sample,)
        data = run.solver.data(output, sample, index, kind).to(model_output.dtype)
        return SearchedSolverSchedulerOutput(prev_sample, data) if return_dict else (prev_sample, data)

    def _limited(self, model_output, sample, solver: SearchedSolver, index: int) -> tuple[torch.Tensor, str]:
        """The output and what it is of: the data instead, if the config limits that."""
        if not has_limits(self.config):
            return model_output, self.config.prediction_type
        return limited(solver.data(model_output, sample, index, self.config.prediction_type), self.config), "sample"

    def _output(self, model_output, sample, per_token_timesteps) -> torch.Tensor:
        """The part of what a pipeline hands to `step` that is of the config's `prediction_type`, with that sign."""
        if self.config.variance_type in ("learned", "learned_range") and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]
        return model_output if per_token_timesteps is None else -model_output

    # Noise

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Noise samples to the level of `timesteps`.

            x = alpha(t) * original + sigma(t) * noise

        Args:
            original_samples, noise (`torch.Tensor`, shape (batch, ...)): Data and standard normal noise.
            timesteps (`torch.Tensor`, shape (batch,) or (1,) or ()): A timestep of the current schedule stands for its
                node, any other (0 to `num_train_timesteps`) for the process at that time.
        """
        alphas, sigmas = self._levels(original_samples, timesteps)
        return alphas * original_samples + sigmas * noise.to(original_samples)

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """[`add_noise`] in the argument order of flow-matching pipelines."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The target of a v-prediction model: alpha(t) * noise - sigma(t) * sample."""
        alphas, sigmas = self._levels(sample, timesteps)
        return alphas * noise.to(sample) - sigmas * sample

    def _levels(self, sample: torch.Tensor, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma of `timesteps`, shaped to multiply `sample`."""
        dtype = timesteps.dtype if torch.is_tensor(timesteps) and timesteps.is_floating_point() else torch.float32
        timesteps = np.atleast_1d(to_numpy(timesteps))
        levels = np.stack(self.process.alpha_sigma(timesteps))
        if self._run is not None:
            solver = self._run.solver
            # float32, because that is what `self.timesteps` gives out; half precision, because models cast that.
            schedule = torch.from_numpy(solver.timesteps.astype(np.float32)).to(dtype).double().numpy()
            matches = timesteps.astype(np.float32)[:, None] == schedule
            rows, nodes = np.nonzero(matches)
            levels[:, rows] = solver.alphas[nodes], solver.sigmas[nodes]
        levels = torch.from_numpy(levels).to(sample)
        return tuple(level.reshape(-1, *[1] * (sample.ndim - 1)) for level in levels)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
