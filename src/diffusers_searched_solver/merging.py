"""Solver files of one model in one: searched apart, used together."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from .serialization import SolverFile
from .solver import SearchedSolver


# Entries of the provenance that say what a solver is for.
SAME = ("base_model", "guidance_scale")


def merge_solver_files(
    first: SolverFile, second: SolverFile, prefer: Literal["first", "second"] | None = None
) -> SolverFile:
    """
    The step counts of two solver files in one.

    Args:
        first, second (`SolverFile`): For the same noise process, prediction type, base model and guidance scale.
        prefer (*optional*): Whose solver to take where both have one of the same step count.

    Returns:
        `SolverFile`: Of equal entries of the provenance one, of others both, each with its step counts. If frames or
            row sums differ, all solvers are written in the velocity frame with free row sums; every run is the same.

    Raises:
        ValueError: If the files are for different models, or both have a step count and `prefer` does not say whose.
    """
    if prefer not in (None, "first", "second"):
        raise ValueError(f'`prefer` is {prefer!r}, expected "first", "second" or None.')
    for name, one, other in _differences(first, second):
        raise ValueError(
            f"The solvers are for different models: `{name}` is {one!r} in the first and {other!r} in the second. "
            "Merge those that were searched alike."
        )
    both = sorted(set(first.solvers) & set(second.solvers))
    if both and prefer is None:
        raise ValueError(
            f'Both files have solvers of {", ".join(map(str, both))} steps. Say whose to take: `prefer` is "first" or '
            '"second".'
        )
    over, under = (first, second) if prefer == "first" else (second, first)
    solvers = {**under.solvers, **over.solvers}
    left = {count for count in under.solvers if count not in over.solvers}
    provenance = _merged_provenance({", ".join(map(str, over.step_counts)): over.provenance} | _of(left, under))
    return replace(first, solvers=_of_one_kind(dict(sorted(solvers.items()))), provenance=provenance)


def _differences(first: SolverFile, second: SolverFile):
    """Name and both values of whatever the files are for that differs; what only one of them says does not."""
    for name in ("process", "prediction_type"):
        if getattr(first, name) != getattr(second, name):
            yield name, str(getattr(first, name)), str(getattr(second, name))
    for name in SAME:
        values = first.provenance.get(name), second.provenance.get(name)
        if None not in values and values[0] != values[1]:
            yield name, *values


def _of(counts: set[int], file: SolverFile) -> Mapping[str, Mapping[str, str]]:
    return {", ".join(map(str, sorted(counts))): file.provenance} if counts else {}


def _merged_provenance(by_counts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    merged = {}
    for key in dict.fromkeys(key for provenance in by_counts.values() for key in provenance):
        values = {counts: provenance[key] for counts, provenance in by_counts.items() if key in provenance}
        same = len(set(values.values())) == 1
        merged[key] = (
            next(iter(values.values())) if same else "; ".join(f"{n} steps: {text}" for n, text in values.items())
        )
    return merged


def _of_one_kind(solvers: Mapping[int, SearchedSolver]) -> Mapping[int, SearchedSolver]:
    if len({(solver.frame, solver.consistent) for solver in solvers.values()}) == 1:
        return solvers
    return {n: replace(solver.in_frame("velocity"), consistent=False) for n, solver in solvers.items()}
