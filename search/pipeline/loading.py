"""From a command-line word to a pipeline."""

import inspect
import os

import torch
from diffusers import DiffusionPipeline

from diffusers_searched_solver.calls import pipeline_class


HUB_NAMES = {"DiT-XL-2-256": "facebook/DiT-XL-2-256", "DiT-XL-2-512": "facebook/DiT-XL-2-512"}
# Official weights that have to be converted first: Hub repository, file, and arguments of the conversion.
CHECKPOINTS = {
    "SiT-XL-2-256": ("nyu-visionx/SiT-collections", "SiT-XL-2-256.pt", "--model sit"),
    "FlowDCN-XL-2-256": ("wangsssssss/FlowDCN", "FlowDCN-XL-2M-R256.pth", "--model flowdcn"),
    "FlowDCN-XL-2-512": ("wangsssssss/FlowDCN", "FlowDCN-XL-100K-R512.pth", "--model flowdcn --sample-size 64"),
    "FlowDCN-B-2-256": ("wangsssssss/FlowDCN", "FlowDCN-B-400K-R256.pth", "--model flowdcn"),
}
NAMES = (*HUB_NAMES, *CHECKPOINTS)


def hub_repository(name: str) -> str | None:
    """The Hub repository that `load_pipeline` takes for `name`, if it is not a folder."""
    return None if os.path.isdir(name) else HUB_NAMES.get(name, name)


def load_pipeline(name: str, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline:
    """
    Load a pipeline.

    Args:
        name: A local folder, one of `NAMES`, or a Hub repository, in this order.
        dtype: Of the networks.
        device: Where they go.

    Raises:
        ValueError: If there is no such pipeline, or it has to be converted first.
    """
    if name in CHECKPOINTS and not os.path.isdir(name):
        repository, file, arguments = CHECKPOINTS[name]
        raise ValueError(
            f"'{name}' has to be converted first, as there is no folder of that name here. Run\n"
            f"  hf download {repository} {file} --local-dir .\n"
            f"  python -m diffusers_searched_solver.convert {arguments} --checkpoint {file} --output {name}"
        )
    source = hub_repository(name) or name
    try:
        cls = pipeline_class(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no pipeline '{name}': it is not a folder with a 'model_index.json', not one of "
            f"{', '.join(NAMES)}, and as a Hub repository it could not be read ({str(error).splitlines()[0]}). "
            "Check the spelling, or the connection."
        ) from error
    return cls.from_pretrained(source, dtype=dtype).to(device)


def takes_guidance(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline's call has a `guidance_scale`."""
    return "guidance_scale" in inspect.signature(type(pipe).__call__).parameters
