"""`searched-solver check`: the pipeline and its conditions from words, the measurement as a table and an answer."""

import argparse
import inspect
import json
import shlex
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.utils import tqdm

from ..calls import build_conditions, pipeline_class
from ..check import MIN_SAMPLES, REFERENCE_STEPS, Comparison, check_solver, count_steps
from ..serialization import SolverFile


DTYPES = ("float32", "float16", "bfloat16")
DESCRIPTION = f"""\
Is a solver good for your pipeline: a fine-tune, another guidance scale, another resolution?

Samples are drawn by the pipeline's ordinary call, from the same noise: in {REFERENCE_STEPS} steps of a classical
solver, then in few steps with the pipeline's own scheduler, with the searched solver, and with the best of diffusers'
schedulers at its best setting. The answer is which of these ends nearest to where the many steps end. Exit status: 0
if it is the searched solver at every step count, 1 if not, 2 on an error."""
EPILOG = """\
A pipeline that is made ready in code (with a LoRA, quantised, compiled, offloaded) is checked in code:

  from diffusers_searched_solver import SearchedSolverScheduler, check_solver

  solver = SearchedSolverScheduler.from_pretrained("org/name").solver_file
  for found in check_solver(pipe, solver, [{"prompt": prompt} for prompt in prompts]):
      print(found.num_steps, found.ratio, found.is_better)"""


def add_arguments(parser: argparse.ArgumentParser):
    """Add the arguments of `searched-solver check`, all but the solver."""
    add = parser.add_argument
    add("--pipeline", required=True, help="a folder or a Hub repository")
    add("--num-steps", type=int, nargs="+", help="the step counts to check (default: all that the solver has)")
    add("--guidance-scale", type=float, help="default: the pipeline's own")
    add("--class-labels", nargs="+", help="ids or names, used in turn (default: from all that the pipeline knows)")
    add("--prompts", nargs="+", help="prompts, used in turn")
    add("--call-kwargs", type=json_object, default={}, help="more of its call as JSON, such as '{\"height\": 768}'")
    add("--num-samples", type=int, default=8, help=f"noises, at least {MIN_SAMPLES} (default: 8)")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the pipeline's networks (default: float32)")


def json_object(text: str) -> dict:
    """An object in JSON; argparse shows this function's name."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def run(file: SolverFile, options: argparse.Namespace) -> int:
    """
    Measure, and print what was found.

    Returns:
        `int`: 0 if the solver is better than all of diffusers at every step count, 1 if not.
    """
    pipe = _load_pipeline(options.pipeline, getattr(torch, options.dtype))
    calls = _calls(pipe, options)
    counts = options.num_steps or file.step_counts
    try:
        with tqdm(
            desc="steps", total=count_steps(pipe.scheduler.config, counts, len(calls)), disable=None, leave=False
        ) as progress:
            found = check_solver(pipe, file, calls, counts, progress.update)
    except (TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(f"The call of {type(pipe).__name__} failed: {type(error).__name__}: {error}") from error
    print(f"{_table(found)}\n")
    own, samples = f"your {type(pipe.scheduler).__name__}", len(calls)
    for each in found:
        best = f"the best of diffusers ({each.best_name})"
        beside = (
            f"{each.ratio:.2f}x the error of {own} and {each.ratio_to_best:.2f}x that of {best}, on {samples} noises"
        )
        if each.is_better:
            print(f"{each.num_steps} steps: use it: {beside}.")
        elif each.ratio_to_best < 1 and each.ratio < 1:
            print(f"{each.num_steps} steps: perhaps better, not beyond chance: {beside}.")
        else:
            nearer = best if each.ratio_to_best >= each.ratio else own
            print(f"{each.num_steps} steps: keep {nearer}: {beside}.")
    others = [str(each.num_steps) for each in found if not each.is_better]
    if others:
        print(f"Search for this pipeline with\n  {_search_command(options, others)}")
    return 1 if others else 0


def _table(found: Sequence[Comparison]) -> str:
    """Errors as root mean square, least and greatest; the same of ratios."""
    lines = [
        f"Distance to the end of {REFERENCE_STEPS} classical steps, over all noises and for the best and the worst",
        f"steps  {'searched solver':26}{'your scheduler':26}{'best of diffusers':26}{'ratio to yours':20}nearer",
    ]
    for each in found:
        with np.errstate(all="ignore"):
            ratios = each.searched / each.own
        searched, theirs, best = (
            f"{np.sqrt(np.mean(errors**2)):.4f} ({errors.min():.4f}, {errors.max():.4f})"
            for errors in (each.searched, each.own, each.best)
        )
        ratio = f"{each.ratio:.2f} ({ratios.min():.2f}, {ratios.max():.2f})"
        lines.append(f"{each.num_steps:5}  {searched:26}{theirs:26}{best:26}{ratio:20}{each.wins} of {len(ratios)}")
    return "\n".join(lines)


def _load_pipeline(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    pipe = pipeline_class(name).from_pretrained(name, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")


def _calls(pipe: DiffusionPipeline, options: argparse.Namespace) -> list[dict]:
    """Keyword arguments of the pipeline's call for each sample: in turn what was chosen, or some from among all."""
    takes = inspect.signature(type(pipe).__call__).parameters
    if "prompt" in takes and not options.prompts and "prompt" not in options.call_kwargs:
        raise ValueError(f"{type(pipe).__name__} draws what it is told. Pass prompts with --prompts.")
    words = options.class_labels, options.prompts, options.guidance_scale, options.call_kwargs
    conditions, count = build_conditions(pipe, *words), options.num_samples
    if options.class_labels or options.prompts:
        return [conditions[k % len(conditions)] for k in range(count)]
    return [conditions[k * len(conditions) // count] for k in range(count)]


def _search_command(options: argparse.Namespace, counts: Sequence[str]) -> str:
    """What searches a solver with the same conditions."""
    command = ["accelerate", "launch", "search/run.py", "--pipeline", options.pipeline, "--num-steps", *counts]
    if options.guidance_scale is not None:
        command += ["--guidance-scale", f"{options.guidance_scale:g}"]
    if options.class_labels:
        command += ["--class-labels", *options.class_labels]
    if options.prompts:
        command += ["--prompts", *options.prompts]
    if options.call_kwargs:
        command += ["--call-kwargs", json.dumps(options.call_kwargs)]
    return shlex.join([*command, "--output-dir", "OUT"])
