"""
PipelineField: every tiny pipeline as a function of state and time, with and without gradients.

What a field cannot do, and why (diffusers 0.42):

============================================  =========================================================================
Pipeline                                      Why, and what to do
============================================  =========================================================================
SkyReels-V2 diffusion forcing, LTX-2; Cosmos  step copies of the scheduler on parts of the state (frames, sound), so
3 and Kandinsky 6 with sound                  there is no one state and time: refused
HunyuanImage and HunyuanVideo 1.5 distilled   tell the network the next time, which is not known yet: keep their own
to mean flows
ChronoEdit with temporal reasoning            drops frames mid-way: refused when it does; leave the option off
LTX-Condition on an image                     draws noise at every step: `image_cond_noise_scale=0`
guidance intervals, `control_guidance_end`    count steps, and see evaluation numbers: found out by `admit`
caches between steps, guidance with momentum  remember: refused when a field opens, and by `admit`
Cosmos 2.5                                    calls its network at the node, whatever the table's time
inpainting                                    keeps the known part at the level of the time called, or of a node given
Wan image to video, ChronoEdit                one image a call: conditions share a call only if they share the image
HunyuanDiT, AuraFlow, Cosmos 2.5;             no gradient with respect to the time, which they copy: refused if one is
EasyAnimate, ERNIE-Image                      asked for
modular pipelines                             no gradients at all, each block turns them off: refused likewise
LTX image to video, LTX-Condition on an       keep a part of old states and with it their graph: close the field after
image                                         each `backward`
============================================  =========================================================================
"""

import gc
import weakref

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from fields import ALL, DIGITS, inputs_of, load, own_run, seeds_of, stable_diffusion_with_a_text_encoder, start_of
from PIL import Image
from tiny_pipelines import NUM_STEPS, OWN_SCHEDULE, build

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, time_grid
from diffusers_searched_solver.pipelines import ClassToImagePipeline
from search.known.baselines import run_scheduler
from search.pipeline import field as field_module
from search.pipeline.field import FieldError, NetworkCalls, PipelineField, merge_conditions
from search.pipeline.hand_out import HandOutScheduler
from search.pipeline.rollout import Run, recorded_run, rollout


ONE_IMAGE_A_CALL = ("wan_image_to_video", "chronoedit")
CALLED_AT_NODES = ("cosmos25",)


pytestmark = pytest.mark.usefixtures("one_thread")


# The field is the pipeline


def table_for(case, name: str) -> SearchedSolver:
    """
    Adams-Bashforth of order 3, called at times other than the nodes'.

    Runs that begin mid-way have no history, so theirs is of order 1; and pipelines noise images to the level of the
    time, which then has to be the node's, in float32.
    """
    process = SearchedSolverScheduler.from_config(case.config).process
    timesteps, _, _ = time_grid(process, NUM_STEPS, 2.0)
    timesteps = timesteps.astype(np.float32).astype(np.float64)
    alphas, sigmas = process.alpha_sigma(timesteps)
    own_times = case.first_step > 0 or name in CALLED_AT_NODES
    called_at = timesteps if own_times else 0.98 * timesteps
    order = 1 if case.first_step else 3
    return SearchedSolver.adams_bashforth(called_at, np.append(alphas, 1), np.append(sigmas, 0), "velocity", order)


@pytest.mark.parametrize("name", ALL)
def test_a_run_over_the_field_is_the_pipelines_own_run_bit_for_bit(name, open_field):
    case, inputs, seeds = build(name), inputs_of(name), seeds_of(inputs_of(name))
    solver = table_for(case, name)
    scheduler = SearchedSolverScheduler.from_config(case.config, solver=solver)
    expected = own_run(case.pipe, scheduler, inputs, seeds, NUM_STEPS)
    if name in OWN_SCHEDULE:
        solver = scheduler._run.solver  # the classical one on the pipeline's nodes

    k = case.first_step
    field = open_field(case.pipe, inputs, seeds, start=solver.timesteps[k] if k else None)
    never_made = [torch.zeros_like(field.noise)] * k
    states = recorded_run(field, solver, Run([field.noise] * (k + 1), never_made)).states[k : case.last_step + 2]
    assert len(states) == len(expected)
    assert all(torch.equal(state, own) for state, own in zip(states, expected, strict=True))
    assert not torch.equal(states[0], states[-1])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("example", ["digits-dit", "digits-sit"])
def test_a_run_over_a_trained_pipelines_field_is_its_own_run_bit_for_bit(example, guidance_scale, open_field):
    pipe, inputs, seeds = load(example), {**DIGITS, "guidance_scale": guidance_scale}, [5, 6]
    field = open_field(pipe, inputs, seeds)
    solver = SearchedSolver.adams_bashforth(*time_grid(field.process, 7, 1.5), "velocity", 3)
    scheduler = SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=solver)
    expected = own_run(pipe, scheduler, inputs, seeds, 7)[-1]
    assert torch.equal(rollout(field, solver), expected)
    assert torch.equal(run_scheduler(field, scheduler, 7), expected)


@pytest.mark.parametrize("name", ALL)
def test_a_call_that_is_finished_with_a_state_returns_what_a_run_that_ends_there_returns(name, open_field):
    case, inputs, seeds = build(name), inputs_of(name), seeds_of(inputs_of(name))
    scheduler = SearchedSolverScheduler.from_config(case.config, solver=table_for(case, name))
    results = []
    states = own_run(case.pipe, scheduler, inputs, seeds, NUM_STEPS, results.append)

    field = open_field(case.pipe, inputs, seeds, start_of(name))
    before = field.calls.count
    finished = field.finish(states[-1])
    assert field.calls.count == before
    assert type(finished) is type(results[0])
    own, found = (result if torch.is_tensor(result) else result[case.output] for result in (results[0], finished))
    # Inpainting noises the known part to the level of timestep 0, a hundredth on a variance-preserving process.
    np.testing.assert_allclose(np.asarray(found), np.asarray(own), rtol=0, atol=0.02 if case.blends else 0)
    reopened, fresh = field, open_field(case.pipe, inputs, seeds, start_of(name))
    assert torch.equal(reopened(field.noise, 500.0), fresh(field.noise, 500.0))


@pytest.mark.parametrize("name", ALL)
def test_evaluations_depend_neither_on_their_order_nor_on_how_many_a_call_serves(name, open_field, monkeypatch):
    case, inputs, seeds = build(name), inputs_of(name), seeds_of(inputs_of(name))
    points = [(0.9, 900.0), (0.4, 123.4), (1.0, 500.0), (0.7, 700.0), (0.1, 20.0), (0.5, 950.0), (0.3, 300.0)]
    field = open_field(case.pipe, inputs, seeds, start_of(name))
    in_order = [field.evaluate(scale * field.noise, timestep) for scale, timestep in points]
    monkeypatch.setattr(HandOutScheduler, "evaluations_per_call", 8)
    other = open_field(case.pipe, inputs, seeds, start_of(name))
    reversed_order = [other.evaluate(scale * other.noise, timestep) for scale, timestep in reversed(points)]
    assert torch.equal(field.noise, other.noise)
    for one, again in zip(in_order, reversed(reversed_order), strict=True):
        assert torch.equal(one[0], again[0])
        assert torch.equal(one[1], again[1])
    assert not torch.equal(in_order[0][0], in_order[1][0])


def mirrored(value):
    """Other conditions of the same kind."""
    if isinstance(value, list):
        return [mirrored(each) for each in value]
    return value.flip(-1) if torch.is_tensor(value) and value.is_floating_point() else value


def two_conditions(name: str) -> tuple[dict, dict]:
    inputs = inputs_of(name)
    if "class_labels" in inputs:
        return {**inputs, "class_labels": [3]}, {**inputs, "class_labels": [7]}
    other = {key: mirrored(value) for key, value in inputs.items()}
    if name in ONE_IMAGE_A_CALL:
        image = Image.fromarray((255 * inputs["image"][0].permute(1, 2, 0).numpy()).astype(np.uint8))
        return {**inputs, "image": image}, {**other, "image": image}
    return inputs, other


@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_two_conditions_is_the_two_alone(name, open_field):
    """To rounding: matrix products of other sizes add up in another order, which the networks amplify."""
    pipe = build(name).pipe
    first, second = two_conditions(name)
    both = merge_conditions(first, second)
    if "batch_size" in first:  # without conditions
        first, second = {**first, "batch_size": 1}, {**second, "batch_size": 1}
    alone = [open_field(pipe, inputs, [seed], start_of(name)) for seed, inputs in enumerate((first, second))]
    together = open_field(pipe, both, [0, 1], start_of(name))
    noise = torch.cat([field.noise[:1] for field in alone])
    torch.testing.assert_close(together.noise[:2], noise, rtol=0, atol=1e-5)  # with images in it, which a VAE encodes
    for timestep in (900.0, 300.0):
        expected = torch.cat([field(field.noise / 2, timestep)[:1] for field in alone])
        prediction = together(together.noise / 2, timestep)[:2]
        scale = expected.abs().max().item()
        torch.testing.assert_close(prediction, expected, rtol=0, atol=2e-5 * scale)
        assert (expected[0] - expected[1]).abs().max() > 0.1 * scale


def test_prompts_are_encoded_once(open_field):
    pipe, encoded = stable_diffusion_with_a_text_encoder(), []
    pipe.text_encoder.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    inputs = {"prompt": ["a cat", "a dog"], "height": 16, "width": 16}
    field = open_field(pipe, inputs, [0, 0])
    prediction = field(field.noise, 500.0)
    for timestep in range(100, 900, 100):
        field(field.noise, timestep)
    assert encoded == [2, 2]  # the prompts and the empty ones that guidance needs
    assert not torch.equal(*prediction)  # from the same noise


# What the pipeline's owner sees


def test_two_fields_of_one_pipeline_do_not_disturb_each_other_or_the_pipeline(digits_dit, open_field):
    before = dict(vars(digits_dit))
    one = open_field(digits_dit, {"class_labels": [1], "guidance_scale": 1.0}, [0])
    other = open_field(digits_dit, {"class_labels": [1], "guidance_scale": 4.0}, [0])
    alone = one(one.noise, 500.0)
    other(other.noise, 400.0)
    assert torch.equal(one(one.noise, 500.0), alone)
    assert not torch.equal(other(other.noise, 500.0)[:1], alone)
    assert vars(digits_dit) == before
    assert torch.is_grad_enabled()


def test_fields_that_hold_too_much_are_closed_in_turn_and_predict_what_they_would_have(
    digits_dit, open_field, monkeypatch
):
    fields = [open_field(digits_dit, {"class_labels": [1], "guidance_scale": 1.0}, [seed]) for seed in range(3)]
    noises = [field.noise for field in fields]
    expected = [field(noise, 500.0) for field, noise in zip(fields, noises, strict=True)]
    monkeypatch.setattr(field_module, "MOST_HELD", 0)
    for field, noise, prediction in zip(fields, noises, expected, strict=True):
        assert torch.equal(field(noise, 500.0), prediction)
        assert [each._coroutine is not None for each in fields] == [each is field for each in fields]
        assert torch.equal(field.noise, noise)
    assert torch.equal(fields[0].noise, noises[0]) and fields[0].shape == noises[0].shape


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_a_field_that_is_closed_or_dropped_leaves_the_pipeline_and_the_gradient_mode_as_they_are(
    digits_dit, grad_enabled
):
    before = dict(vars(digits_dit))
    calls = NetworkCalls(digits_dit)
    closed, dropped = (PipelineField(digits_dit, DIGITS, [0, 1], calls) for _ in range(2))
    reference = weakref.ref(dropped)
    with torch.set_grad_enabled(grad_enabled):
        closed.close()
        del dropped
        gc.collect()
        assert torch.is_grad_enabled() == grad_enabled
    calls.remove()
    assert reference() is None
    assert vars(digits_dit) == before
    assert not digits_dit.transformer._forward_pre_hooks


def test_a_field_may_be_collected_inside_the_call_of_another(digits_dit, open_field):
    """The garbage collector comes when it likes."""
    calls = NetworkCalls(digits_dit)
    dropped, field = [PipelineField(digits_dit, DIGITS, [0, 1], calls)], open_field(digits_dit, DIGITS, [0, 1])
    prediction = field(field.noise, 400.0)
    handle = digits_dit.transformer.register_forward_pre_hook(lambda *_: dropped.clear())
    try:
        assert torch.equal(field(field.noise, 400.0), prediction)
    finally:
        handle.remove()
        calls.remove()
    assert not dropped


def test_closing_a_field_ends_the_call_as_the_pipeline_does_itself(digits_dit, open_field, monkeypatch):
    """So that offloaded networks leave the accelerator."""
    ends = []
    monkeypatch.setattr(digits_dit, "maybe_free_model_hooks", lambda: ends.append(True))
    field = open_field(digits_dit, DIGITS, [0, 1])
    field.close()
    field.close()
    assert ends == [True]


def test_a_closed_field_opens_again(digits_dit, open_field):
    field = open_field(digits_dit, DIGITS, [0, 1])
    noise, prediction = field.noise, field(field.noise, 400.0)
    field.close()
    assert torch.equal(field(noise, 400.0), prediction)
    assert torch.equal(field.noise, noise)


def test_a_field_goes_on_after_a_failed_evaluation(digits_dit, open_field):
    """Say, one that ran out of memory."""
    field = open_field(digits_dit, DIGITS, [0, 1])
    prediction = field(field.noise, 400.0)

    def fail(module, args):
        raise torch.OutOfMemoryError("no more")

    handle = digits_dit.transformer.register_forward_pre_hook(fail)
    with pytest.raises(FieldError, match="DiTPipeline with .* failed: OutOfMemoryError: no more") as caught:
        field(field.noise, 300.0)
    handle.remove()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert torch.equal(field(field.noise, 400.0), prediction)


# Pipelines that cannot be driven


def test_a_failing_pipeline_call_is_reported_with_its_arguments_and_leaves_the_pipeline_as_it_was(
    digits_dit, open_field
):
    before = dict(vars(digits_dit))
    with pytest.raises(FieldError, match=r"The call of DiTPipeline with class_labels=\['no such', 2\]"):
        open_field(digits_dit, {"class_labels": ["no such", 2]}, [0, 1])
    assert {key: value for key, value in vars(digits_dit).items() if key in before} == before


class PipelineOverACopy(DiTPipeline):
    """Takes all times out of the schedule before its loop."""

    def progress_bar(self, iterable=None, total=None):
        return super().progress_bar([float(timestep) for timestep in iterable], total)


class PipelineWithASchedulerOfItsOwn(ClassToImagePipeline):
    def __call__(self, *args, **kwargs):
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return super().__call__(*args, **{**kwargs, "num_inference_steps": 2})


def test_a_pipeline_that_runs_over_a_copy_of_the_schedule_is_refused(digits_dit, open_field):
    field = open_field(PipelineOverACopy(**digits_dit.components), DIGITS, [0, 1])
    with pytest.raises(FieldError, match="is at timestep 999 where 500 was asked for"):
        field(field.noise, 500.0)


def test_a_pipeline_that_replaces_its_scheduler_is_refused(open_field):
    parts = load("digits-sit").components
    with pytest.raises(FieldError, match="returned before its scheduler's `step` had been called"):
        open_field(PipelineWithASchedulerOfItsOwn(**parts), DIGITS, [0, 1])


def test_a_pipeline_that_steps_copies_of_its_scheduler_is_refused(open_field):
    case = build("skyreels_v2")
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(**case.pipe.components)
    with pytest.raises(FieldError, match="copies its scheduler"):
        open_field(pipe, {**case.inputs, "prompt": None}, [0])


def test_a_pipeline_that_changes_the_shape_of_its_states_is_refused_when_it_does(open_field):
    case = build("chronoedit")
    field = open_field(case.pipe, {**case.inputs, "num_temporal_reasoning_steps": 2}, [0])
    field(field.noise, 900.0)
    with pytest.raises(FieldError, match=r"turned states of shape \(1, 4, 5, 4, 4\) into \(1, 4, 2, 4, 4\)"):
        field(field.noise, 800.0)


def test_a_call_for_the_last_part_of_a_run_needs_a_start_in_it(open_field):
    case = build("sdxl_denoising_start")
    with pytest.raises(FieldError, match="a call for the last part of a run needs a lower `start`"):
        open_field(case.pipe, case.inputs, [0])


# Conditions


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        (
            {"prompt": "a", "guidance_scale": 2},
            {"prompt": "b", "guidance_scale": 2},
            {"prompt": ["a", "b"], "guidance_scale": 2},
        ),
        ({"prompt": "a"}, {"prompt": "a"}, {"prompt": ["a", "a"]}),
        ({"class_labels": [1, 2]}, {"class_labels": [3]}, {"class_labels": [1, 2, 3]}),
        ({"guidance_scale": 2}, {"guidance_scale": 3}, None),
        ({"prompt": "a"}, {"class_labels": [1]}, None),
        ({"image": np.zeros(2)}, {"image": np.zeros(2)}, None),
    ],
    ids=["prompts", "equal prompts", "labels", "other scalars", "other arguments", "arrays"],
)
def test_conditions_share_a_call_only_if_one_call_can_make_both(first, second, merged):
    assert merge_conditions(first, second) == merged


def test_prompt_embeddings_are_joined_along_the_batch():
    merged = merge_conditions({"prompt_embeds": torch.ones(1, 2)}, {"prompt_embeds": torch.zeros(1, 2)})
    assert merged["prompt_embeds"].tolist() == [[1, 1], [0, 0]]
