"""What a search leaves behind: the solver, the report, the images and the model card, each written whole."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, SolverFile

from ..teacher.splits import EVALUATION_SEEDS, split_seeds
from .card import IMAGES, write_card
from .images import SampleImages, draw_samples, image_grid
from .record import NAME, Report
from .report import write_report


GRID_SAMPLES = 8
ASIDE = ".unfinished."


def write_results(
    pipe: DiffusionPipeline,
    solvers: Mapping[int, SearchedSolver],
    report: Report,
    output_dir: Path,
    provenance: Mapping[str, str],
) -> None:
    """
    Write everything but pictures.

    Args:
        provenance: Where the solvers come from, as their file says it.
    """
    with _published(output_dir) as aside:
        _scheduler(pipe, solvers, provenance).save_pretrained(aside)
        _write_report(aside, report, output_dir, None)
    # Of other solvers.
    (output_dir / IMAGES).unlink(missing_ok=True)


def draw(
    pipe: DiffusionPipeline,
    conditions: Sequence[Mapping],
    solvers: Mapping[int, SearchedSolver],
    report: Report,
    output_dir: Path,
    batch_size: int,
    update: Callable[[int], object],
) -> tuple[str, Report]:
    """
    Draw the first of the held-out noises and add them to what is written.

    Args:
        batch_size (`int`): Images in one call.
        update: Is told how many evaluations of one sample were made.

    Returns:
        What was drawn, in a sentence, and the report, with how long an image takes.
    """
    scheduler = _scheduler(pipe, solvers, {})
    conditions = conditions[:GRID_SAMPLES]
    seeds = split_seeds(report.seed, EVALUATION_SEEDS, len(conditions))
    try:
        images = draw_samples(pipe, scheduler, conditions, seeds, report.evaluation, batch_size, update)
    except TypeError as error:
        images = None
        told = f"No images: {error}"
    if images is not None:
        report = replace(report, seconds_per_image=images.seconds)
    with _published(output_dir) as aside:
        if images is not None:
            image_grid(images).save(aside / IMAGES)
            told = f"Drew '{output_dir / IMAGES}'."
        shutil.copytree(output_dir / "solver", aside / "solver")
        _write_report(aside, report, output_dir, images)
    return told, report


def _write_report(aside: Path, report: Report, output_dir: Path, images: SampleImages | None):
    (aside / NAME).write_text(report.to_json())
    if report.evaluation is not None:
        write_report(aside, str(output_dir), images)
        if report.search is not None:
            write_card(aside, str(output_dir))


def how_to_use(output_dir: Path) -> str:
    """Lines for the terminal."""
    return (
        f"\nWrote {output_dir}. Use it with\n  from diffusers_searched_solver import SearchedSolverScheduler\n"
        f"  pipe.scheduler = SearchedSolverScheduler.from_pretrained({str(output_dir)!r})"
    )


def write_solvers(
    pipe: DiffusionPipeline, solvers: Mapping[int, SearchedSolver], output_dir: Path, provenance: Mapping[str, str]
) -> None:
    """Write solvers that were not measured."""
    with _published(output_dir) as aside:
        _scheduler(pipe, solvers, provenance).save_pretrained(aside)


def _scheduler(pipe, solvers, provenance) -> SearchedSolverScheduler:
    own = SearchedSolverScheduler.from_config(pipe.scheduler.config)
    file = SolverFile(dict(solvers), own.process, own.config.prediction_type, dict(provenance))
    return SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=file)


@contextmanager
def _published(output_dir: Path) -> Iterator[Path]:
    """A folder whose files are moved into `output_dir` when all are finished, each whole."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for left_behind in output_dir.glob(f"{ASIDE}*"):
        shutil.rmtree(left_behind)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=ASIDE) as aside:
        yield Path(aside)
        for path in sorted(Path(aside).rglob("*")):
            if path.is_file():
                target = output_dir / path.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
