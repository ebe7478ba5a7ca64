"""What is there to be measured without a search: the solver of an earlier one, or any by its name."""

import argparse
import json
from collections.abc import Mapping

from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, SolverFile
from diffusers_searched_solver.serialization import SOLVER_FILE

from .known.baselines import KnownTable, known_tables
from .launch.processes import agree


# What a report says once for the search and the measurement.
SHARED = ("pipeline", "guidance_scale", "conditions", "seed")


def earlier_results(
    pipe: DiffusionPipeline, args: argparse.Namespace, report: dict
) -> tuple[dict[int, SearchedSolver], dict[str, str] | None, dict[int, dict[str, KnownTable]] | None, dict]:
    """
    What `--evaluate-only` is to measure, and the report to complete.

    Args:
        args: `solver`, `output_dir` and `num_steps`, which is set to the solver's step counts unless it is given.
        report: Without findings.

    Returns:
        The tables by number of steps, on the pipeline's noise process; where they come from, if that is no search in
        `output_dir`; the best known tables as that search has found them; and the report, with what else it had found.

    Raises:
        ValueError: If there is no such solver, or the search had other settings.
    """
    file, earlier = agree(_read(args) if PartialState().is_main_process else None)
    file = SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=file).solver_file
    args.num_steps = args.num_steps or file.step_counts
    missing = [n for n in args.num_steps if n not in file.solvers]
    if missing:
        have = ", ".join(map(str, file.step_counts))
        raise ValueError(f"The solver has no table of {missing[0]} steps; pass some of --num-steps {have}.")
    solvers = {n: file.solvers[n] for n in args.num_steps}
    if earlier is None:
        return solvers, dict(file.provenance), None, report
    _check_settings(args, report, earlier)
    return solvers, None, _tuned(pipe, solvers, earlier), {**report, **earlier}


def _tuned(pipe, solvers, earlier: Mapping) -> dict[int, dict[str, KnownTable]]:
    """The known tables that the report of a search names, in its order."""
    settings = earlier["search"]["tuned"]
    known = {n: {(t.family, t.setting): t for t in known_tables(pipe.scheduler.config, n)} for n in solvers}
    return {n: {f: known[n][f, s] for f, s in settings[str(n)].items()} for n in solvers}


def _read(args: argparse.Namespace) -> tuple[SolverFile, dict | None]:
    """The solver, and the report of its search if that is to be completed."""
    path = args.output_dir / "report.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if args.solver is None:
        if "search" not in earlier:
            raise ValueError(f"There is no finished search in '{args.output_dir}'. Search, or name a --solver.")
        return SearchedSolverScheduler.from_pretrained(args.output_dir).solver_file, earlier
    if "search" in earlier or (args.output_dir / "journal.json").exists():
        raise ValueError(
            f"'{args.output_dir}' has a search's results. Choose another --output-dir for '{args.solver}'."
        )
    try:
        file = SearchedSolverScheduler.from_pretrained(args.solver).solver_file
    except OSError as error:
        raise ValueError(str(error)) from error
    if file is None:
        raise ValueError(f"'{args.solver}' has no '{SOLVER_FILE}', so there is nothing to measure.")
    return file, None


def _check_settings(args: argparse.Namespace, report: Mapping, earlier: Mapping):
    now = {key: report[key] for key in SHARED}
    then = {key: earlier[key] for key in SHARED}
    now |= {"teacher_steps": args.teacher_steps, "num_steps": sorted(args.num_steps)}
    then["teacher_steps"] = earlier["search"]["least_teacher_steps"]
    then["num_steps"] = sorted(map(int, earlier["evaluation"]["results"]))
    changed = [f"{key} was {then[key]!r}, is {now[key]!r}" for key in now if now[key] != then[key]]
    if changed:
        raise ValueError(
            f"The search in '{args.output_dir}' had other settings: {'; '.join(changed)}. Measure with the same ones, "
            f"or pass `--solver {args.output_dir}` and another --output-dir."
        )
