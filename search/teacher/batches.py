"""The teacher: a many-step run of the same pipeline, whose end points the searched solver has to reach."""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline

from diffusers_searched_solver.calls import describe
from diffusers_searched_solver.teacher import teacher_solver

from ..launch.processes import share
from ..pipeline.field import FieldError, NetworkCalls, PipelineField, merge_conditions
from ..pipeline.rollout import Batch
from .cache import TeacherCache


logger = logging.getLogger(__name__)

# Steps of the teacher to begin with, and the share of the best rival's error that its own may be.
TEACHER_STEPS, TEACHER_SHARE = 48, 0.1
# Samples of one pipeline call.
BATCH_SIZE = 4
NO_CACHE = TeacherCache()
Samples = Sequence[tuple[Mapping, int]]
T = TypeVar("T")
# By pipeline, so many samples in one call that memory ran out: no stage tries that again.
_TOO_MANY: MutableMapping[DiffusionPipeline, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Teacher:
    """
    How the samples of a pipeline and their goals are made.

    Args:
        pipe: The pipeline to search for.
        steps (`int`): Of the run whose ends are the goal, at least 3.
        batch_size (`int`): Samples of one pipeline call at most; conditions that cannot share a call get their own,
            and a call that runs out of memory is made in two halves.
        calls: Counts the network calls.
        cache: Where end points are kept.
    """

    pipe: DiffusionPipeline
    steps: int
    batch_size: int
    calls: NetworkCalls
    cache: TeacherCache = NO_CACHE

    def batches(self, conditions: Sequence[Mapping], seeds: Sequence[int], first: int = 0) -> list[Batch]:
        """
        Samples with the teacher's end points.

        Args:
            conditions: Keyword arguments of a call that makes one sample each; used in turn.
            seeds: One for each sample.
            first (`int`): The number of the first of these calls among all.

        Returns:
            `list[Batch]`: This process's, in the order of the seeds, except that samples with different call arguments
                are apart.

        Raises:
            ValueError: If an end point is not finite.
        """
        return [batch for batches in self.stream(conditions, seeds, first) for batch in batches]

    def stream(self, conditions: Sequence[Mapping], seeds: Sequence[int], first: int = 0) -> Iterator[list[Batch]]:
        """The same as they are asked for: one at a time, or its parts where memory was short."""
        numbered = list(enumerate(pipeline_calls(conditions, seeds, self.batch_size), first))
        for index, samples in share(numbered, first):
            yield list(in_parts(self.pipe, self._batch, samples, (index,)))

    def _batch(self, samples: Samples, index: tuple[int, ...]) -> Batch:
        field = open_field(self.pipe, samples, self.calls)
        end = self.cache.end(field, teacher_solver(field.process, self.steps), self.calls)
        _check_finite(end, samples)
        return Batch(field, end.cpu(), index)


def open_field(pipe: DiffusionPipeline, samples: Samples, calls: NetworkCalls) -> PipelineField:
    """The field of one call that makes these samples."""
    return PipelineField(pipe, merged(samples), [seed for _, seed in samples], calls)


def merged(samples: Samples) -> dict:
    """Keyword arguments of the call that makes these samples."""
    return functools.reduce(merge_conditions, (condition for condition, _ in samples))


def in_parts(
    pipe: DiffusionPipeline,
    make: Callable[[Samples, tuple[int, ...]], T],
    samples: Samples,
    index: tuple[int, ...] = (),
) -> Iterator[T]:
    """
    What is made of the samples of a call, or of its halves where memory is too short for all, now or at an earlier
    call of as many.
    """
    half = len(samples) // 2
    if len(samples) < _TOO_MANY.get(pipe, math.inf):
        try:
            made = make(samples, index)
        except (FieldError, torch.OutOfMemoryError) as error:
            if not half or not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
                raise
        else:
            yield made
            return
        _TOO_MANY[pipe] = len(samples)
        logger.warning(f"{len(samples)} samples in one call run out of memory: going on with {half}.")
        torch.cuda.empty_cache()
    for k, each in enumerate((samples[:half], samples[half:])):
        yield from in_parts(pipe, make, each, (*index, k))


def count_batches(conditions: Sequence[Mapping], num_samples: int, batch_size: int) -> int:
    """How many batches all processes have of so many samples."""
    return len(pipeline_calls(conditions, range(num_samples), batch_size))


def pipeline_calls(
    conditions: Sequence[Mapping], seeds: Sequence[int], batch_size: int
) -> list[list[tuple[Mapping, int]]]:
    """The samples of each pipeline call, as conditions and seeds."""
    calls: list[list[tuple[Mapping, int]]] = []
    with_room: list[tuple[Mapping, list[tuple[Mapping, int]]]] = []
    for i, seed in enumerate(seeds):
        condition = conditions[i % len(conditions)]
        for k, (merged, samples) in enumerate(with_room):
            if (joined := merge_conditions(merged, condition)) is not None:
                samples.append((condition, seed))
                with_room[k] = (joined, samples)
                break
        else:
            calls.append([(condition, seed)])
            with_room.append((condition, calls[-1]))
        with_room = [(merged, samples) for merged, samples in with_room if len(samples) < batch_size]
    return calls


def _check_finite(end: torch.Tensor, samples: Sequence[tuple[Mapping, int]]):
    for row in torch.nonzero(~torch.isfinite(end).flatten(1).all(1)).flatten().tolist():
        condition, seed = samples[row % len(samples)]
        raise ValueError(
            f"The teacher's end point for seed {seed} with {describe(condition)} is not finite. Run the pipeline's "
            "network in float32 (`--mixed-precision no`), or make sure that its own scheduler gives an image with "
            "these arguments."
        )
