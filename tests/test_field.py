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
guidance intervals, `control_guidance_end`,   count steps, and see evaluation numbers: leave them off
caches between steps
Cosmos 2.5                                    calls its network at the node, whatever the table's time: search without
                                              times of their own
inpainting                                    keeps the known part at the level of the time called, not of the node
Wan image to video, ChronoEdit                one image a call: conditions share a call only if they share the image
HunyuanDiT, AuraFlow, Cosmos 2.5;             no gradient with respect to the time, which they copy: refused if one is
EasyAnimate, ERNIE-Image                      asked for
modular pipelines                             no gradients at all, each block turns them off: refused likewise
LTX image to video, LTX-Condition on an       keep a part of old states and with it their graph: close the field after
image                                         each `backward`
============================================  =========================================================================
"""

import functools
import gc
import weakref
from contextlib import contextmanager
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiTPipeline
from PIL import Image
from tiny_pipelines import BUILDERS, NUM_STEPS, OWN_SCHEDULE, TOKENS, build
from torch._dynamo.testing import CompileCounter

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, time_grid
from diffusers_searched_solver.pipelines import ClassToImagePipeline
from search.baselines import run_scheduler
from search.field import FieldError, NetworkCalls, PipelineField, merge_conditions
from search.hand_out import HandOutScheduler
from search.rollout import Run, rollout


EXAMPLES = Path(__file__).parent.parent / "examples"
ALL = {**BUILDERS, **OWN_SCHEDULE}
WITHOUT = {
    "chronoedit": {"enable_temporal_reasoning": False},
    "ltx_condition_on_an_image": {"image_cond_noise_scale": 0.0},
}
ONE_IMAGE_A_CALL = ("wan_image_to_video", "chronoedit")
CALLED_AT_NODES = ("cosmos25",)
NO_GRADIENT = {"x": ("modular_flux",), "timestep": ("modular_flux", "hunyuan_dit", "aura_flow", "cosmos25")}
KEEPS_OLD_STATES = ("ltx_image_to_video", "ltx_condition_on_an_image")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny networks are slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture()
def open_field():
    """Opens fields, each with a counter of its own as `field.calls`, and closes them after the test."""
    opened = []

    def open_field(pipe, inputs, seeds, start=None) -> PipelineField:
        calls = NetworkCalls(pipe)
        opened.append(calls.remove)
        field = PipelineField(pipe, inputs, seeds, calls, start)
        field.calls = calls
        opened.append(field.close)
        return field

    yield open_field
    for close in reversed(opened):
        close()


@pytest.fixture(params=ALL)
def name(request):
    return request.param


def inputs_of(name: str) -> dict:
    return {**build(name).inputs, **WITHOUT.get(name, {})}


def seeds_of(inputs) -> list[int]:
    return list(range(len(inputs["class_labels"]) if "class_labels" in inputs else inputs.get("batch_size", 1)))


def start_of(name: str) -> float | None:
    """A call for the last part of a run says so in times, and has to begin there."""
    return 500.0 if name == "sdxl_denoising_start" else None


def load(name: str, dtype=torch.float32):
    """A shipped pipeline, with a trained network."""
    pipe = {"digits-dit": DiTPipeline, "digits-sit": ClassToImagePipeline}[name].from_pretrained(EXAMPLES / name)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


DIGITS = {"class_labels": [3, 8], "guidance_scale": 2.0}


@contextmanager
def recorded_steps(scheduler):
    """What goes into `scheduler.step` and the last that comes out."""
    states, step = [], scheduler.step

    @functools.wraps(step)
    def recording_step(model_output, timestep, sample, *args, **kwargs):
        states[-1:] = [sample.clone()]
        result = step(model_output, timestep, sample, *args, **kwargs)
        states.append(result[0].clone())
        return result

    scheduler.step = recording_step
    try:
        yield states
    finally:
        del scheduler.step


def own_run(pipe, scheduler, inputs, seeds, num_steps) -> list[torch.Tensor]:
    """The states of an ordinary call of the pipeline with a scheduler."""
    own, pipe.scheduler = pipe.scheduler, scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        with recorded_steps(scheduler) as states:
            pipe(**inputs, generator=generators, num_inference_steps=num_steps)
    finally:
        pipe.scheduler = own
    return states


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


def test_a_run_over_the_field_is_the_pipelines_own_run_bit_for_bit(name, open_field):
    case, inputs, seeds = build(name), inputs_of(name), seeds_of(inputs_of(name))
    solver = table_for(case, name)
    scheduler = SearchedSolverScheduler.from_config(case.config, solver=solver)
    expected = own_run(case.pipe, scheduler, inputs, seeds, NUM_STEPS)
    if name in OWN_SCHEDULE:
        solver = scheduler._solver  # the classical one on the pipeline's nodes

    k = case.first_step
    field = open_field(case.pipe, inputs, seeds, start=solver.timesteps[k] if k else None)
    never_made = [torch.zeros_like(field.noise)] * k
    states = rollout(field, solver, Run([field.noise] * (k + 1), never_made)).states[k : case.last_step + 2]
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
    assert torch.equal(rollout(field, solver).end, expected)
    assert torch.equal(run_scheduler(field, scheduler, 7), expected)


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


def stable_diffusion_with_a_text_encoder():
    """Stable Diffusion with a tokenizer of six words and CLIP's text encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = ("<pad>", "<unk>", "a", "cat", "dog", "moon")
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", unk_token="<unk>", model_max_length=TOKENS
    )
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
    )
    torch.manual_seed(0)
    parts = {**build("sd15").pipe.components, "text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer}
    return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)


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


@pytest.fixture(scope="module")
def dit():
    return load("digits-dit")


def test_two_fields_of_one_pipeline_do_not_disturb_each_other_or_the_pipeline(dit, open_field):
    before = dict(vars(dit))
    one = open_field(dit, {"class_labels": [1], "guidance_scale": 1.0}, [0])
    other = open_field(dit, {"class_labels": [1], "guidance_scale": 4.0}, [0])
    alone = one(one.noise, 500.0)
    other(other.noise, 400.0)
    assert torch.equal(one(one.noise, 500.0), alone)
    assert not torch.equal(other(other.noise, 500.0)[:1], alone)
    assert vars(dit) == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_a_field_that_is_closed_or_dropped_leaves_the_pipeline_and_the_gradient_mode_as_they_are(dit, grad_enabled):
    before = dict(vars(dit))
    calls = NetworkCalls(dit)
    closed, dropped = (PipelineField(dit, DIGITS, [0, 1], calls) for _ in range(2))
    reference = weakref.ref(dropped)
    with torch.set_grad_enabled(grad_enabled):
        closed.close()
        del dropped
        gc.collect()
        assert torch.is_grad_enabled() == grad_enabled
    calls.remove()
    assert reference() is None
    assert vars(dit) == before
    assert not dit.transformer._forward_pre_hooks


def test_closing_a_field_ends_the_call_as_the_pipeline_does_itself(dit, open_field, monkeypatch):
    """So that offloaded networks leave the accelerator."""
    ends = []
    monkeypatch.setattr(dit, "maybe_free_model_hooks", lambda: ends.append(True))
    field = open_field(dit, DIGITS, [0, 1])
    field.close()
    field.close()
    assert ends == [True]


def test_a_closed_field_opens_again(dit, open_field):
    field = open_field(dit, DIGITS, [0, 1])
    noise, prediction = field.noise, field(field.noise, 400.0)
    field.close()
    assert torch.equal(field(noise, 400.0), prediction)
    assert torch.equal(field.noise, noise)


def test_a_field_goes_on_after_a_failed_evaluation(dit, open_field):
    """Say, one that ran out of memory."""
    field = open_field(dit, DIGITS, [0, 1])
    prediction = field(field.noise, 400.0)

    def fail(module, args):
        raise torch.OutOfMemoryError("no more")

    handle = dit.transformer.register_forward_pre_hook(fail)
    with pytest.raises(FieldError, match="DiTPipeline with .* failed: OutOfMemoryError: no more") as caught:
        field(field.noise, 300.0)
    handle.remove()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert torch.equal(field(field.noise, 400.0), prediction)


# Pipelines that cannot be driven


def test_a_failing_pipeline_call_is_reported_with_its_arguments_and_leaves_the_pipeline_as_it_was(dit, open_field):
    before = dict(vars(dit))
    with pytest.raises(FieldError, match=r"The call of DiTPipeline with class_labels=\['no such', 2\]"):
        open_field(dit, {"class_labels": ["no such", 2]}, [0, 1])
    assert {key: value for key, value in vars(dit).items() if key in before} == before


class PipelineOverACopy(DiTPipeline):
    """Takes all times out of the schedule before its loop."""

    def progress_bar(self, iterable=None, total=None):
        return super().progress_bar([float(timestep) for timestep in iterable], total)


class PipelineWithASchedulerOfItsOwn(ClassToImagePipeline):
    def __call__(self, *args, **kwargs):
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return super().__call__(*args, **{**kwargs, "num_inference_steps": 2})


def test_a_pipeline_that_runs_over_a_copy_of_the_schedule_is_refused(dit, open_field):
    field = open_field(PipelineOverACopy(**dit.components), DIGITS, [0, 1])
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


# Network calls


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("sd15", 2),
        ("sd15_controlnet", 2),
        ("flux", 1),
        ("flux_true_guidance", 2),
        ("wan", 2),
        ("wan22_two_experts", 2),
        ("z_image", 2),
    ],
    ids=[
        "guidance in one batch",
        "a ControlNet beside",
        "guidance is an input",
        "guidance in two calls",
        "video",
        "two experts",
        "a list of samples",
    ],
)
def test_an_evaluation_counts_its_samples_once_and_again_for_guidance(name, samples, open_field):
    field = open_field(build(name).pipe, inputs_of(name), [0])
    assert field.calls.count == samples
    field(field.noise, 900.0)
    field(field.noise, 100.0)
    assert field.calls.count == 3 * samples


def test_text_encoders_and_calls_outside_of_fields_are_not_counted(open_field):
    pipe = stable_diffusion_with_a_text_encoder()
    inputs = {"prompt": "a cat", "height": 16, "width": 16, "guidance_scale": 1.0}
    field = open_field(pipe, {**inputs, "negative_prompt": "a dog"}, [0])
    assert field.calls.count == 1
    pipe.set_progress_bar_config(disable=True)
    pipe(**inputs, num_inference_steps=2, output_type="latent")
    assert field.calls.count == 1


def test_a_listener_hears_of_every_evaluation(dit):
    heard = []
    calls = NetworkCalls(dit, heard.append)
    field = PipelineField(dit, {"class_labels": [1, 2, 3], "guidance_scale": 2.0}, [0, 1, 2], calls)
    field(field.noise, 500.0)
    field.close()
    calls.remove()
    assert heard == [6, 6]
    assert calls.count == 12


# Networks that only run forward


def compiled_in_place(pipe):
    pipe.transformer.compile(backend="eager", fullgraph=True)


def compiled_in_a_wrapper(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)


def offloaded_by_layer(pipe):
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert next(pipe.transformer.parameters()).is_meta


def offloaded_by_model(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def quantised(pipe):
    torch.ao.quantization.quantize_dynamic(pipe.transformer, {torch.nn.Linear}, inplace=True)


def in_bfloat16(pipe):
    pipe.to(torch.bfloat16)


def in_float16(pipe):
    pipe.to(torch.float16)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "change",
    [
        compiled_in_place,
        compiled_in_a_wrapper,
        offloaded_by_layer,
        offloaded_by_model,
        quantised,
        in_bfloat16,
        in_float16,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "after an ordinary call"])
def test_a_network_that_only_runs_forward_makes_the_same_run_over_the_field(change, warm, open_field):
    """A half-precision pipeline's states are rounded between steps, which a rollout does not do."""
    pipe = load("digits-dit")
    change(pipe)
    if warm:
        pipe(**DIGITS, num_inference_steps=2, output_type="np")
    field = open_field(pipe, DIGITS, [0, 1])
    solver = SearchedSolver.adams_bashforth(*time_grid(field.process, 3), "velocity", 1)
    scheduler = SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=solver)
    x = field.noise
    states = [x]
    for i, timestep in enumerate(solver.timesteps):
        prediction = solver.prediction(field(x, timestep), x, i, field.prediction_type)
        x = solver.step(x, [prediction], i).to(field.noise.dtype)
        states.append(x)
    expected = own_run(pipe, scheduler, DIGITS, [0, 1], 3)
    assert all(torch.equal(state, own) for state, own in zip(states, expected, strict=True))
    assert field.calls.count == (1 + 3) * 2 * 2
    assert states[-1].float().std() > 0.1
    assert torch.equal(field(x.float(), 500.0), field(x, 500.0))


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "in a wrapper"])
def test_a_compiled_network_is_not_compiled_again_for_the_field(in_place, open_field):
    torch.compiler.reset()
    pipe, counter = load("digits-dit"), CompileCounter()
    if in_place:
        pipe.transformer.compile(backend=counter, fullgraph=True)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    pipe.scheduler = SearchedSolverScheduler.from_config(pipe.scheduler.config)  # its times are float, not whole
    pipe(**DIGITS, num_inference_steps=2, output_type="np")
    assert counter.frame_count == 1
    field = open_field(pipe, DIGITS, [0, 1])
    for timestep in (900.0, 500.0, 100.0):
        field(field.noise, timestep)
    assert field.calls.count == (1 + 3) * 2 * 2
    assert counter.frame_count == 1


def test_predictions_survive_a_network_that_uses_its_output_memory_again(open_field):
    """As compiled networks do that replay a CUDA graph."""
    pipe = build("flux").pipe
    memory = torch.empty_like(pipe.transformer.proj_out.weight[:0])

    def reuse(module, args, output):
        return (memory.resize_(output[0].shape).copy_(output[0]),)

    handle = pipe.transformer.register_forward_hook(reuse)
    field = open_field(pipe, inputs_of("flux"), [0])
    first = field(field.noise, 900.0)
    kept = first.clone()
    second = field(field.noise, 100.0)
    handle.remove()
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


# Gradients


def test_predictions_have_a_graph_only_if_an_input_requires_a_gradient(dit, open_field):
    field = open_field(dit, DIGITS, [0, 1])
    assert any(parameter.requires_grad for parameter in dit.transformer.parameters())
    plain = field(field.noise, 500.0)
    with_graph = field(field.noise.clone().requires_grad_(), 500.0)
    with torch.no_grad():
        without = field(field.noise.clone().requires_grad_(), torch.tensor(500.0, requires_grad=True))
    assert [each.requires_grad for each in (plain, with_graph, without, field(field.noise, 500.0))] == [0, 1, 0, 0]
    assert torch.equal(plain, with_graph)
    assert torch.equal(plain, without)


@pytest.mark.parametrize("source", ["x", "timestep"])
def test_a_pipeline_gives_gradients_or_says_that_it_does_not(name, source, open_field):
    inputs = inputs_of(name)
    field = open_field(build(name).pipe, inputs, seeds_of(inputs), start_of(name))
    arguments = {"x": field.noise / 2, "timestep": torch.tensor(450.0)}
    arguments[source].requires_grad_()
    if name in NO_GRADIENT[source]:
        with pytest.raises(FieldError, match=f"hands on no gradient with respect to `{source}`"):
            field(**arguments)
        return
    prediction = field(**arguments)
    assert torch.equal(prediction, field(field.noise / 2, 450.0))
    (gradient,) = torch.autograd.grad(prediction.square().sum(), arguments[source])
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("example", ["digits-dit", "digits-sit", "sd15", "sd3", "flux", "wan"])
def test_gradients_are_the_derivatives(example, open_field):
    """Against central differences, which the rounding of float32 leaves with three digits."""
    pipe, inputs = (load(example), DIGITS) if example in ("digits-dit", "digits-sit") else (build(example).pipe, None)
    inputs = inputs or inputs_of(example)
    field = open_field(pipe, inputs, seeds_of(inputs))
    generator = torch.Generator().manual_seed(0)
    weights, direction = (torch.randn(field.noise.shape, generator=generator) for _ in range(2))
    x, timestep = field.noise / 2, torch.tensor(450.0)

    def projected(x, timestep):
        return (field(x, timestep).double() * weights).sum()

    value = projected(x.requires_grad_(), timestep.requires_grad_())
    by_x, by_time = torch.autograd.grad(value, (x, timestep))
    with torch.no_grad():
        along = (projected(x + 1e-2 * direction, 450.0) - projected(x - 1e-2 * direction, 450.0)) / 2e-2
        later = (projected(x, 450.125) - projected(x, 449.875)) / 0.25
    scale = by_x.norm().item()
    torch.testing.assert_close((by_x * direction).sum().double(), along, rtol=1e-2, atol=1e-3 * scale)
    torch.testing.assert_close(by_time.double(), later, rtol=3e-2, atol=1e-3 * scale / 100)


def test_gradients_of_a_run_reach_all_of_its_times_and_come_again(dit, open_field):
    field = open_field(dit, DIGITS, [0, 1])

    def gradient():
        times = torch.tensor([900.0, 600.0, 300.0], dtype=torch.float64, requires_grad=True)
        x = field.noise
        for timestep in times:
            x = x - 0.3 * field(x, timestep)
        x.square().mean().backward()
        return times.grad

    first = gradient()
    assert (first != 0).all()
    assert torch.equal(gradient(), first)


@pytest.mark.parametrize("name", KEEPS_OLD_STATES)
def test_a_pipeline_that_keeps_a_part_of_old_states_gives_gradients_again_once_it_is_closed(name, open_field):
    field = open_field(build(name).pipe, inputs_of(name), [0])
    noise = field.noise

    def gradient():
        x = noise.clone().requires_grad_()
        field(x - 0.1 * field(x, 900.0), 500.0).square().sum().backward()
        return x.grad

    first = gradient()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradient()
    field.close()
    assert torch.equal(gradient(), first)


def test_no_activation_outlives_the_backward_pass(dit, open_field):
    """The suspended call still holds the last prediction, but not what its gradient needed."""
    field, activations = open_field(dit, DIGITS, [0, 1]), []
    linear = dit.transformer.transformer_blocks[0].ff.net[-1]
    handle = linear.register_forward_pre_hook(lambda module, args: activations.append(weakref.ref(args[0])))
    x = field.noise.clone().requires_grad_()
    prediction = field(x, 500.0)
    handle.remove()
    assert activations[-1]() is not None
    prediction.square().sum().backward()
    gc.collect()
    assert activations[-1]() is None


def test_gradient_checkpointing_gives_the_same_gradients_from_less_memory(open_field):
    pipe = load("digits-dit")
    gradients, kept = [], []

    def keep(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for checkpointing in (False, True):
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        field = open_field(pipe, DIGITS, [0, 1])
        kept.append(0)
        inputs = field.noise.clone().requires_grad_(), torch.tensor(500.0, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            prediction = field(*inputs)
        gradients.append(torch.autograd.grad(prediction.square().sum(), inputs))
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
    assert kept[1] < 0.5 * kept[0]


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
