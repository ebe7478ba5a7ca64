"""
In place of what diffusers' own tests load from the Hub: tokenizers of letters, processors as their classes make them,
tiny encoders with weights of chance. Nothing else.
"""

import string
import tempfile

import torch
from diffusers import UNet2DModel
from diffusers.pipelines.kolors import ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    DPTImageProcessor,
    FeatureExtractionMixin,
    Gemma3Config,
    GlmImageImageProcessor,
    GlmImageProcessor,
    ImageProcessingMixin,
    LlamaConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
    T5Config,
    UMT5Config,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


MARKS = ("<s>", "<pad>", "</s>", "<unk>")
CHARACTERS = [*MARKS, *string.ascii_lowercase, *string.digits, *string.punctuation, " ", "\n"]
# What stands for images among the text, where the encoders' configs have it.
QWEN = {151652: "<|vision_start|>", 151653: "<|vision_end|>", 151655: "<|image_pad|>", 151656: "<|video_pad|>"}
GLM = {16384: "<|image_start|>", 167855: "<|image|>"}
CHAT = (
    "{% for each in messages %}{% if each['content'] is string %}{{ each['content'] }}{% else %}"
    "{% for part in each['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
TINY_T5 = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}
TINY = {
    "vocab_size": 1103,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
}
TINY_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
}
TINY_GEMMA = {**TINY, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
# By a part of the name that is asked for; the first that fits.
CONFIGS = {
    "umt5": (UMT5Config, TINY_T5),
    "t5": (T5Config, {**TINY_T5, "relative_attention_num_buckets": 8}),
    "bert": (BertConfig, TINY),
    "llama": (LlamaConfig, {**TINY, "hidden_size": 16}),
    "gemma3": (Gemma3Config, {"text_config": TINY_GEMMA, "vision_config": {**TINY, "num_hidden_layers": 1}}),
    "qwen2vl": (
        Qwen2VLConfig,
        {"text_config": TINY_QWEN, "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}},
    ),
    "qwen3vl": (
        Qwen3VLConfig,
        {
            "text_config": {**TINY_QWEN, "head_dim": 8},
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
    "siglipvision": (SiglipVisionConfig, {**TINY, "image_size": 30, "patch_size": 2}),
    "chatglm": (
        ChatGLMConfig,
        {
            "num_layers": 2,
            "padded_vocab_size": 1103,
            "hidden_size": 8,
            "ffn_hidden_size": 37,
            "kv_channels": 4,
            "num_attention_heads": 2,
            "add_qkv_bias": True,
            "original_rope": True,
        },
    ),
}


def tokenizer(
    name: str, marks: dict[int, str] | None = None, cls: type[PreTrainedTokenizerBase] = PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    """One token a letter, and one for each of `marks` at its place, whatever the tokenizer of that name does."""
    marks = marks or {}
    last = max(marks, default=-1)
    words = {i: f"<{i}>" for i in range(last)} | dict(enumerate(CHARACTERS)) | marks
    letters = Tokenizer(models.WordLevel({word: i for i, word in words.items()}, unk_token="<unk>"))
    letters.normalizer = normalizers.Lowercase()
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    ends = [(mark, letters.token_to_id(mark)) for mark in ("<s>", "</s>")]
    letters.decoder = decoders.Fuse()
    letters.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    # Some pipelines ask for the class.
    cls = cls if issubclass(cls, PreTrainedTokenizerFast) else PreTrainedTokenizerFast
    made = cls.__new__(cls)
    PreTrainedTokenizerFast.__init__(
        made,
        tokenizer_object=letters,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=77 if "clip" in name else 512,
        chat_template=CHAT,
        extra_special_tokens=[*marks.values()],
    )
    return made


def glm_tokenizer() -> ChatGLMTokenizer:
    """Kolors' own class, on a model of letters."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([string.printable]),
            model_prefix=f"{folder}/letters",
            model_type="char",
            vocab_size=80,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        return ChatGLMTokenizer(f"{folder}/letters.model")


def processor(name: str):
    """
    A processor of text and images.

    Raises:
        OSError: If there is none that fits the name.
    """
    words = tokenizer(name, QWEN if "Qwen" in name else GLM if "GLM" in name else None)
    if "Qwen3" in name:
        images, videos = Qwen2VLImageProcessor(patch_size=16), Qwen3VLVideoProcessor()
        return Qwen3VLProcessor(images, words, videos, chat_template=CHAT)
    if "Qwen" in name:
        return Qwen2VLProcessor(Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor(), chat_template=CHAT)
    if "Mistral" in name:
        return PixtralProcessor(PixtralImageProcessor(), words, chat_template=CHAT)
    if "GLM" in name:
        words.bos_token, words.image_token = "<|image_start|>", "<|image|>"
        words.grid_bos_token, words.grid_eos_token = "<", ">"
        return GlmImageProcessor(GlmImageImageProcessor(), words, chat_template=CHAT)
    raise _missing(name)


def config(name: str):
    """
    The config of a tiny encoder.

    Raises:
        OSError: If there is none that fits the name.
    """
    for part, (cls, entries) in CONFIGS.items():
        if part in name.lower():
            return cls(**entries)
    raise _missing(name)


def consistency_network(subfolder: str) -> UNet2DModel:
    """A tiny network of images, with classes or without."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        norm_num_groups=4,
        num_class_embeds=10 if "class" in subfolder else None,
    )


def glm_encoder(name: str) -> ChatGLMModel:
    """Kolors' own class leaves its weights to a file."""
    model = ChatGLMModel(config(name))
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    return model


def _missing(name: str) -> OSError:
    return OSError(f"'{name}' is on the Hub, and there is no stand-in for it.")


def install():
    """Have `from_pretrained` of transformers' and diffusers' classes give these from now on."""
    PreTrainedTokenizerBase.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: tokenizer(name, cls=cls))
    AutoTokenizer.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: tokenizer(name))
    ChatGLMTokenizer.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: glm_tokenizer())
    ProcessorMixin.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: processor(name))
    AutoProcessor.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: processor(name))
    ImageProcessingMixin.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: cls(**kwargs))
    DPTImageProcessor.from_pretrained = classmethod(lambda cls, name: cls(size={"height": 32, "width": 32}))
    FeatureExtractionMixin.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: cls(**kwargs))
    AutoConfig.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: config(name))
    PreTrainedModel.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: cls(config(name)))
    ChatGLMModel.from_pretrained = classmethod(lambda cls, name, *args, **kwargs: glm_encoder(name))
    UNet2DModel.from_pretrained = classmethod(lambda cls, name, subfolder: consistency_network(subfolder))
