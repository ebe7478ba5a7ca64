"""Images and videos of the same noise under the teacher, diffusers' schedulers and the searched solver."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image, ImageChops, ImageDraw, ImageFont

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.rivals import diffusers_schedulers
from diffusers_searched_solver.teacher import teacher_solver

from ..measure.evaluate import OWN, SEARCHED, Row
from ..measure.measuring import Evaluation
from ..teacher.batches import Samples, in_parts, merged, pipeline_calls


MIN_TILE = 64
LABEL_SIZE, LABEL_MARGIN = 15, 16
ERROR_GAIN = 8
# Samplers of each step count that are looked at.
SHOWN = 3
# Frames of a video that are looked at side by side.
STRIP = 4
BACKGROUND, INK = (255, 255, 255), (20, 20, 20)
# The frames of a video, or an image alone.
Film = tuple[Image.Image, ...]


@dataclass(frozen=True)
class SampleImages:
    """
    Images or videos of the same noises under several samplers, all of one size and length.

    Args:
        captions: What each was asked to show.
        teacher_steps (`int`): Steps of the teacher.
        teacher: What it makes.
        samples: By number of steps and sampler, what these make: the best of diffusers' schedulers first, "searched"
            last.
        seconds: By number of steps, what one sample of the searched solver took.
    """

    captions: Sequence[str]
    teacher_steps: int
    teacher: Sequence[Film]
    samples: Mapping[int, Mapping[str, Sequence[Film]]]
    seconds: Mapping[int, float] = field(default_factory=dict)


def draw_samples(
    pipe: DiffusionPipeline,
    scheduler: SearchedSolverScheduler,
    conditions: Sequence[Mapping],
    seeds: Sequence[int],
    evaluation: Evaluation,
    batch_size: int,
    update: Callable[[int], object],
) -> SampleImages:
    """
    Sample the pipeline with the teacher, and with what a measurement says is worth looking at: the best of diffusers'
    schedulers, its first-order one and the searched solver.

    Args:
        scheduler: Runs the searched solver.
        conditions, seeds: Keyword arguments of a call and the seed of its noise, for each sample.
        evaluation: The measurement.
        batch_size (`int`): Samples in one call, if their conditions can share it.
        update: Is told how many evaluations every call took.

    Raises:
        TypeError: If the pipeline makes neither images nor videos.
    """
    config, steps = pipe.scheduler.config, evaluation.teacher_steps
    shown = {n: {**_shown(pipe, rows), SEARCHED: scheduler} for n, rows in sorted(evaluation.results.items())}
    teacher = SearchedSolverScheduler.from_config(config, solver=teacher_solver(scheduler.process, steps))
    calls = pipeline_calls(conditions, seeds, batch_size)

    def draw(with_scheduler: SchedulerMixin, num_steps: int) -> list[Film]:
        def some(samples: Samples, _) -> list[tuple[int, Film]]:
            of_samples = [seed for _, seed in samples]
            films = sample_films(pipe, with_scheduler, merged(samples), of_samples, num_steps)
            update(num_steps * len(samples))
            return list(zip(of_samples, films, strict=False))

        found = dict(pair for samples in calls for part in in_parts(pipe, some, samples) for pair in part)
        return [found[seed] for seed in seeds if seed in found]

    goal = draw(teacher, steps)
    samples, seconds = {}, {}
    for n, contenders in shown.items():
        samples[n] = {name: draw(each, n) for name, each in contenders.items() if name != SEARCHED}
        started = time.perf_counter()
        samples[n][SEARCHED] = draw(scheduler, n)
        seconds[n] = (time.perf_counter() - started) / len(samples[n][SEARCHED])
    return SampleImages([_caption(kwargs) for kwargs in conditions[: len(goal)]], steps, goal, samples, seconds)


def drawing_evaluations(num_images: int, step_counts: Sequence[int], teacher_steps: int) -> int:
    """Evaluations of one sample that `draw_samples` makes."""
    return num_images * (teacher_steps + SHOWN * sum(step_counts))


def _shown(pipe: DiffusionPipeline, rows: Sequence[Row]) -> dict[str, SchedulerMixin]:
    """The best of diffusers' schedulers in a table of results, and its first-order one."""
    families = diffusers_schedulers(pipe.scheduler.config)
    first_order = next(iter(families))
    best, *others = (row for row in rows if row.from_diffusers)
    shown = [best, *(row for row in others if row.solver == first_order)]
    return {row.solver: pipe.scheduler if row.solver == OWN else families[row.solver][row.setting] for row in shown}


def _caption(call_kwargs: Mapping) -> str:
    """The prompt, or the class label, or nothing."""
    if "prompt" in call_kwargs:
        return str(call_kwargs["prompt"])
    return " ".join(f"class {label}" for label in call_kwargs.get("class_labels", ()))


def sample_films(
    pipe: DiffusionPipeline, scheduler: SchedulerMixin, call_kwargs: Mapping, seeds: Sequence[int], num_steps: int
) -> list[Film]:
    """
    What an ordinary call of the pipeline with another scheduler makes; the pipeline gets its own back.

    Raises:
        TypeError: If the pipeline makes neither images nor videos.
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
    images, videos = (getattr(output, name, None) for name in ("images", "frames"))
    films = [(each,) for each in images] if isinstance(images, list) else [tuple(each) for each in videos or ()]
    if not films or not all(isinstance(frame, Image.Image) for film in films for frame in film):
        name = type(pipe).__name__
        raise TypeError(f"{name} makes neither images nor videos with these arguments; there is nothing to draw.")
    return films


def error_films(films: Sequence[Film], goals: Sequence[Film]) -> list[Film]:
    """The absolute difference of each frame to its goal's, `ERROR_GAIN` times as bright."""
    return [
        tuple(
            ImageChops.difference(frame, goal).point(lambda value: min(255, ERROR_GAIN * value))
            for frame, goal in zip(*pair, strict=True)
        )
        for pair in zip(films, goals, strict=True)
    ]


def strip(film: Film) -> Image.Image:
    """An image, or some frames of a video side by side."""
    if len(film) == 1:
        return film[0]
    shown = [film[k] for k in np.linspace(0, len(film) - 1, min(STRIP, len(film))).round().astype(int)]
    width, height = film[0].size
    row = Image.new("RGB", (width * len(shown), height))
    for k, frame in enumerate(shown):
        row.paste(frame, (k * width, 0))
    return row


def image_grid(images: SampleImages) -> Image.Image:
    """
    One picture: the teacher, then for each step count the best of diffusers' schedulers and the searched solver, with
    their errors. Small images are enlarged, of videos some frames are shown.
    """
    rows = {f"teacher, {images.teacher_steps} steps": images.teacher}
    for num_steps, samples in images.samples.items():
        for name in (next(iter(samples)), SEARCHED):
            rows[f"{name}, {num_steps} steps"] = samples[name]
            errors = error_films(samples[name], images.teacher)
            rows[f"  its error x {ERROR_GAIN}, {num_steps} steps, {name}"] = errors
    return _labelled_rows({label: [strip(film) for film in row] for label, row in rows.items()})


def _labelled_rows(rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Rows of images, each with its label to the left."""
    width, height = next(iter(rows.values()))[0].size
    scale = int(np.ceil(MIN_TILE / min(width, height)))
    tile, gap = (width * scale, height * scale), 4
    columns = len(next(iter(rows.values())))
    font = ImageFont.load_default(LABEL_SIZE)
    labels = round(max(font.getlength(label) for label in rows)) + LABEL_MARGIN
    size = (labels + columns * (tile[0] + gap) + gap, len(rows) * (tile[1] + gap) + gap)
    grid = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for row, (label, images) in enumerate(rows.items()):
        top = gap + row * (tile[1] + gap)
        draw.text((8, top + tile[1] // 2), label, fill=INK, anchor="lm", font=font)
        for column, image in enumerate(images):
            left = labels + gap + column * (tile[0] + gap)
            grid.paste(image.convert("RGB").resize(tile, Image.Resampling.NEAREST), (left, top))
    return grid
