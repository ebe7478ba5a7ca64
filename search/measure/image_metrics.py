"""Image metrics of samplers side by side: images stream by, shared out to the processes; only features are kept."""

import tempfile
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from diffusers_searched_solver import SearchedSolver

from ..known.contest import Number
from ..launch.processes import in_order, quiet, share
from ..pipeline.field import FieldError, NetworkCalls, PipelineField
from ..pipeline.readying import device_of
from ..pipeline.rollout import Batch, rollout
from ..teacher.batches import Teacher, count_batches
from ..teacher.splits import EVALUATION_SEEDS, split_seeds
from .feature_network import FeatureNetwork
from .metrics import MIN_IMAGES, distribution_metrics, inception_score, similarity


COLUMNS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "fid": "FID",
    "kid": "KID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
}
TEACHER, REFERENCE = "teacher", "reference"
FILES_AT_A_TIME = 32


@dataclass(frozen=True)
class ImageRow:
    """
    Args:
        solver (`str`): As in the rows of errors, or "teacher".
        metrics (`dict[str, float]`): By name, those of `COLUMNS` that could be computed.
    """

    solver: str
    metrics: dict[str, Number]


@dataclass(frozen=True)
class ImageMetrics:
    """
    What images say of solvers.

    Args:
        num_samples (`int`): Images of each.
        feature_network (`str`): What they were compared by.
        reference (`str`): What they were compared with.
        results: By number of steps a row for each solver and the teacher.
    """

    num_samples: int
    feature_network: str
    reference: str
    results: dict[int, list[ImageRow]]


@dataclass(frozen=True)
class ImageSettings:
    """
    How images are measured.

    Args:
        num_images (`int`): Of each solver; the first noises that are held out.
        feature_network (`str`): As `FeatureNetwork` takes it.
        reference (`Path`, *optional*): A folder of what they should be like, instead of the teacher's.
        seed (`int`): As in `Settings`.
        folder (`Path`): Where features lie in the meantime, 8 KB an image for Inception.
    """

    num_images: int
    feature_network: str
    reference: Path | None
    seed: int
    folder: Path


def load_feature_network(
    pipe: DiffusionPipeline, condition: Mapping, settings: ImageSettings
) -> FeatureNetwork | None:
    """
    The network that images are measured by, if they are.

    Raises:
        ValueError: If images could not be measured when the search is finished.
    """
    if not settings.num_images:
        return None
    if settings.num_images < MIN_IMAGES:
        raise ValueError(f"`--image-metrics` is {settings.num_images}, expected 0 or at least {MIN_IMAGES} images.")
    network = FeatureNetwork(settings.feature_network, device_of(pipe))
    if settings.reference is not None:
        network(_read_images(_files(settings.reference)[:1]))
    calls = NetworkCalls(pipe)
    try:
        field = PipelineField(pipe, _for_arrays(condition), [0], calls)
        network(_images(field, field.noise))
    except FieldError as error:
        raise ValueError(f"`--image-metrics` needs images. {error}") from error
    finally:
        calls.remove()
    return network


def measure_images(
    teacher: Teacher,
    conditions: Sequence[Mapping],
    samplers: Mapping[int, Mapping[str, SearchedSolver]],
    network: FeatureNetwork,
    settings: ImageSettings,
) -> ImageMetrics | None:
    """
    How like the teacher's images from the same noises they are, and how near all of them to the reference.

    The main process gets all features in the order of the noises, so the numbers have the same bits on any number of
    processes.

    Args:
        conditions: Keyword arguments of the pipeline's calls, used in turn.
        samplers: What to measure, by number of steps and name.

    Returns:
        On the main process what was found; elsewhere nothing.
    """
    conditions = [_for_arrays(condition) for condition in conditions]
    contenders = {(n, name): sampler for n, of_steps in samplers.items() for name, sampler in of_steps.items()}
    rows = _Rows(settings.folder)
    seeds = split_seeds(settings.seed, EVALUATION_SEEDS, settings.num_images)
    stream = teacher.stream(conditions, seeds)
    num_batches = count_batches(conditions, settings.num_images, teacher.batch_size)
    for described in in_order(stream, num_batches, lambda batch: _describe(batch, contenders, network)):
        rows.append(described)
    if settings.reference is not None:
        _describe_reference(settings.reference, network, rows)
    if not PartialState().is_main_process:
        return None
    reference = TEACHER if settings.reference is None else REFERENCE
    keys = tqdm((TEACHER, *contenders), desc="distances between images", unit=" solvers", disable=quiet(), leave=False)
    metrics = {key: rows.metrics(key, reference, device_of(teacher.pipe)) for key in keys}
    of_teacher = [ImageRow(TEACHER, metrics[TEACHER])] if metrics[TEACHER] else []
    return ImageMetrics(
        settings.num_images,
        settings.feature_network,
        f"the teacher's of {teacher.steps} steps" if reference == TEACHER else str(settings.reference),
        {n: [*(ImageRow(name, metrics[n, name]) for name in each), *of_teacher] for n, each in samplers.items()},
    )


def _describe_reference(folder: Path, network: FeatureNetwork, rows: "_Rows"):
    chunks = _chunks(folder)
    read = iter([[chunk] for chunk in share(chunks)])
    described = in_order(read, len(chunks), lambda chunk: {REFERENCE: network(_read_images(chunk.files))})
    for each in tqdm(described, "reference images", len(chunks), unit=" batches", disable=quiet(), leave=False):
        rows.append(each)


def _describe(
    batch: Batch, contenders: Mapping[Hashable, SearchedSolver], network: FeatureNetwork
) -> dict[Hashable, dict]:
    """Of every sampler's images from one batch of noises: likeness to the teacher's, features, logits."""
    goals = _images(batch.field, batch.target.to(batch.field.noise.device))
    described = {TEACHER: network(goals)}
    for key, solver in contenders.items():
        images = _images(batch.field, rollout(batch.field, solver))
        described[key] = {**similarity(images, goals), **network(images)}
    batch.field.close()
    return described


def seconds_per_image(pipe: DiffusionPipeline, condition: Mapping, batch_size: int, network: FeatureNetwork) -> float:
    """What decoding an image and looking at it takes, from one batch."""
    calls = NetworkCalls(pipe)
    field = PipelineField(pipe, _for_arrays(condition), list(range(batch_size)), calls)
    calls.remove()
    started = time.perf_counter()
    images = _images(field, field.noise)
    network(images)
    similarity(images, images)
    return (time.perf_counter() - started) / batch_size


def image_evaluations(num_images: int, teacher_steps: int, step_counts: Sequence[int], num_solvers: int) -> int:
    """Evaluations of one sample by `measure_images`; decoding ends a call, and the next one has to be opened."""
    return num_images * (teacher_steps + 1 + num_solvers * sum(n + 1 for n in step_counts))


class _Rows:
    """
    What is said of the images of each sampler: on disk, because 50,000 Inception features take 400 MB.

    Args:
        folder (`Path`): Where files without a name are made, which are gone when this is.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[Hashable, dict[str, tuple[Any, torch.Size]]] = {}

    def append(self, described: Mapping[Hashable, Mapping[str, torch.Tensor]]):
        if not PartialState().is_main_process:
            return
        for key, values in described.items():
            files = self._files.setdefault(key, {})
            for name, rows in values.items():
                if name not in files:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    files[name] = tempfile.TemporaryFile(dir=self._folder), rows.shape[1:]
                files[name][0].write(rows.float().numpy().tobytes())

    def _read(self, key: Hashable, name: str) -> torch.Tensor:
        file, shape = self._files[key][name]
        file.seek(0)
        return torch.from_numpy(np.fromfile(file, np.float32)).reshape(-1, *shape)

    def metrics(self, key: Hashable, reference: Hashable, device: torch.device) -> dict[str, float]:
        """All metrics of a sampler's images, as far as there is something to compute them from."""
        files = self._files[key]
        metrics = {name: float(self._read(key, name).double().mean()) for name in ("psnr", "ssim") if name in files}
        logits = self._read(key, "logits") if "logits" in files else None
        if "features" in files and key != reference:
            features, others = self._read(key, "features"), self._read(reference, "features")
            metrics |= distribution_metrics(features, others, device)
        return metrics if logits is None else {**metrics, "inception_score": inception_score(logits)}


def _for_arrays(condition: Mapping) -> dict:
    """Keyword arguments for images as numbers and not rounded."""
    return {**condition, "output_type": "np"}


def _images(field: PipelineField, end: torch.Tensor) -> torch.Tensor:
    """The images (n, channels, h, w), in [0, 1], that a state decodes to."""
    images = getattr(field.finish(end), "images", None)
    if not isinstance(images, np.ndarray) or images.ndim != 4:
        raise FieldError(f"{type(field.pipe).__name__} makes none with these arguments.")
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


@dataclass(frozen=True)
class _Chunk:
    """Some files of the reference, and their place among all."""

    index: tuple[int, ...]
    files: list[Path]


def _chunks(folder: Path) -> list[_Chunk]:
    files = _files(folder)
    starts = range(0, len(files), FILES_AT_A_TIME)
    return [_Chunk((start,), files[start : start + FILES_AT_A_TIME]) for start in starts]


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in Image.registered_extensions())
    if len(files) < MIN_IMAGES:
        raise ValueError(f"`--reference-images` {folder} has {len(files)} images, expected at least {MIN_IMAGES}.")
    return files


def _read_images(files: Sequence[Path]) -> torch.Tensor:
    """Images (n, 3, h, w) in [0, 1]."""
    images = []
    for path in files:
        images.append(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255)
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"'{path}' has {images[-1].shape[1]} x {images[-1].shape[0]} pixels, '{files[0]}' "
                f"{images[0].shape[1]} x {images[0].shape[0]}. Crop and scale the reference images to one size."
            )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def columns_of(rows: Sequence[ImageRow]) -> list[str]:
    """The metrics that some of the rows have."""
    return [name for name in COLUMNS if any(name in row.metrics for row in rows)]


def format_metrics(rows: Sequence[ImageRow]) -> str:
    """Rows of metrics as a table for the terminal."""
    columns = columns_of(rows)
    lines = [f"{'solver':18}" + "".join(f"{COLUMNS[name]:>11}" for name in columns)]
    for row in rows:
        values = (f"{row.metrics[name]:11.4g}" if name in row.metrics else f"{'':11}" for name in columns)
        lines.append(f"{row.solver:18}" + "".join(values))
    return "\n".join(lines)
