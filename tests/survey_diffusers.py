"""
Every pipeline of diffusers' own tests under a searched table and under the search: right, or refused with the reason.

    python tests/survey_diffusers.py CHECKOUT --output examples/results/pipelines.md

CHECKOUT is a clone of github.com/huggingface/diffusers, of about the version that is installed; its test requirements
(parameterized, requests_mock, torchvision, sentencepiece, opencv, ftfy) have to be there. Each pipeline is made of its
tests' tiny networks, in a process and a time of its own, with stand-ins for the tokenizers, processors and encoders of
the Hub. A pipeline is

- right if what the search says of two noises is where the pipeline's own calls end, with a table that has times of its
  own and with that of a known scheduler, and saved solvers load again for it;
- refused if the scheduler, or the search before its first teacher run, says why not;
- wrong if neither; crashed if what says so is not a message of ours; not tried if its own call fails without us.

Exit status: 0 if none is wrong or crashed.
"""

import argparse
import ast
import importlib
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import hub_stand_ins
import torch
from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, solver_from_scheduler, time_grid
from diffusers_searched_solver.rivals import diffusers_schedulers
from diffusers_searched_solver.trial import (
    UnsuitableCallError,
    recorded_steps,
    schedule_for,
    takes_step_count,
    try_call,
    undecoded,
)
from search.launch.network_calls import NetworkCalls
from search.pipeline.field import Alone, FieldError
from search.pipeline.rollout import rollout
from search.teacher.admission import admit
from search.teacher.batches import Teacher


RIGHT, REFUSED, WRONG, CRASHED, NOT_TRIED = "right", "refused", "wrong", "crashed", "not tried"
NUM_STEPS, TEACHER_STEPS = 4, 3
SEEDS = [0, 1]
# Of the end's size; calls of two round otherwise than calls of one.
TOLERANCE = 1e-3
OUR_FOLDERS = ("diffusers_searched_solver", "search")
# For arguments of the tests that do not go with any number of steps (of 4, a `strength` of 0.2 leaves none), or with a
# token for each letter.
INSTEAD = {
    "ConsistencyModelPipeline": {"timesteps": None},
    "Kandinsky5I2IPipeline": {"max_sequence_length": 900},
    "KandinskyV22ControlnetImg2ImgPipeline": {"strength": 0.5},
    "KandinskyV22Img2ImgCombinedPipeline": {"strength": 0.5},
    "KandinskyV22Img2ImgPipeline": {"strength": 0.5},
    "SanaSprintImg2ImgPipeline": {"intermediate_timesteps": None},
    "SanaSprintPipeline": {"intermediate_timesteps": None},
}


@dataclass(frozen=True)
class Verdict:
    """What became of a pipeline, and the reason."""

    status: str
    why: str = ""
    pipeline: str = ""


def survey(pipe: DiffusionPipeline, inputs: Mapping) -> Verdict:
    """
    Compare what the search says of a pipeline with its own calls.

    Args:
        inputs: Keyword arguments of its call for one sample, without `generator` and `num_inference_steps`.
    """
    name = type(pipe).__name__
    steps = {"num_inference_steps": NUM_STEPS} if takes_step_count(pipe) else {}
    try:
        pipe(**inputs, **steps, generator=torch.Generator().manual_seed(0))
    except Exception as error:
        return Verdict(NOT_TRIED, _line(error), name)
    try:
        return Verdict(*_compare(pipe, inputs), name)
    except (FieldError, UnsuitableCallError) as error:
        return Verdict(REFUSED, _line(error), name)
    except Exception as error:
        last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = isinstance(error, (ValueError, NotImplementedError)) and {*OUR_FOLDERS} & {*last.parts}
        return Verdict(REFUSED if ours else CRASHED, _line(error), name)


def _compare(pipe, inputs: Mapping) -> tuple[str, str]:
    conditions = admit(pipe, [inputs] * 2, [NUM_STEPS])
    solvers = _tables(pipe.scheduler.config)
    schedulers = [_saved_and_loaded(pipe, solver) for solver in solvers]
    argument = try_call(pipe, inputs, NUM_STEPS).schedule_argument
    calls = NetworkCalls(pipe)
    said: dict[int, list[torch.Tensor]] = {}
    for batch in Teacher(pipe, TEACHER_STEPS, len(SEEDS), calls).batches(conditions, SEEDS):
        ends = [rollout(batch.field, solver) for solver in solvers]
        for k, seed in enumerate(batch.field.seeds):
            said[seed] = [end[k :: len(batch.field.seeds)] for end in ends]
        batch.field.close()
    calls.remove()
    errors = []
    for seed, ends in said.items():
        for end, solver, scheduler in zip(ends, solvers, schedulers, strict=True):
            more = {} if argument is None else {argument: schedule_for(argument, solver.timesteps.tolist())}
            own = _own_end(pipe, scheduler, {**inputs, **more}, solver.num_steps, seed)
            if own.shape != end.shape:
                return WRONG, f"states of shape {tuple(own.shape)}, said to be {tuple(end.shape)}"
            errors.append(float((end - own).norm() / own.norm()))
    if not max(errors) <= TOLERANCE:
        return WRONG, f"ends {max(errors):.2g} of its size from where it is said to"
    notes = [f"with `{argument}` among the arguments of its call"] * (argument is not None)
    return RIGHT, ", ".join(notes + ["one sample a call"] * isinstance(conditions[0], Alone))


def _tables(config) -> list[SearchedSolver]:
    """One with times apart from its nodes, where the search moves them, and a known one that it may return."""
    process = SearchedSolverScheduler.from_config(config).process
    timesteps, alphas, sigmas = time_grid(process, NUM_STEPS, 1.5)
    apart = 1.0 if process.kind == "flow_matching" else 0.98
    known = next(iter(diffusers_schedulers(config)["DPM-Solver++(2M)"].values()))
    return [
        SearchedSolver.adams_bashforth(apart * timesteps, alphas, sigmas, "velocity", 3),
        solver_from_scheduler(known, NUM_STEPS),
    ]


def _saved_and_loaded(pipe, solver: SearchedSolver) -> SearchedSolverScheduler:
    with tempfile.TemporaryDirectory() as folder:
        SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=solver).save_pretrained(folder)
        return SearchedSolverScheduler.from_pretrained(folder)


def _own_end(pipe, scheduler, call: Mapping, num_steps: int, seed: int) -> torch.Tensor:
    last = []
    with recorded_steps(pipe, scheduler, lambda output, sample, next_sample: last.append(next_sample)):
        pipe(**undecoded(pipe, call), num_inference_steps=num_steps, generator=torch.Generator().manual_seed(seed))
    return last[-1].float()


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


# diffusers' tests


def find_cases(checkout: Path) -> list[tuple[str, str]]:
    """Modules and classes of the tests that name a pipeline or make its tiny networks."""
    found = []
    for file in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and _may_make_a_pipeline(node):
                found.append((".".join(file.relative_to(checkout).with_suffix("").parts), node.name))
    return found


def _may_make_a_pipeline(node: ast.ClassDef) -> bool:
    assigned = [target for each in node.body if isinstance(each, ast.Assign) for target in each.targets]
    names = {target.id for target in assigned if isinstance(target, ast.Name)}
    return "pipeline_class" in names or "get_dummy_components" in {getattr(each, "name", "") for each in node.body}


def build_case(module: str, name: str) -> tuple[DiffusionPipeline, dict] | None:
    """The pipeline of a class of tests with the arguments of its call; None if it makes none of tiny networks."""
    cls = getattr(importlib.import_module(module), name)
    if not isinstance(getattr(cls, "pipeline_class", None), type) or not _makes_networks(cls):
        return None
    case = cls.__new__(cls)
    pipe = case.pipeline_class(**case.get_dummy_components())
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    inputs = _on_the_cpu(case.get_dummy_inputs)
    if hasattr(case, "get_dummy_inversion_inputs"):
        inverted = _on_the_cpu(case.get_dummy_inversion_inputs)
        pipe.invert(**{**inverted, "image": inverted["image"][0]})
    ours = ("generator", "num_inference_steps", "return_dict")
    inputs = {key: value for key, value in inputs.items() if key not in ours}
    return pipe, inputs | INSTEAD.get(type(pipe).__name__, {})


def _makes_networks(cls) -> bool:
    """Classes that others inherit from may leave it to them, or to a parameter, what is made."""
    make = getattr(cls, "get_dummy_components", None)
    if make is None:
        return False
    parameters = [*inspect.signature(make).parameters.values()][1:]
    return all(each.default is not each.empty or each.kind is each.VAR_KEYWORD for each in parameters)


def _on_the_cpu(make) -> dict:
    return make(device="cpu") if "device" in inspect.signature(make).parameters else make()


def _survey_case(connection, module: str, name: str, errors: str):
    """In a process of its own."""
    output = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        case = build_case(module, name)
        verdict = None if case is None else survey(*case)
    except BaseException as error:
        verdict = Verdict(NOT_TRIED, _line(error), name)
    connection.send(verdict)


def _in_time(module: str, name: str, limit: float) -> Verdict | None:
    processes = multiprocessing.get_context("fork")
    here, there = processes.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as errors:
        process = processes.Process(target=_survey_case, args=(there, module, name, errors.name))
        process.start()
        there.close()
        try:
            return here.recv() if here.poll(limit) else Verdict(NOT_TRIED, f"not done in {limit:g} s", name)
        except EOFError:
            last = Path(errors.name).read_text(errors="replace").strip().splitlines()[-1:]
            return Verdict(CRASHED, f"the process died: {' '.join(last)}", name)
        finally:
            process.kill()
            process.join()


def markdown(verdicts: list[Verdict]) -> str:
    """The table: pipelines by what became of them."""
    lines = [
        "Made by `python tests/survey_diffusers.py CHECKOUT --output examples/results/pipelines.md` with diffusers "
        f"{diffusers.__version__}, from the arguments and tiny networks of diffusers' own tests.",
        "",
        ", ".join(f"{count} {status}" for status, count in _counts(verdicts).items()),
        "",
    ]
    lines += ["| pipeline | | why |", "|---|---|---|"]
    order = [WRONG, CRASHED, RIGHT, REFUSED, NOT_TRIED]
    for each in sorted(verdicts, key=lambda each: (order.index(each.status), each.pipeline)):
        why = each.why.replace("|", "\\|")
        lines.append(f"| {each.pipeline} | {each.status} | {why} |")
    return "\n".join(lines) + "\n"


def _counts(verdicts: list[Verdict]) -> Counter:
    return Counter(each.status for each in verdicts)


def main():
    """All pipelines, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a clone of diffusers")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="tests whose names have one")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each pipeline (default: 600)")
    parser.add_argument("--hub", action="store_true", help="load what the tests load from the Hub, without stand-ins")
    parser.add_argument("--output", type=Path, help="a Markdown file for the table (default: it is printed)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Before our own folder of tests, which is no package.
    sys.path.insert(0, str(args.checkout.resolve()))
    importlib.import_module("tests.pipelines.test_pipelines_common")
    if not args.hub:
        os.environ["HF_HUB_OFFLINE"] = "1"
        hub_stand_ins.install()
    verdicts = []
    for module, name in find_cases(args.checkout):
        if any(word in f"{module}:{name}" for word in args.only):
            started = time.perf_counter()
            verdict = _in_time(module, name, args.limit)
            if verdict is not None:
                verdicts.append(verdict)
                seconds = time.perf_counter() - started
                print(f"{seconds:5.1f} s  {verdict.status:10}{verdict.pipeline}  {verdict.why}", flush=True)
    if args.output is None:
        print(markdown(verdicts))
    else:
        args.output.write_text(markdown(verdicts))
    print(", ".join(f"{count} {status}" for status, count in _counts(verdicts).items()))
    sys.exit(any(verdict.status in (WRONG, CRASHED) for verdict in verdicts))


if __name__ == "__main__":
    main()
