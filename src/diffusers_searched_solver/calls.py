"""Calls of any pipeline, from what a command line says of them."""

import inspect
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from . import pipelines
from .loading import hub_has_no_address


def pipeline_class(source: str) -> type[DiffusionPipeline]:
    """
    What loads the pipeline of a folder or Hub repository.

    Raises:
        OSError, ValueError: As in `DiffusionPipeline.load_config`.
    """
    unreachable = not os.path.isdir(source) and hub_has_no_address()
    name = DiffusionPipeline.load_config(source, local_files_only=unreachable).get("_class_name", "")
    return getattr(pipelines, str(name), DiffusionPipeline)


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
                f"{type(pipe).__name__} takes no `{key}`, but {', '.join(list(parameters)[1:])}. Leave the option "
                "out, or pass others with --call-kwargs."
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
        raise ValueError(f"There is no class '{label}', but {known}. Pass one of these, or ids.")
    return labels[label]


def describe(call: Mapping) -> str:
    """Argument names and short values, for an error message; of images and tensors their sizes."""
    return ", ".join(f"{key}={_short(value)}" for key, value in call.items()) or "no arguments"


def _short(value) -> str:
    if isinstance(value, (list, tuple)) and value and not isinstance(value[0], (str, int, float)):
        return f"{len(value)} x {_short(value[0])}"
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, Image.Image):
        return f"image of {value.width} x {value.height}"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
