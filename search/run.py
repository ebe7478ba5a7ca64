"""
Search few-step solvers for a diffusers pipeline and measure them.

    accelerate launch search/run.py --pipeline examples/digits-sit --num-steps 5 8 10 --output-dir OUT

OUT is then what `SearchedSolverScheduler.from_pretrained(OUT)` loads, with `report.html`, `report.json` and
`images.png` beside it.
"""

import argparse
import json
import logging
import os
import resource
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, SolverFile
from search.baselines import classical_solvers
from search.evaluate import compare, format_table
from search.field import FieldError, NetworkCalls
from search.images import SampleImages, draw_samples, image_grid
from search.loading import NAMES, build_conditions, load_pipeline
from search.report import write_report
from search.strategy import (
    BATCH_SIZE,
    EVALUATION_SEEDS,
    FITTERS,
    MAX_CALLS,
    TEACHER_STEPS,
    TUNING_SEEDS,
    check_settings,
    fit_solver,
    search_batches,
    split_seeds,
)
from search.teacher import make_batches
from search.trajectory import compare_trajectories, teacher_trajectory


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TUNING_SAMPLES = 16
EVALUATION_BATCH_SIZE = 32
# The measuring teacher is this much finer than the one that is fitted to.
EVALUATION_TEACHER = 2
GRID_SAMPLES = 8


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
    parsed = parser.parse_args(arguments)
    if not isinstance(parsed.call_kwargs, dict):
        parser.error(f"--call-kwargs is {json.dumps(parsed.call_kwargs)}, expected a JSON object")
    return parsed


def main(arguments: list[str] | None = None):
    """Load, search, measure, write."""
    args = parse_arguments(arguments)
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(
            f"The search was launched with {accelerator.num_processes} processes, but uses one so far. Launch it with "
            "`accelerate launch --num_processes 1 search/run.py ...`."
        )
    pipe = load_pipeline(args.pipeline, DTYPES[args.mixed_precision], accelerator.device)
    conditions = build_conditions(pipe, args.class_labels, args.prompts, args.guidance_scale, args.call_kwargs)
    check_settings(args.num_steps, conditions, args.num_samples, args.teacher_steps, args.batch_size, args.fitter)
    if args.num_eval_samples < 2:
        raise ValueError(f"`--num-eval-samples` is {args.num_eval_samples}, expected at least 2.")
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir.parent, prefix=f".{args.output_dir.name}.") as aside:
        inference_memory = _inference_memory(pipe, conditions[0], args)
        solvers, search = run_search(pipe, conditions, args)
        search["peak_memory_over_inference"] = _peak_memory(accelerator.device) / inference_memory
        tables, trajectories = run_evaluation(pipe, conditions, solvers, args)
        report = {
            "command": shlex.join(["accelerate", "launch", "search/run.py", *(arguments or sys.argv[1:])]),
            "pipeline": args.pipeline,
            "pipeline_class": type(pipe).__name__,
            "guidance_scale": args.guidance_scale,
            "conditions": len(conditions),
            "seed": args.seed,
            "versions": {name: version(name) for name in ("diffusers-searched-solver", "diffusers", "torch")},
            "search": search,
            "evaluation": {
                "num_samples": args.num_eval_samples,
                "teacher_steps": EVALUATION_TEACHER * args.teacher_steps,
                "results": {str(n): rows for n, rows in tables.items()},
                "trajectories": {str(n): rows for n, rows in trajectories.items()},
            },
        }
        scheduler = _scheduler(pipe, solvers, report)
        scheduler.save_pretrained(aside)
        Path(aside, "report.json").write_text(json.dumps(report, indent=2) + "\n")
        images = _draw_images(pipe, scheduler, conditions, tables, args)
        if images is not None:
            image_grid(images).save(Path(aside, "images.png"))
        write_report(Path(aside), images)
        _publish(Path(aside), args.output_dir)
    print(f"\nWrote {args.output_dir}. Use it with\n  from diffusers_searched_solver import SearchedSolverScheduler")
    print(f"  pipe.scheduler = SearchedSolverScheduler.from_pretrained({str(args.output_dir)!r})")


def run_search(pipe: DiffusionPipeline, conditions: list[dict], args) -> tuple[dict[int, SearchedSolver], dict]:
    """Search a solver for each step count; also what it cost."""
    costs = {}
    with tqdm(desc="teacher", unit=" calls", disable=None, smoothing=0) as progress:
        calls = NetworkCalls(pipe, progress.update)
        started = time.perf_counter()
        train, held_out = search_batches(
            pipe, conditions, args.num_samples, args.seed, args.teacher_steps, args.batch_size, calls
        )
        teacher_calls, teacher_seconds = calls.count, time.perf_counter() - started
        solvers = {}
        for num_steps in args.num_steps:
            progress.set_description(f"search, {num_steps} steps")
            calls.count, started = teacher_calls, time.perf_counter()
            solvers[num_steps] = fit_solver(train, held_out, num_steps, calls, args.max_calls, progress.write)
            costs[str(num_steps)] = {
                "network_calls": calls.count,
                "seconds": round(time.perf_counter() - started + teacher_seconds, 2),
            }
        calls.remove()
    for batch in [*train, *held_out]:
        batch.field.close()
    search = {
        "fitter": args.fitter,
        "num_samples": args.num_samples,
        "teacher_steps": args.teacher_steps,
        "teacher_network_calls": teacher_calls,
        "cost_with_teacher": costs,
    }
    return solvers, search


def run_evaluation(
    pipe: DiffusionPipeline, conditions: list[dict], solvers, args
) -> tuple[dict[int, list[dict]], dict[int, list[dict]]]:
    """Rows of `compare`, also printed, and of `compare_trajectories`, for each step count."""
    teacher_steps = EVALUATION_TEACHER * args.teacher_steps
    with tqdm(desc="evaluation", unit=" calls", disable=None, smoothing=0) as progress:
        calls = NetworkCalls(pipe, progress.update)
        tuning, evaluation = (
            make_batches(
                pipe, conditions, split_seeds(args.seed, split, count), EVALUATION_BATCH_SIZE, teacher_steps, calls
            )
            for split, count in ((TUNING_SEEDS, TUNING_SAMPLES), (EVALUATION_SEEDS, args.num_eval_samples))
        )
        progress.set_description("evaluation, the teacher's trajectory")
        teacher = teacher_trajectory(evaluation[0], teacher_steps)
        tables, trajectories = {}, {}
        for num_steps, solver in solvers.items():
            progress.set_description(f"evaluation, {num_steps} steps")
            tables[num_steps] = compare(solver, pipe.scheduler.config, tuning, evaluation)
            progress.write(
                f"\n{num_steps} steps, distance to the teacher's end on {args.num_eval_samples} held-out noises\n"
                + format_table(tables[num_steps])
            )
            setting = next(row["setting"] for row in tables[num_steps] if row["solver"] == "classical table")
            classical = classical_solvers(evaluation[0].field.process, num_steps)[setting]
            trajectories[num_steps] = compare_trajectories(solver, classical, evaluation[0], teacher)
        calls.remove()
    for batch in [*tuning, *evaluation]:
        batch.field.close()
    return tables, trajectories


def _scheduler(pipe: DiffusionPipeline, solvers: dict[int, SearchedSolver], report: dict) -> SearchedSolverScheduler:
    own = SearchedSolverScheduler.from_config(pipe.scheduler.config)
    errors = {
        n: next(row["endpoint_error"] for row in rows if row["solver"] == "searched")
        for n, rows in report["evaluation"]["results"].items()
    }
    provenance = {
        "base_model": report["pipeline"],
        "guidance_scale": report["guidance_scale"] or "the pipeline's default",
        "teacher": f"{report['search']['teacher_steps']} steps of Adams-Bashforth 3",
        "objective": "endpoint_error",
        "endpoint_errors": json.dumps(errors),
    }
    file = SolverFile(solvers, own.process, own.config.prediction_type, provenance)
    return SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=file)


def _draw_images(pipe, scheduler, conditions, tables, args) -> SampleImages | None:
    """The first of the evaluation's noises as images, if the pipeline makes any."""
    conditions = conditions[:GRID_SAMPLES]
    seeds = split_seeds(args.seed, EVALUATION_SEEDS, len(conditions))
    teacher_steps = EVALUATION_TEACHER * args.teacher_steps
    try:
        return draw_samples(pipe, scheduler, conditions, seeds, tables, teacher_steps)
    except TypeError as error:
        print(f"No images: {error}")
        return None


def _publish(aside: Path, output_dir: Path):
    """Move the finished files into place, each whole."""
    for path in sorted(aside.rglob("*")):
        if path.is_file():
            target = output_dir / path.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


def _inference_memory(pipe: DiffusionPipeline, condition: dict, args) -> float:
    """Peak memory after an ordinary run of as many samples as one call of the search has."""
    calls = NetworkCalls(pipe)
    for batch in make_batches(pipe, [condition], list(range(args.batch_size)), args.batch_size, 8, calls):
        batch.field.close()
    calls.remove()
    return _peak_memory(pipe.device)


def _peak_memory(device: torch.device) -> float:
    """Bytes: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        main()
    except (ValueError, FieldError) as error:
        sys.exit(f"error: {error}")
