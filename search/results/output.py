"""What a search leaves behind: the solver, the report, the images and the model card, each written whole."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, SolverFile

from ..teacher.splits import EVALUATION_SEEDS, split_seeds
from .card import IMAGES, write_card
from .images import SampleImages, draw_samples, image_grid
from .report import write_report


GRID_SAMPLES = 8
ASIDE = ".unfinished."


def write_results(
    pipe: DiffusionPipeline,
    conditions: Sequence[Mapping],
    solvers: Mapping[int, SearchedSolver],
    report: Mapping,
    output_dir: Path,
    provenance: Mapping[str, str] | None = None,
) -> None:
    """
    Write everything, and say how to use it.

    Args:
        provenance (*optional*): Of solvers that no search has found here. They get no model card.
    """
    scheduler = _scheduler(pipe, solvers, _provenance(report) if provenance is None else provenance)
    images = _draw_images(pipe, scheduler, conditions, report)
    with _published(output_dir) as aside:
        scheduler.save_pretrained(aside)
        (aside / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        if images is not None:
            image_grid(images).save(aside / IMAGES)
        write_report(aside, images)
        if "search" in report:
            write_card(aside, str(output_dir))
    print(f"\nWrote {output_dir}. Use it with\n  from diffusers_searched_solver import SearchedSolverScheduler")
    print(f"  pipe.scheduler = SearchedSolverScheduler.from_pretrained({str(output_dir)!r})")


def _provenance(report: Mapping) -> dict[str, str]:
    """How solvers came to be, as their file says it."""
    errors = {
        n: next(row["endpoint_error"] for row in rows if row["solver"] == "searched")
        for n, rows in report["evaluation"]["results"].items()
    }
    scale = report["guidance_scale"]
    return {
        "base_model": report["pipeline"],
        "license": report["license"],
        "guidance_scale": "the pipeline's default" if scale is None else str(scale).strip("[]"),
        "fitter": report["search"]["fitter"],
        "teacher": f"{report['search']['teacher_steps']} steps",
        "endpoint_errors": json.dumps(errors),
    }


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


def _draw_images(pipe, scheduler, conditions, report) -> SampleImages | None:
    """The first of the evaluation's noises as images, if the pipeline makes any."""
    conditions = conditions[:GRID_SAMPLES]
    seeds = split_seeds(report["seed"], EVALUATION_SEEDS, len(conditions))
    tables = {int(n): rows for n, rows in report["evaluation"]["results"].items()}
    try:
        return draw_samples(pipe, scheduler, conditions, seeds, tables, report["evaluation"]["teacher_steps"])
    except TypeError as error:
        print(f"No images: {error}")
        return None


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
