"""A grid of images: the same noise under the teacher, the best baseline and the searched solver."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image, ImageChops, ImageDraw


MIN_TILE = 64
LABEL_WIDTH = 330
ERROR_GAIN = 8
BACKGROUND, INK = (255, 255, 255), (20, 20, 20)


def sample_images(
    pipe: DiffusionPipeline, scheduler: SchedulerMixin, call_kwargs: Mapping, seeds: Sequence[int], num_steps: int
) -> list[Image.Image]:
    """
    Images of an ordinary call of the pipeline with another scheduler; the pipeline gets its own back.

    Raises:
        TypeError: If the pipeline does not make images.
    """
    own, progress = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    try:
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        output = pipe(**{"output_type": "pil", **call_kwargs}, generator=generators, num_inference_steps=num_steps)
    finally:
        pipe.scheduler = own
        pipe.set_progress_bar_config(**progress)
    images = getattr(output, "images", None)
    if not isinstance(images, list) or not all(isinstance(image, Image.Image) for image in images):
        raise TypeError(f"{type(pipe).__name__} does not make images with these arguments; there is nothing to draw.")
    return images


def error_images(images: Sequence[Image.Image], goals: Sequence[Image.Image]) -> list[Image.Image]:
    """The absolute difference of each image to its goal, `ERROR_GAIN` times as bright."""
    return [
        ImageChops.difference(image, goal).point(lambda value: min(255, ERROR_GAIN * value))
        for image, goal in zip(images, goals, strict=True)
    ]


def image_grid(rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """
    Rows of images, each with its label to the left.

    Args:
        rows: Labels and images; all rows of one length, all images of one size. Small images are enlarged.
    """
    width, height = next(iter(rows.values()))[0].size
    scale = int(np.ceil(MIN_TILE / min(width, height)))
    tile, gap = (width * scale, height * scale), 4
    columns = len(next(iter(rows.values())))
    size = (LABEL_WIDTH + columns * (tile[0] + gap) + gap, len(rows) * (tile[1] + gap) + gap)
    grid = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for row, (label, images) in enumerate(rows.items()):
        top = gap + row * (tile[1] + gap)
        draw.text((8, top + tile[1] // 2), label, fill=INK, anchor="lm", font_size=15)
        for column, image in enumerate(images):
            left = LABEL_WIDTH + gap + column * (tile[0] + gap)
            grid.paste(image.convert("RGB").resize(tile, Image.Resampling.NEAREST), (left, top))
    return grid
