"""The search, from the command line to the report: `accelerate launch search/run.py --help`."""

import argparse
import logging
import shlex
import signal
import sys
from datetime import timedelta
from importlib.metadata import version

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.calls import build_conditions
from search.arguments import DTYPES, parse_arguments
from search.earlier import earlier_results
from search.estimate import estimate, expected_calls
from search.fit.strategy import check_settings, given_solvers
from search.launch.journal import Journal
from search.launch.processes import LostProcessError
from search.launch.progress import Progress
from search.measure.image_metrics import load_feature_network
from search.measure.measuring import final_numbers, measure
from search.pipeline.field import FieldError, NetworkCalls
from search.pipeline.loading import hub_repository, load_pipeline, takes_guidance
from search.results.card import check_place
from search.results.output import write_results
from search.results.publish import PublishError, check_target, publish
from search.session import run_search
from search.teacher.admission import admit


# What a journal's outcomes depend on.
SETTINGS = (
    "pipeline",
    "num_steps",
    "class_labels",
    "prompts",
    "guidance_scale",
    "call_kwargs",
    "num_samples",
    "teacher_steps",
    "fitter",
    "start_solver",
    "max_calls",
    "batch_size",
    "mixed_precision",
    "seed",
)
STOPPED = 128 + signal.SIGTERM
GO_ON = "What was found so far is in --output-dir: go on with --resume."


def main(arguments: list[str] | None = None):
    """Load, search, measure, write."""
    args = parse_arguments(arguments)
    check_place(args.output_dir)
    if args.push_to_hub is not None:
        check_target(args.push_to_hub)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    accelerator = _accelerator(args)
    pipe = load_pipeline(args.pipeline, DTYPES[args.mixed_precision], accelerator.device)
    if args.fitter == "gradient" and args.guidance_scale is None and takes_guidance(pipe):
        args.guidance_scale = 1.0
    conditions = build_conditions(pipe, args.class_labels, args.prompts, args.guidance_scale, args.call_kwargs)
    command = shlex.join(["accelerate", "launch", "search/run.py", *(arguments or sys.argv[1:])])
    report = _heading(pipe, conditions, args, command)
    solvers = provenance = tuned = None
    if args.evaluate_only:
        solvers, provenance, tuned, report = earlier_results(pipe, args, report)
    check_settings(args.num_steps, conditions, args.teacher_steps, args.batch_size)
    conditions = admit(pipe, conditions, args.num_steps)
    given = given_solvers(pipe, args.start_solver and SearchedSolverScheduler.from_pretrained(args.start_solver))
    if args.num_eval_samples < 2:
        raise ValueError(f"`--num-eval-samples` is {args.num_eval_samples}, expected at least 2.")
    network = load_feature_network(pipe, conditions[0], args)
    if args.dry_run:
        print(estimate(pipe, conditions, args, network))
        return
    settings = {name: getattr(args, name) for name in SETTINGS} | {"version": version("diffusers-searched-solver")}
    journal = None
    if not args.evaluate_only:
        calls = NetworkCalls(pipe)
        journal = Journal(calls, args.output_dir / "journal.json", settings, args.resume)
    accelerator.init_trackers("searched_solver", {name: str(value) for name, value in settings.items()})
    with Progress(expected_calls(pipe, conditions, args), accelerator.log) as progress:
        if journal is not None:
            outcomes, report["search"] = run_search(pipe, conditions, args, given, calls, journal, progress)
            solvers = {n: outcome.solver for n, outcome in outcomes.items()}
            tuned = {n: outcome.tuned for n, outcome in outcomes.items()}
        teacher_steps = report["search"]["teacher_steps"] if "search" in report else args.teacher_steps
        found = measure(pipe, conditions, solvers, tuned, teacher_steps, args, network, progress)
        report["evaluation"] = {"command": command, **found}
        progress.track(final_numbers(report["evaluation"]))
    if accelerator.is_main_process:
        write_results(pipe, conditions, solvers, report, args.output_dir, provenance)
    if journal is not None:
        journal.delete()
    for tracker in accelerator.trackers:
        tracker.finish()
    if args.push_to_hub is not None and accelerator.is_main_process:
        print(f"Uploaded to {publish(args.output_dir, args.push_to_hub)}")


def _accelerator(args: argparse.Namespace) -> Accelerator:
    """
    The processes of the launch, and the trackers that are asked for.

    Raises:
        ValueError: If one of these is not installed; accelerate would leave it out.
    """
    accelerator = Accelerator(
        # Without an accelerator, accelerate takes the processes of a launch for so many launches unless it is told.
        cpu=not torch.accelerator.is_available(),
        log_with=args.report_to,
        project_dir=args.output_dir,
        # Processes wait for each other's batches.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    missing = sorted({*(args.report_to or [])} - {str(tracker) for tracker in accelerator.log_with})
    if missing:
        raise ValueError(f"`--report-to {missing[0]}` needs a package that is not installed. Install {missing[0]}.")
    return accelerator


def _heading(pipe: DiffusionPipeline, conditions: list[dict], args: argparse.Namespace, command: str) -> dict:
    """A report without what is found."""
    return {
        "command": command,
        "pipeline": args.pipeline,
        "pipeline_class": type(pipe).__name__,
        "base_model": hub_repository(args.pipeline),
        "license": args.license,
        "example": conditions[0],
        "guidance_scale": args.guidance_scale,
        "conditions": len(conditions),
        "seed": args.seed,
        "processes": PartialState().num_processes,
        "versions": {name: version(name) for name in ("diffusers-searched-solver", "diffusers", "torch")},
    }


def _stop(number, frame):
    """Stop, and at a second signal at once: nothing is left to be written."""
    for handled in (signal.SIGTERM, signal.SIGINT):
        signal.signal(handled, signal.SIG_DFL)
    raise KeyboardInterrupt


if __name__ == "__main__":
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        main()
    except KeyboardInterrupt:
        print(f"Stopped. {GO_ON}", file=sys.stderr)
        sys.exit(STOPPED)
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {error}\nLower --batch-size, or use more processes.")
    except (LostProcessError, OSError) as error:
        sys.exit(f"error: {error}\nThis has to be put right first. {GO_ON}")
    except (ValueError, FieldError, PublishError) as error:
        sys.exit(f"error: {error}")
