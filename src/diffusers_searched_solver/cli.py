"""The command `searched-solver`: list, show and compare solvers, check one on a pipeline, convert checkpoints."""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import diffusers
from diffusers import SchedulerMixin

from . import check_command, convert
from .hub import list_hub_solvers
from .loading import list_bundled_solvers
from .scheduler import SearchedSolverScheduler
from .serialization import SolverFile, load_solver_file
from .solver import SearchedSolver
from .tabulate import solver_from_scheduler
from .terminal import printable, summary, table


SOLVER = "a folder, a solver file, the name of a bundled solver, or a Hub repository"


def main(arguments: Sequence[str] | None = None) -> int:
    """
    The command line.

    Returns:
        `int`: The exit status, 2 after an error.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="searched-solver", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(run: Callable[[argparse.Namespace], int | None], name: str, title: str, **texts):
        texts = {"help": title, "description": f"{title[0].upper()}{title[1:]}.", **texts}
        added = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
        added.set_defaults(run=run)
        return added

    add = command(_list, "list", "list the solvers that come with the package, or those on the Hub").add_argument
    add("--hub", nargs="?", const="", metavar="MODEL", help="those on the Hub, all or for one model (org/name)")

    add = command(_show, "show", "show a solver's tables and where they come from").add_argument
    add("name", help=SOLVER)
    add("--num-steps", type=int, nargs="+", help="the tables to show (default: all)")

    add = command(_compare, "compare", "show two solvers side by side").add_argument
    add("first", help=SOLVER)
    add("second", help="the same")
    add("--num-steps", type=int, nargs="+", help="the tables to show (default: those that both have)")

    add = command(_tabulate, "tabulate", "write a diffusers scheduler's tables as a solver").add_argument
    add("source", help="a pipeline or a scheduler: a folder or a Hub repository")
    add(
        "--scheduler", metavar="CLASS", help="another of diffusers' schedulers for it, such as UniPCMultistepScheduler"
    )
    add("--config", type=json.loads, default={}, help="config entries to change, as JSON")
    add("--num-steps", type=int, nargs="+", required=True, help="the step counts to write")
    add("--mu", type=float, help="what the pipeline passes to a scheduler with dynamic shifting")
    add("--output", required=True, metavar="FOLDER", help="what `from_pretrained` then loads")

    texts = {"description": check_command.DESCRIPTION, "epilog": check_command.EPILOG}
    check = command(_check, "check", "measure whether a solver is good for your pipeline", **texts)
    check.add_argument("name", help=SOLVER)
    check_command.add_arguments(check)

    convert.add_arguments(command(_convert, "convert", "turn a checkpoint of SiT, DiT or FlowDCN into a pipeline"))
    return parser


def _list(options: argparse.Namespace):
    if options.hub is not None:
        names = list_hub_solvers(options.hub or None)
        print("\n".join(map(printable, names)) or f"The Hub has no solver for {options.hub or 'any model'} yet.")
        return
    for name in list_bundled_solvers():
        file = _load(name)
        print(f"{name:20}for {file.provenance['base_model']:36}{', '.join(map(str, file.step_counts))} steps")


def _show(options: argparse.Namespace):
    file = _load(options.name)
    for key, value in summary(file).items():
        print(f"{key:20}{value}")
    for count in options.num_steps or file.step_counts:
        print(f"\n{count} steps", *table({"": _table_of(options.name, file, count)}), sep="\n")


def _compare(options: argparse.Namespace):
    names = {"A": options.first, "B": options.second}
    files = {each: _load(name) for each, name in names.items()}
    rows = {each: {"solver": printable(names[each]), **summary(file)} for each, file in files.items()}
    for key in {**rows["A"], **rows["B"]}:
        a, b = (rows[each].get(key, "-") for each in names)
        print(f"{key:20}{a}" if a == b else f"{key:18}A {a}\n{'':18}B {b}")
    common = [count for count in files["A"].step_counts if count in files["B"].solvers]
    if not common and not options.num_steps:
        print("\nThere is no step count that both have.")
    for count in options.num_steps or common:
        both = {each: _table_of(names[each], file, count) for each, file in files.items()}
        print(f"\n{count} steps", *table(both), sep="\n")


def _tabulate(options: argparse.Namespace):
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


def _check(options: argparse.Namespace) -> int:
    file = _load(options.name)
    for count in options.num_steps or ():
        _table_of(options.name, file, count)  # Raises before a pipeline is downloaded.
    return check_command.run(file, options)


def _convert(options: argparse.Namespace):
    convert.run(**{key: value for key, value in vars(options).items() if key != "run"})


def _load(name: str) -> SolverFile:
    if os.path.isfile(name):
        return load_solver_file(name)
    file = SearchedSolverScheduler.from_pretrained(name).solver_file
    if file is None:
        raise ValueError(f"'{name}' is a scheduler without a searched solver. Name {SOLVER}.")
    return file


def _table_of(name: str, file: SolverFile, count: int) -> SearchedSolver:
    if count not in file.solvers:
        raise ValueError(f"'{name}' has no solver of {count} steps, only of {', '.join(map(str, file.step_counts))}.")
    return file.solvers[count]


if __name__ == "__main__":
    sys.exit(main())
