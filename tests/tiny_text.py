"""Tiny text-to-image pipelines that read a prompt: those of `tiny_pipelines` with tokenizers and text encoders."""

from string import ascii_lowercase

import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import TOKENS, build
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


MARKS = ("<|startoftext|>", "<|endoftext|>")
LETTERS = {token: i for i, token in enumerate([*MARKS, *ascii_lowercase, *(f"{x}</w>" for x in ascii_lowercase)])}


def clip(cls: type, width: int, pooled: int) -> tuple[CLIPTokenizer, torch.nn.Module]:
    """A tokenizer of letters, and an encoder whose states and projection are of these widths."""
    config = CLIPTextConfig(
        vocab_size=len(LETTERS),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=pooled,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=LETTERS[MARKS[0]],
        eos_token_id=LETTERS[MARKS[1]],
    )
    return CLIPTokenizer(vocab=LETTERS, merges=[], model_max_length=TOKENS), cls(config).eval()


def t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """The same of T5's kind."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *ascii_lowercase]
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=4, d_ff=width, num_layers=1, num_heads=2)
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0), T5EncoderModel(config).eval()


# Widths are what the networks of `tiny_pipelines` take: 8, or two encoders of 4 beside each other.
ENCODERS = {
    "sd15": lambda: [clip(CLIPTextModel, 8, 8)],
    "sdxl": lambda: [clip(CLIPTextModel, 4, 4), clip(CLIPTextModelWithProjection, 4, 8)],
    "sd3": lambda: [clip(CLIPTextModelWithProjection, 4, 4), clip(CLIPTextModelWithProjection, 4, 4), t5(8)],
    "flux": lambda: [clip(CLIPTextModel, 8, 8), t5(8)],
}


def build_with_text(name: str) -> DiffusionPipeline:
    """The tiny pipeline of this name, with what it needs to read a prompt."""
    torch.manual_seed(0)
    parts = dict(build(name).pipe.components)
    for suffix, (tokenizer, encoder) in zip(("", "_2", "_3"), ENCODERS[name](), strict=False):
        parts |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
    config = {key: value for key, value in build(name).pipe.config.items() if key == "requires_safety_checker"}
    return type(build(name).pipe)(**parts, **config)
