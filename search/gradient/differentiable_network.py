"""DifferentiableNetwork: a pipeline whose samples' gradients are asked for, in the memory that there is."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline

from diffusers_searched_solver import process_from_config

from ..pipeline.field import FieldError, NetworkCalls, PipelineField
from ..teacher.batches import open_field, pipeline_calls


logger = logging.getLogger(__name__)


class DifferentiableNetwork:
    """
    A pipeline's samples by number.

    Args:
        pipe (`DiffusionPipeline`): Its predictions have to carry gradients of states and times, see `PipelineField`.
        conditions: Keyword arguments of a call that makes one sample each; used in turn.
        batch_size (`int`): Samples of one pipeline call at most. It is halved whenever memory runs out.
        calls (`NetworkCalls`): Counts forward evaluations.
        first_seed (`int`): Of sample 0; the others follow.

    Attributes:
        process (`NoiseProcess`): Of the pipeline's model.

    Raises:
        ValueError: If there are no conditions.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        conditions: Sequence[Mapping],
        batch_size: int,
        calls: NetworkCalls,
        first_seed: int = 0,
    ):
        if not conditions:
            raise ValueError("`conditions` is empty. Give the keyword arguments of at least one call of the pipeline.")
        self.pipe, self.conditions, self.first_seed = pipe, conditions, first_seed
        self.process = process_from_config(pipe.scheduler.config)
        self._batch_size = self._limit = batch_size
        self._calls = calls

    def split(self, numbers: Sequence[int]) -> list[list[tuple[Mapping, int]]]:
        """The samples of these numbers as conditions and seeds, in groups that one call can make."""
        conditions = [self.conditions[number % len(self.conditions)] for number in numbers]
        return pipeline_calls(conditions, [self.first_seed + number for number in numbers], self._batch_size)

    def map(
        self, function: Callable[[PipelineField], torch.Tensor], samples: Sequence[tuple[Mapping, int]]
    ) -> list[torch.Tensor]:
        """
        What a function says of the fields of some samples: of one field, or of several if memory asks for it.

        Raises:
            FieldError: If the pipeline's call fails.
        """
        values = []
        while samples:
            part = samples[: self._limit]
            try:
                with self._field(part) as field:
                    values.append(function(field))
            except (FieldError, torch.OutOfMemoryError) as error:
                if len(part) == 1 or not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
                    raise
            else:
                samples = samples[len(part) :]
                continue
            self._limit = len(part) // 2
            logger.warning(f"Gradients of {len(part)} samples in one call run out of memory: going on with half.")
            torch.cuda.empty_cache()
        return values

    @contextmanager
    def _field(self, samples: Sequence[tuple[Mapping, int]]) -> Iterator[PipelineField]:
        """A field whose networks keep no more for gradients than those of states and times need, while it is open."""
        modules = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
        field = None
        try:
            for weight in weights:
                weight.requires_grad_(False)
            field = open_field(self.pipe, samples, self._calls)
            yield field
        finally:
            if field is not None:
                field.close()
            for weight in weights:
                weight.requires_grad_(True)
