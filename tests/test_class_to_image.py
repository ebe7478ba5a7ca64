"""The class-conditional pipeline against the conventions that it brings together."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from golden_models import official

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.pipelines import ClassToImagePipeline


FLOW_SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchHeunDiscreteScheduler(),
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    SearchedSolverScheduler(prediction_type="flow_prediction"),
]


def new_pipeline(**kwargs) -> ClassToImagePipeline:
    kwargs = {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "id2label": {0: "tench, Tinca tinca", 1: "goldfish"},
    } | kwargs
    pipe = ClassToImagePipeline(official("sit")[0], **kwargs)
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


@torch.no_grad()
def test_guidance_on_three_channels_is_that_of_the_official_code():
    model, golden = official("sit")
    t, batch = golden["cfg_t"][0].item(), 2

    class OneCall(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            self.timesteps = torch.tensor([1000 * (1 - t)])

        def step(self, model_output, timestep, sample, return_dict):
            return (-model_output,)

    pipe = new_pipeline(scheduler=OneCall(), guidance_channels=3)
    out = run(pipe, golden["cfg_y"][:batch].tolist(), latents=golden["cfg_x"][:batch], guidance_scale=4.0)
    # Four times the difference of two outputs that are each within 2e-6.
    torch.testing.assert_close(out, golden["cfg_out"][:batch], atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_pipeline_walks_the_official_euler_path_from_noise_to_data():
    model, pipe, n = official("sit")[0], new_pipeline(), 5

    class UniformEuler(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps, device=None):
            super().set_timesteps(sigmas=[1 - i / num_inference_steps for i in range(num_inference_steps)])

    pipe.scheduler = UniformEuler()
    x, y = noise(2), torch.tensor([1, 3])
    for i in range(n):
        x = x + model(x, torch.full((2,), i / n), y).sample / n
    torch.testing.assert_close(run(pipe, num_inference_steps=n, guidance_scale=1.0), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", FLOW_SCHEDULERS, ids=lambda s: type(s).__name__)
def test_flow_schedulers_agree_in_the_limit_of_many_steps(scheduler):
    heun = new_pipeline(scheduler=FlowMatchHeunDiscreteScheduler())
    reference = run(heun, num_inference_steps=50, guidance_scale=1.0)
    out = run(new_pipeline(scheduler=scheduler), num_inference_steps=50, guidance_scale=1.0)
    assert (out - reference).square().mean().sqrt() < 0.02  # what Euler in 50 steps leaves, on values around 2


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
pipe = ClassToImagePipeline.from_pretrained(sys.argv[1])
noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
torch.save(pipe(["goldfish", 3], num_inference_steps=4, latents=noise, output_type="latent").images, sys.argv[2])
"""


@pytest.mark.parametrize("vae", [None, new_vae(3)], ids=["without vae", "with vae"])
def test_a_saved_pipeline_gives_the_same_samples_in_a_new_process(vae, tmp_path):
    pipe = new_pipeline(vae=vae, guidance_channels=3)
    pipe.save_pretrained(tmp_path / "pipe")
    subprocess.run([sys.executable, "-c", LOAD, tmp_path / "pipe", tmp_path / "out.pt"], check=True, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), run(pipe), atol=1e-5, rtol=0)
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["transformer"][0].startswith("diffusers_searched_solver.models")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": ["godlfish"]}, "'godlfish', expected .* or one of the 3 names"),
        ({"class_labels": [11]}, "has 11, expected an id from 0 to 9, 10 for the null class"),
        ({"class_labels": [-1]}, "has -1, expected an id from 0 to 9"),
        ({"class_labels": [1], "latents": noise(2)}, r"\(2, 4, 8, 8\), expected \(1, 4, 8, 8\)"),
        ({"class_labels": [1], "guidance_channels": 5}, "`guidance_channels` is 5, expected 1 to 4"),
        ({"class_labels": [1], "output_type": "jpg"}, "`output_type` is 'jpg'"),
        ({"class_labels": [1], "output_type": "pil"}, "has no `vae` and makes 4 channels"),
        ({"class_labels": [1], "callback_on_step_end_tensor_inputs": ["prompt"]}, r"has \['prompt'\]"),
    ],
    ids=["name", "id", "negative id", "latents", "channels", "output type", "pil without vae", "callback tensors"],
)
def test_a_bad_argument_is_refused_with_what_to_pass_instead(arguments, message):
    with pytest.raises(ValueError, match=message):
        new_pipeline()(**{"num_inference_steps": 1, "output_type": "latent"} | arguments)


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler(), UniPCMultistepScheduler(), UniPCMultistepScheduler(prediction_type="flow_prediction")],
    ids=["ddim", "unipc epsilon", "unipc without flow sigmas"],
)
def test_a_scheduler_that_is_not_for_flow_matching_is_refused(scheduler):
    with pytest.raises(ValueError, match="is a model of `prediction_type` 'flow_prediction'"):
        run(new_pipeline(scheduler=scheduler))
