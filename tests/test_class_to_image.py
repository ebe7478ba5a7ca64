"""The class-conditional pipeline against the samplers of the official codes and the conventions of schedulers."""

import inspect
import json
import math
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from golden_models import FIXTURES, official

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.pipelines import ClassToImagePipeline
from search.pipeline.field import NetworkCalls, PipelineField


NETWORKS = ["sit", "dit", "flowdcn"]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchHeunDiscreteScheduler(),
    UniPCMultistepScheduler(**FLOW),
    DPMSolverMultistepScheduler(**FLOW),
    SearchedSolverScheduler(prediction_type="flow_prediction"),
]
NOISE_SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "DEISMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
}
RELEASED = [("sit-xl-2-256", "sit", 3), ("dit-xl-2-256", "dit", 3), ("flowdcn-b-2-256", "flowdcn", 4)]
PAPER_TABLES = json.loads((FIXTURES / "paper_tables.json").read_text())["tables"]


def new_pipeline(network="sit", **kwargs) -> ClassToImagePipeline:
    kwargs = {
        "scheduler": DDIMScheduler(clip_sample=False) if network == "dit" else FlowMatchEulerDiscreteScheduler(),
        "id2label": {0: "tench, Tinca tinca", 1: "goldfish"},
    } | kwargs
    pipe = ClassToImagePipeline(official(network)[0], **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def new_vae(channels: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(channels, channels, block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.5).eval()


def noise(batch: int) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def run(pipe: ClassToImagePipeline, class_labels=(1, 3), **kwargs) -> torch.Tensor:
    kwargs = {"num_inference_steps": 4, "latents": noise(len(class_labels)), "output_type": "latent"} | kwargs
    return pipe(list(class_labels), **kwargs).images


def field(pipe, **kwargs) -> PipelineField:
    """What the pipeline hands to its scheduler, at any state and time."""
    return PipelineField(pipe, {"output_type": "latent"} | kwargs, [0, 1], NetworkCalls(pipe))


@pytest.mark.parametrize("network", ["sit", "dit"])
@torch.no_grad()
def test_guidance_on_three_channels_is_that_of_the_official_code(network):
    golden = {name: tensor[:2] for name, tensor in official(network)[1].items() if name.startswith("cfg")}
    pipe, t = new_pipeline(network, guidance_channels=3), golden["cfg_t"][0].item()
    predict = field(pipe, class_labels=golden["cfg_y"].tolist(), guidance_scale=4.0)
    out = predict(golden["cfg_x"], t) if network == "dit" else -predict(golden["cfg_x"], 1000 * (1 - t))
    # Four times the difference of two outputs that are each within 1e-5.
    torch.testing.assert_close(out, golden["cfg_out"][:, :4], atol=8e-5, rtol=0)


@torch.no_grad()
def test_sigmas_of_even_spacing_walk_the_official_euler_path_from_noise_to_data():
    model, n, x, y = official("sit")[0], 5, noise(2), torch.tensor([1, 3])
    out = run(new_pipeline(), sigmas=[1 - i / n for i in range(n)], guidance_scale=1.0)
    for i in range(n):
        x = x + model(x, torch.full((2,), i / n), y).sample / n
    torch.testing.assert_close(out, x, atol=1e-5, rtol=0)


def test_dit_is_called_at_explicit_timesteps_as_they_are():
    pipe, seen = new_pipeline("dit", scheduler=DPMSolverMultistepScheduler()), []
    pipe.transformer.register_forward_pre_hook(lambda module, args: seen.extend(args[1].unique().tolist()))
    run(pipe, timesteps=[981, 500, 20])
    assert seen == [981, 500, 20]


def released_steps(table):
    """Step sizes, normalised as they are on import, and rows of coefficients with their diagonal."""
    total = sum(table["step_sizes"])
    for i, (step_size, row) in enumerate(zip(table["step_sizes"], table["coefficients_below_diagonal"], strict=True)):
        yield step_size / total, [*row[:i], 1 - sum(row[:i])]


def released_flow_sampler(velocity, x, table):
    t, past = 0.0, []
    for dt, coefficients in released_steps(table):
        past.append(velocity(x, t))
        x = x + dt * sum(c * u for c, u in zip(coefficients, past, strict=True))
        t += dt
    return x


def released_noise_sampler(noise_at, x, table):
    """On the continuous variance-preserving process with beta from 0.1 to 20, combining predictions of the data."""

    def alpha_sigma(tau):
        alpha = math.exp(-(9.95 * tau**2 + 0.1 * tau) / 2)
        return alpha, math.sqrt(1 - alpha**2)

    tau, past = 0.999, []
    for dt, coefficients in released_steps(table):
        alpha, sigma = alpha_sigma(tau)
        past.append((x - sigma * noise_at(x, 1000 * tau)) / alpha)
        tau = max(tau - dt, 1e-3)
        next_alpha, next_sigma = alpha_sigma(tau)
        data = sum(c * p for c, p in zip(coefficients, past, strict=True))
        x = next_sigma / sigma * x + next_sigma * (next_alpha / next_sigma - alpha / sigma) * data
    return x


@pytest.mark.parametrize(
    "solver, network, channels, num_steps",
    [(solver, network, channels, int(n)) for solver, network, channels in RELEASED for n in PAPER_TABLES[solver]],
)
def test_a_bundled_solver_samples_what_the_released_sampler_does(solver, network, channels, num_steps):
    scheduler, calls = SearchedSolverScheduler.from_pretrained(solver), []
    pipe = new_pipeline(network, scheduler=scheduler, guidance_channels=channels)
    pipe.transformer.double().register_forward_hook(lambda module, args, output: calls.append((*args, *output)))
    out = run(pipe, num_inference_steps=num_steps, guidance_scale=4.0, latents=noise(2).double())

    def answer(x, t):
        """What the network answered the pipeline, guided as the released samplers do, if it was asked the same."""
        seen_x, seen_t, labels, output = calls.pop(0)
        torch.testing.assert_close(seen_x, torch.cat([x, x]), atol=1e-12, rtol=1e-12)  # float64
        torch.testing.assert_close(seen_t, torch.full((4,), t), atol=1.2e-7, rtol=1.2e-7)  # float32
        assert labels.tolist() == [1, 3, 10, 10]
        of_class, of_null = output[:, :4].chunk(2)
        return torch.cat([(of_null + 4 * (of_class - of_null))[:, :channels], of_class[:, channels:]], dim=1)

    # The same answers, because with its random weights FlowDCN is chaotic: a last bit is worth 0.1 after 15 steps.
    sampler = released_noise_sampler if network == "dit" else released_flow_sampler
    expected = sampler(answer, noise(2).double(), PAPER_TABLES[solver][str(num_steps)])
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    assert not calls


@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS, ids=lambda s: type(s).__name__)
def test_flow_schedulers_agree_in_the_limit_of_many_steps(scheduler):
    heun = new_pipeline(scheduler=FlowMatchHeunDiscreteScheduler())
    reference = run(heun, num_inference_steps=50, guidance_scale=1.0)
    out = run(new_pipeline(scheduler=scheduler), num_inference_steps=50, guidance_scale=1.0)
    assert (out - reference).square().mean().sqrt() < 0.02  # what Euler in 50 steps leaves, on values around 2


@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_noise_schedulers_agree_in_the_limit_of_many_steps(name):
    def sample(name, num_steps):
        betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
        scheduler = getattr(diffusers, name)(timestep_spacing="trailing", **betas, **NOISE_SCHEDULERS[name])
        pipe = new_pipeline("dit", scheduler=scheduler)
        # Leave out the time's fast waves, of up to one radian per timestep, which 50 steps do not resolve.
        pipe.transformer.t_embedder.mlp[0].weight.detach().unflatten(1, (2, 128))[:, :, :64] = 0
        return run(pipe, num_inference_steps=num_steps, guidance_scale=1.0)

    reference, out = sample("HeunDiscreteScheduler", 200), sample(name, 50)
    # What DDIM in 50 steps leaves is 0.037.
    assert (out - reference).square().mean().sqrt() < 0.05 * reference.square().mean().sqrt()


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), EulerAncestralDiscreteScheduler()], ids=["ddpm", "euler a"])
def test_stochastic_schedulers_draw_from_the_generator(scheduler):
    def sample(seed):
        return run(new_pipeline("dit", scheduler=scheduler), generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize("network", NETWORKS)
def test_guidance_ends_where_its_interval_does_whatever_the_order_of_times(network):
    pipe, calls, kwargs = new_pipeline(network), [], {"class_labels": [1, 3]}
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    every, none = field(pipe, guidance_scale=3.0, **kwargs), field(pipe, guidance_scale=1.0, **kwargs)
    some = field(pipe, guidance_scale=3.0, guidance_interval=(0.2, 0.7), **kwargs)
    for timestep, inside in [(900.0, False), (450.0, True), (100.0, False), (200.0, True), (700.0, True)]:
        calls.clear()
        out = some(noise(2), timestep)
        assert calls == [4 if inside else 2]  # the null half is not run in vain
        assert torch.equal(out, (every if inside else none)(noise(2), timestep))


def test_guidance_on_three_channels_leaves_the_fourth_of_the_first_step_unguided():
    pipe = new_pipeline()
    plain = run(pipe, num_inference_steps=1, guidance_scale=1.0)
    three = run(pipe, num_inference_steps=1, guidance_scale=4.0, guidance_channels=3)
    every = run(pipe, num_inference_steps=1, guidance_scale=4.0, guidance_channels=4)
    torch.testing.assert_close(three[:, 3], plain[:, 3], atol=1e-5, rtol=0)  # another batch size, another rounding
    assert torch.equal(three[:, :3], every[:, :3])
    assert (every[:, 3] - plain[:, 3]).abs().max() > 0.1


@pytest.mark.parametrize("configured, same_as", [(None, 4), (3, 3)])
def test_the_guided_channels_default_to_those_of_the_pipeline(configured, same_as):
    out = run(new_pipeline(guidance_channels=configured))
    assert torch.equal(out, run(new_pipeline(), guidance_channels=same_as))


def test_samples_of_a_batch_do_not_interact():
    pipe = new_pipeline()
    both = run(pipe)
    torch.testing.assert_close(both[1:], run(pipe, [3], latents=noise(2)[1:]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_may_be_stored_in_a_type_that_nothing_computes_in(network):
    """As layerwise casting, bitsandbytes and torchao store them."""
    expected, pipe = run(new_pipeline(network), num_inference_steps=1), new_pipeline(network)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    found = run(pipe, num_inference_steps=1)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).square().mean() < 0.05 * expected.square().mean()


def test_every_name_of_a_class_is_a_label():
    pipe = new_pipeline()
    assert pipe.labels == {"Tinca tinca": 0, "goldfish": 1, "tench": 0}
    assert torch.equal(run(pipe, ["goldfish", "tench"]), run(pipe, [1, 0]))
    assert pipe("goldfish", num_inference_steps=1, output_type="pt").images.shape == (1, 4, 8, 8)


def test_noise_comes_from_the_generator():
    pipe = new_pipeline()
    by_seed = run(pipe, latents=None, generator=torch.Generator().manual_seed(0))
    assert torch.equal(by_seed, run(pipe))


def test_a_callback_sees_and_replaces_the_latents_of_every_step():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, timestep.item()))
        return {"latents": torch.zeros_like(tensors["latents"])}

    pipe = new_pipeline()
    assert run(pipe, callback_on_step_end=callback).abs().max() == 0
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_images_are_the_decoded_latents(channels, mode):
    pipe = new_pipeline(vae=new_vae(channels))
    decoded = pipe.vae.decode(run(pipe) / 0.5).sample
    arrays = run(pipe, output_type="np")
    np.testing.assert_allclose(arrays, (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy(), atol=1e-6)
    image = run(pipe, output_type="pil")[0]
    assert (image.mode, image.size) == (mode, (8, 8))
    np.testing.assert_array_equal(np.asarray(image), (arrays[0].squeeze() * 255).round().astype("uint8"))


def test_flowdcn_makes_images_of_any_aspect_ratio():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(3, 3, **blocks, block_out_channels=(8, 8), norm_num_groups=4)  # a latent is 2 pixels wide
    pipe = new_pipeline("flowdcn", vae=vae)
    default, wide = (pipe(1, **size, num_inference_steps=2).images[0] for size in ({}, {"width": 24}))
    assert (default.size, wide.size) == ((16, 16), (24, 16))
    for size in (26, 0, -4):
        with pytest.raises(ValueError, match=f"are 16 and {size}, expected positive multiples of 4"):
            pipe(1, width=size)


def test_without_its_no_grad_the_loop_passes_gradients_to_a_learnable_schedule():
    class Learnable(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            self.timesteps = torch.tensor([1000.0, 500.0], requires_grad=True)

        def step(self, model_output, timestep, sample, return_dict):
            return (sample - 0.5 * model_output,)

    pipe = new_pipeline(scheduler=Learnable())
    call = inspect.unwrap(ClassToImagePipeline.__call__)
    call(pipe, [1, 3], latents=noise(2), output_type="latent").images.square().sum().backward()
    assert pipe.scheduler.timesteps.grad.abs().min() > 0


LOAD = """
import sys, torch
from diffusers_searched_solver.pipelines import ClassToImagePipeline
for folder in sys.argv[1:]:
    pipe = ClassToImagePipeline.from_pretrained(folder)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipe(["goldfish", 3], num_inference_steps=4, latents=noise, output_type="latent").images
    torch.save(images, f"{folder}/out.pt")
"""


def test_saved_pipelines_give_the_same_samples_in_a_new_process(tmp_path):
    pipes = {network: new_pipeline(network, guidance_channels=3) for network in NETWORKS}
    pipes["with vae"] = new_pipeline(vae=new_vae(3))
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / name)
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["transformer"][0].startswith("diffusers_searched_solver.models")
    subprocess.run([sys.executable, "-c", LOAD, *(tmp_path / name for name in pipes)], check=True, timeout=300)
    for name, pipe in pipes.items():
        torch.testing.assert_close(torch.load(tmp_path / name / "out.pt"), run(pipe), atol=1e-5, rtol=1e-5)


def test_the_pipeline_is_to_be_loaded_by_its_own_class(tmp_path):
    new_pipeline().save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="ClassToImagePipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": ["godlfish"]}, "'godlfish', expected .* or one of the 3 names"),
        ({"class_labels": [11]}, "has 11, expected an id from 0 to 9, 10 for the null class"),
        ({"class_labels": [-1]}, "has -1, expected an id from 0 to 9"),
        ({"class_labels": [1], "latents": noise(2)}, r"\(2, 4, 8, 8\), expected \(1, 4, 8, 8\)"),
        ({"class_labels": [1], "guidance_channels": 5}, "`guidance_channels` is 5, expected 1 to 4"),
        ({"class_labels": [1], "guidance_interval": (0.7, 0.2)}, r"`guidance_interval` is \(0.7, 0.2\), expected two"),
        ({"class_labels": [1], "guidance_interval": (0, 700)}, r"is \(0, 700\), expected two numbers from 0"),
        ({"class_labels": [1], "height": 16}, "are 16 and 8, expected 8 each, the only size"),
        (
            {"class_labels": [1], "timesteps": [1000, 500]},
            "`timesteps` was passed, but FlowMatchHeunDiscreteScheduler",
        ),
        ({"class_labels": [1], "output_type": "jpg"}, "`output_type` is 'jpg'"),
        ({"class_labels": [1], "output_type": "pil"}, "has no `vae` and makes 4 channels"),
        ({"class_labels": [1], "callback_on_step_end_tensor_inputs": ["prompt"]}, r"has \['prompt'\]"),
    ],
    ids=[
        "name",
        "id",
        "negative id",
        "latents",
        "channels",
        "interval backwards",
        "interval in timesteps",
        "height",
        "schedule",
        "output type",
        "pil without vae",
        "callback tensors",
    ],
)
def test_a_bad_argument_is_refused_with_what_to_pass_instead(arguments, message):
    with pytest.raises(ValueError, match=message):
        new_pipeline(scheduler=FlowMatchHeunDiscreteScheduler())(
            **{"num_inference_steps": 1, "output_type": "latent"} | arguments
        )


@pytest.mark.parametrize(
    "network, scheduler, message",
    [
        ("sit", DDIMScheduler(), "'epsilon' and `use_flow_sigmas` False, but this SiTTransformer2DModel"),
        ("sit", UniPCMultistepScheduler(), "Use `FlowMatchEulerDiscreteScheduler"),
        ("sit", UniPCMultistepScheduler(prediction_type="flow_prediction"), "made with .* `use_flow_sigmas=True`"),
        ("dit", FlowMatchEulerDiscreteScheduler(), "is a model of `prediction_type` 'epsilon'. Use `DDIMScheduler"),
        ("dit", DDIMScheduler(prediction_type="v_prediction"), "`prediction_type` 'v_prediction'"),
        ("dit", DPMSolverMultistepScheduler(use_flow_sigmas=True), "made with .* `use_flow_sigmas=False`"),
        ("dit", EDMEulerScheduler(), "neither DDPM's noise process nor flow matching"),
    ],
    ids=["ddim", "unipc", "without flow sigmas", "flow on dit", "v on dit", "flow sigmas on dit", "edm on dit"],
)
def test_a_scheduler_of_another_prediction_type_is_refused(network, scheduler, message):
    with pytest.raises(ValueError, match=message):
        run(new_pipeline(network, scheduler=scheduler))
