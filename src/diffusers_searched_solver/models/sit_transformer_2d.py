"""The transformer of SiT and DiT, function for function that of the official code."""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .layers import Block, ClassEmbedder, FinalLayer, PatchEmbedder, TimeEmbedder, unpatchify


class SiTTransformer2DModel(ModelMixin, ConfigMixin):
    r"""
    Class-conditional diffusion transformer with adaptive layer norm, exact to the official SiT and DiT code.

    A patch of the latent is a token; time and class are added to one vector c that modulates every block,

        h <- h + g_1(c) * attention(norm(h) * (1 + s_1(c)) + b_1(c))
        h <- h + g_2(c) * mlp(norm(h) * (1 + s_2(c)) + b_2(c))

    where shift b, scale s and gate g are linear in silu(c). Parameters carry the official names, so an official state
    dict loads with `load_state_dict(..., strict=True)`; its fixed position table is kept as a buffer, because the
    released weights bring their own rounding of it.

    The stock `DiTTransformer2DModel` is not this function: its sinusoid has other frequencies, and it holds one copy
    of the time and class embedders per block.

    Args:
        sample_size (`int`, defaults to 32): Height and width of the latent. A multiple of `patch_size`.
        patch_size (`int`, defaults to 2): Height and width of a token.
        in_channels (`int`, defaults to 4): Channels of the latent.
        num_layers (`int`, defaults to 28): Number of blocks.
        num_attention_heads (`int`, defaults to 16): Heads of each attention.
        attention_head_dim (`int`, defaults to 72): Width of a head; the model's width is heads times this, and has
            to be a multiple of four.
        mlp_ratio (`float`, defaults to 4.0): Hidden width of the MLP over the model's width.
        num_classes (`int`, defaults to 1000): Number of classes. The id `num_classes` is the null class.
        learn_sigma (`bool`, defaults to `True`): Whether the network has twice `in_channels` outputs, as the released
            SiT-XL/2 and DiT-XL/2 do.
        prediction_type (`str`, defaults to `"flow_prediction"`): What the network predicts, and so what it is:
            `"flow_prediction"` for SiT, which returns the first `in_channels` outputs alone, or `"epsilon"` for DiT,
            which returns all of them, noise and then its learned variance.
        norm_eps (`float`, defaults to 1e-6): Added to the variance in the norms of the blocks.

    Raises:
        `ValueError`: If `sample_size` is not a multiple of `patch_size`, the width is not a multiple of four, or
            `prediction_type` is neither of the two.

    Source:
        Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers",
        arXiv 2401.08740; Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        prediction_type: str = "flow_prediction",
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        if sample_size % patch_size:
            raise ValueError(
                f"`sample_size` is {sample_size}, which is no multiple of `patch_size` {patch_size}. Tokens have to"
                " tile the latent: pass a multiple."
            )
        if width % 4:
            raise ValueError(
                f"`num_attention_heads` times `attention_head_dim` is {width}, which is no multiple of 4. The position"
                " table needs sine and cosine of both axes: choose other heads."
            )
        if prediction_type not in ("flow_prediction", "epsilon"):
            raise ValueError(
                f"`prediction_type` is {prediction_type!r}. Pass 'flow_prediction' for SiT, or 'epsilon' for DiT."
            )
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbedder(in_channels, patch_size, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = ClassEmbedder(num_classes, width)
        self.register_buffer("pos_embed", _position_table(sample_size // patch_size, width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                partial(nn.LayerNorm, width, elementwise_affine=False, eps=norm_eps),
                _Attention(width, num_attention_heads),
                _Mlp(width, int(width * mlp_ratio)),
            )
            for _ in range(num_layers)
        )
        self.final_layer = FinalLayer(width, patch_size * patch_size * self.out_channels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        Predict at the state x and time t.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, sample_size, sample_size)`): The state x.
            timestep (`torch.Tensor` of shape `(batch,)`): The time the network was trained with: for SiT 0 (noise) to
                1 (data), for DiT 0 (data) to 999 (noise).
            class_labels (`torch.LongTensor` of shape `(batch,)`): Class ids, 0 to `num_classes` inclusive.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            `Transformer2DModelOutput` with `sample` of shape `(batch, channels, sample_size, sample_size)`, or a tuple
            with that tensor alone. SiT predicts data - noise, DiT noise (and, with `learn_sigma`, its variance).

        Raises:
            `ValueError`: If the latent is not `sample_size` wide and high.
        """
        size, patch = self.config.sample_size, self.config.patch_size
        if tuple(hidden_states.shape[-2:]) != (size, size):
            raise ValueError(
                f"`hidden_states` is {tuple(hidden_states.shape[-2:])} high and wide, expected {(size, size)}. The"
                f" position table was made for `sample_size` {size}: pass latents of that size."
            )
        h = self.x_embedder(hidden_states).flatten(1, 2) + self.pos_embed
        c = (self.t_embedder(timestep, hidden_states.dtype) + self.y_embedder(class_labels))[:, None]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, c)
            else:
                h = block(h, c)
        patches = self.final_layer(h, c).unflatten(1, (size // patch, size // patch))
        sample = unpatchify(patches, patch)
        if self.config.prediction_type == "flow_prediction":
            sample = sample[:, : self.config.in_channels]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


def _position_table(rows: int, width: int) -> torch.Tensor:
    """Return [sin(j f), cos(j f), sin(i f), cos(i f)] at row i, column j, with f_k = 10000^(-4k/width)."""
    k = torch.arange(width // 4, dtype=torch.float64)
    angles = torch.arange(rows, dtype=torch.float64)[:, None] * 10000.0 ** (-4 * k / width)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    across, down = waves.repeat(rows, 1), waves.repeat_interleave(rows, dim=0)
    return torch.cat([across, down], dim=-1)[None].float()
