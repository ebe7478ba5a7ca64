"""
Search few-step solvers for a diffusers pipeline and measure them.

    accelerate launch search/run.py --pipeline examples/digits-sit --num-steps 5 8 10 --output-dir OUT

OUT is then what `SearchedSolverScheduler.from_pretrained(OUT)` loads, with `report.html`, `report.json`, `images.png`
and a model card beside it; --push-to-hub uploads them. Samples are dealt out to the processes of `accelerate launch`.
A search that was killed goes on with --resume; meanwhile OUT has the best solvers so far.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate.utils import LoggerType
from huggingface_hub import cached_assets_path

from .fit.strategy import BASE_CALLS, CALLS_PER_SQUARED_STEP
from .gradient.recipe import PAPER_RECIPE
from .measure.feature_network import INCEPTION
from .pipeline.loading import NAMES
from .teacher.batches import BATCH_SIZE, TEACHER_STEPS


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What depends on the fitter unless it is given.
DEFAULT_TEACHER_STEPS = {"gauss-newton": TEACHER_STEPS, "gradient": PAPER_RECIPE.teacher_steps}
NUM_STEPS = [5, 8, 10]
TRACKERS = sorted(set(LoggerType.list()) - {"all"})


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with all defaults but those that depend on the pipeline."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if not isinstance(parsed.call_kwargs, dict):
        parser.error(f"--call-kwargs is {json.dumps(parsed.call_kwargs)}, expected a JSON object")
    if parsed.evaluate_only and (parsed.resume or parsed.dry_run):
        parser.error("--evaluate-only searches nothing: leave out --resume and --dry-run")
    if parsed.solver is not None and (not parsed.evaluate_only or parsed.push_to_hub is not None):
        parser.error("--solver is for --evaluate-only, and its results have no model card to push to the Hub")
    if parsed.num_steps is None and not parsed.evaluate_only:
        parsed.num_steps = NUM_STEPS
    if parsed.guidance_scale is not None and len(parsed.guidance_scale) == 1:
        (parsed.guidance_scale,) = parsed.guidance_scale
    if parsed.fitter == "gauss-newton" and parsed.num_samples is not None:
        parser.error("--num-samples is for --fitter gradient; here --max-calls decides how many noises there are")
    if parsed.fitter == "gradient" and (parsed.max_calls is not None or parsed.start_solver is not None):
        parser.error("--max-calls and --start-solver are for --fitter gauss-newton; here --num-samples decides")
    if parsed.fitter == "gradient" and parsed.num_samples is None:
        parsed.num_samples = PAPER_RECIPE.num_samples
    if parsed.teacher_steps is None:
        parsed.teacher_steps = DEFAULT_TEACHER_STEPS[parsed.fitter]
    if parsed.cache_dir is None:
        parsed.cache_dir = cached_assets_path("diffusers_searched_solver", "search", "teacher")
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pipeline", required=True, help=f"a folder, a Hub repository, or one of {', '.join(NAMES)}")
    add("--num-steps", type=int, nargs="+", help="step counts (default: 5 8 10, or those of the solver to evaluate)")
    add("--output-dir", type=Path, required=True, help="where the solver, the report and the images go")
    add("--class-labels", nargs="+", help="ids or names (default: all that the pipeline knows)")
    add("--prompts", nargs="+", help="prompts, used in turn")
    add(
        "--guidance-scale",
        type=float,
        nargs="+",
        help="one, or several that the solver has to serve, each with as many noises and calls as one has "
        "(default: the pipeline's own; 1 for --fitter gradient)",
    )
    add("--call-kwargs", type=json.loads, default={}, help="further arguments of the pipeline's call, as JSON")
    add("--num-eval-samples", type=int, default=256, help="held-out noises to measure on (default: 256)")
    add("--image-metrics", type=int, default=0, metavar="N", help="images of each solver to measure (default: none)")
    add(
        "--feature-network",
        default=INCEPTION,
        help="for their FID, KID and so on: inception, none, a Python file with a function `feature_network`, or a "
        f"TorchScript file (default: {INCEPTION})",
    )
    add("--reference-images", type=Path, help="a folder of what images should be like (default: the teacher's)")
    add(
        "--teacher-steps",
        type=int,
        help="of the teacher, doubled until its own error is small beside the solvers' "
        f"(default: {TEACHER_STEPS}; for --fitter gradient {PAPER_RECIPE.teacher_steps})",
    )
    add(
        "--max-calls",
        type=int,
        help="network calls for each step count N, guidance and teacher included: they decide how many noises, starts "
        f"and iterations there are (default: {BASE_CALLS:,} + {CALLS_PER_SQUARED_STEP} N^2 for each guidance scale; "
        "twice that where a few noises are much harder than others)",
    )
    add("--start-solver", metavar="NAME", help="race this one too: a folder, a bundled solver or a Hub repository")
    add("--fitter", choices=DEFAULT_TEACHER_STEPS, default="gauss-newton", help="gradient is the paper's recipe")
    add("--num-samples", type=int, help=f"noises of --fitter gradient (default: {PAPER_RECIPE.num_samples:,})")
    add("--batch-size", type=int, default=BATCH_SIZE, help=f"samples in one pipeline call (default: {BATCH_SIZE})")
    add("--mixed-precision", choices=DTYPES, default="no", help="dtype of the networks (default: no, float32)")
    add("--seed", type=int, default=0, help="of all noises (default: 0)")
    add("--resume", action="store_true", help="go on with the search that was begun in --output-dir, if there is one")
    add("--evaluate-only", action="store_true", help="search nothing: measure the solver in --output-dir once more")
    add("--solver", metavar="NAME", help="or this one: a folder, a bundled solver or a Hub repository")
    add("--dry-run", action="store_true", help="say what the search would cost, and stop")
    add("--report-to", nargs="+", choices=TRACKERS, help="accelerate's trackers, such as tensorboard in --output-dir")
    add("--cache-dir", type=Path, help="where the teacher's end points are kept (default: in the Hugging Face cache)")
    add("--push-to-hub", metavar="ORG/NAME", help="upload the solver, its model card and the report when finished")
    add("--license", default="apache-2.0", help="of the solver, as the Hub names licences (default: apache-2.0)")
    return parser
