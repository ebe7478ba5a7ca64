"""
Search few-step solvers for a diffusers pipeline and measure them.

    accelerate launch search/run.py --pipeline examples/digits-sit --num-steps 5 8 10 --output-dir OUT

OUT is then what `SearchedSolverScheduler.from_pretrained(OUT)` loads, with `report.html`, `report.json` and
`images.png` beside it. Samples are dealt out to the processes of `accelerate launch`. A search that was killed goes on
with --resume; SIGTERM and Ctrl-C leave the best solvers so far in OUT.
"""

import argparse
import json
import logging
import shlex
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from huggingface_hub import cached_assets_path
from tqdm import tqdm

from diffusers_searched_solver import SearchedSolver
from search.cache import TeacherCache
from search.estimate import estimate
from search.field import FieldError, NetworkCalls
from search.journal import Journal
from search.loading import NAMES, build_conditions, load_pipeline
from search.measure import measure
from search.memory import inference_memory, peak_memory
from search.output import write_results, write_solvers
from search.processes import quiet
from search.strategy import (
    BATCH_SIZE,
    FITTERS,
    MAX_CALLS,
    TEACHER_STEPS,
    check_settings,
    fit_solver,
    search_problem,
)


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
    "max_calls",
    "batch_size",
    "mixed_precision",
    "seed",
)
STOPPED = 128 + signal.SIGTERM


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pipeline", required=True, help=f"a folder, a Hub repository, or one of {', '.join(NAMES)}")
    add("--num-steps", type=int, nargs="+", default=[5, 8, 10], help="step counts to search (default: 5 8 10)")
    add("--output-dir", type=Path, required=True, help="where the solver, the report and the images go")
    add("--class-labels", nargs="+", help="ids or names (default: all that the pipeline knows)")
    add("--prompts", nargs="+", help="prompts, used in turn")
    add("--guidance-scale", type=float, help="default: the pipeline's own")
    add("--call-kwargs", type=json.loads, default={}, help="further arguments of the pipeline's call, as JSON")
    add("--num-samples", type=int, default=16, help="noises to fit (default: 16)")
    add("--num-eval-samples", type=int, default=256, help="held-out noises to measure on (default: 256)")
    add("--teacher-steps", type=int, default=TEACHER_STEPS, help=f"default: {TEACHER_STEPS}")
    add("--fitter", choices=FITTERS, default="gauss-newton", help="how to search (default: gauss-newton)")
    add("--max-calls", type=int, default=MAX_CALLS, help=f"network calls per step count (default: {MAX_CALLS})")
    add("--batch-size", type=int, default=BATCH_SIZE, help=f"samples in one pipeline call (default: {BATCH_SIZE})")
    add("--mixed-precision", choices=DTYPES, default="no", help="dtype of the networks (default: no, float32)")
    add("--seed", type=int, default=0, help="of all noises (default: 0)")
    add("--resume", action="store_true", help="go on with the search that was begun in --output-dir, if there is one")
    add("--dry-run", action="store_true", help="say what the search would cost, and stop")
    add("--cache-dir", type=Path, help="where the teacher's end points are kept (default: in the Hugging Face cache)")
    parsed = parser.parse_args(arguments)
    if not isinstance(parsed.call_kwargs, dict):
        parser.error(f"--call-kwargs is {json.dumps(parsed.call_kwargs)}, expected a JSON object")
    if parsed.cache_dir is None:
        parsed.cache_dir = cached_assets_path("diffusers_searched_solver", "search", "teacher")
    return parsed


def main(arguments: list[str] | None = None):
    """Load, search, measure, write."""
    args = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Without an accelerator, accelerate takes the processes of a launch for so many launches unless it is told.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    pipe = load_pipeline(args.pipeline, DTYPES[args.mixed_precision], accelerator.device)
    conditions = build_conditions(pipe, args.class_labels, args.prompts, args.guidance_scale, args.call_kwargs)
    check_settings(args.num_steps, conditions, args.num_samples, args.teacher_steps, args.batch_size, args.fitter)
    if args.num_eval_samples < 2:
        raise ValueError(f"`--num-eval-samples` is {args.num_eval_samples}, expected at least 2.")
    if args.dry_run:
        print(estimate(pipe, conditions, args))
        return
    calls = NetworkCalls(pipe)
    settings = {name: getattr(args, name) for name in SETTINGS}
    journal = Journal(calls, args.output_dir / "journal.json", settings, args.resume)
    solvers: dict[int, SearchedSolver] = {}
    try:
        memory = inference_memory(pipe, conditions[0], args.batch_size)
        search = run_search(pipe, conditions, args, calls, journal, solvers)
        search["peak_memory_over_inference"] = peak_memory(accelerator.device) / memory
        evaluation = measure(pipe, conditions, solvers, args)
    except KeyboardInterrupt:
        if accelerator.is_main_process and solvers:
            write_solvers(pipe, solvers, args.output_dir, {"base_model": args.pipeline})
        found = f"{args.output_dir} has the best solvers so far" if solvers else "Nothing was found yet"
        print(f"Stopped. {found}. Go on with --resume.", file=sys.stderr)
        sys.exit(STOPPED)
    if accelerator.is_main_process:
        report = {
            "command": shlex.join(["accelerate", "launch", "search/run.py", *(arguments or sys.argv[1:])]),
            "pipeline": args.pipeline,
            "pipeline_class": type(pipe).__name__,
            "guidance_scale": args.guidance_scale,
            "conditions": len(conditions),
            "seed": args.seed,
            "processes": accelerator.num_processes,
            "versions": {name: version(name) for name in ("diffusers-searched-solver", "diffusers", "torch")},
            "search": search,
            "evaluation": evaluation,
        }
        write_results(pipe, conditions, solvers, report, args.output_dir)
    journal.delete()


def run_search(
    pipe: DiffusionPipeline,
    conditions: list[dict],
    args: argparse.Namespace,
    calls: NetworkCalls,
    journal: Journal,
    solvers: dict[int, SearchedSolver],
) -> dict:
    """Put a solver for each step count into `solvers`, ever better ones while it searches; returns what it cost."""
    costs = {}
    with tqdm(desc="teacher", unit=" calls", disable=quiet(), smoothing=0) as progress:
        calls.on_call = progress.update
        started = time.perf_counter()
        cache = TeacherCache(args.cache_dir)
        problem = search_problem(
            pipe, conditions, args.num_samples, args.seed, args.teacher_steps, args.batch_size, calls, cache
        )
        journal.check(problem.fingerprint())
        teacher_seconds = time.perf_counter() - started
        for num_steps in args.num_steps:
            progress.set_description(f"search, {num_steps} steps")
            before, started = journal.spent, time.perf_counter()
            for solver in fit_solver(problem, num_steps, args.max_calls, journal, progress.write):
                solvers[num_steps] = solver
            costs[str(num_steps)] = {
                "network_calls": problem.teacher_calls + journal.spent - before,
                "seconds": round(time.perf_counter() - started + teacher_seconds, 2),
            }
    calls.remove()
    problem.close()
    return {
        "fitter": args.fitter,
        "num_samples": args.num_samples,
        "teacher_steps": args.teacher_steps,
        "teacher_network_calls": problem.teacher_calls,
        "cost_with_teacher": costs,
    }


if __name__ == "__main__":
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        main()
    except (ValueError, FieldError) as error:
        sys.exit(f"error: {error}")
