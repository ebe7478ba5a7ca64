"""The search, from the command line to the report: `accelerate launch search/run.py --help`."""

import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from diffusers import DiffusionPipeline

from search.earlier import earlier_search, to_measure
from search.estimate import estimate, expected_calls
from search.fit.budget import check_calls
from search.fit.demands import usual_demands
from search.fit.find import check_settings
from search.launch.heartbeat import peers_watched
from search.launch.network_calls import NetworkCalls
from search.launch.processes import LostProcessError
from search.launch.progress import DRAWING, Progress
from search.measure.image_metrics import load_feature_network
from search.pipeline.conditions import sampled_conditions
from search.pipeline.field import FieldError
from search.pipeline.loading import load_pipeline, takes_guidance
from search.results.card import check_place
from search.results.publish import PublishError, check_target, publish
from search.session import Session, heading
from search.settings import Settings, parse_settings
from search.teacher.admission import admit


STOPPED = 128 + signal.SIGTERM
GO_ON = "What was found so far is in --output-dir: go on with --resume."


def main(arguments: list[str] | None = None):
    """Load, search, measure, write."""
    settings = parse_settings(arguments)
    check_place(settings.output_dir)
    if settings.push_to_hub is not None:
        check_target(settings.push_to_hub)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    accelerator = _accelerator(settings)
    pipe = load_pipeline(settings.source, settings.dtype, accelerator.device)
    if settings.fitter == "gradient" and settings.guidance_scale is None and takes_guidance(pipe):
        settings = replace(settings, guidance_scale=(1.0,))
    command = shlex.join(["accelerate", "launch", "search/run.py", *(arguments or sys.argv[1:])])
    with peers_watched(GO_ON):
        _run(pipe, settings, command, accelerator.log)
    if settings.dry_run:
        return
    for tracker in accelerator.trackers:
        tracker.finish()
    if settings.push_to_hub is not None and accelerator.is_main_process:
        print(f"Uploaded to {publish(settings.output_dir, settings.push_to_hub)}")


def _run(pipe: DiffusionPipeline, settings: Settings, command: str, track: Callable):
    """What the settings ask for: an estimate, a measurement, or a search as far as there is none yet."""
    labels, prompts, scale = settings.class_labels, settings.all_prompts, settings.scale
    conditions = sampled_conditions(pipe, labels, prompts, scale, settings.sizes, settings.of_every_call)
    report = heading(pipe, conditions, settings)
    if settings.evaluate_only:
        solvers, provenance, tuned, report = to_measure(pipe, settings, report)
        settings = replace(settings, num_steps=tuple(solvers))
    else:
        earlier, settings = earlier_search(pipe, settings, report)
    if settings.num_steps:
        check_settings(settings.num_steps, conditions, settings.teacher_steps, settings.batch_size)
        conditions = admit(pipe, conditions, settings.num_steps)
    network = load_feature_network(pipe, conditions[0], settings.of_images)
    expected = {DRAWING: 0}
    if settings.num_steps:
        calls = NetworkCalls(pipe)
        demands = usual_demands(pipe, conditions, settings.teacher_steps, calls)
        calls.remove()
        if not settings.evaluate_only and settings.fitter == "gauss-newton":
            check_calls(demands, settings.num_steps, settings.max_calls)
        expected = expected_calls(demands, conditions, settings)
    if settings.dry_run:
        finished = f"The search in '{settings.output_dir}' is finished: there is nothing to go on with."
        print(estimate(pipe, conditions, settings, demands, expected, network) if settings.num_steps else finished)
        return
    with Progress(expected, track) as progress:
        session = Session(pipe, conditions, settings, command, network, progress)
        if settings.evaluate_only:
            session.evaluate(report, solvers, provenance, tuned)
        elif settings.num_steps:
            session.search(report, earlier)
        else:
            session.finish(earlier)
    session.calls.remove()


def _accelerator(settings: Settings) -> Accelerator:
    """
    The processes of the launch, and the trackers that are asked for.

    Raises:
        ValueError: If one of these is not installed; accelerate would leave it out.
    """
    accelerator = Accelerator(
        # Without an accelerator, accelerate takes the processes of a launch for so many launches unless it is told.
        cpu=not torch.accelerator.is_available(),
        log_with=None if settings.report_to is None else list(settings.report_to),
        project_dir=settings.output_dir,
        # Processes wait for each other's batches.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    missing = sorted({*(settings.report_to or [])} - {str(tracker) for tracker in accelerator.log_with})
    if missing:
        raise ValueError(f"`--report-to {missing[0]}` needs a package that is not installed. Install {missing[0]}.")
    if not settings.dry_run:
        accelerator.init_trackers("searched_solver", {name: str(value) for name, value in vars(settings).items()})
    return accelerator


def _stop(number, frame):
    """Stop, and at a second signal at once: nothing is left to be written."""
    for handled in (signal.SIGTERM, signal.SIGINT):
        signal.signal(handled, signal.SIG_DFL)
    raise KeyboardInterrupt


if __name__ == "__main__":
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    # After a process that has failed, accelerate says so at length.
    LAUNCHED = "\n(What follows is accelerate's.)" if "ACCELERATE_MIXED_PRECISION" in os.environ else ""
    try:
        main()
    except KeyboardInterrupt:
        print(f"Stopped. {GO_ON}{LAUNCHED}", file=sys.stderr)
        sys.exit(STOPPED)
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {error}\nLower --batch-size, or use more processes.{LAUNCHED}")
    except (LostProcessError, OSError) as error:
        sys.exit(f"error: {error}\nThis has to be put right first. {GO_ON}{LAUNCHED}")
    except (ValueError, FieldError, PublishError) as error:
        sys.exit(f"error: {error}{LAUNCHED}")
