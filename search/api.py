"""Measuring from Python: the same session as the command line's, for a pipeline that somebody prepared."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, SolverFile

from .launch.progress import DRAWING, IMAGES, MEASURING, Progress
from .measure.image_metrics import load_feature_network
from .results.record import Report
from .session import Session, heading
from .settings import Settings
from .teacher.admission import admit


def measure(
    pipe: DiffusionPipeline,
    solver: SearchedSolver | SolverFile | SearchedSolverScheduler,
    conditions: Sequence[Mapping],
    output_dir: str | Path,
    name: str | None = None,
    **settings,
) -> Report:
    """
    Measure solvers of a pipeline, whoever prepared it, beside everything that is known, and write `report.html`.

        report = measure(pipe, outcome.solver, [{"class_labels": [k]} for k in range(10)], "out")
        print(report.verdicts[8])

    Args:
        pipe: Any pipeline: your own class, with a LoRA, quantised.
        solver: One table, or the tables of several step counts.
        conditions: As in [`find_solver`].
        output_dir: Where the solver and the report are written.
        name (`str`, *optional*): What the report calls the pipeline; by default where it was loaded from.
        settings: Of `Settings`: `measure`, `num_eval_samples`, `image_metrics`, `teacher_steps`, `batch_size`, `seed`.

    Returns:
        `Report`: What was found: rows by number of steps in `evaluation.results`, sentences in `verdicts`.

    Raises:
        ValueError: If a setting is out of range, or the solver is for another kind of process.
        UnsuitableCallError, FieldError: If the pipeline's call would not run the solver, or not all of it.
    """
    name = name or str(getattr(pipe.config, "_name_or_path", None) or type(pipe).__name__)
    settings = Settings(pipeline=name, output_dir=Path(output_dir), evaluate_only=True, solver="given", **settings)
    given = solver.solver_file if isinstance(solver, SearchedSolverScheduler) else solver
    file = SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=given).solver_file
    conditions = admit(pipe, conditions, file.step_counts)
    network = load_feature_network(pipe, conditions[0], settings.of_images)
    report = heading(pipe, conditions, settings)
    with Progress({MEASURING: 0, IMAGES: 0, DRAWING: 0}, lambda *_: None) as progress:
        session = Session(pipe, conditions, settings, "search.measure(...)", network, progress)
        try:
            return session.evaluate(report, dict(file.solvers), dict(file.provenance), None)
        finally:
            session.calls.remove()
