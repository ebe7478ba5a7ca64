"""The command `searched-solver`: list, show, compare, merge and export solvers, check one, convert checkpoints."""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from .. import convert
from . import check as check_command
from .exchange import FORMATS, export, merge
from .solvers import SOLVER, compare, list_solvers, load, show, table_of, tabulate
from .terminal import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """
    The command line.

    Returns:
        `int`: The exit status, 2 after an error.
    """
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever reads, such as `head`, has enough; the interpreter would complain of the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="searched-solver", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('diffusers-searched-solver')}")
    command = functools.partial(_command, parser.add_subparsers(required=True, metavar="command"))

    add = command(
        list_solvers, "list", "list the solvers that come with the package, or those on the Hub"
    ).add_argument
    add("--hub", nargs="?", const="", metavar="MODEL", help="those on the Hub, all or for one model (org/name)")

    add = command(show, "show", "show a solver's tables and where they come from").add_argument
    add("name", help=SOLVER)
    add("--num-steps", type=int, nargs="+", help="the tables to show (default: all)")

    add = command(compare, "compare", "show two solvers side by side").add_argument
    add("first", help=SOLVER)
    add("second", help="the same")
    add("--num-steps", type=int, nargs="+", help="the tables to show (default: those that both have)")

    add = command(merge, "merge", "write the step counts of two solvers of one model as one").add_argument
    add("first", metavar="A", help=SOLVER)
    add("second", metavar="B", help="the same")
    add("--output", required=True, metavar="C", help="a folder, or a file if A is one")
    add("--prefer", choices=["A", "B"], help="whose solver to take where both have the step count")

    add = command(export, "export", "write a solver's noise levels and coefficients for other programs").add_argument
    add("name", help=SOLVER)
    add("--to", choices=sorted(FORMATS), required=True, help="json has all that a run needs, the others noise levels")
    add("--num-steps", type=int, nargs="+", help="the tables to write (default: all)")
    add("--output", metavar="FILE", help="where to (default: the terminal)")

    add = command(tabulate, "tabulate", "write a diffusers scheduler's tables as a solver").add_argument
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


def _command(commands, run: Callable[[argparse.Namespace], int | None], name: str, title: str, **texts):
    """The parser of one command, which `run` does."""
    texts = {"help": title, "description": f"{title[0].upper()}{title[1:]}.", **texts}
    added = commands.add_parser(name, formatter_class=argparse.RawDescriptionHelpFormatter, **texts)
    added.set_defaults(run=run)
    return added


def _check(options: argparse.Namespace) -> int:
    file = load(options.name)
    for count in options.num_steps or ():
        table_of(options.name, file, count)  # Raises before a pipeline is downloaded.
    return check_command.run(file, options)


def _convert(options: argparse.Namespace):
    convert.run(**{key: value for key, value in vars(options).items() if key != "run"})
