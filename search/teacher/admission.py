"""What a pipeline is asked before a search: whether what a search reports is what its users' calls will do."""

import logging
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline

from diffusers_searched_solver.trial import Trial, UnsuitableCallError, check_arguments, try_call

from ..pipeline.conditions import variant_of
from ..pipeline.field import Alone, FieldError, NetworkCalls, PipelineField
from ..pipeline.rollout import node_of
from .batches import open_field, pipeline_calls


logger = logging.getLogger(__name__)

# How far predictions for the same state and time may be apart, as a share of their size (root mean squares): a network
# may round otherwise from call to call, half precision more, and batches of other sizes do.
CLOSE, CLOSE_IN_HALF, OF_OTHER_SIZE = 1e-4, 1e-2, 10
SEED = 0


def admit(pipe: DiffusionPipeline, conditions: Sequence[Mapping], step_counts: Sequence[int]) -> list[Mapping]:
    """
    Try a pipeline before anything is spent on it.

    The user's call is made once, in the least of `step_counts`, with a scheduler such as users will set. It has to run
    the scheduler's table, all of it; and a field has to predict the same from the same states and times in another
    order, after other fields. Then two samples are made in one call, if one call can make both. That takes 2 N + 9
    evaluations in the least number of steps N, and 2 N + 3 for each further guidance scale.

    Args:
        conditions: As in `search_solver`.
        step_counts: Of the solvers to be searched.

    Returns:
        `list[Mapping]`: The conditions; each for a call of its own (`Alone`), which is said in one line, if the
            pipeline does not make two samples in one call as it makes them in two.

    Raises:
        UnsuitableCallError, FieldError: If the search would not say what the pipeline does.
        TypeError: If `conditions` are not a list of keyword arguments.
    """
    if isinstance(conditions, Mapping):
        raise TypeError(f"`conditions` is a dict, expected a list of such. Pass `[{dict(conditions)!r:.60}]`.")
    conditions = list(conditions)
    for condition in conditions:
        check_arguments(pipe, condition)
    for condition in {variant_of(condition): condition for condition in reversed(conditions)}.values():
        trial = try_call(pipe, condition, min(step_counts), SEED)
        if trial.schedule_argument is not None:
            logger.warning(_needs_argument(pipe, trial))
        _check_field(pipe, condition, trial)
    if (reason := _reason_against_merging(pipe, conditions)) is not None:
        logger.warning(f"Every sample gets a call of {type(pipe).__name__} of its own: {reason}.")
        return [Alone(condition) for condition in conditions]
    return conditions


def _needs_argument(pipe, trial: Trial) -> str:
    by_argument = {
        "sigmas": "[1 - i / N for i in range(N)]",
        "timesteps": "scheduler.solver_file.solvers[N].timesteps.tolist()",
    }
    value = by_argument[trial.schedule_argument]
    return (
        f"{type(pipe).__name__} runs a solver of N steps only if `{trial.schedule_argument}={value}` is among the "
        "arguments of its call: it sets a schedule of its own otherwise. Pass that with every call."
    )


def _check_field(pipe: DiffusionPipeline, condition: Mapping, trial: Trial):
    """Compare a field's predictions, in reverse order and after another field's, with those of a tried call."""
    calls = NetworkCalls(pipe)
    first = trial.steps[0].sample
    field = PipelineField(pipe, condition, [SEED], calls)
    try:
        other = PipelineField(pipe, condition, [SEED], calls, 0.9 * field.process.max_timestep)
        begins_anywhere = other.noise.shape == field.noise.shape and _apart(other.noise, field.noise) == 0
        _check_noise(pipe, field, first, begins_anywhere)
        other(other.noise, field.process.max_timestep / 2)
        other.close()
        table = trial.solver
        for step in reversed(trial.steps):
            node = node_of(table, step.index)
            prediction, state = field.evaluate(step.sample, table.timesteps[step.index], node)
            _check_same(pipe, prediction, step.output, f"step {step.index + 1} of {table.num_steps}")
            _check_same(pipe, state, step.sample, f"step {step.index + 1} of {table.num_steps}")
    finally:
        field.close()
        calls.remove()


def _check_noise(pipe, field: PipelineField, first: torch.Tensor, begins_anywhere: bool):
    name, noise = type(pipe).__name__, field.noise
    if len(noise) > 1 and any(not torch.equal(row, noise[0]) for row in noise):
        raise UnsuitableCallError(
            f"One call of {name} with one condition makes states of {len(noise)} different samples. Give a condition "
            "for each sample: on the command line with --class-labels or --prompts, in Python as so many dicts."
        )
    if noise.shape != first.shape or not _apart(noise, first) <= _tolerance(noise):
        by = f"by {_apart(noise, first):.0%}" if noise.shape == first.shape else f"in shape, {tuple(noise.shape)}"
        field.suspend()
        if not torch.equal(field.noise, noise):
            raise FieldError(
                f"{name} begins at another state whenever it is called, with one seed: it draws noise that is not of "
                "its `generator`, so there are no runs to compare. Leave out the option that does so (such as an "
                "`image` that is encoded with noise), or keep its own scheduler."
            )
        raise FieldError(
            f"{name} begins at another state in a call of few steps than in a long one (it differs {by}): it draws "
            "more noise than its first state, or makes as many states as there are steps. Leave out the option that "
            "does so (such as `image_cond_noise_scale`), or keep its own scheduler."
        )
    if not begins_anywhere:
        raise UnsuitableCallError(
            f"{name} begins at an image that it noises to the level of a solver's first node, which differs from "
            "solver to solver. Search with its text-to-image sibling: its solver runs here too."
        )


def _check_same(pipe, found: torch.Tensor, own: torch.Tensor, where: str):
    if found.shape != own.shape or not _apart(found, own) <= _tolerance(own):
        by = f"by {_apart(found, own):.0%}" if found.shape == own.shape else f"in shape, {tuple(found.shape)}"
        raise FieldError(
            f"{type(pipe).__name__} does more than a function of state and time: at {where} of a call of its own it "
            f"differs {by} from what it makes of the same state at the same time in another order. It keeps something "
            "from step to step (momentum guidance, caches), counts steps (guidance intervals, `control_guidance_end`) "
            "or draws noise. Call it without the option that does so, or keep its own scheduler."
        )


def _reason_against_merging(pipe: DiffusionPipeline, conditions: Sequence[Mapping]) -> str | None:
    """Why two samples cannot be made in one call; None if they can, or if no two are ever made in one."""
    dealt = pipeline_calls(conditions, range(2 * len(conditions)), 2)
    pair = next((samples for samples in dealt if len(samples) == 2), None)
    if pair is None:
        return None
    calls, fields = NetworkCalls(pipe), []
    try:
        for samples in ([pair[0]], [pair[1]], pair):
            fields.append(open_field(pipe, samples, calls))
        return _difference(*fields)
    except FieldError as error:
        return f"two in one call fail ({error.__cause__ or error})".replace("\n", " ")[:200]
    finally:
        for field in fields:
            field.close()
        calls.remove()


def _difference(first: PipelineField, second: PipelineField, both: PipelineField) -> str | None:
    """What two samples of one call have otherwise than each alone, as words."""
    rows = len(first.noise)
    if both.noise.shape != (2 * rows, *first.noise.shape[1:]):
        return f"a call for two makes states of shape {tuple(both.noise.shape)}, for one {tuple(first.noise.shape)}"
    time = both.process.max_timestep / 2
    for title, of in (("states", lambda field: field.noise), ("predictions", lambda field: field(field.noise, time))):
        # Pipelines with guidance may have every sample twice: first all once, then all again.
        together = of(both).unflatten(0, (rows, 2)).transpose(0, 1)
        for mine, alone in zip(together, (first, second), strict=True):
            if not _apart(mine, of(alone)) <= OF_OTHER_SIZE * _tolerance(mine):
                return f"{title} of two in one call differ from those of each alone"
    return None


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, over that of the larger one; what is not finite the teacher's run tells."""
    found, expected = (torch.nan_to_num(each.cpu().double()) for each in (found, expected))
    size = max(found.square().mean(), expected.square().mean()).sqrt()
    return float((found - expected).square().mean().sqrt() / size) if size else 0.0


def _tolerance(of: torch.Tensor) -> float:
    return CLOSE if of.dtype in (torch.float32, torch.float64) else CLOSE_IN_HALF
