"""
Search few-step solvers for a diffusers pipeline and measure them.

    accelerate launch search/run.py --pipeline examples/digits-sit --num-steps 5 8 10 --output-dir OUT

OUT is then what `SearchedSolverScheduler.from_pretrained(OUT)` loads, with `report.html`, `report.json`, `images.png`
and a model card beside it; --push-to-hub uploads them. Samples are dealt out to the processes of `accelerate launch`.
A search that was killed goes on with --resume; meanwhile OUT has the best solvers so far.
"""

import argparse
import json
import logging
import shlex
import signal
import sys
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from diffusers import DiffusionPipeline
from huggingface_hub import cached_assets_path

from search.card import check_place
from search.earlier import earlier_results
from search.estimate import estimate
from search.feature_network import INCEPTION
from search.field import FieldError, NetworkCalls
from search.gradient import PAPER_RECIPE
from search.image_metrics import load_feature_network
from search.journal import Journal
from search.loading import NAMES, build_conditions, hub_repository, load_pipeline, takes_guidance
from search.measure import measure
from search.memory import inference_memory, peak_memory
from search.output import write_results
from search.processes import LostProcessError
from search.publish import PublishError, check_target, publish
from search.session import run_search
from search.strategy import BATCH_SIZE, ITERATIONS, MAX_CALLS, NUM_SAMPLES, TEACHER_STEPS, check_settings


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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
    "iterations",
    "max_calls",
    "batch_size",
    "mixed_precision",
    "seed",
)
# What depends on the fitter unless it is given.
DEFAULTS = {
    "gauss-newton": {"num_samples": NUM_SAMPLES, "teacher_steps": TEACHER_STEPS},
    "gradient": {"num_samples": PAPER_RECIPE.num_samples, "teacher_steps": PAPER_RECIPE.teacher_steps},
}
NUM_STEPS = [5, 8, 10]
STOPPED = 128 + signal.SIGTERM
GO_ON = "What was found so far is in --output-dir: go on with --resume."


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pipeline", required=True, help=f"a folder, a Hub repository, or one of {', '.join(NAMES)}")
    add("--num-steps", type=int, nargs="+", help="step counts (default: 5 8 10, or those of the solver to evaluate)")
    add("--output-dir", type=Path, required=True, help="where the solver, the report and the images go")
    add("--class-labels", nargs="+", help="ids or names (default: all that the pipeline knows)")
    add("--prompts", nargs="+", help="prompts, used in turn")
    add("--guidance-scale", type=float, help="default: the pipeline's own; 1 for --fitter gradient, as in the paper")
    add("--call-kwargs", type=json.loads, default={}, help="further arguments of the pipeline's call, as JSON")
    add("--num-samples", type=int, help=_defaults("noises to fit", "num_samples"))
    add("--num-eval-samples", type=int, default=256, help="held-out noises to measure on (default: 256)")
    add("--image-metrics", type=int, default=0, metavar="N", help="images of each solver to measure (default: none)")
    add(
        "--feature-network",
        default=INCEPTION,
        help="for their FID, KID and so on: inception, none, a Python file with a function `feature_network`, or a "
        f"TorchScript file (default: {INCEPTION})",
    )
    add("--reference-images", type=Path, help="a folder of what images should be like (default: the teacher's)")
    add("--teacher-steps", type=int, help=_defaults("of the teacher", "teacher_steps"))
    add("--fitter", choices=DEFAULTS, default="gauss-newton", help="gradient is the paper's (default: gauss-newton)")
    add("--iterations", type=int, default=ITERATIONS, help=f"over all noises to fit (default: {ITERATIONS})")
    add(
        "--max-calls",
        type=int,
        default=MAX_CALLS,
        help=f"of a search with more than one iteration (default: {MAX_CALLS})",
    )
    add("--batch-size", type=int, default=BATCH_SIZE, help=f"samples in one pipeline call (default: {BATCH_SIZE})")
    add("--mixed-precision", choices=DTYPES, default="no", help="dtype of the networks (default: no, float32)")
    add("--seed", type=int, default=0, help="of all noises (default: 0)")
    add("--resume", action="store_true", help="go on with the search that was begun in --output-dir, if there is one")
    add("--evaluate-only", action="store_true", help="search nothing: measure the solver in --output-dir once more")
    add("--solver", metavar="NAME", help="or this one: a folder, a bundled solver or a Hub repository")
    add("--dry-run", action="store_true", help="say what the search would cost, and stop")
    add("--cache-dir", type=Path, help="where the teacher's end points are kept (default: in the Hugging Face cache)")
    add("--push-to-hub", metavar="ORG/NAME", help="upload the solver, its model card and the report when finished")
    add("--license", default="apache-2.0", help="of the solver, as the Hub names licences (default: apache-2.0)")
    parsed = parser.parse_args(arguments)
    if not isinstance(parsed.call_kwargs, dict):
        parser.error(f"--call-kwargs is {json.dumps(parsed.call_kwargs)}, expected a JSON object")
    if parsed.evaluate_only and (parsed.resume or parsed.dry_run):
        parser.error("--evaluate-only searches nothing: leave out --resume and --dry-run")
    if parsed.solver is not None and (not parsed.evaluate_only or parsed.push_to_hub is not None):
        parser.error("--solver is for --evaluate-only, and its results have no model card to push to the Hub")
    if parsed.num_steps is None and not parsed.evaluate_only:
        parsed.num_steps = NUM_STEPS
    for name, value in DEFAULTS[parsed.fitter].items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, value)
    if parsed.cache_dir is None:
        parsed.cache_dir = cached_assets_path("diffusers_searched_solver", "search", "teacher")
    return parsed


def _defaults(what: str, name: str) -> str:
    return (
        f"{what} (default: " + ", ".join(f"{values[name]} for {fitter}" for fitter, values in DEFAULTS.items()) + ")"
    )


def main(arguments: list[str] | None = None):
    """Load, search, measure, write."""
    args = parse_arguments(arguments)
    check_place(args.output_dir)
    if args.push_to_hub is not None:
        check_target(args.push_to_hub)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    # Processes wait for each other's batches. Without an accelerator, accelerate takes the processes of a launch for
    # so many launches unless it is told.
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[waiting])
    pipe = load_pipeline(args.pipeline, DTYPES[args.mixed_precision], accelerator.device)
    if args.fitter == "gradient" and args.guidance_scale is None and takes_guidance(pipe):
        args.guidance_scale = 1.0
    conditions = build_conditions(pipe, args.class_labels, args.prompts, args.guidance_scale, args.call_kwargs)
    command = shlex.join(["accelerate", "launch", "search/run.py", *(arguments or sys.argv[1:])])
    report = _heading(pipe, conditions, args, command)
    solvers, provenance = {}, None
    if args.evaluate_only:
        solvers, provenance, report = earlier_results(pipe, args, report)
    check_settings(args.num_steps, conditions, args.num_samples, args.teacher_steps, args.batch_size)
    if args.num_eval_samples < 2:
        raise ValueError(f"`--num-eval-samples` is {args.num_eval_samples}, expected at least 2.")
    network = load_feature_network(pipe, conditions[0], args)
    if args.dry_run:
        print(estimate(pipe, conditions, args))
        return
    journal = None
    if not args.evaluate_only:
        calls = NetworkCalls(pipe)
        settings = {name: getattr(args, name) for name in SETTINGS} | {"version": version("diffusers-searched-solver")}
        journal = Journal(calls, args.output_dir / "journal.json", settings, args.resume)
        memory = inference_memory(pipe, conditions[0], args.batch_size)
        report["search"] = run_search(pipe, conditions, args, calls, journal, solvers)
        report["search"]["peak_memory_over_inference"] = peak_memory(accelerator.device) / memory
    report["evaluation"] = {"command": command, **measure(pipe, conditions, solvers, args, network)}
    if accelerator.is_main_process:
        write_results(pipe, conditions, solvers, report, args.output_dir, provenance)
    if journal is not None:
        journal.delete()
    if args.push_to_hub is not None and accelerator.is_main_process:
        print(f"Uploaded to {publish(args.output_dir, args.push_to_hub)}")


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
        sys.exit(f"error: {error}\nLower --batch-size or --num-samples, or use more processes.")
    except (LostProcessError, OSError) as error:
        sys.exit(f"error: {error}\nThis has to be put right first. {GO_ON}")
    except (ValueError, FieldError, PublishError) as error:
        sys.exit(f"error: {error}")
