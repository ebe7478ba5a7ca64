"""TeacherCache: end points of the teacher on disk, found by what the pipeline computes."""

import hashlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from diffusers_searched_solver import SearchedSolver
from diffusers_searched_solver.serialization import write_whole

from ..launch.network_calls import NetworkCalls
from ..pipeline.field import PipelineField
from ..pipeline.rollout import rollout


logger = logging.getLogger(__name__)


class TeacherCache:
    """
    End points by content: the key is a hash of the noise, of two predictions of the field and of the teacher's table.

    So another network, LoRA, prompt, guidance scale or precision never meets the end points of this one, wherever the
    weights come from, and searches for other step counts or with other settings find them again.

    Args:
        folder (`Path`, *optional*): Where they are kept; nowhere unless given.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = folder

    def end(self, field: PipelineField, teacher: SearchedSolver, calls: NetworkCalls) -> torch.Tensor:
        """
        Where the teacher ends from the field's noise.

        Args:
            calls: Counts what the run cost also if it is read from disk, so that costs do not depend on the cache.
        """
        if self._folder is None:
            return rollout(field, teacher)
        path = self._folder / f"{content_key(field, teacher)}.safetensors"
        if path.exists() and (found := _read(path, field.noise)) is not None:
            end, cost = found
            calls.count += cost
            return end
        before = calls.count
        end = rollout(field, teacher)
        try:
            write_whole(path, save({"end": end.cpu().contiguous()}, {"calls": str(calls.count - before)}))
        except OSError as error:
            logger.warning(f"The teacher's end points cannot be kept for another time: {error}.")
        return end


def content_key(field: PipelineField, teacher: SearchedSolver) -> str:
    """A hash of what the field and the teacher compute."""
    last = field.process.max_timestep
    digest = hashlib.sha256()
    for tensor in (field.noise, field(field.noise, last), field(field.noise, last / 2)):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for table in (teacher.timesteps, teacher.alphas, teacher.sigmas, teacher.coefficients):
        digest.update(table.tobytes())
    return digest.hexdigest()


def _read(path: Path, noise: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """End points and what they cost, or None if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            end, cost = file.get_tensor("end"), int(file.metadata()["calls"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning(f"'{path}' is damaged ({error}): the teacher runs again.")
        return None
    if end.shape != noise.shape or not torch.isfinite(end).all():
        logger.warning(f"'{path}' is damaged (shape {tuple(end.shape)} or its values): the teacher runs again.")
        return None
    return end.to(noise.device), cost
