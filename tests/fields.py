"""Fields of tiny pipelines and of the shipped ones, for the tests of `search/pipeline/field.py`."""

import functools
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import DiTPipeline
from tiny_pipelines import BUILDERS, OWN_SCHEDULE, TOKENS, build

from diffusers_searched_solver.pipelines import ClassToImagePipeline


EXAMPLES = Path(__file__).parent.parent / "examples"
ALL = {**BUILDERS, **OWN_SCHEDULE}
WITHOUT = {
    "chronoedit": {"enable_temporal_reasoning": False},
    "ltx_condition_on_an_image": {"image_cond_noise_scale": 0.0},
}
DIGITS = {"class_labels": [3, 8], "guidance_scale": 2.0}


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


def own_run(pipe, scheduler, inputs, seeds, num_steps, see=lambda result: None) -> list[torch.Tensor]:
    """The states of an ordinary call of the pipeline with a scheduler; `see` is given what it returns."""
    own, pipe.scheduler = pipe.scheduler, scheduler
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        with recorded_steps(scheduler) as states:
            see(pipe(**inputs, generator=generators, num_inference_steps=num_steps))
    finally:
        pipe.scheduler = own
    return states


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
