"""Peak memory of the search, beside that of ordinary sampling."""

import resource
import sys
from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline

from ..launch.network_calls import NetworkCalls
from ..pipeline.readying import device_of
from .batches import Teacher


def inference_memory(pipe: DiffusionPipeline, condition: Mapping, batch_size: int) -> float:
    """Peak memory in bytes after an ordinary run of as many samples as one call of the search has."""
    calls = NetworkCalls(pipe)
    for batch in Teacher(pipe, 8, batch_size, calls).batches([condition], range(batch_size)):
        batch.field.close()
    calls.remove()
    return peak_memory(device_of(pipe))


def peak_memory(device: torch.device) -> float:
    """Bytes: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
