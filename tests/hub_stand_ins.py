"""In place of what diffusers' own tests load from the Hub: tokenizers of letters, tiny text encoders. Nothing else."""

import string

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    UMT5Config,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


MARKS = ("<s>", "<pad>", "</s>", "<unk>")
CHARACTERS = [*MARKS, *string.ascii_lowercase, *string.digits, *string.punctuation, " "]
TINY_T5 = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}
TINY = {
    "vocab_size": 1103,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}
# By a part of the name that is asked for; the first that fits.
CONFIGS = {
    "umt5": (UMT5Config, TINY_T5),
    "t5": (T5Config, {**TINY_T5, "relative_attention_num_buckets": 8}),
    "bert": (BertConfig, {**TINY, "num_attention_heads": 4}),
    "llama": (LlamaConfig, {**TINY, "num_attention_heads": 4}),
}


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One token a letter, whatever the tokenizer of that name does."""
    letters = Tokenizer(models.WordLevel({each: i for i, each in enumerate(CHARACTERS)}, unk_token="<unk>"))
    letters.normalizer = normalizers.Lowercase()
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    marks = [(mark, CHARACTERS.index(mark)) for mark in ("<s>", "</s>")]
    letters.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=77 if "clip" in name else 512,
        chat_template="{% for each in messages %}{{ each['content'] }}{% endfor %}",
    )


def config(name: str):
    """
    The config of a tiny text encoder.

    Raises:
        OSError: If there is none that fits the name.
    """
    for part, (cls, entries) in CONFIGS.items():
        if part in name.lower():
            return cls(**entries)
    raise OSError(f"'{name}' is on the Hub, and there is no stand-in for it.")


def install():
    """Have transformers' `from_pretrained` give these from now on."""
    PreTrainedTokenizerBase.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: tokenizer(name))
    AutoTokenizer.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: tokenizer(name))
    AutoConfig.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: config(name))
    PreTrainedModel.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: cls(config(name)))
