"""A pipeline's call tried beforehand, as users will make it: whether the table runs, and all of it."""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from .calls import describe
from .grids import time_grid
from .process import NoiseProcess
from .scheduler import SearchedSolverScheduler
from .solver import SearchedSolver


# Arguments that say how many samples one prompt makes.
SEVERAL = re.compile(r"num_\w+_per_prompt|batch_size")
# Editing prompts are of one sample, as many as there are.
PER_SAMPLE = re.compile(r"class_labels|(?!editing_).*prompt.*")
# The share of node times at which the network is called in a trial: whatever works apart from nodes works at them.
APART = 0.99
SET_FOR_EACH_SAMPLE = ("generator", "num_inference_steps")
SCHEDULES = ("sigmas", "timesteps")


class UnsuitableCallError(ValueError):
    """A pipeline or its call that would not do what a searched solver says; the message says why and what to do."""


@dataclass(frozen=True)
class TriedStep:
    """
    What the scheduler saw in one step of a tried call.

    Args:
        index (`int`): Which step of the table.
        sample, output (`torch.Tensor`): The state, and the pipeline's prediction for it.
    """

    index: int
    sample: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class Trial:
    """
    A call that ran the table.

    Args:
        solver (`SearchedSolver`): The table.
        steps (`list[TriedStep]`): What was seen.
        schedule_argument (`str`, *optional*): The argument with which the call has to say its number of steps, because
            it passes a schedule of its own without it; see [`schedule_for`].
    """

    solver: SearchedSolver
    steps: list[TriedStep]
    schedule_argument: str | None


def check_arguments(pipe: DiffusionPipeline, call: Mapping):
    """
    Refuse what is known to be wrong before anything runs: a pipeline that does not run its own scheduler or is told no
    number of steps, and keyword arguments that make several samples, one noise for all seeds or another schedule than
    the table's.

    Raises:
        UnsuitableCallError: If there is such a thing.
        TypeError: If `call` is no mapping.
    """
    name = type(pipe).__name__
    if not isinstance(call, Mapping):
        raise TypeError(f"A condition is {call!r}, expected keyword arguments such as {{'prompt': 'a cat'}}.")
    inner = {key: type(value).__name__ for key, value in vars(pipe).items() if isinstance(value, DiffusionPipeline)}
    if inner:
        listed = " and ".join(f"`{key}` ({cls})" for key, cls in inner.items())
        raise UnsuitableCallError(
            f"{name} hands its work to pipelines of its own, {listed}, which keep their schedulers: to set its "
            "`scheduler` changes nothing. Take the one of these that draws, and set that one's `scheduler`."
        )
    if not isinstance(getattr(pipe, "scheduler", None), SchedulerMixin):
        raise UnsuitableCallError(
            f"{name} has no `scheduler` of diffusers' that a searched one could take the place of."
        )
    if not takes_step_count(pipe):
        raise UnsuitableCallError(
            f"The call of {name} takes no `num_inference_steps`, so it cannot be told how many steps a solver has. "
            "Keep its own scheduler."
        )
    given = {key: value for key, value in call.items() if value is not None}
    for key in SET_FOR_EACH_SAMPLE:
        if key in given:
            raise UnsuitableCallError(
                f"`{key}` is among the call's arguments, but is set anew for each run. Leave it out."
            )
    if "latents" in given:
        raise UnsuitableCallError(
            "`latents` are among the call's arguments: every seed would begin at this one noise, also those that are "
            "held out. Leave them out; noises are drawn from seeds."
        )
    for key in SCHEDULES:
        if key in given:
            raise UnsuitableCallError(
                f"`{key}` is among the call's arguments: a schedule of its own, on which a classical solver runs "
                "instead of a searched one. Leave it out; the solver has its own."
            )
    for key, value in given.items():
        _check_one_sample(key, value)


def takes_step_count(pipe: DiffusionPipeline) -> bool:
    """Whether the number of steps is among the arguments of its call, or of the call of a class it inherits from."""
    calls = [vars(cls)["__call__"] for cls in type(pipe).__mro__ if "__call__" in vars(cls)]
    return any("num_inference_steps" in inspect.signature(call).parameters for call in calls)


def _check_one_sample(key: str, value):
    count = 1
    if SEVERAL.fullmatch(key):
        count = value
    elif PER_SAMPLE.fullmatch(key) and isinstance(value, (list, np.ndarray)) and not np.isscalar(value):
        count = len(value)
    if count != 1:
        raise UnsuitableCallError(
            f"`{key}` is {describe({key: value}).partition('=')[2]}, so one call makes {count} samples, where one "
            "condition stands for one sample. Give a condition for each: on the command line with --class-labels or "
            "--prompts, in Python as so many dicts."
        )


def try_call(pipe: DiffusionPipeline, call: Mapping, num_steps: int, seed: int = 0) -> Trial:
    """
    Make a call once with a scheduler such as users will set, and see whether it runs the scheduler's table.

    Args:
        pipe: Has its own scheduler again afterwards.
        call: Keyword arguments of the call for one sample.
        num_steps (`int`): Steps of the call, and of the table: a classical one called apart from its nodes.
        seed (`int`): Of the noise.

    Raises:
        UnsuitableCallError: If the call fails, never calls its scheduler, copies it, runs a schedule of its own or a
            part of the table.
    """
    check_arguments(pipe, call)
    scheduler = SearchedSolverScheduler.from_config(pipe.scheduler.config)
    solver = trial_table(scheduler.process, num_steps)
    scheduler = SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=solver)
    steps, passed = _recorded_call(pipe, scheduler, call, num_steps, seed)
    argument = None
    if not _ran(scheduler, solver):
        argument = _selecting_argument(pipe, scheduler, solver, call, seed)
        if argument is None:
            raise UnsuitableCallError(_own_schedule(pipe, passed))
        more = {argument: schedule_for(argument, solver.timesteps.tolist())}
        steps, _ = _recorded_call(pipe, scheduler, {**call, **more}, num_steps, seed)
    _check_all_ran(pipe, [step.index for step in steps], solver)
    return Trial(solver, steps, argument)


def trial_table(process: NoiseProcess, num_steps: int) -> SearchedSolver:
    """Adams-Bashforth of order 2 from the process's noisiest end, called apart from its nodes."""
    timesteps, alphas, sigmas = time_grid(process, num_steps)
    return SearchedSolver.adams_bashforth(APART * timesteps, alphas, sigmas, "velocity", order=2)


def schedule_for(argument: str, timesteps: Sequence[float]) -> list[float]:
    """What the argument `sigmas` (1 - i/N, which stands for N steps) or `timesteps` of a call has to be."""
    steps = len(timesteps)
    return [1 - i / steps for i in range(steps)] if argument == "sigmas" else list(timesteps)


def _selecting_argument(pipe, scheduler, solver, call: Mapping, seed: int) -> str | None:
    """The argument of a schedule with which the call runs the table."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    for argument in SCHEDULES:
        if argument in parameters:
            try:
                more = {argument: schedule_for(argument, solver.timesteps.tolist())}
                _recorded_call(pipe, scheduler, {**call, **more}, solver.num_steps, seed)
            except UnsuitableCallError:
                continue
            if _ran(scheduler, solver):
                return argument
    return None


def _ran(scheduler: SearchedSolverScheduler, solver: SearchedSolver) -> bool:
    """Whether the last schedule that was set is the table's, which is called apart from its nodes."""
    pairs = (scheduler.timesteps, solver.timesteps), (scheduler.sigmas, solver.sigmas)
    return all(np.array_equal(found.cpu().numpy(), ours.astype(np.float32)) for found, ours in pairs)


def _own_schedule(pipe, passed: Sequence[str]) -> str:
    listed = " and ".join(f"`{name}`" for name in passed) or "other steps"
    return (
        f"{type(pipe).__name__} sets a schedule of its own on its scheduler ({listed}), so a classical solver runs on "
        "it whatever was searched, and nothing that is passed to its call changes that. Keep its own scheduler."
    )


def _check_all_ran(pipe, indices: Sequence[int], solver: SearchedSolver):
    every = list(range(solver.num_steps))
    if list(indices) == every:
        return
    name, count = type(pipe).__name__, solver.num_steps
    if not indices:
        raise UnsuitableCallError(f"{name} never calls its scheduler's `step`, so no solver changes what it draws.")
    if list(indices) != every[indices[0] : indices[-1] + 1]:
        raise UnsuitableCallError(
            f"{name} runs steps {list(indices)} of a table of {count}, expected each once, in order. Call it without "
            "the option that does so, or keep its own scheduler."
        )
    raise UnsuitableCallError(
        f"The call of {name} runs only steps {indices[0] + 1} to {indices[-1] + 1} of {count}. A solver is searched "
        "and checked on whole runs from noise to data. Leave out what makes it a part (`denoising_end`, a `strength` "
        "below 1), or take the pipeline's text-to-image sibling, whose solver runs in parts as well."
    )


def _recorded_call(
    pipe, scheduler: SearchedSolverScheduler, call: Mapping, num_steps: int, seed: int
) -> tuple[list[TriedStep], list[str]]:
    """The steps of a call with a scheduler, and which arguments of a schedule the pipeline passed to it."""
    steps, passed, set_timesteps = [], [], scheduler.set_timesteps

    @functools.wraps(set_timesteps)
    def noting_set_timesteps(*args, **kwargs):
        passed[:] = [key for key in SCHEDULES if kwargs.get(key) is not None]
        return set_timesteps(*args, **kwargs)

    def see(output, sample, next_sample):
        steps.append(TriedStep(scheduler.step_index - 1, sample, output))

    def refuse_to_be_copied(memo):
        raise UnsuitableCallError(
            f"{type(pipe).__name__} copies its scheduler, to step parts of its state by themselves (frames, or the "
            "sound of a video), so there is no one state and time that a solver could be searched for. Call it "
            "without the option that does so, or keep its own scheduler."
        )

    # Copies of it would step it in their place while its steps are recorded.
    scheduler.set_timesteps, scheduler.__deepcopy__ = noting_set_timesteps, refuse_to_be_copied
    try:
        with recorded_steps(pipe, scheduler, see):
            generator = torch.Generator("cpu").manual_seed(seed)
            pipe(**undecoded(pipe, call), num_inference_steps=num_steps, generator=generator)
    except (UnsuitableCallError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsuitableCallError(_failure(pipe, call, num_steps, seed, error)) from error
    finally:
        del scheduler.set_timesteps, scheduler.__deepcopy__
    return steps, passed


def _failure(pipe, call: Mapping, num_steps: int, seed: int, error: Exception) -> str:
    """What to say of a call that fails with a scheduler of ours: whether it does so with the pipeline's own."""
    name, own = type(pipe).__name__, type(pipe.scheduler).from_config(pipe.scheduler.config)
    said = f"{type(error).__name__}: {str(error).rstrip('.')}"
    try:
        with recorded_steps(pipe, own, lambda *_: None):
            generator = torch.Generator("cpu").manual_seed(seed)
            pipe(**undecoded(pipe, call), num_inference_steps=num_steps, generator=generator)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return (
            f"The call of {name} with {describe(call)} failed: {said}. Make the same call yourself, with your own "
            "scheduler, to see whether the arguments are right."
        )
    return f"{name} runs with {type(own).__name__} but not with a searched scheduler: {said}. Keep its own scheduler."


def undecoded(pipe: DiffusionPipeline, call: Mapping) -> dict:
    """The call without the decoding of what it ends at, where the pipeline leaves that to be chosen."""
    takes = inspect.signature(type(pipe).__call__).parameters
    return {"output_type": "latent", **call} if "output_type" in takes else dict(call)


@contextmanager
def recorded_steps(
    pipe: DiffusionPipeline,
    scheduler: SchedulerMixin,
    see: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object],
) -> Iterator[None]:
    """
    Have a pipeline run with a scheduler, without a progress bar.

    Args:
        see: Is told of every step's prediction, as the scheduler takes it, the state, and the next state.
    """
    own, step, attributes = pipe.scheduler, scheduler.step, vars(pipe)
    bar = attributes.get("_progress_bar_config")

    @functools.wraps(step)
    def recording_step(model_output, timestep, sample, *args, **kwargs):
        output = model_output
        if isinstance(scheduler, SearchedSolverScheduler):
            output = scheduler._output(model_output, sample, kwargs.get("per_token_timesteps"))
        before = sample.clone(), output.clone()
        result = step(model_output, timestep, sample, *args, **kwargs)
        # Copies, because some pipelines put parts of an image back into the states themselves.
        see(before[1], before[0], result[0].clone())
        return result

    pipe.scheduler, scheduler.step, pipe._progress_bar_config = scheduler, recording_step, {"disable": True}
    try:
        yield
    finally:
        pipe.scheduler = own
        del scheduler.step
        if bar is None:
            attributes.pop("_progress_bar_config", None)
        else:
            pipe._progress_bar_config = bar
