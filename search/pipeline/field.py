"""PipelineField: any diffusers pipeline as a function (x, timestep) -> prediction, through its own `__call__`."""

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DiffusionPipeline
from greenlet import GreenletExit, getcurrent, greenlet

from diffusers_searched_solver.calls import describe

from ..launch.network_calls import NetworkCalls
from .hand_out import FieldError, HandOutScheduler


__all__ = ["Alone", "FieldError", "NetworkCalls", "PipelineField", "merge_conditions"]

# States of its batch that a suspended call holds, about: its beginning, the last one, its prediction, what the
# network was given. Where the open fields of a thread hold more bytes than this, the one that was not used for the
# longest time is closed; to open it again is one evaluation more.
HELD_STATES, MOST_HELD = 5, 2**27


class PipelineField:
    """
    One batch of a pipeline's samples as a function of state and time.

    The pipeline's `__call__` runs in a coroutine with a scheduler that hands each network output out of `step` and
    waits there for the next state and time. So conditioning, guidance, packing and dtypes are the pipeline's own,
    prompts are encoded once, and any state can be evaluated at any time in any order, in the thread that made the
    field. Where the pipeline decides by step *number* (guidance or ControlNets for a part of the steps, caches), it
    sees evaluation numbers instead; leave such options off.

    A prediction carries a graph if the state or a tensor of time requires a gradient, and only then. What the
    coroutine still holds of it is the last prediction's, until the next one or `close`.

    Args:
        pipe (`DiffusionPipeline`): Any pipeline with a `scheduler`; between evaluations it is as it was.
        call_kwargs (`Mapping`): Keyword arguments of the pipeline's call: conditions, guidance scale and so on,
            without `generator` and `num_inference_steps`.
        seeds (sequence of `int`): One for each sample of the batch; a sample's initial noise depends on its seed
            alone.
        calls (`NetworkCalls`): Counts what the field spends.
        start (`float`, *optional*): The timestep that `noise` is at; the process's last unless given. Of interest to
            pipelines that noise an image (image to image, inpainting): their call begins with the image at `start`,
            whatever node a `strength` would begin at.

    Attributes:
        shape (`torch.Size`): Of its states.
        prediction_type (`str`): What predictions are, one of `process.PREDICTION_TYPES`.
        process (`NoiseProcess`): The noise process of the pipeline's model.

    Raises:
        FieldError: If the pipeline's call fails, or never calls `scheduler.step`.
    """

    _coroutine: greenlet | None = None
    _noise: torch.Tensor | None = None
    _held = 0  # bytes while its call is suspended

    def __init__(
        self,
        pipe: DiffusionPipeline,
        call_kwargs: Mapping,
        seeds: Sequence[int],
        calls: NetworkCalls,
        start: float | None = None,
    ):
        self.pipe, self.call_kwargs, self.seeds, self._calls = pipe, dict(call_kwargs), list(seeds), calls
        self._scheduler = HandOutScheduler.from_config(pipe.scheduler.config)
        self._scheduler.start = self._scheduler.process.max_timestep if start is None else start
        self.prediction_type = self._scheduler.config.prediction_type
        self.process = self._scheduler.process
        # The pipeline's attributes while it runs: it keeps its guidance scale and the like there.
        self._inside = {"scheduler": self._scheduler, "_progress_bar_config": {"disable": True}}
        self._differentiated: set[str] = set()
        self._open()

    def _open(self):
        self.close()
        _check_caches(self.pipe)
        _suspended.used(self)
        self._coroutine = greenlet(_call_pipeline)
        prediction, noise = self._switch(self.pipe, self.call_kwargs, self.seeds)
        self._check_shape(prediction, noise.shape, "made of a state of shape {} a prediction of shape {}")
        self._noise, self.shape, self._held = noise.clone(), noise.shape, HELD_STATES * noise.nbytes
        _suspended.used(self)

    @property
    def noise(self) -> torch.Tensor:
        """The initial state, as the scheduler sees it."""
        if self._noise is None:
            self._open()
        return self._noise

    def __call__(self, x: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The prediction of `evaluate` alone."""
        return self.evaluate(x, timestep)[0]

    def evaluate(
        self, x: torch.Tensor, timestep: float | torch.Tensor, node: tuple[float, float] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The pipeline's prediction (after guidance) for states `x` at one time.

        Args:
            x (`torch.Tensor`): Of `noise`'s shape; cast to the dtype of predictions, as between the steps of a run.
            timestep (`float` or 0-dimensional `torch.Tensor`): In the pipeline's unit, 0 to 1000.
            node (`tuple[float, float]`, *optional*): alpha and sigma of `x`, where a solver calls the network at
                another time than its node's; by default the process's at `timestep`.

        Returns:
            What the pipeline passes to `scheduler.step`, of `prediction_type`, and the states that it is of: `x`,
            except where the pipeline itself sets states between steps, as inpainting does outside of the mask.

        Raises:
            FieldError: If the pipeline's call fails, changes the shape of states, predicts in another one, or keeps a
                gradient that is asked for.
        """
        inputs = {"x": x, "timestep": timestep} if torch.is_grad_enabled() else {}
        # Clones, because gradients have to lead back to them through this evaluation.
        sources = {name: v.clone() for name, v in inputs.items() if torch.is_tensor(v) and v.requires_grad}
        x = sources.get("x", x)
        timestep = sources["timestep"] if "timestep" in sources else float(timestep)
        self._open_if_needed()
        _suspended.used(self)
        prediction, state = self._switch(x, timestep, node, bool(sources))
        self._check_shape(state, x.shape, "turned states of shape {} into {}")
        self._check_shape(prediction, x.shape, "made of states of shape {} a prediction of shape {}")
        self._check_graph(prediction, sources)
        return prediction, torch.where(state == x.to(state.dtype), x, state)

    def _check_shape(self, found: torch.Tensor, expected: torch.Size, what: str):
        if found.shape != expected:
            raise FieldError(
                f"{type(self.pipe).__name__} {what.format(tuple(expected), tuple(found.shape))}. Call it without the "
                "option that does so; states and predictions of a field keep their shape."
            )

    def finish(self, x: torch.Tensor):
        """
        End the pipeline's call as if `x` were its last state. No network call is made for it, but the next evaluation
        opens the field again.

        Returns:
            What the pipeline's call returns: the images that `x` decodes to, or whatever else it makes.

        Raises:
            FieldError: If the pipeline's call fails, or does not end.
        """
        self._open_if_needed()
        self._scheduler.finished = True
        try:
            output = self._resume(x, 0.0, None, False)
        finally:
            self._scheduler.finished = False
        if not self._coroutine.dead:
            raise FieldError(
                f"{type(self.pipe).__name__} goes on where its scheduler's timesteps end: its loop counts steps "
                "itself, so no state of ours can be its last."
            )
        return output

    def _open_if_needed(self):
        if self._coroutine is None or self._coroutine.dead or self._scheduler.exhausted:
            self._open()

    def _switch(self, *message):
        """Let the pipeline run until its next `scheduler.step`."""
        with self._calls.evaluation():
            handed_out = self._resume(*message)
        if self._coroutine.dead:
            raise FieldError(
                f"{type(self.pipe).__name__} returned before its scheduler's `step` had been called "
                f"{HandOutScheduler.evaluations_per_call} times. A pipeline that fixes its own number of steps or "
                "replaces its scheduler cannot be searched; a call for the last part of a run needs a lower `start`."
            )
        return handed_out

    def _resume(self, *message):
        try:
            with self._running():
                return self._coroutine.switch(*message)
        except FieldError:
            raise
        except Exception as error:
            raise FieldError(
                f"The call of {type(self.pipe).__name__} with {describe(self.call_kwargs)} failed: "
                f"{type(error).__name__}: {str(error).rstrip('.')}. Make the same call yourself, with your own "
                "scheduler, to see whether the arguments are right."
            ) from error

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Give the pipeline its attributes of this call; afterwards, those that its owner has left it with."""
        grad_enabled = torch.is_grad_enabled()
        attributes = vars(self.pipe)
        outside = dict(attributes)
        attributes.update(self._inside)
        # Where the coroutine hands out to, and where it ends: a field may be collected inside another one's call.
        self._scheduler.driver = self._coroutine.parent = getcurrent()
        try:
            yield
        finally:
            self._inside = dict(attributes)
            attributes.clear()
            attributes.update(outside)
            torch.set_grad_enabled(grad_enabled)

    def _check_graph(self, prediction: torch.Tensor, sources: Mapping[str, torch.Tensor]):
        """Refuse to give silently wrong gradients: some pipelines copy the time, some run without a graph."""
        for name in sources.keys() - self._differentiated:
            if not _leads_back(prediction, sources[name]):
                raise FieldError(
                    f"{type(self.pipe).__name__} hands on no gradient with respect to `{name}`: somewhere it detaches "
                    "or copies it. Search without gradients, with `--fitter gauss-newton`."
                )
            self._differentiated.add(name)

    def close(self):
        """End the pipeline's call. A closed field opens again when it is evaluated."""
        if self._coroutine is not None and not self._coroutine.dead:
            with self._running():
                self._coroutine.throw(GreenletExit)
            if hasattr(self.pipe, "maybe_free_model_hooks"):
                self.pipe.maybe_free_model_hooks()
        self._coroutine = None
        _suspended.closed(self)

    def suspend(self):
        """Close it, and forget its noise too: it will be made again."""
        self.close()
        self._noise = None

    def __del__(self):
        if not sys.is_finalizing():
            self.close()


class _Suspended(threading.local):
    """The open fields of a thread, the one that was used last at the end."""

    def __init__(self):
        self._fields: list[weakref.ref[PipelineField]] = []

    def used(self, field: PipelineField):
        """Close others that have not been used for long, if all together hold too much."""
        others = [other for ref in self._fields if (other := ref()) not in (None, field)]
        while others and sum(each._held for each in (*others, field)) > MOST_HELD:
            others.pop(0).suspend()
        self._fields = [weakref.ref(each) for each in (*others, field)]

    def closed(self, field: PipelineField):
        """Count it no more."""
        self._fields = [ref for ref in self._fields if ref() not in (None, field)]


_suspended = _Suspended()


def _call_pipeline(pipe: DiffusionPipeline, call_kwargs: Mapping, seeds: Sequence[int]):
    """What runs in the coroutine. It knows nothing of the field, so that a field that is dropped goes at once."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    # Some pipelines, such as Wan VACE's, refuse lists.
    generator = generators[0] if len(generators) == 1 else generators
    with torch.no_grad():
        return pipe(**call_kwargs, generator=generator, num_inference_steps=HandOutScheduler.evaluations_per_call)


def _check_caches(pipe: DiffusionPipeline):
    """Refuse networks that answer from earlier evaluations."""
    cached = [name for name, part in pipe.components.items() if getattr(part, "is_cache_enabled", False)]
    if cached:
        raise FieldError(
            f"The `{cached[0]}` of {type(pipe).__name__} has a cache between steps, so what it predicts depends on "
            f"what it predicted before. Call `pipe.{cached[0]}.disable_cache()`; with few steps there is little to "
            "skip."
        )


def _leads_back(tensor: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether gradients of `tensor` reach `source`."""
    seen, pending = {None}, [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is source.grad_fn:
            return True
        if node not in seen:
            seen.add(node)
            pending.extend(following for following, _ in node.next_functions)
    return False


class Alone(dict):
    """Keyword arguments of a call that shares no call with others, as its pipeline makes one sample at a time."""


def merge_conditions(first: Mapping, second: Mapping) -> dict | None:
    """
    Keyword arguments of one pipeline call that makes the samples of two.

    Lists are joined, tensors are joined along their first dimension, prompts become a list; everything else has to be
    the same in both.

    Returns:
        `dict`, or None if one call cannot make both.
    """
    if first.keys() != second.keys() or isinstance(first, Alone) or isinstance(second, Alone):
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
        elif value is other or not isinstance(value, (torch.Tensor, np.ndarray)) and value == other:
            merged[key] = value
        else:
            return None
    return merged
