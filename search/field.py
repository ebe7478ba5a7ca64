"""PipelineField: any diffusers pipeline as a function (x, timestep) -> prediction, through its own `__call__`."""

from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from greenlet import GreenletExit, getcurrent, greenlet

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.scheduler import SearchedSolverSchedulerOutput


# Evaluations that one call of the pipeline serves; after so many the pipeline is called again.
EVALUATIONS_PER_CALL = 4096


class FieldError(RuntimeError):
    """The pipeline's call failed or cannot be driven; the message says at which point and what to do."""


class NetworkCalls:
    """
    Counts samples that went through a pipeline's networks, guidance included.

    Args:
        pipe (`DiffusionPipeline`): Its `torch.nn.Module` components are watched, but counted only while `active`.
        on_call (*optional*): Is told every number of samples, say to move a progress bar.
    """

    def __init__(self, pipe: DiffusionPipeline, on_call: Callable[[int], object] = lambda samples: None):
        self.count = 0
        self.active = False
        self._on_call = on_call
        modules = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
        self._handles = [module.register_forward_pre_hook(self._watch, with_kwargs=True) for module in modules]

    def _watch(self, module, args, kwargs):
        if self.active:
            samples = next(len(value) for value in (*args, *kwargs.values()) if torch.is_tensor(value))
            self.count += samples
            self._on_call(samples)

    def remove(self):
        for handle in self._handles:
            handle.remove()


class PipelineField:
    """
    One batch of a pipeline's samples as a function of state and time.

    The pipeline's `__call__` runs in a coroutine with a scheduler that hands each network output out of `step` and
    waits there for the next state and time. So conditioning, guidance, packing and dtypes are the pipeline's own,
    prompts are encoded once, and any state can be evaluated at any time in any order. Pipelines that decide by step
    *number* (say, guidance in the first half of the steps only) see evaluation numbers instead; leave such options
    off.

    Args:
        pipe (`DiffusionPipeline`): Any pipeline with a `scheduler`; between evaluations it is as it was.
        call_kwargs (`Mapping`): Keyword arguments of the pipeline's call: conditions, guidance scale and so on,
            without `generator` and `num_inference_steps`.
        seeds (sequence of `int`): One for each sample of the batch; a sample's initial noise depends on its seed
            alone.
        calls (`NetworkCalls`): Counts what the field spends.

    Attributes:
        noise (`torch.Tensor`): The initial state, as the scheduler sees it.

    Raises:
        FieldError: If the pipeline's call fails, or never calls `scheduler.step`.
    """

    def __init__(self, pipe: DiffusionPipeline, call_kwargs: Mapping, seeds: Sequence[int], calls: NetworkCalls):
        self.pipe, self.call_kwargs, self.seeds, self._calls = pipe, dict(call_kwargs), list(seeds), calls
        self._scheduler = _HandOutScheduler.from_config(pipe.scheduler.config)
        self.prediction_type = self._scheduler.config.prediction_type
        self.process = self._scheduler.process
        self._coroutine = None
        # The pipeline's attributes while it runs: it keeps its guidance scale and the like there.
        self._inside = {"scheduler": self._scheduler, "_progress_bar_config": {"disable": True}}
        self._open()

    def _open(self):
        self.close()
        self._coroutine = greenlet(self._run_pipeline)
        _, noise = self._switch()
        self.noise = noise.clone()

    def _run_pipeline(self):
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        return self.pipe(**self.call_kwargs, generator=generators, num_inference_steps=EVALUATIONS_PER_CALL)

    def __call__(self, x: torch.Tensor, timestep: float) -> torch.Tensor:
        """
        The pipeline's prediction (after guidance) for states `x` at one time.

        Args:
            x (`torch.Tensor`): Of `noise`'s shape; cast to its dtype, as between the steps of a run.
            timestep (`float`): In the pipeline's unit, 0 to 1000.

        Returns:
            `torch.Tensor`: What the pipeline passes to `scheduler.step`, of the network's prediction type.
        """
        if self._scheduler.exhausted:
            self._open()
        output, _ = self._switch((x.to(self.noise.dtype), float(timestep)))
        return output

    def _switch(self, *message):
        """Let the pipeline run until its next `scheduler.step`; outside of that time it is as its owner left it."""
        grad_enabled = torch.is_grad_enabled()
        attributes = vars(self.pipe)
        outside = dict(attributes)
        attributes.update(self._inside)
        self._scheduler.driver = getcurrent()
        self._calls.active = True
        try:
            handed_out = self._coroutine.switch(*message)
        except Exception as error:
            raise FieldError(
                f"The call of {type(self.pipe).__name__} with {_describe(self.call_kwargs)} failed: "
                f"{type(error).__name__}: {error}. Make the same call yourself with your own scheduler to see whether "
                "the arguments are right."
            ) from error
        finally:
            self._calls.active = False
            self._inside = dict(attributes)
            attributes.clear()
            attributes.update(outside)
            torch.set_grad_enabled(grad_enabled)
        if self._coroutine.dead:
            raise FieldError(
                f"{type(self.pipe).__name__} returned before its scheduler's `step` had been called "
                f"{EVALUATIONS_PER_CALL} times. Pipelines that fix their own number of steps cannot be searched."
            )
        return handed_out

    def close(self):
        """End the pipeline's call."""
        if self._coroutine is not None and not self._coroutine.dead:
            self._coroutine.throw(GreenletExit)
            self.pipe.maybe_free_model_hooks()
        self._coroutine = None


class _HandOutScheduler(SearchedSolverScheduler):
    """Hands each network output to the coroutine that drives the pipeline, and takes the next state and time."""

    driver: greenlet | None = None
    exhausted = False

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        # The loop iterates over views of this tensor, so a time written into it is the time of the next call.
        self.timesteps = torch.full((EVALUATIONS_PER_CALL,), self.process.max_timestep, device=device)
        self.sigmas = torch.ones(EVALUATIONS_PER_CALL + 1)
        self.num_inference_steps = EVALUATIONS_PER_CALL
        self.exhausted = False

    def step(self, model_output, timestep, sample, *args, return_dict: bool = True, **kwargs):
        index = self.index_for_timestep(timestep)
        self.exhausted = index + 2 >= EVALUATIONS_PER_CALL
        grad_enabled = torch.is_grad_enabled()
        x, next_timestep = self.driver.switch((model_output, sample))
        torch.set_grad_enabled(grad_enabled)
        self.timesteps[index + 1] = next_timestep
        self.sigmas[index + 1] = self.process.alpha_sigma(next_timestep)[1]
        return SearchedSolverSchedulerOutput(x, x) if return_dict else (x, x)

    def index_for_timestep(self, timestep) -> int:
        if timestep.untyped_storage().data_ptr() != self.timesteps.untyped_storage().data_ptr():
            raise FieldError(
                "The pipeline calls `scheduler.step` with a timestep that is not an element of `scheduler.timesteps` "
                "but a copy, so its network cannot be called at other times. It cannot be searched as it is."
            )
        return timestep.storage_offset()


def _describe(call_kwargs: Mapping) -> str:
    """Argument names and short values, for an error message."""
    return ", ".join(f"{key}={str(value)[:60]}" for key, value in call_kwargs.items()) or "no arguments"


def merge_conditions(first: Mapping, second: Mapping) -> dict | None:
    """
    Keyword arguments of one pipeline call that makes the samples of two.

    Lists are joined, tensors are joined along their first dimension, prompts become a list; everything else has to be
    the same in both.

    Returns:
        `dict`, or None if one call cannot make both.
    """
    if first.keys() != second.keys():
        return None
    merged = {}
    for key, value in first.items():
        other = second[key]
        if "prompt" in key and isinstance(other, str):
            value, other = [value] if isinstance(value, str) else value, [other]
        if isinstance(value, list) and isinstance(other, list):
            merged[key] = value + other
        elif torch.is_tensor(value) and torch.is_tensor(other):
            merged[key] = torch.cat([value, other])
        elif not torch.is_tensor(value) and value == other:
            merged[key] = value
        else:
            return None
    return merged
