"""What a folder already has: an earlier search that is added to, gone on with, measured again, or not overwritten."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, SolverFile
from diffusers_searched_solver.serialization import SOLVER_FILE

from .known.baselines import KnownTable, known_tables
from .launch.processes import agree
from .results.record import Earlier, Report
from .settings import Settings


# What all solvers of a folder share.
SHARED = ("pipeline", "pipeline_class", "guidance_scale", "conditions", "example", "dtype", "seed")


def earlier_search(pipe: DiffusionPipeline, settings: Settings, report: Report) -> tuple[Earlier, Settings]:
    """
    What is there already, and the settings of what is still to be searched: `num_steps` is empty if nothing is.

    Raises:
        ValueError: If the folder has results of other settings or of the same step counts, and neither `overwrite` nor
            `resume` says what is to become of them.
    """
    earlier = agree(_finished(settings) if PartialState().is_main_process else None)
    if earlier.report is None:
        return earlier, settings
    place = f"'{settings.output_dir}'"
    if earlier.report.search is None:
        raise ValueError(f"{place} has a measured solver from elsewhere. Choose another --output-dir, or --overwrite.")
    changed = _changed(settings, report, earlier.report)
    if changed:
        raise ValueError(
            f"The search in {place} had other settings: {'; '.join(changed)}. Solvers of one folder share them: "
            "choose another --output-dir, or replace what is there with --overwrite."
        )
    missing = tuple(n for n in settings.num_steps if n not in earlier.solvers)
    if not missing and not settings.resume:
        have = ", ".join(map(str, earlier.solvers))
        raise ValueError(
            f"{place} has solvers of {have} steps already. Search them again with --overwrite, or others to be added "
            "with --num-steps."
        )
    return earlier, replace(settings, num_steps=missing)


def _finished(settings: Settings) -> Earlier:
    report = None if settings.overwrite else Report.read(settings.output_dir)
    if report is None:
        return Earlier()
    file = SearchedSolverScheduler.from_pretrained(settings.output_dir).solver_file
    # A search that was begun to add step counts has written some of them already.
    known = report.search.costs if report.search is not None else file.solvers
    return Earlier(report, {n: solver for n, solver in file.solvers.items() if n in known})


def _changed(settings: Settings, report: Report, earlier: Report) -> list[str]:
    now, then = ({key: getattr(each, key) for key in SHARED} for each in (report, earlier))
    now |= {"teacher_steps": settings.teacher_steps, "fitter": settings.fitter}
    then |= {"teacher_steps": earlier.search.least_teacher_steps, "fitter": earlier.search.fitter}
    # As they come back from JSON.
    now["example"] = replace(report, example=now["example"]).from_json(report.to_json()).example
    return [f"{key} was {then[key]!r}, is {now[key]!r}" for key in now if now[key] != then[key]]


def to_measure(
    pipe: DiffusionPipeline, settings: Settings, report: Report
) -> tuple[dict[int, SearchedSolver], dict[str, str] | None, dict[int, dict[str, KnownTable]] | None, Report]:
    """
    What `--evaluate-only` is to measure, and the report to complete.

    Args:
        report: Without findings.

    Returns:
        The tables by number of steps, on the pipeline's noise process; where they come from, if that is no search in
        `output_dir`; the best known tables as that search has found them; and the report, with what else it had found.

    Raises:
        ValueError: If there is no such solver, or the search had other settings.
    """
    file, earlier = agree(_read(settings) if PartialState().is_main_process else None)
    file = SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=file).solver_file
    step_counts = settings.num_steps or file.step_counts
    missing = [n for n in step_counts if n not in file.solvers]
    if missing:
        have = ", ".join(map(str, file.step_counts))
        raise ValueError(f"The solver has no table of {missing[0]} steps; pass some of --num-steps {have}.")
    solvers = {n: file.solvers[n] for n in step_counts}
    if earlier is None:
        return solvers, dict(file.provenance), None, report
    changed = _changed(settings, report, earlier)
    if sorted(step_counts) != sorted(earlier.search.costs):
        changed.append(f"num_steps was {sorted(earlier.search.costs)}, is {sorted(step_counts)}")
    if changed:
        raise ValueError(
            f"The search in '{settings.output_dir}' had other settings: {'; '.join(changed)}. Measure with the same "
            f"ones, or pass `--solver {settings.output_dir}` and another --output-dir."
        )
    return solvers, None, _tuned(pipe, solvers, earlier.search.tuned), replace(report, search=earlier.search)


def _tuned(
    pipe: DiffusionPipeline, solvers: Mapping[int, SearchedSolver], names: Mapping[int, Sequence[tuple[str, str]]]
) -> dict[int, list[KnownTable]]:
    """The known tables that the report of a search names, in its order."""
    known = {n: {(t.family, t.setting): t for t in known_tables(pipe.scheduler.config, n)} for n in solvers}
    return {n: [known[n][name] for name in names[n]] for n in solvers}


def _read(settings: Settings) -> tuple[SolverFile, Report | None]:
    """The solver, and the report of its search if that is to be completed."""
    place = f"'{settings.output_dir}'"
    if settings.solver is None:
        earlier = Report.read(settings.output_dir)
        if earlier is None or earlier.search is None:
            raise ValueError(f"There is no finished search in {place}. Search, or name a --solver.")
        return SearchedSolverScheduler.from_pretrained(settings.output_dir).solver_file, earlier
    unfinished = (settings.output_dir / "journal.jsonl").exists()
    if (
        unfinished
        or not settings.overwrite
        and (found := Report.read(settings.output_dir))
        and found.search is not None
    ):
        raise ValueError(f"{place} has a search's results. Choose another --output-dir for '{settings.solver}'.")
    try:
        file = SearchedSolverScheduler.from_pretrained(settings.solver).solver_file
    except OSError as error:
        raise ValueError(str(error)) from error
    if file is None:
        raise ValueError(f"'{settings.solver}' has no '{SOLVER_FILE}', so there is nothing to measure.")
    return file, None
