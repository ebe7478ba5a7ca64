"""What a field counts, and the networks that it drives: compiled, offloaded, quantised, in half precision."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiTPipeline
from fields import DIGITS, inputs_of, load, own_run, stable_diffusion_with_a_text_encoder
from tiny_pipelines import build
from torch._dynamo.testing import CompileCounter

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, time_grid
from search.pipeline.field import NetworkCalls, PipelineField


pytestmark = pytest.mark.usefixtures("one_thread")


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


class PipelineWithALanguageModel(DiTPipeline):
    """Runs another network sixteen times before its loop."""

    def __call__(self, *args, **kwargs):
        for _ in range(16):
            self.vae(torch.zeros(1, 1, 8, 8))
        return super().__call__(*args, **kwargs)


def test_what_runs_often_before_the_loop_is_not_counted(open_field):
    pipe = PipelineWithALanguageModel(**load("digits-dit").components)
    field = open_field(pipe, {"class_labels": [1], "guidance_scale": 1.0}, [0])
    assert field.calls.count == 1


class PackedNetwork(torch.nn.Module):
    """Takes the tokens of one sample one after another, as Cosmos 3's does."""

    def forward(self, input_ids, text_indexes, vision_tokens):
        return vision_tokens


def test_tokens_of_one_sample_are_one_sample():
    network = PackedNetwork()
    calls = NetworkCalls(SimpleNamespace(components={"transformer": network}))
    with calls.evaluation():
        for _ in ("with the prompt", "without it"):
            network(input_ids=torch.arange(13), text_indexes=torch.arange(13), vision_tokens=[torch.zeros(26, 4)])
    calls.remove()
    assert calls.count == 2


def test_a_listener_hears_of_every_evaluation(digits_dit):
    heard = []
    calls = NetworkCalls(digits_dit, heard.append)
    field = PipelineField(digits_dit, {"class_labels": [1, 2, 3], "guidance_scale": 2.0}, [0, 1, 2], calls)
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


def quantised_by_torchao(pipe):
    """Where torchao is installed: diffusers imports it then, which takes seconds."""
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())


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
        quantised_by_torchao,
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
