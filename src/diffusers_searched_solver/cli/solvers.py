"""The commands that list, show, compare and write solvers."""

import argparse
import inspect
import os
from collections.abc import Iterable, Mapping

import diffusers
from diffusers import SchedulerMixin

from ..hub import list_hub_solvers
from ..loading import list_bundled_solvers
from ..scheduler import SearchedSolverScheduler
from ..schedules import said_of_derived, searched_table
from ..serialization import SolverFile, load_solver_file
from ..solver import SearchedSolver
from ..tabulate import solver_from_scheduler
from .terminal import printable, summary, table


SOLVER = "a folder, a solver file, the name of a bundled solver, or a Hub repository"


def list_solvers(options: argparse.Namespace):
    if options.hub is not None:
        names = list_hub_solvers(options.hub or None)
        print("\n".join(map(printable, names)) or f"The Hub has no solver for {options.hub or 'any model'} yet.")
        return
    for name in list_bundled_solvers():
        file = load(name)
        print(f"{name:20}for {file.provenance['base_model']:36}{', '.join(map(str, file.step_counts))} steps")


def show(options: argparse.Namespace):
    file = load(options.name)
    for key, value in summary(file).items():
        print(f"{key:20}{value}")
    for count in options.num_steps or file.step_counts:
        print(title(count, [file]), *table({"": table_of(options.name, file, count)}), sep="\n")


def compare(options: argparse.Namespace):
    names = {"A": options.first, "B": options.second}
    files = {each: load(name) for each, name in names.items()}
    rows = {each: {"solver": printable(names[each]), **summary(file)} for each, file in files.items()}
    for key in {**rows["A"], **rows["B"]}:
        a, b = (rows[each].get(key, "-") for each in names)
        print(f"{key:20}{a}" if a == b else f"{key:18}A {a}\n{'':18}B {b}")
    common = [count for count in files["A"].step_counts if count in files["B"].solvers]
    if not common and not options.num_steps:
        print("\nThere is no step count that both have.")
    for count in options.num_steps or common:
        both = {each: table_of(names[each], file, count) for each, file in files.items()}
        print(title(count, files.values()), *table(both), sep="\n")


def tabulate(options: argparse.Namespace):
    scheduler = _diffusers_scheduler(options.source, options.scheduler, options.config)
    solvers = {n: solver_from_scheduler(scheduler, n, options.mu) for n in options.num_steps}
    own = SearchedSolverScheduler.from_config(scheduler.config)
    provenance = {"base_model": options.source, "table_of": repr(scheduler)}
    file = SolverFile(solvers, own.process, own.config.prediction_type, provenance)
    SearchedSolverScheduler.from_config(scheduler.config, solver=file).save_pretrained(options.output)
    print(f"Wrote {options.output}: {type(scheduler).__name__} in {', '.join(map(str, file.step_counts))} steps.")


def _diffusers_scheduler(source: str, name: str | None, changes: Mapping) -> SchedulerMixin:
    """The scheduler of a pipeline or a repository, or another one for the same model."""
    for subfolder in ("scheduler", None):
        try:
            config = SearchedSolverScheduler.load_config(source, subfolder=subfolder)
            break
        except OSError as error:
            cause = error
    else:
        raise ValueError(f"There is no scheduler's config in '{source}'. Name a pipeline or a scheduler.") from cause
    name = name or config.get("_class_name", "")
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise ValueError(f"{name!r} is none of diffusers' schedulers. Name one with --scheduler.")
    unknown = sorted(set(changes) - set(inspect.signature(cls.__init__).parameters))
    if unknown:
        raise ValueError(f"{name} has no config entry {unknown[0]!r}.")
    return cls.from_config(config, **changes)


def load(name: str) -> SolverFile:
    """The solver file of a name as the user typed it."""
    if os.path.isfile(name):
        return load_solver_file(name)
    file = load_scheduler(name).solver_file
    if file is None:
        raise ValueError(f"'{name}' is a scheduler without a searched solver. Name {SOLVER}.")
    return file


def load_scheduler(name: str) -> SearchedSolverScheduler:
    """The scheduler of a name as the user typed it; the Hub is asked for nothing that cannot be there."""
    if "/" not in name and not os.path.isdir(name) and name not in list_bundled_solvers():
        raise ValueError(
            f"There is no folder and no bundled solver of the name '{name}'; the bundled ones are "
            f"{', '.join(list_bundled_solvers())}. A Hub repository is named org/name."
        )
    return SearchedSolverScheduler.from_pretrained(name)


def table_of(name: str, file: SolverFile, count: int) -> SearchedSolver:
    """What the scheduler would run in so many steps: the table of the file, or one that is derived."""
    try:
        return searched_table(file, count, strict=False)
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from error


def title(count: int, files: Iterable[SolverFile]) -> str:
    """The step count, and which of its tables nobody has searched."""
    derived = [said_of_derived(file, count) for file in files if count not in file.solvers]
    return "\n".join([f"\n{count} steps", *dict.fromkeys(derived)])
