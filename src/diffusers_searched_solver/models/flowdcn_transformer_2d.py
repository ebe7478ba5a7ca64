"""The network of FlowDCN, function for function that of the official code."""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import RMSNorm
from torch import nn

from .deformable_convolution import deformable_convolution
from .layers import Block, ClassEmbedder, FinalLayer, PatchEmbedder, TimeEmbedder, unpatchify


class FlowDCNTransformer2DModel(ModelMixin, ConfigMixin):
    r"""
    Class-conditional flow network with deformable convolutions instead of attention, exact to the official FlowDCN.

    Blocks are those of [`SiTTransformer2DModel`] with other parts: RMS norms, a SwiGLU, and for the mixing of tokens
    K samples of each group's map per token, at offsets and with weights that are linear in the token,

        offset_k = (direction_k + prior_k) * sigmoid(scale_k) * max_scale

    where the prior is a square grid over -1 to 1. There is no table of positions, so latents of any size and aspect
    ratio will do. Parameters carry the official names and are registered in the official order, so an official state
    dict loads with `load_state_dict(..., strict=True)`, and a list of averaged weights fits `parameters()`.

    For latents larger than the network was trained with, `block.attn.max_scale` of some blocks may be set to another
    number, or to a tensor of two, across and down.

    Args:
        sample_size (`int`, defaults to 32): Height and width of the latents that a pipeline makes by default.
        patch_size (`int`, defaults to 2): Height and width of a token.
        in_channels (`int`, defaults to 4): Channels of the latent.
        num_layers (`int`, defaults to 28): Number of blocks.
        num_groups (`int`, defaults to 16): Groups of channels that sample at positions of their own.
        hidden_size (`int`, defaults to 1152): Width of the model. A multiple of `num_groups`.
        kernel_size (`int`, defaults to 3): Samples along a side of the grid, so K is its square.
        mlp_ratio (`float`, defaults to 4.0): The hidden width of the SwiGLU is two thirds of this times the model's.
        num_classes (`int`, defaults to 1000): Number of classes. The id `num_classes` is the null class.
        learn_sigma (`bool`, defaults to `True`): Whether the network has twice `in_channels` outputs, of which the
            second half is dropped, as all released ones do.
        max_scale (`float`, defaults to 6.0): How far the grid reaches at most, in tokens.

    Raises:
        `ValueError`: If `hidden_size` is not a multiple of `num_groups`.

    Source:
        Wang et al., "Exploring DCN-like Architecture for Fast Image Generation with Arbitrary Resolution", NeurIPS
        2024, arXiv 2410.22655.
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
        num_groups: int = 16,
        hidden_size: int = 1152,
        kernel_size: int = 3,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        max_scale: float = 6.0,
    ):
        super().__init__()
        if hidden_size % num_groups:
            raise ValueError(
                f"`hidden_size` is {hidden_size}, which is no multiple of `num_groups` {num_groups}. Groups have to be"
                " of equal width: pass a multiple."
            )
        self.gradient_checkpointing = False

        out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbedder(in_channels, patch_size, hidden_size)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = ClassEmbedder(num_classes, hidden_size)
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * out_channels)
        self.blocks = nn.ModuleList(
            Block(
                hidden_size,
                partial(RMSNorm, hidden_size, 1e-6),
                _MultiScaleDeformableConvolution(hidden_size, num_groups, kernel_size, max_scale),
                _SwiGLU(hidden_size, int(2 * mlp_ratio * hidden_size / 3)),
            )
            for _ in range(num_layers)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        r"""
        Predict data - noise at the state x and time t.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, in_channels, height, width)`): The state x. Height and
                width are multiples of `patch_size`.
            timestep (`torch.Tensor` of shape `(batch,)`): The time t, 0 (noise) to 1 (data).
            class_labels (`torch.LongTensor` of shape `(batch,)`): Class ids, 0 to `num_classes` inclusive.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.

        Returns:
            `Transformer2DModelOutput` with `sample` of the shape of `hidden_states`, or a tuple with that tensor
            alone.

        Raises:
            `ValueError`: If patches do not tile the latent.
        """
        patch, size = self.config.patch_size, tuple(hidden_states.shape[-2:])
        if size[0] % patch or size[1] % patch:
            raise ValueError(
                f"`hidden_states` is {size} high and wide, expected multiples of `patch_size` {patch}. Tokens have to"
                " tile the latent: pad or crop it."
            )
        h = self.x_embedder(hidden_states)
        c = (self.t_embedder(timestep, hidden_states.dtype) + self.y_embedder(class_labels))[:, None, None]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(block, h, c)
            else:
                h = block(h, c)
        sample = unpatchify(self.final_layer(h, c), patch)[:, : self.config.in_channels]
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class _MultiScaleDeformableConvolution(nn.Module):
    def __init__(self, width: int, groups: int, kernel_size: int, max_scale: float):
        super().__init__()
        samples = kernel_size * kernel_size
        self.groups, self.max_scale = groups, max_scale
        side = torch.linspace(-1, 1, kernel_size)
        prior = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)
        self.deformables_prior = nn.Parameter(prior.view(1, 1, 1, 1, samples, 2), requires_grad=False)
        # A new group g reaches (g + 1) / groups of `max_scale`; the sigmoid cannot reach one.
        reach = torch.arange(1, groups + 1) / groups - 1e-4
        self.deformables_scale = nn.Parameter(reach.logit().view(1, 1, 1, groups, 1, 1))
        self.v = nn.Linear(width, width)
        self.qk_deformables = nn.Linear(width, groups * samples * 2)
        self.qk_scales = nn.Linear(width, groups * samples, bias=False)
        self.qk_weights = nn.Linear(width, groups * samples)
        self.out = nn.Linear(width, width)
        # So that a new network samples on its grid alone, wherever it looks.
        for parameter in (*self.qk_deformables.parameters(), self.qk_scales.weight, self.qk_weights.weight):
            nn.init.zeros_(parameter)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        # Not in half precision, whatever that of the layers: bfloat16 numbers around 6 tokens are 1/32 token apart.
        dtype = torch.promote_types(h.dtype, torch.float32)
        direction = self.qk_deformables(h).to(dtype).unflatten(-1, (self.groups, -1, 2)) + self.deformables_prior
        scale = self.qk_scales(h).to(dtype).unflatten(-1, (self.groups, -1, 1)) + self.deformables_scale
        offsets = direction * scale.sigmoid() * self.max_scale
        weights = self.qk_weights(h).unflatten(-1, (self.groups, -1))
        values = self.v(h).unflatten(-1, (self.groups, -1))
        return self.out(deformable_convolution(values, offsets, weights).flatten(-2))


class _SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(h)) * self.w3(h))
