"""HandOutScheduler: in place of a pipeline's scheduler, it asks outside for each next state and time."""

from collections.abc import Iterator

import torch
from greenlet import greenlet

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.limiting import has_limits
from diffusers_searched_solver.scheduler import SearchedSolverSchedulerOutput


class FieldError(RuntimeError):
    """The pipeline's call failed or cannot be driven; the message says at which point and what to do."""


class HandOutScheduler(SearchedSolverScheduler):
    """
    Hands each network output to the coroutine that drives the pipeline, and takes the next state and time from it.

    Attributes:
        driver (`greenlet`): Who asks for evaluations.
        start (`float`): The timestep of the first.
        time (`torch.Tensor`, 0-dimensional): The timestep of the evaluation that is asked for.
        index (`int`): Its place in `timesteps`.
        node (`tuple[float, float]`, *optional*): alpha and sigma of its state, if not the process's at that time.
        finished (`bool`): Whether the pipeline's loop ends when it asks for the next timestep.
    """

    # After so many, the pipeline has to be called again.
    evaluations_per_call = 4096
    driver: greenlet | None = None
    index = 0
    node: tuple[float, float] | None = None
    finished = False

    @property
    def exhausted(self) -> bool:
        """Whether the loop is at its end; some loops leave the last timestep out."""
        return self.index + 2 >= self.evaluations_per_call

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        if has_limits(self.config):
            raise FieldError(
                "The config of the pipeline's scheduler limits the data that is predicted (`thresholding` or "
                "`clip_sample`), so a run is no table's. Set both to False in it to search a solver for such runs."
            )
        self.num_inference_steps = self.evaluations_per_call
        self.time = torch.tensor(self.start, dtype=torch.float32, device=device or "cpu")
        self.timesteps = _LiveTimesteps.of(self, self.time.repeat(self.num_inference_steps))
        self.sigmas = torch.full((self.num_inference_steps + 1,), self._sigma(self.start), device="cpu")
        self.index, self.node = 0, None

    def _sigma(self, timestep: float) -> float:
        return float(self.process.alpha_sigma(timestep)[1]) if self.node is None else self.node[1]

    def _levels(self, sample, timesteps):
        """Of the node that the network is called for, where that is asked for; it may be called at another time."""
        alphas, sigmas = super()._levels(sample, timesteps)
        if self.node is not None:
            here = torch.as_tensor(timesteps, device=alphas.device).reshape(-1, *[1] * (sample.ndim - 1))
            here = here == self.time.to(here)
            alphas, sigmas = (
                torch.where(here, node, of) for node, of in zip(self.node, (alphas, sigmas), strict=True)
            )
        return alphas, sigmas

    def times(self, first: int, count: int) -> Iterator[torch.Tensor]:
        """The timesteps from place `first` on, each as it is when the loop gets there."""
        for self.index in range(first, first + count):
            if self.finished:
                return
            yield self.time

    def step(self, model_output, timestep, sample, *args, per_token_timesteps=None, return_dict=True, **kwargs):
        self._check_time(timestep)
        model_output = self._output(model_output, sample, per_token_timesteps)
        # A copy, because a compiled network may use the memory of its output again.
        x, timestep, self.node, differentiable = self.driver.switch((model_output.clone(), sample))
        torch.set_grad_enabled(differentiable)
        has_graph = torch.is_tensor(timestep)
        number = float(timestep.detach()) if has_graph else timestep
        self.time = timestep.to(self.timesteps) if has_graph else torch.full_like(self.time, number)
        self.timesteps[self.index + 1 : self.index + 2] = number
        self.sigmas[self.index + 1] = self._sigma(number)
        x = x.to(model_output.dtype)
        return SearchedSolverSchedulerOutput(x, x) if return_dict else (x, x)

    def _check_time(self, timestep):
        if timestep is not self.time and float(timestep) != float(self.time):
            raise FieldError(
                f"The pipeline is at timestep {float(timestep):g} where {float(self.time):g} was asked for: its loop "
                "runs over a copy of `scheduler.timesteps`, so its network cannot be called at any time. It cannot be "
                "searched as it is."
            )

    def __deepcopy__(self, memo):
        raise FieldError(
            "The pipeline copies its scheduler, to step parts of its state by themselves, so there is no one state "
            "and time to evaluate it at. It cannot be searched as it is."
        )


class _LiveTimesteps(torch.Tensor):
    """
    A schedule that is made up as it goes: a loop over it, or over a slice of it, sees the time last asked for.

    A loop over an ordinary tensor takes all elements out before its first pass.
    """

    # What is computed from it is an ordinary tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, scheduler: HandOutScheduler, timesteps: torch.Tensor) -> "_LiveTimesteps":
        live = timesteps.as_subclass(cls)
        live.scheduler = scheduler
        return live

    def __getitem__(self, key):
        part = super().__getitem__(key)
        return self.of(self.scheduler, part) if isinstance(key, slice) else part

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.scheduler.times(self.storage_offset(), len(self))
