"""SearchedSolverScheduler: the diffusers scheduler contract around a SearchedSolver. No numerics of its own."""

import inspect
import math
import operator
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging

from .loading import (
    BUNDLED_SOLVERS,
    ConnectionBroken,
    cannot_load,
    check_config,
    find_solver_file,
    list_bundled_solvers,
    solver_from_hub,
)
from .process import prediction_type_from_config, process_from_config, time_grid
from .serialization import MAX_BYTES, SOLVER_FILE, SolverFile, load_solver_file, save_solver_file
from .solver import SearchedSolver


logger = logging.get_logger(__name__)

BETAS = ("beta_start", "beta_end", "beta_schedule")


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


class _Run:
    """
    A run of a solver from `set_timesteps` on. A step that has begun touches its own run alone, whatever other threads
    begin meanwhile.

    Attributes:
        thread (`int`): Which began it.
        step_index (`int`, *optional*): The step that comes next; None before the first.
        history (`list[torch.Tensor]`): The predictions so far.
    """

    def __init__(self, solver: SearchedSolver, timesteps: torch.Tensor):
        self.solver, self._timesteps, self.thread = solver, timesteps, threading.get_ident()
        self.step_index: int | None = None
        self.history: list[torch.Tensor] = []

    def place(self, timestep) -> int | None:
        """Which element of the schedule's tensor a timestep is, if it is that itself and not a copy."""
        if not torch.is_tensor(timestep) or timestep.ndim:
            return None
        same = timestep.untyped_storage().data_ptr() == self._timesteps.untyped_storage().data_ptr()
        return timestep.storage_offset() if same else None

    def check_thread(self):
        """Refuse what another thread than the run's own does in it."""
        if self.thread != threading.get_ident():
            raise RuntimeError(
                "Another thread has begun a run with this scheduler, which holds the predictions of one. Give each "
                "thread a pipeline of its own, with a copy of the scheduler (`copy.deepcopy`)."
            )


class SearchedSolverScheduler(SchedulerMixin, ConfigMixin):
    """
    Runs a [`SearchedSolver`]: time steps and multistep coefficients that were searched for a model.

    This model inherits from [`SchedulerMixin`] and [`ConfigMixin`]. Load one with
    `SearchedSolverScheduler.from_pretrained(...)` or put tables around a pipeline's own config with
    `SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=...)`. Constructed without a solver it is a
    classical second-order multistep scheduler (variable-step Adams-Bashforth on velocities) for any step count.

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
        self._run: _Run | None = None
        self._begin_index: int | None = None
        self._warned: set[str] = set()

    @property
    def compatibles(self) -> list[type[SchedulerMixin]]:
        """diffusers' schedulers for the same kind of noise process."""
        flow_matching = self.process.kind == "flow_matching"
        return [each for each in super().compatibles if each.__name__.startswith("FlowMatch") == flow_matching]

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs,
    ):
        """
        Load a scheduler with its solver from a local folder, by the name of a bundled solver, or from the Hub.

        Args:
            pretrained_model_name_or_path: Tried in this order: a folder written by `save_pretrained` or by
                `search/run.py`; one of [`list_bundled_solvers`]; a Hub repository.
            subfolder (`str`, *optional*): Where in it.
            return_unused_kwargs (`bool`): As in [`SchedulerMixin.from_pretrained`].
            kwargs: `revision`, `cache_dir`, `token`, `local_files_only` and so on, as in
                [`SchedulerMixin.from_pretrained`].

        Raises:
            EnvironmentError: If there is nothing of that name, or no config of a scheduler.
            SolverFileError: If the solver file cannot be trusted.
            ValueError: If the config describes no model that the solver is for.
        """
        name = source = str(pretrained_model_name_or_path)
        if not os.path.isdir(source) and source in list_bundled_solvers():
            source = str(BUNDLED_SOLVERS / source)
        load_id = "|".join(part or "null" for part in (name, subfolder, kwargs.get("variant"), kwargs.get("revision")))
        hub_kwargs = {
            key: kwargs[key]
            for key in ("cache_dir", "force_download", "token", "local_files_only", "revision")
            if key in kwargs
        }
        folder = Path(source, subfolder or "")
        if not folder.is_relative_to(source) or ".." in Path(subfolder or "").parts:
            raise cannot_load(name, ValueError(f"`subfolder` is {subfolder!r}, which leads out of it."))
        if os.path.isdir(source) and not (folder / cls.config_name).is_file():
            # Without a config in the sub-folder, diffusers would take the one above it.
            raise cannot_load(name, FileNotFoundError(f"'{folder}' has no file named {cls.config_name}."))
        try:
            config, kwargs, commit_hash = cls.load_config(
                source, subfolder=subfolder, return_unused_kwargs=True, return_commit_hash=True, **kwargs
            )
        except (OSError, ValueError, ConnectionBroken) as error:
            raise cannot_load(name, error) from error
        if os.path.isdir(source):
            path = folder / SOLVER_FILE
            solver = load_solver_file(path) if os.path.lexists(path) else None
        else:
            solver = solver_from_hub(name, subfolder, commit_hash, hub_kwargs)
        if solver is None:
            logger.warning(
                f"'{name}' has no '{SOLVER_FILE}', so this scheduler is a classical second-order multistep scheduler. "
                "Search a solver with `accelerate launch search/run.py`."
            )
        loaded = cls.from_config(config, return_unused_kwargs=return_unused_kwargs, solver=solver, **kwargs)
        # Where modular pipelines load it from again; without it they would rebuild it from its config alone.
        (loaded[0] if return_unused_kwargs else loaded)._diffusers_load_id = load_id
        return loaded

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike, **kwargs) -> dict:
        """
        diffusers' reader of configs, which may come from anywhere: refuse what is no scheduler's config.

        Args:
            kwargs: Before version 0.42 diffusers passes `dduf_entries`.
        """
        if os.path.getsize(json_file) > MAX_BYTES:
            raise ValueError(f"'{json_file}' has {os.path.getsize(json_file)} bytes, a config at most {MAX_BYTES}.")
        try:
            config = super()._dict_from_json_file(json_file, **kwargs)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"'{json_file}' cannot be read as JSON ({error}). If it was damaged on its way, `force_download=True` "
                "fetches it anew."
            ) from error
        check_config(json_file, config)
        return config

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, solver=None, **kwargs):
        """
        Build a scheduler for the model that a scheduler config describes.

        Args:
            config: Usually `pipe.scheduler.config`; its noise process and prediction type are kept.
            return_unused_kwargs (`bool`): As in [`ConfigMixin.from_config`].
            solver (*optional*): A [`SolverFile`], one [`SearchedSolver`], the path of a solver file or of a folder
                with one, or the name of a bundled solver.
            kwargs: Config entries to change.

        Raises:
            ValueError: If the solver is for the other kind of noise process, or the config for neither.
        """
        if config is not None:
            process_from_config(config)
            kwargs = {**{key: config[key] for key in BETAS if key in config}, **kwargs}
            if config.get("snr_shift_scale", 1.0) != 1.0:
                kwargs.setdefault("snr_shift_scale", config["snr_shift_scale"])
        deduced = {} if config is None else _deduced_entries(config)
        hidden = deduced.keys() - kwargs.keys()
        loaded = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **{**deduced, **kwargs})
        scheduler = loaded[0] if return_unused_kwargs else loaded
        if hidden:
            # diffusers hands such entries to no other scheduler: the one they were deduced from would not know them.
            defaults = scheduler.config.get("_use_default_values", ())
            scheduler.register_to_config(_use_default_values=sorted({*defaults, *hidden}))
        if solver is not None:
            scheduler._set_solver(solver)
        return loaded

    def _set_solver(self, solver):
        if isinstance(solver, (str, os.PathLike)):
            solver = find_solver_file(Path(solver))
        if isinstance(solver, SearchedSolver):
            solver = SolverFile({solver.num_steps: solver}, self.process, self.config.prediction_type)
        if solver.process.kind != self.process.kind:
            raise ValueError(
                f"The solver is for a {solver.process.kind.replace('_', ' ')} process, this model has a "
                f"{self.process.kind.replace('_', ' ')} one (`prediction_type` {self.config.prediction_type!r}). Pass "
                "a solver that was searched for such a model, or search one with `accelerate launch search/run.py`."
            )
        solver = _carry_over(solver, self.process)
        for num_steps, table in solver.solvers.items():
            reach, limit = table.reach(self.config.prediction_type), torch.finfo(torch.float16).max
            if not reach <= limit:
                raise ValueError(
                    f"The solver of {num_steps} steps makes numbers of up to {reach:.3g} out of outputs of size one, "
                    f"where half precision ends at {limit:g} (`prediction_type` {self.config.prediction_type!r}). "
                    "Pass a solver that was searched for such a model, with smaller coefficients."
                )
        self.solver_file = solver

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Save `scheduler_config.json`, and the solver in the sub-folder `solver/` if there is one."""
        if not os.path.isfile(save_directory):
            path = Path(save_directory, SOLVER_FILE)
            for link in (path.parent, Path(save_directory, self.config_name)):
                # Through it, files of another folder would be overwritten.
                if link.is_symlink():
                    link.unlink()
            if self.solver_file is None:
                # What an earlier save has left would be loaded as this scheduler's.
                path.unlink(missing_ok=True)
            else:
                save_solver_file(self.solver_file, path)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

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
            num_inference_steps (`int`, *optional*): N; a step count that the solver file holds.
            device (*optional*): Where `timesteps` goes.
            timesteps, sigmas (*optional*): An explicit schedule. `sigmas` equal to 1 - i/N, which many flow pipelines
                pass by default, means N steps of the searched solver; any other schedule is honoured with a classical
                second-order multistep table on those nodes. `sigmas` are shifted as the config says, and the network
                is called at `timesteps` if both are given, as in [`FlowMatchEulerDiscreteScheduler`].
            mu (`float`, *optional*): Shift of the classical grid if the config uses dynamic shifting.

        Raises:
            ValueError: If there is no solver for so many steps, or no valid schedule is given.
            TypeError: If `num_inference_steps` is not a whole number.
        """
        explicit = timesteps if timesteps is not None else sigmas
        if sigmas is not None and timesteps is None and _is_default_grid(sigmas):
            num_inference_steps, explicit = len(sigmas), None
        if num_inference_steps is not None and operator.index(num_inference_steps) < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, expected at least 1.")
        if explicit is not None:
            solver = self._classical_on(timesteps, sigmas, mu)
        elif num_inference_steps is None:
            raise ValueError(
                "`set_timesteps` needs one of `num_inference_steps`, `timesteps` and `sigmas`, found none."
            )
        elif self.solver_file is None:
            shift = math.exp(mu) if mu is not None and self.config.use_dynamic_shifting else self.config.shift
            solver = _second_order(*time_grid(self.process, num_inference_steps, shift))
        else:
            solver = self._searched(num_inference_steps)
        self.num_inference_steps = solver.num_steps
        self.timesteps = torch.tensor(solver.timesteps, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor(solver.sigmas, dtype=torch.float32)
        self._begin_index = None
        self._run = _Run(solver, self.timesteps)

    def _searched(self, num_steps: int) -> SearchedSolver:
        solver = self.solver_file.solvers.get(num_steps)
        if solver is None:
            counts = self.solver_file.step_counts
            listed = " and ".join(filter(None, [", ".join(map(str, counts[:-1])), str(counts[-1])]))
            raise ValueError(
                f"No solver for {num_steps} steps: this scheduler has {listed}. Pass one of these as "
                f"`num_inference_steps`, or search one with `accelerate launch search/run.py --num-steps {num_steps}`."
            )
        return solver

    def _classical_on(self, timesteps, sigmas, mu) -> SearchedSolver:
        if self.solver_file is not None:
            self._warn_once(
                "An explicit schedule was passed, which the searched solver does not have: a classical second-order "
                "multistep solver runs on it. Pass only `num_inference_steps` to use the searched one."
            )
        for name, schedule, maximum in (("timesteps", timesteps, self.process.max_timestep), ("sigmas", sigmas, 1.0)):
            values = np.ones(1) if schedule is None else _to_numpy(schedule)
            if not (values.size and (values >= 0).all() and (values <= maximum).all()):
                raise ValueError(
                    f"`{name}` is {values.tolist()}, expected falling numbers from at most {maximum:g} to at least 0."
                )
        if sigmas is None:
            timesteps = _to_numpy(timesteps)
            alphas, sigmas = self.process.alpha_sigma(timesteps)
            return _second_order(timesteps, np.append(alphas, 1.0), np.append(sigmas, 0.0))
        if self.process.kind != "flow_matching":
            raise ValueError(
                "`sigmas` is a schedule for flow-matching models, this model has `prediction_type` "
                f"{self.config.prediction_type!r}. Pass `timesteps` instead."
            )
        # Explicit sigmas are shifted by the config, times given with them are not: diffusers' own scheduler knows how.
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        nodes = FlowMatchEulerDiscreteScheduler(**{key: self.config[key] for key in known if key in self.config})
        times = None if timesteps is None else _to_numpy(timesteps)
        nodes.set_timesteps(sigmas=np.trim_zeros(_to_numpy(sigmas), "b"), timesteps=times, mu=mu)
        sigmas = _to_numpy(nodes.sigmas)
        return _second_order(_to_numpy(nodes.timesteps), 1 - sigmas, sigmas)

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
        """
        place = self._run.place(timestep)
        if place is not None:
            return place
        if math.isnan(timestep):
            raise ValueError("`timestep` is nan, expected an element of `timesteps`.")
        return int(abs(self._run.solver.timesteps - float(timestep)).argmin())

    # A run

    @property
    def model_outputs(self) -> list[torch.Tensor]:
        """The predictions that the steps to come need; ChronoEdit drops frames of them."""
        return [] if self._run is None else self._run.history

    @model_outputs.setter
    def model_outputs(self, tensors: list[torch.Tensor]):
        self._run.history = tensors

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
            eta, use_clipped_model_output, generator: Accepted because pipelines pass them. The solver is
                deterministic, so `eta` must be 0.
            per_token_timesteps (*optional*): Says, as in [`FlowMatchEulerDiscreteScheduler`], that `model_output` is
                data minus noise. All tokens advance together; pipelines that condition on clean tokens put those
                back after the step.
            return_dict (`bool`): Whether to return a [`SearchedSolverSchedulerOutput`] rather than a tuple.

        Returns:
            The sample at the next node, in `model_output`'s dtype, and the data this prediction points at; a tuple has
            the data only in a run of one step.

        Raises:
            RuntimeError: Before `set_timesteps`, out of order, after the last step, or if another thread has begun a
                run.
            ValueError: If shapes differ.
            NotImplementedError: If noise is asked for.
        """
        run, index = self._next_step(timestep)
        model_output = self._output(model_output, sample, per_token_timesteps)
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` has shape {tuple(model_output.shape)}, `sample` {tuple(sample.shape)}; expected the "
                "same. Drop the learned variance from the output if the network predicts one."
            )
        if eta:
            raise NotImplementedError("A searched solver is deterministic. Call the pipeline without `eta`.")
        solver = run.solver
        prediction = solver.prediction(model_output, sample, index, self.config.prediction_type)
        run.history.append(prediction)
        prev_sample = solver.step(sample, run.history, index).to(model_output.dtype)
        run.step_index = index + 1
        if run.step_index == solver.num_steps:
            run.history = []
        # Two passes over memory that the loops of pipelines have no use for, but for PixArt's in one step.
        if not return_dict and solver.num_steps > 1:
            return (prev_sample,)
        data = solver.data(prediction, sample, index).to(model_output.dtype)
        return SearchedSolverSchedulerOutput(prev_sample, data) if return_dict else (prev_sample, data)

    def _output(self, model_output, sample, per_token_timesteps) -> torch.Tensor:
        """The part of what a pipeline hands to `step` that is of the config's `prediction_type`, with that sign."""
        if self.config.variance_type in ("learned", "learned_range") and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]
        return model_output if per_token_timesteps is None else -model_output

    def _next_step(self, timestep) -> tuple["_Run", int]:
        """The run, and the index of the step that is due in it."""
        run = self._run
        if run is None:
            raise RuntimeError("`step` was called before `set_timesteps`; call `set_timesteps(num_steps)` first.")
        place = run.place(timestep)
        if place is None:
            run.check_thread()
        index, num_steps = run.step_index, run.solver.num_steps
        if index is None:
            return run, self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if index >= num_steps:
            raise RuntimeError(
                f"`step` was called {index + 1} times in a run of {num_steps} steps. Call `set_timesteps` to begin "
                "another run."
            )
        if place is not None and place != index:
            raise RuntimeError(
                f"`step` was called with timestep {place} of the schedule where timestep {index} is due: each step "
                "needs the predictions of those before. Call `set_timesteps` to begin another run."
            )
        return run, index

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
        timesteps = np.atleast_1d(_to_numpy(timesteps))
        levels = np.stack(self.process.alpha_sigma(timesteps))
        if self._run is not None:
            solver = self._run.solver
            # float32, because that is what `self.timesteps` gives out; half precision, because models cast that.
            schedule = torch.tensor(solver.timesteps, dtype=torch.float32).to(dtype).double().numpy()
            matches = timesteps.astype(np.float32)[:, None] == schedule
            rows, nodes = np.nonzero(matches)
            levels[:, rows] = solver.alphas[nodes], solver.sigmas[nodes]
        levels = torch.from_numpy(levels).to(sample)
        return tuple(level.reshape(-1, *[1] * (sample.ndim - 1)) for level in levels)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _to_numpy(values) -> np.ndarray:
    return values.detach().cpu().double().numpy() if torch.is_tensor(values) else np.asarray(values, np.float64)


def _is_default_grid(sigmas) -> bool:
    """Whether `sigmas` is 1 - i/N, which flow pipelines pass for lack of a wish."""
    sigmas = _to_numpy(sigmas)
    return sigmas.size > 0 and bool(abs(sigmas - (1 - np.arange(len(sigmas)) / len(sigmas))).max() < 1e-5)


def _deduced_entries(config) -> dict:
    """Entries of our config that the config of another scheduler does not give, or gives in its own way."""
    given = {key: value for key, value in config.items() if key not in config.get("_use_default_values", ())}
    deduced = {}
    if prediction_type_from_config(config) != given.get("prediction_type", "epsilon"):
        deduced["prediction_type"] = prediction_type_from_config(config)
    if config.get("use_flow_sigmas") and "shift" not in given:
        deduced["shift"] = config.get("flow_shift", 1.0)
    return deduced


def _second_order(timesteps, alphas, sigmas) -> SearchedSolver:
    return SearchedSolver.adams_bashforth(timesteps, alphas, sigmas, "velocity", order=2)


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
