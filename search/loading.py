"""From command-line words to a pipeline and its conditions."""

import inspect
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffusers_searched_solver import pipelines


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
        class_name = DiffusionPipeline.load_config(source).get("_class_name", "")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no pipeline '{name}': it is not a folder with a 'model_index.json', not one of "
            f"{', '.join(NAMES)}, and as a Hub repository it could not be read ({str(error).splitlines()[0]}). "
            "Check the spelling, or the connection."
        ) from error
    cls = getattr(pipelines, str(class_name), DiffusionPipeline)
    return cls.from_pretrained(source, dtype=dtype).to(device)


def takes_guidance(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline's call has a `guidance_scale`."""
    return "guidance_scale" in inspect.signature(type(pipe).__call__).parameters


def build_conditions(
    pipe: DiffusionPipeline,
    class_labels: Sequence[str] | None,
    prompts: Sequence[str] | None,
    guidance_scale: float | Sequence[float] | None,
    call_kwargs: Mapping,
) -> list[dict]:
    """
    Keyword arguments of the calls that make one sample each.

    Args:
        class_labels: Ids or names that the pipeline knows; by default all of them, if it takes class labels.
        prompts: Prompts.
        guidance_scale: By default the pipeline's own. Of several, each goes with each class label or prompt.
        call_kwargs: Further arguments of every call.

    Raises:
        ValueError: If the pipeline takes no such argument, or needs one that is not given.
    """
    # Lists say one thing per sample where the pipeline takes several; what else JSON gives as a list is one value.
    per_sample = {key for key in call_kwargs if key == "class_labels" or "prompt" in key}
    common = {
        key: tuple(value) if isinstance(value, list) and key not in per_sample else value
        for key, value in call_kwargs.items()
    }
    scales = [] if guidance_scale is None else np.atleast_1d(guidance_scale).tolist()
    parameters = inspect.signature(type(pipe).__call__).parameters
    wanted = {"class_labels": class_labels, "prompt": prompts, "guidance_scale": scales}
    for key in [*common, *(key for key, values in wanted.items() if values)]:
        if key not in parameters:
            raise ValueError(
                f"{type(pipe).__name__} takes no `{key}`. It takes {', '.join(list(parameters)[1:])}; leave the "
                "option out, or pass others with --call-kwargs."
            )
    if class_labels is None and prompts is None and "class_labels" in parameters and "class_labels" not in common:
        class_labels = [str(index) for index in _all_labels(pipe)]
    varied = [{"class_labels": [_label_id(pipe, label)]} for label in class_labels or ()]
    varied += [{"prompt": prompt} for prompt in prompts or ()]
    conditions = [{**common, **condition} for condition in varied or [{}]]
    if not scales:
        return conditions
    # In such an order that the first few conditions have all scales alike, and different labels.
    period = math.lcm(len(conditions), len(scales))
    return [
        {**conditions[i % len(conditions)], "guidance_scale": scales[(i + i // period) % len(scales)]}
        for i in range(len(conditions) * len(scales))
    ]


def _all_labels(pipe: DiffusionPipeline) -> list[int]:
    labels = sorted(set(getattr(pipe, "labels", {}).values()))
    if not labels:
        raise ValueError(
            f"{type(pipe).__name__} takes `class_labels` but does not say which there are. Pass --class-labels."
        )
    return labels


def _label_id(pipe: DiffusionPipeline, label: str) -> int:
    if label.isdecimal():
        return int(label)
    labels = getattr(pipe, "labels", {})
    if label not in labels:
        known = ", ".join(list(labels)[:10]) or "none by name"
        raise ValueError(f"There is no class '{label}'; the pipeline knows {known}. Pass one of these, or ids.")
    return labels[label]
