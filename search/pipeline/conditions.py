"""Conditions: keyword arguments of the calls that a search samples, from what its settings say of them."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diffusers import DiffusionPipeline
from diffusers.utils import load_image, load_video
from PIL import Image

from diffusers_searched_solver.calls import build_conditions


VIDEOS = (".mp4", ".gif", ".mov", ".avi", ".webm", ".mkv")


def sampled_conditions(
    pipe: DiffusionPipeline,
    class_labels: Sequence[str] | None,
    prompts: Sequence[str] | None,
    guidance_scale: float | Sequence[float] | None,
    sizes: Sequence[Mapping[str, int]],
    call_kwargs: Mapping[str, Any],
) -> list[dict]:
    """
    Keyword arguments of the calls that make one sample each.

    Args:
        class_labels, prompts, guidance_scale: As in `build_conditions`.
        sizes: Heights, widths, numbers of frames; each goes with each condition.
        call_kwargs: Further arguments of every call; paths and addresses of images and videos stand for
            what is in them, also in lists.

    Raises:
        ValueError: If the pipeline takes no such argument, or needs one that is not given, or a file cannot be read.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    wants_prompt = "prompt" in parameters and not {"prompt", "prompt_embeds"} & {*call_kwargs}
    if wants_prompt and prompts is None:
        raise ValueError(f"{type(pipe).__name__} takes a `prompt`. Pass some with --prompts or --prompts-file.")
    call_kwargs = {key: read_media(key, value) for key, value in call_kwargs.items()}
    of_sizes = [
        build_conditions(pipe, class_labels, prompts, guidance_scale, {**call_kwargs, **size}) for size in sizes
    ]
    # In such an order that the first few conditions have all sizes alike.
    return [condition for group in zip(*of_sizes, strict=True) for condition in group]


def variant_of(condition: Mapping[str, Any]) -> tuple:
    """What of a condition a solver has to serve apart from others: guidance scale and size."""
    return tuple(condition.get(name) for name in ("guidance_scale", "height", "width", "num_frames"))


def one_of_each(conditions: Sequence[Mapping]) -> list[Mapping]:
    """A condition of every guidance scale and size, which cost differently."""
    return list({variant_of(condition): condition for condition in conditions}.values())


def read_media(name: str, value: Any) -> Any:
    """
    The image or the frames of a video, if an argument is the path or the address of one; of a list, of each.

    Raises:
        ValueError: If it is the name of an image or a video that is not there, or cannot be read.
    """
    if isinstance(value, list):
        return [read_media(name, each) for each in value]
    if not isinstance(value, str) or "prompt" in name:
        return value
    suffix, remote = Path(urlsplit(value).path).suffix.lower(), value.startswith(("http://", "https://"))
    load = load_video if suffix in VIDEOS else load_image if suffix in Image.registered_extensions() else None
    if load is None:
        return value
    if not remote and not Path(value).is_file():
        raise ValueError(f"`{name}`: there is no file '{value}'. Paths are relative to {Path.cwd()}.")
    try:
        return load(value)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"`{name}`: '{value}' cannot be read as an image or a video: {error}") from error
